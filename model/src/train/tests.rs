//! The training as a whole, on tiny random models.
#![allow(clippy::unwrap_used)]

use std::cell::{Cell, RefCell};

use super::budget::Budget;
use super::frozen::Frozen;
use super::head::{self, HeadRoom};
use super::linear::Dropout;
use super::network::Network;
use super::pack::{self, Pack};
use super::params::Layout;
use super::rope::Rope;
use super::tape::{Keep, Tape};
use super::tiny;
use super::{Hooks, TrainConfig, TrainRow, Trainer, TrainerState};
use crate::architecture;
use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::lora::{LoraAdapter, LoraConfig, Module};
use crate::weights::LlamaWeights;

fn lora() -> LoraConfig {
    LoraConfig {
        rank: 3,
        alpha: 6.0,
        ..LoraConfig::default()
    }
}

/// Mean loss and, where wanted, gradients of `params` over `packs`.
struct Probe<'a> {
    weights: &'a LlamaWeights,
    layout: Layout,
    scale: f32,
    dropout: Option<Dropout>,
    keep: Keep,
    packs: Vec<Pack>,
}

impl<'a> Probe<'a> {
    fn new(weights: &'a LlamaWeights, lora: &LoraConfig, packs: Vec<Pack>) -> Self {
        Self {
            weights,
            layout: Layout::new(lora, &weights.config).unwrap(),
            scale: lora.scale() as f32,
            dropout: None,
            keep: Keep::Everything,
            packs,
        }
    }

    fn run(&self, params: &[f32], mut grads: Option<&mut [f32]>) -> f64 {
        let frozen = Frozen::new(self.weights).unwrap();
        let ropes = Rope::tables(&self.weights.config, 64);
        let network = Network {
            frozen: &frozen,
            layout: &self.layout,
            ropes: &ropes,
            scale: self.scale,
            dropout: self.dropout,
        };
        let targets: usize = self.packs.iter().map(|pack| pack.targets.len()).sum();
        let (mut tape, mut room, mut loss) = (Tape::default(), HeadRoom::default(), 0.0);
        for pack in &self.packs {
            network.forward(params, pack, &mut tape, self.keep);
            let (out, dx) = (&tape.out, &mut tape.dx);
            let weight = 1.0 / targets as f32;
            let dx = Some(&mut dx[..]);
            loss += head::loss(&frozen, &mut room, out, &pack.targets, weight, dx).loss;
            if let Some(grads) = grads.as_deref_mut() {
                network.backward(params, grads, pack, &mut tape);
            }
        }
        loss / targets as f64
    }

    fn gradient(&self, params: &[f32]) -> (f64, Vec<f32>) {
        let mut grads = vec![0.0; params.len()];
        let loss = self.run(params, Some(&mut grads));
        (loss, grads)
    }

    /// Compares the gradient of every factor with finite differences along the gradient itself
    /// and along another direction.
    fn check_gradient(&self, params: &[f32]) {
        let (_, grads) = self.gradient(params);
        for (layer, a, b, module) in self.layout.pairs() {
            for (factor, range) in [("a", a), ("b", b)] {
                let grad = &grads[range.clone()];
                let norm = grad.iter().map(|g| g * g).sum::<f32>().sqrt();
                let place = format!("layer {layer} {} {factor}", module.name());
                assert!(norm > 1e-4, "{place} has no gradient");
                let along: Vec<f32> = grad.iter().map(|g| g / norm).collect();
                let other: Vec<f32> = (0..grad.len())
                    .map(|i| along[i] * if i % 3 == 0 { -0.5 } else { 1.0 })
                    .collect();
                for direction in [along, other] {
                    let moved = |by: f32| {
                        let mut params = params.to_vec();
                        let values = params[range.clone()].iter_mut().zip(&direction);
                        values.for_each(|(p, d)| *p += by * d);
                        self.run(&params, None)
                    };
                    let slope = |by: f32| (moved(by) - moved(-by)) / f64::from(2.0 * by);
                    // Richardson's extrapolation, since a step small enough for the curvature
                    // drowns in f32's rounding.
                    let want = (4.0 * slope(1e-2) - slope(2e-2)) / 3.0;
                    let got: f32 = grad.iter().zip(&direction).map(|(g, d)| g * d).sum();
                    let off = (f64::from(got) - want).abs();
                    assert!(off < 1e-3 + 0.01 * want.abs(), "{place}: {got}, not {want}");
                }
            }
        }
    }
}

