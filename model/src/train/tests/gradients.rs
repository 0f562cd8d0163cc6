//! Losses and gradients against plain implementations.

use super::activated::activated;
use super::{close, config, lora};
use crate::architecture;
use crate::lora::LoraConfig;
use crate::train::budget::Budget;
use crate::train::frozen::Frozen;
use crate::train::head::{self, HeadRoom};
use crate::train::linear::Dropout;
use crate::train::network::Network;
use crate::train::pack::{self, Pack};
use crate::train::params::Layout;
use crate::train::rope::Rope;
use crate::train::tape::{Keep, Tape};
use crate::train::{TrainConfig, TrainRow, Trainer, reference, tiny};
use crate::weights::LlamaWeights;

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
            let loss = reference::losses(&weights, &adapter, row).unwrap();
            count += loss.len();
            sum += loss.iter().sum::<f64>();
        }
        let wanted = sum / count as f64;
        let name = architecture.gguf;
        assert!((got - wanted).abs() < 1e-5, "{name}: {got} is not {wanted}");
    }
}
