//! Adapters that take effect at their invocation.

use std::cell::Cell;

use super::{close, config, lora};
use crate::architecture;
use crate::lora::{LoraAdapter, LoraConfig};
use crate::train::{Hooks, TrainConfig, Trainer, TrainerState, tiny};

/// The invocation of an activated adapter: the last token of every prompt of [`tiny::rows`] but
/// one, and the first of the common start once more in some questions.
pub(super) fn activated() -> LoraConfig {
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