fn pack(rows: &[TrainRow], share_prefix: bool) -> Pack {
    Pack::new(&rows.iter().collect::<Vec<_>>(), share_prefix)
}

fn close(a: &[f32], b: &[f32]) {
    let size = a.iter().fold(0f32, |m, v| m.max(v.abs()));
    for (a, b) in a.iter().zip(b) {
        assert!((a - b).abs() < 1e-5 * (1.0 + size), "{a} is not {b}");
    }
}

#[test]
fn gradients_equal_finite_differences() {
    let rows = tiny::rows(4, 2);
    for architecture in architecture::ALL {
        let weights = tiny::weights_of(architecture, 1);
        for share_prefix in [false, true] {
            let probe = Probe::new(&weights, &lora(), vec![pack(&rows, share_prefix)]);
            let start = tiny::adapter(&lora(), &weights.config, 3);
            probe.check_gradient(&probe.layout.flatten(&start).unwrap());
        }
    }
}

#[test]
fn gradients_with_dropout_equal_finite_differences() {
    let (weights, rows) = (tiny::weights(4), tiny::rows(3, 5));
    let mut probe = Probe::new(&weights, &lora(), vec![pack(&rows, true)]);
    let start = tiny::adapter(&lora(), &weights.config, 6);
    let params = probe.layout.flatten(&start).unwrap();
    let without = probe.run(&params, None);
    probe.dropout = Some(Dropout { share: 0.3, key: 7 });
    assert_ne!(without, probe.run(&params, None));
    probe.check_gradient(&params);
}

#[test]
fn every_subset_of_modules_gets_its_gradient() {
    let (weights, rows) = (tiny::weights(1), tiny::rows(3, 2));
    for names in [
        &["k_proj", "down_proj"][..],
        &["q_proj", "v_proj"],
        &["up_proj"],
    ] {
        let lora = LoraConfig {
            target_modules: names.iter().map(|n| (*n).to_owned()).collect(),
            ..lora()
        };
        let probe = Probe::new(&weights, &lora, vec![pack(&rows, true)]);
        let start = tiny::adapter(&lora, &weights.config, 3);
        probe.check_gradient(&probe.layout.flatten(&start).unwrap());
    }
}

/// A conversation with two answers is its two rows with one answer each.
#[test]
#[allow(clippy::single_range_in_vec_init)]
fn earlier_answers_have_the_gradients_of_rows_of_their_own() {
    let weights = tiny::weights(8);
    let row = |prompt: &[u32], target: &[u32], earlier| TrainRow {
        prompt: prompt.to_vec(),
        target: target.to_vec(),
        earlier,
    };
    let start = [1, 2, 3, 4, 5];
    let chats: Vec<[TrainRow; 3]> = [[9, 10, 11], [12, 13, 14]]
        .map(|[question, answer, more]| {
            let first = [&start[..], &[question, 7]].concat();
            let said = [&first[..], &[answer, 0, more, 7]].concat();
            let answers = vec![first.len()..first.len() + 2];
            [
                row(&said, &[more, 8, 0], answers),
                row(&first, &[answer, 0], Vec::new()),
                row(&said, &[more, 8, 0], Vec::new()),
            ]
        })
        .into();
    let gradient = |rows: Vec<&TrainRow>, share_prefix| {
        let pack = Pack::new(&rows, share_prefix);
        let probe = Probe::new(&weights, &lora(), vec![pack]);
        let start = tiny::adapter(&lora(), &weights.config, 3);
        probe.gradient(&probe.layout.flatten(&start).unwrap())
    };
    let apart = chats.iter().flat_map(|rows| &rows[1..]).collect();
    let (loss, grads) = gradient(apart, false);
    for share_prefix in [false, true] {
        let whole = chats.iter().map(|rows| &rows[0]).collect();
        let (other, others) = gradient(whole, share_prefix);
        assert!((loss - other).abs() < 1e-5, "{loss} is not {other}");
        close(&grads, &others);
    }
    let rows: Vec<TrainRow> = chats.iter().map(|rows| rows[0].clone()).collect();
    let error = Trainer::new(&weights, activated(), config(), &rows).err();
    let error = error.unwrap().to_string();
    assert!(error.contains("the last answer of a row alone"), "{error}");
}

