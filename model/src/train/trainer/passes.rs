//! Passes over rows: the loss of a batch, and its gradient; on the processor or a GPU.
//!
//! Knows no steps. Invariant: the gradient of a batch is the sum of its passes'.

use super::Trainer;
use crate::error::ModelError;
#[cfg(test)]
use crate::lora::LoraAdapter;
use crate::profile::in_pool;
use crate::train::activated::Activated;
#[cfg(test)]
use crate::train::config::TrainConfig;
use crate::train::frozen::Frozen;
use crate::train::head::{self, HeadRoom, LossSum};
use crate::train::hooks::EvalStats;
use crate::train::linear::Dropout;
use crate::train::network::Network;
#[cfg(feature = "cuda")]
use crate::train::on_gpu::OnGpu;
use crate::train::order::mix;
use crate::train::pack::Pack;
use crate::train::params::Layout;
use crate::train::past::Stretch;
use crate::train::rope::Rope;
use crate::train::row::TrainRow;
use crate::train::tape::{Keep, Tape};
#[cfg(test)]
use crate::weights::LlamaWeights;

/// What steps share, and the room that they reuse.
pub(super) struct Workspace<'f> {
    frozen: &'f Frozen<'f>,
    ropes: Vec<Rope>,
    tape: Tape,
    head: HeadRoom,
    pub(super) grads: Vec<f32>,
    activated: Option<Activated>,
    #[cfg(feature = "cuda")]
    on_gpu: Option<OnGpu>,
}

