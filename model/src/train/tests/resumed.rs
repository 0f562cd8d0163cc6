//! Trainings that are killed and go on, and what they leave on the way.

use std::cell::{Cell, RefCell};

use super::{config, lora};
use crate::error::ModelError;
use crate::lora::{LoraAdapter, LoraConfig};
use crate::train::{Hooks, TrainConfig, Trainer, TrainerState, tiny};

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