#[test]
fn a_shared_prefix_and_split_passes_change_nothing() {
    let (weights, rows) = (tiny::weights(8), tiny::rows(6, 9));
    let refs: Vec<&TrainRow> = rows.iter().collect();
    let gradient = |packs| {
        let probe = Probe::new(&weights, &lora(), packs);
        let start = tiny::adapter(&lora(), &weights.config, 3);
        probe.gradient(&probe.layout.flatten(&start).unwrap())
    };
    let (loss, grads) = gradient(vec![Pack::new(&refs, false)]);
    for (share_prefix, whole, inputs) in [
        (true, 1000, 1000),
        (false, 20, 20),
        (true, 20, 20),
        (true, 1, 1000),
    ] {
        let past = inputs;
        let budget = Budget {
            whole,
            inputs,
            past,
        };
        let groups = pack::groups(&refs, share_prefix, &budget);
        let packs = groups.iter().map(|rows| Pack::new(rows, share_prefix));
        let packs: Vec<Pack> = packs.collect();
        assert_eq!(packs.len() > 1, inputs == 20);
        let (other, others) = gradient(packs);
        assert!((loss - other).abs() < 1e-5, "{loss} is not {other}");
        close(&grads, &others);
    }
}

#[test]
fn computing_activations_again_changes_no_bit() {
    let rows = tiny::rows(6, 9);
    for architecture in architecture::ALL {
        let weights = tiny::weights_of(architecture, 8);
        let mut probe = Probe::new(&weights, &lora(), vec![pack(&rows, true)]);
        probe.dropout = Some(Dropout { share: 0.2, key: 3 });
        let start = tiny::adapter(&lora(), &weights.config, 3);
        let params = probe.layout.flatten(&start).unwrap();
        let whole = probe.gradient(&params);
        probe.keep = Keep::Inputs;
        assert_eq!(probe.gradient(&params), whole);
    }
}

#[test]
fn a_row_longer_than_a_pass_may_be_is_trained_all_the_same() {
    let (weights, rows) = (tiny::weights(1), tiny::rows(12, 2));
    let train = |max_tokens, batch_size| {
        let config = TrainConfig {
            max_tokens,
            batch_size,
            epochs: 2,
            ..config()
        };
        train(&weights, &config, &rows).1
    };
    close(&train(1000, 1), &train(1, 1));
}

/// However a batch is cut, what is kept of it, and in which pieces what comes before an invocation
/// is computed: the gradients are those of one pass.
#[test]
fn gradients_hang_neither_on_the_room_nor_on_the_pieces() {
    let rows = tiny::rows(12, 2);
    for architecture in architecture::ALL {
        let weights = tiny::weights_of(architecture, 1);
        for lora in [lora(), activated()] {
            let adapter = tiny::adapter(&lora, &weights.config, 3);
            let gradients = |max_tokens, share_prefix| {
                let config = TrainConfig {
                    max_tokens,
                    share_prefix,
                    ..config()
                };
                let trainer = Trainer::new(&weights, lora.clone(), config, &rows).unwrap();
                trainer.gradients_of(&adapter, &rows)
            };
            let (loss, wanted) = gradients(1000, false);
            for max_tokens in [1, 7, 12, 20, 40, 1000] {
                let (other, got) = gradients(max_tokens, true);
                let name = architecture.gguf;
                assert!((loss - other).abs() < 1e-5, "{name} {max_tokens}: {other}");
                for (layer, pairs) in wanted.layers.iter().enumerate() {
                    for (module, pair) in pairs {
                        let other = &got.layers[layer][module];
                        for (a, b) in [(&pair.a, &other.a), (&pair.b, &other.b)] {
                            let values = |factor: &candle_core::Tensor| {
                                factor.flatten_all().unwrap().to_vec1::<f32>().unwrap()
                            };
                            close(&values(a), &values(b));
                        }
                    }
                }
            }
        }
    }
}

