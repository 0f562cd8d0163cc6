//! The training as a whole, on tiny random models.
#![allow(clippy::unwrap_used)]

mod activated;
mod gradients;
mod resumed;

use std::cell::{Cell, RefCell};

use super::tiny::{self, lora};
use super::{Hooks, TrainConfig, TrainRow, Trainer, TrainerState};
use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::lora::{LoraAdapter, LoraConfig, Module};
use crate::weights::LlamaWeights;

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

fn close(a: &[f32], b: &[f32]) {
    let size = a.iter().fold(0f32, |m, v| m.max(v.abs()));
    for (a, b) in a.iter().zip(b) {
        assert!((a - b).abs() < 1e-5 * (1.0 + size), "{a} is not {b}");
    }
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