impl Trainer<'_> {
    /// Room for passes over `rows`, and what they have in common.
    pub(super) fn workspace<'f, 'r>(
        &self,
        frozen: &'f Frozen<'f>,
        rows: impl Iterator<Item = &'r TrainRow> + Clone,
        grads: usize,
    ) -> Result<Workspace<'f>, ModelError> {
        let model = &self.weights.config;
        let longest = rows.clone().map(TrainRow::len).max().unwrap_or(0);
        let invocation = self.lora.invocation_tokens.as_deref();
        let mut work = Workspace {
            frozen,
            ropes: Rope::tables(model, longest),
            tape: Tape::default(),
            head: HeadRoom::default(),
            grads: vec![0.0; grads],
            activated: invocation.map(|tokens| Activated::new(tokens, model, rows.clone())),
            #[cfg(feature = "cuda")]
            on_gpu: None,
        };
        #[cfg(feature = "cuda")]
        if let Some(model) = &self.on_gpu {
            work.on_gpu = Some(OnGpu::new(model, &work.ropes, self.layout.len)?);
        }
        if let (Some(mut activated), Some(row)) = (work.activated.take(), rows.clone().next()) {
            let layout = activated.layout.clone();
            let plain = &mut work;
            in_pool(|| {
                activated.compute_shared(&mut |pack| self.plain(plain, &layout, pack), row)
            })?;
            work.activated = Some(activated);
        }
        Ok(work)
    }

    /// Computes a pack with the base model alone, whose layout is `layout`.
    fn plain(
        &self,
        work: &mut Workspace<'_>,
        layout: &Layout,
        pack: &Pack,
    ) -> Result<Stretch, ModelError> {
        #[cfg(feature = "cuda")]
        if let Some(on_gpu) = &mut work.on_gpu {
            return on_gpu.stretch(layout, pack);
        }
        let mut stretch = Stretch::new(pack.tokens.len());
        let mut tape = std::mem::take(&mut work.tape);
        let network = Network {
            layout,
            ..self.network(work, None)
        };
        network.forward_only(&[], pack, &mut tape, Some(&mut stretch));
        work.tape = tape;
        Ok(stretch)
    }

    /// The rows of a batch as passes; also the number of tokens that they compute.
    fn packs(
        &self,
        work: &mut Workspace<'_>,
        rows: &[&TrainRow],
    ) -> Result<(Vec<Pack>, usize), ModelError> {
        let most = self.config.max_tokens;
        let count = |packs: &[Pack]| packs.iter().map(|pack| pack.tokens.len()).sum::<usize>();
        // Taken out of the workspace, which computes for it.
        let (packs, plain) = match work.activated.take() {
            None => (Pack::split(rows, self.config.share_prefix, most), 0),
            Some(activated) => {
                let layout = &activated.layout;
                let packs = activated.packs(&mut |pack| self.plain(work, layout, pack), rows, most);
                work.activated = Some(activated);
                packs?
            }
        };
        let tokens = count(&packs) + plain;
        Ok((packs, tokens))
    }

    fn network<'b>(&'b self, work: &'b Workspace<'_>, dropout: Option<Dropout>) -> Network<'b> {
        Network {
            frozen: work.frozen,
            layout: &self.layout,
            ropes: &work.ropes,
            scale: self.lora.scale() as f32,
            dropout,
        }
    }

    /// Leaves the gradient of the batch's mean loss in `work.grads`; also the number of tokens
    /// computed.
    pub(super) fn gradients(
        &self,
        work: &mut Workspace<'_>,
        rows: &[&TrainRow],
    ) -> Result<(LossSum, usize), ModelError> {
        work.grads.fill(0.0);
        let targets: usize = rows.iter().map(|row| row.target.len()).sum();
        let weight = 1.0 / targets as f32;
        let (packs, tokens) = self.packs(work, rows)?;
        let mut sum = LossSum::default();
        #[cfg(feature = "cuda")]
        if let Some(on_gpu) = &mut work.on_gpu {
            on_gpu.begin(&self.state.params)?;
        }
        for (index, pack) in packs.iter().enumerate() {
            let place = mix(self.state.step as u64) ^ mix(index as u64 + 1);
            let dropout = (self.lora.dropout > 0.0).then_some(Dropout {
                share: self.lora.dropout,
                key: mix(self.config.seed ^ place),
            });
            // Only a row that alone is longer than it may be makes such a pass.
            let keep = match pack.tokens.len() > self.config.max_tokens {
                true => Keep::Inputs,
                false => Keep::Everything,
            };
            #[cfg(feature = "cuda")]
            if let Some(on_gpu) = &mut work.on_gpu {
                let scale = self.lora.scale() as f32;
                sum.add(on_gpu.gradients(&self.layout, scale, dropout, keep, pack, weight)?);
                continue;
            }
            // Taken out of the workspace, so that the network may borrow the rest of it.
            let (mut tape, mut room) = (
                std::mem::take(&mut work.tape),
                std::mem::take(&mut work.head),
            );
            let mut grads = std::mem::take(&mut work.grads);
            let network = self.network(work, dropout);
            network.forward(&self.state.params, pack, &mut tape, keep);
            let (out, dx) = (&tape.out, &mut tape.dx);
            let frozen = work.frozen;
            sum.add(head::loss(
                frozen,
                &mut room,
                out,
                &pack.targets,
                weight,
                Some(dx),
            ));
            network.backward(&self.state.params, &mut grads, pack, &mut tape);
            (work.tape, work.head, work.grads) = (tape, room, grads);
        }
        #[cfg(feature = "cuda")]
        if let Some(on_gpu) = &work.on_gpu {
            work.grads = on_gpu.gathered()?;
        }
        Ok((sum, tokens))
    }

    pub(super) fn measure(
        &self,
        work: &mut Workspace<'_>,
        rows: &[TrainRow],
    ) -> Result<EvalStats, ModelError> {
        let mut sum = LossSum::default();
        #[cfg(feature = "cuda")]
        if let Some(on_gpu) = &mut work.on_gpu {
            on_gpu.begin(&self.state.params)?;
        }
        for batch in rows.chunks(self.config.batch_size) {
            let batch: Vec<&TrainRow> = batch.iter().collect();
            for pack in self.packs(work, &batch)?.0 {
                #[cfg(feature = "cuda")]
                if let Some(on_gpu) = &mut work.on_gpu {
                    let scale = self.lora.scale() as f32;
                    sum.add(on_gpu.loss(&self.layout, scale, &pack)?);
                    continue;
                }
                let (mut tape, mut room) = (
                    std::mem::take(&mut work.tape),
                    std::mem::take(&mut work.head),
                );
                self.network(work, None)
                    .forward_only(&self.state.params, &pack, &mut tape, None);
                sum.add(head::loss(
                    work.frozen,
                    &mut room,
                    &tape.out,
                    &pack.targets,
                    0.0,
                    None,
                ));
                (work.tape, work.head) = (tape, room);
            }
        }
        let tokens = sum.tokens.max(1) as f64;
        Ok(EvalStats {
            loss: sum.loss / tokens,
            token_accuracy: sum.right as f64 / tokens,
        })
    }
}

/// Mean loss of `adapter` on `rows` and its gradients, shaped as the adapter.
#[cfg(test)]
pub(crate) fn gradients(
    weights: &LlamaWeights,
    adapter: &LoraAdapter,
    rows: &[TrainRow],
) -> (f64, LoraAdapter) {
    let lora = adapter.config.clone();
    let trainer = Trainer::new(weights, lora, TrainConfig::default(), rows);
    trainer.expect("rows that fit").gradients_of(adapter, rows)
}

#[cfg(test)]
impl Trainer<'_> {
    /// The same with the settings and on the device of a training.
    pub(crate) fn gradients_of(
        mut self,
        adapter: &LoraAdapter,
        rows: &[TrainRow],
    ) -> (f64, LoraAdapter) {
        let trainer = &mut self;
        trainer.state.params = trainer.layout.flatten(adapter).expect("it fits");
        let frozen = Frozen::new(trainer.weights).expect("dense weights");
        let work = trainer.workspace(&frozen, rows.iter(), trainer.layout.len);
        let mut work = work.expect("room");
        let batch: Vec<&TrainRow> = rows.iter().collect();
        let (sum, _) = in_pool(|| trainer.gradients(&mut work, &batch)).expect("no device");
        let grads = trainer
            .layout
            .adapter(&work.grads, &trainer.lora)
            .expect("it fits");
        (sum.loss / sum.tokens as f64, grads)
    }
}