/// A start that leaves no room beside it is computed once for a batch, not once for each row.
#[test]
fn a_long_common_start_is_computed_once_for_a_batch() {
    let weights = tiny::weights(1);
    let start: Vec<u32> = (0..50).map(|at| at % 8).collect();
    let mut rows = tiny::rows(8, 2);
    for row in &mut rows {
        row.prompt = [start.as_slice(), row.prompt.as_slice()].concat();
        row.prompt.truncate(58);
        row.target.truncate(2);
    }
    let own: usize = rows.iter().map(|row| row.len() - 56).sum();
    let config = TrainConfig {
        epochs: 1,
        // The start and a row or two, if everything is kept.
        max_tokens: 62,
        ..config()
    };
    let tokens = Cell::new(0);
    let hooks = Hooks::default().on_step(|stats| tokens.set(stats.tokens));
    let mut trainer = Trainer::new(&weights, lora(), config, &rows).unwrap();
    trainer.run(hooks).unwrap();
    assert_eq!(tokens.get(), 56 + own);
}

/// The loss again, computed with plain candle operations and no code of this module.
#[test]
fn the_loss_equals_a_plain_implementation() {
    let rows = tiny::rows(3, 2);
    for architecture in architecture::ALL {
        let weights = tiny::weights_of(architecture, 1);
        let adapter = tiny::adapter(&lora(), &weights.config, 3);
        let probe = Probe::new(&weights, &lora(), vec![pack(&rows, true)]);
        let got = probe.run(&probe.layout.flatten(&adapter).unwrap(), None);
        let (mut sum, mut count) = (0.0, 0);
        for row in &rows {
            let loss = super::reference::losses(&weights, &adapter, row).unwrap();
            count += loss.len();
            sum += loss.iter().sum::<f64>();
        }
        let wanted = sum / count as f64;
        let name = architecture.gguf;
        assert!((got - wanted).abs() < 1e-5, "{name}: {got} is not {wanted}");
    }
}

fn config() -> TrainConfig {
    TrainConfig {
        epochs: 6,
        learning_rate: 2e-2,
        seed: 11,
        ..TrainConfig::default()
    }
}

fn train(
    weights: &LlamaWeights,
    config: &TrainConfig,
    rows: &[TrainRow],
) -> (LoraAdapter, Vec<f32>) {
    let mut trainer = Trainer::new(weights, lora(), config.clone(), rows).unwrap();
    let outcome = trainer.run(Hooks::default()).unwrap();
    (outcome.adapter, outcome.losses)
}

#[test]
fn a_toy_task_is_learnt_and_every_factor_moves() {
    let (weights, rows, unseen) = (tiny::weights(1), tiny::rows(60, 2), tiny::rows(20, 3));
    let steps = RefCell::new(Vec::new());
    let epochs = RefCell::new(Vec::new());
    let mut trainer = Trainer::new(&weights, lora(), config(), &rows)
        .unwrap()
        .validate_on(&unseen)
        .unwrap();
    let before = trainer.evaluate(&unseen).unwrap();
    let hooks = Hooks::default()
        .on_step(|stats| steps.borrow_mut().push(*stats))
        .on_epoch(|stats, _| {
            epochs.borrow_mut().push(*stats);
            Ok(())
        });
    let outcome = trainer.run(hooks).unwrap();
    let (steps, epochs) = (steps.into_inner(), epochs.into_inner());
    assert_eq!((steps.len(), epochs.len()), (6 * 8, 6));
    assert_eq!(
        (steps[47].step, steps[47].steps, steps[47].epoch),
        (48, 48, 6)
    );
    assert_eq!((epochs[5].epoch, epochs[5].step), (6, 48));
    let after = epochs[5].validation.unwrap();
    assert!(after.loss < 0.5 * before.loss, "{before:?} {after:?}");
    assert!(after.token_accuracy > 0.8, "{after:?}");
    assert_eq!(trainer.evaluate(&unseen).unwrap(), after);

    let start = LoraAdapter::init(&lora(), &weights.config, 11).unwrap();
    for (from, to) in start.layers.iter().zip(&outcome.adapter.layers) {
        for module in Module::ALL {
            let (from, to) = (&from[module.name()], &to[module.name()]);
            for (from, to) in [(&from.a, &to.a), (&from.b, &to.b)] {
                let moved = (from - to).unwrap().abs().unwrap();
                let moved = moved.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                assert!(moved.iter().all(|m| *m > 0.0), "{module:?} stood still");
            }
        }
    }
}

#[test]
fn equal_seeds_give_equal_bytes_with_any_number_of_threads() {
    let (weights, rows) = (tiny::weights(1), tiny::rows(20, 2));
    let bytes = |seed, threads| {
        let config = TrainConfig { seed, ..config() };
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        let (adapter, _) = pool.install(|| train(&weights, &config, &rows));
        adapter.to_safetensors().unwrap()
    };
    let first = bytes(1, 2);
    assert_eq!(first, bytes(1, 2));
    assert_eq!(first, bytes(1, 1));
    assert_ne!(first, bytes(2, 2));
}

/// Sizes at which products and loops are split over threads; those of the other tests are not.
#[test]
fn equal_seeds_give_equal_bytes_where_the_work_is_split() {
    let model = LlamaConfig {
        hidden: 96,
        head_dim: 24,
        ffn: 256,
        ..tiny::config()
    };
    let weights = tiny::weights_with(model, 1);
    let lora = LoraConfig {
        rank: 16,
        dropout: 0.1,
        ..lora()
    };
    let row = |row: u32| TrainRow {
        prompt: (0..31).map(|at| (row * 7 + at * at + 5) % 31).collect(),
        target: vec![row % 31, 0],
        earlier: Vec::new(),
    };
    let rows: Vec<TrainRow> = (0..16).map(row).collect();
    let config = TrainConfig {
        epochs: 2,
        share_prefix: false,
        ..config()
    };
    let trained = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let trainer = Trainer::new(&weights, lora.clone(), config.clone(), &rows);
            let tokens = Cell::new(0);
            let hooks = Hooks::default().on_step(|stats| tokens.set(stats.tokens));
            let outcome = trainer.unwrap().run(hooks).unwrap();
            // The keys' product is the smallest with a frozen weight.
            assert!(tokens.get() * 96 * 48 > 1 << 20);
            let values = outcome
                .adapter
                .layers
                .iter()
                .flat_map(|pairs| pairs.values());
            let values = values.map(|pair| pair.a.elem_count() + pair.b.elem_count());
            assert!(values.sum::<usize>() > 2 * (16 << 10));
            outcome.adapter.to_safetensors().unwrap()
        })
    };
    let first = trained(1);
    for threads in [2, 3, 4] {
        assert!(trained(threads) == first, "{threads} threads");
    }
}

#[test]
fn a_killed_training_ends_with_the_same_bytes() {
    let (weights, rows) = (tiny::weights(1), tiny::rows(20, 2));
    let lora = LoraConfig {
        dropout: 0.1,
        ..lora()
    };
    let config = TrainConfig {
        epochs: 3,
        ..config()
    };
    let new = || Trainer::new(&weights, lora.clone(), config.clone(), &rows).unwrap();
    let whole = new().run(Hooks::default()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    // Steps at a batch within an epoch, at its end, and at the first of the next.
    for (stop, every) in [(1, 1), (2, 2), (3, 0), (4, 1), (5, 2), (8, 3)] {
        let _ = std::fs::remove_file(&path);
        let done = Cell::new(0);
        let hooks = Hooks::default()
            .on_step(|stats| done.set(stats.step))
            .cancelled_by(|| done.get() >= stop)
            .save_state(&path, every);
        let stopped = new().run(hooks);
        assert!(matches!(stopped, Err(ModelError::Cancelled)));
        let state = TrainerState::load(&path).unwrap();
        assert_eq!(state.step(), stop);
        let resumed = new().resume(state).unwrap().run(Hooks::default()).unwrap();
        assert_eq!(resumed.losses, whole.losses);
        let bytes = |adapter: &LoraAdapter| adapter.to_safetensors().unwrap();
        assert_eq!(bytes(&resumed.adapter), bytes(&whole.adapter));
    }
}

#[test]
fn a_kill_between_saves_goes_on_from_the_last_one() {
    let (weights, rows) = (tiny::weights(1), tiny::rows(40, 2));
    let config = TrainConfig {
        epochs: 2,
        ..config()
    };
    let new = || Trainer::new(&weights, lora(), config.clone(), &rows).unwrap();
    let whole = new().run(Hooks::default()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    // What a kill leaves: the file of the last save, copied before the run goes on.
    let kept = folder.path().join("kept.safetensors");
    let hooks = Hooks::default()
        .on_step(|stats| {
            if stats.step == 4 {
                std::fs::copy(&path, &kept).unwrap();
            }
        })
        .save_state(&path, 3);
    new().run(hooks).unwrap();
    let state = TrainerState::load(&kept).unwrap();
    assert_eq!(state.step(), 3);
    let resumed = new().resume(state).unwrap().run(Hooks::default()).unwrap();
    let bytes = |adapter: &LoraAdapter| adapter.to_safetensors().unwrap();
    assert_eq!(bytes(&resumed.adapter), bytes(&whole.adapter));
    // A finished state gives the adapter without a step.
    let last = TrainerState::load(&path).unwrap();
    let again = new().resume(last).unwrap().run(Hooks::default()).unwrap();
    assert_eq!(bytes(&again.adapter), bytes(&whole.adapter));
}

#[test]
fn a_state_of_another_training_is_refused() {
    let (weights, rows) = (tiny::weights(1), tiny::rows(20, 2));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    let hooks = Hooks::default().save_state(&path, 0);
    let once = TrainConfig {
        epochs: 1,
        ..config()
    };
    let mut trainer = Trainer::new(&weights, lora(), once.clone(), &rows).unwrap();
    trainer.run(hooks).unwrap();
    let state = || TrainerState::load(&path).unwrap();
    let other = TrainConfig {
        clip: 0.5,
        ..once.clone()
    };
    let others = tiny::weights(2);
    for trainer in [
        Trainer::new(&weights, lora(), other, &rows).unwrap(),
        Trainer::new(&weights, lora(), once.clone(), &rows[1..]).unwrap(),
        Trainer::new(&others, lora(), once, &rows).unwrap(),
    ] {
        let error = trainer.resume(state()).err().unwrap().to_string();
        assert!(
            error.contains("other rows, settings or base weights"),
            "{error}"
        );
    }
}

#[test]
fn what_cannot_be_trained_is_an_error() {
    let (weights, rows) = (tiny::weights(1), tiny::rows(8, 2));
    let new = |rows: &[TrainRow]| Trainer::new(&weights, lora(), config(), rows).err();
    assert!(new(&[]).is_some());
    let bad = |prompt: Vec<u32>, target: Vec<u32>| {
        let mut rows = rows.clone();
        rows[3] = TrainRow {
            prompt,
            target,
            earlier: Vec::new(),
        };
        new(&rows).unwrap().to_string()
    };
    assert!(bad(vec![], vec![1]).starts_with("training row 4: a training row needs"));
    assert!(bad(vec![1], vec![31]).starts_with("training row 4: token 31 is not"));
    assert!(bad(vec![1; 70], vec![2]).starts_with("training row 4: 70 tokens are more"));

    let wild = TrainConfig {
        learning_rate: 1e30,
        clip: 0.0,
        ..config()
    };
    let mut trainer = Trainer::new(&weights, lora(), wild, &rows).unwrap();
    let error = trainer.run(Hooks::default()).unwrap_err();
    assert!(
        matches!(error, ModelError::Training { step, .. } if step > 1),
        "{error}"
    );
}

#[test]
fn checkpoints_by_steps_are_the_adapters_of_these_steps_and_come_before_the_state() {
    // Three steps an epoch.
    let (weights, rows) = (tiny::weights(1), tiny::rows(20, 2));
    let config = TrainConfig {
        epochs: 3,
        ..config()
    };
    let new = || Trainer::new(&weights, lora(), config.clone(), &rows).unwrap();
    let bytes = |adapter: &LoraAdapter| adapter.to_safetensors().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    let checkpoints = |every: usize| {
        let found = RefCell::new(Vec::new());
        let hooks = Hooks::default()
            .save_state(&path, 1)
            .on_steps(every, |stats, adapter| {
                if path.exists() {
                    assert!(TrainerState::load(&path).unwrap().step() < stats.step);
                }
                let place = (stats.step, stats.epoch);
                found.borrow_mut().push((place, bytes(adapter)));
                Ok(())
            });
        new().run(hooks).unwrap();
        std::fs::remove_file(&path).unwrap();
        found.into_inner()
    };
    let epochs = RefCell::new(Vec::new());
    let hooks = Hooks::default().on_epoch(|stats, adapter| {
        let place = (stats.step, stats.epoch);
        epochs.borrow_mut().push((place, bytes(adapter)));
        Ok(())
    });
    new().run(hooks).unwrap();
    assert_eq!(checkpoints(3), epochs.into_inner());
    let all = checkpoints(1);
    let places: Vec<(usize, usize)> = all.iter().map(|(place, _)| *place).collect();
    let expected: Vec<(usize, usize)> = (1..=9).map(|s| (s, (s - 1) / 3 + 1)).collect();
    assert_eq!(places, expected);
    let every_fourth: Vec<_> = all.into_iter().skip(3).step_by(4).collect();
    assert_eq!(checkpoints(4), every_fourth);
    assert!(checkpoints(0).is_empty());

    let full = Hooks::default().on_steps(2, |_, _| {
        let reason = "the disk is full".to_owned();
        Err(ModelError::Training { step: 2, reason })
    });
    let error = new().run(full).unwrap_err().to_string();
    assert!(error.contains("the disk is full"), "{error}");
}

#[test]
fn a_validation_loss_that_is_no_number_ends_the_training() {
    let (mut weights, rows) = (tiny::weights(1), tiny::rows(8, 2));
    // A token that no row to train on has.
    let mut embed: Vec<Vec<f32>> = weights.embed.to_vec2().unwrap();
    embed[30].fill(f32::NAN);
    let shape = (embed.len(), weights.config.hidden);
    let embed = candle_core::Tensor::from_vec(embed.concat(), shape, &candle_core::Device::Cpu);
    weights.embed = embed.unwrap();
    let unseen = [TrainRow {
        prompt: vec![1, 2, 3, 30],
        target: vec![8, 0],
        earlier: Vec::new(),
    }];
    let told = Cell::new(false);
    let hooks = Hooks::default().on_epoch(|_, _| {
        told.set(true);
        Ok(())
    });
    let mut trainer = Trainer::new(&weights, lora(), config(), &rows)
        .unwrap()
        .validate_on(&unseen)
        .unwrap();
    let error = trainer.run(hooks).unwrap_err().to_string();
    assert!(error.contains("validation loss is NaN"), "{error}");
    assert!(!told.get());
}

/// The invocation of an activated adapter: the last token of every prompt of [`tiny::rows`] but
/// one, and the first of the common start once more in some questions.
fn activated() -> LoraConfig {
    LoraConfig {
        invocation_tokens: Some(vec![7]),
        ..lora()
    }
}

#[test]
fn an_activated_training_learns_and_resumes_and_needs_its_invocation() {
    let (weights, rows, unseen) = (tiny::weights(1), tiny::rows(60, 2), tiny::rows(20, 3));
    let config = TrainConfig {
        epochs: 4,
        ..config()
    };
    let new = || {
        Trainer::new(&weights, activated(), config.clone(), &rows)
            .unwrap()
            .validate_on(&unseen)
            .unwrap()
    };
    let before = new().evaluate(&unseen).unwrap();
    let mut trainer = new();
    let whole = trainer.run(Hooks::default()).unwrap();
    let after = trainer.evaluate(&unseen).unwrap();
    assert!(after.loss < 0.7 * before.loss, "{before:?} {after:?}");

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    let done = Cell::new(0);
    let hooks = Hooks::default()
        .on_step(|stats| done.set(stats.step))
        .cancelled_by(|| done.get() >= 11)
        .save_state(&path, 0);
    assert!(new().run(hooks).is_err());
    let state = TrainerState::load(&path).unwrap();
    let resumed = new().resume(state).unwrap().run(Hooks::default()).unwrap();
    let bytes = |adapter: &LoraAdapter| adapter.to_safetensors().unwrap();
    assert_eq!(bytes(&resumed.adapter), bytes(&whole.adapter));

    let without = LoraConfig {
        invocation_tokens: Some(vec![30, 30, 30]),
        ..lora()
    };
    let error = Trainer::new(&weights, without, config.clone(), &rows).err();
    let error = error.unwrap().to_string();
    assert!(
        error.contains("lacks the invocation tokens [30, 30, 30]"),
        "{error}"
    );
}

/// Before its first step an adapter changes nothing, so what it sees of the base model's part must
/// be what one pass over the whole row sees.
#[test]
fn what_comes_before_an_invocation_is_seen_as_in_a_plain_pass() {
    let rows = tiny::rows(12, 2);
    for architecture in architecture::ALL {
        let weights = tiny::weights_of(architecture, 1);
        let loss = |lora| {
            let trainer = Trainer::new(&weights, lora, config(), &rows).unwrap();
            trainer.evaluate(&rows).unwrap().loss
        };
        let (plain, activated) = (loss(lora()), loss(activated()));
        let name = architecture.gguf;
        assert!(
            (plain - activated).abs() < 1e-5,
            "{name}: {activated}, not {plain}"
        );
    }
}

#[test]
fn small_passes_of_an_activated_training_change_nothing() {
    let (weights, rows) = (tiny::weights(1), tiny::rows(16, 2));
    let losses = |max_tokens| {
        let config = TrainConfig {
            max_tokens,
            epochs: 2,
            ..config()
        };
        let mut trainer = Trainer::new(&weights, activated(), config, &rows).unwrap();
        trainer.run(Hooks::default()).unwrap().losses
    };
    close(&losses(1000), &losses(9));
    close(&losses(1000), &losses(1));
}

#[test]
fn a_training_that_gets_no_better_stops_and_says_so() {
    let (weights, rows, unseen) = (tiny::weights(1), tiny::rows(16, 2), tiny::rows(8, 3));
    let config = TrainConfig {
        epochs: 30,
        learning_rate: 0.3,
        patience: Some(2),
        ..config()
    };
    let new = || Trainer::new(&weights, lora(), config.clone(), &rows).unwrap();
    let error = new().run(Hooks::default()).unwrap_err().to_string();
    assert!(error.contains("needs rows to validate on"), "{error}");
    let losses = RefCell::new(Vec::new());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    let mut trainer = new().validate_on(&unseen).unwrap();
    let hooks = Hooks::default().save_state(&path, 0).on_epoch(|stats, _| {
        losses.borrow_mut().push(stats.validation.unwrap().loss);
        Ok(())
    });
    let outcome = trainer.run(hooks).unwrap();
    let losses = losses.into_inner();
    assert!(outcome.stopped_early && losses.len() < 30);
    let told: Vec<f32> = losses.iter().map(|loss| *loss as f32).collect();
    assert_eq!(outcome.validations, told);
    let best = losses.iter().copied().fold(f64::INFINITY, f64::min);
    let last = &losses[losses.len() - 3..];
    assert_eq!(last[0], best, "{losses:?}");
    assert_eq!(outcome.losses.len(), 2 * losses.len());
    // The rows that decided when it stopped are a part of what it is.
    let state = || TrainerState::load(&path).unwrap();
    assert!(
        new()
            .validate_on(&unseen[1..])
            .unwrap()
            .resume(state())
            .is_err()
    );
    assert!(new().validate_on(&unseen).unwrap().resume(state()).is_ok());
}
