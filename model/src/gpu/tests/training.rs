//! Training on the device.

use super::{assert_close, devices};
use crate::architecture;
use crate::gpu::{Gpu, host};
use crate::lora::LoraConfig;
use crate::train::tiny::{self, lora};
use crate::train::{Hooks, TrainConfig, TrainRow, Trainer};

/// Loss, and every gradient with its place.
fn gradients(
    weights: &crate::LlamaWeights,
    lora: &LoraConfig,
    config: &TrainConfig,
    rows: &[TrainRow],
    gpu: Option<&Gpu>,
) -> (f64, Vec<(String, Vec<f32>)>) {
    let adapter = tiny::adapter(lora, &weights.config, 3);
    let mut trainer = Trainer::new(weights, lora.clone(), config.clone(), rows).unwrap();
    if let Some(gpu) = gpu {
        trainer = trainer.moved_to(gpu).unwrap();
    }
    let (loss, gradients) = trainer.gradients_of(&adapter, rows);
    let mut all = Vec::new();
    for (layer, pairs) in gradients.layers.iter().enumerate() {
        for (name, pair) in pairs {
            for (factor, tensor) in [("a", &pair.a), ("b", &pair.b)] {
                let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                all.push((format!("layer {layer} {name} {factor}"), values));
            }
        }
    }
    (loss, all)
}

#[test]
fn every_gradient_equals_the_cpu() {
    let lora = lora();
    let few = LoraConfig {
        target_modules: ["q_proj", "v_proj", "down_proj"]
            .map(str::to_owned)
            .to_vec(),
        ..lora.clone()
    };
    let dropout = LoraConfig {
        dropout: 0.3,
        ..lora.clone()
    };
    let activated = LoraConfig {
        invocation_tokens: Some(vec![7]),
        ..lora.clone()
    };
    let config = TrainConfig::default();
    let plain = TrainConfig {
        share_prefix: false,
        ..config.clone()
    };
    // Each row by itself, with its activations computed again.
    let again = TrainConfig {
        max_tokens: 6,
        ..config.clone()
    };
    let rows = tiny::rows(5, 2);
    let cases = [
        ("common start", &lora, &config),
        ("each row", &lora, &plain),
        ("computed again", &lora, &again),
        ("some modules", &few, &config),
        ("dropout", &dropout, &config),
        ("dropout, computed again", &dropout, &again),
        ("activated", &activated, &config),
        ("activated, computed again", &activated, &again),
    ];
    for architecture in architecture::ALL {
        let weights = tiny::weights_of(architecture, 1);
        for (name, lora, config) in cases {
            let (loss, wanted) = gradients(&weights, lora, config, &rows, None);
            for gpu in devices() {
                let (got_loss, got) = gradients(&weights, lora, config, &rows, Some(&gpu));
                let what = format!("{} {name}", architecture.gguf);
                assert!(
                    (got_loss - loss).abs() < 1e-5,
                    "{what}: {got_loss}, not {loss}"
                );
                assert_eq!(got.len(), wanted.len());
                for ((place, got), (_, wanted)) in got.iter().zip(&wanted) {
                    assert!(
                        wanted.iter().any(|g| g.abs() > 1e-6),
                        "{what} {place}: none"
                    );
                    assert_close(got, wanted, 1e-4, &format!("{what} {place}"));
                }
            }
        }
    }
}

#[test]
fn a_training_goes_as_on_the_cpu_and_equal_seeds_give_equal_bytes() {
    let weights = tiny::weights(1);
    let lora = lora();
    let config = TrainConfig {
        epochs: 2,
        batch_size: 4,
        ..TrainConfig::default()
    };
    let (rows, unseen) = (tiny::rows(12, 2), tiny::rows(5, 9));
    let run = |gpu: Option<&Gpu>| {
        let mut trainer = Trainer::new(&weights, lora.clone(), config.clone(), &rows).unwrap();
        if let Some(gpu) = gpu {
            trainer = trainer.moved_to(gpu).unwrap();
        }
        let mut trainer = trainer.validate_on(&unseen).unwrap();
        let outcome = trainer.run(Hooks::default()).unwrap();
        let accuracy = trainer.evaluate(&unseen).unwrap().token_accuracy;
        (outcome, accuracy)
    };
    let (wanted, accuracy) = run(None);
    for gpu in devices() {
        let (got, got_accuracy) = run(Some(&gpu));
        assert_close(&got.losses, &wanted.losses, 1e-4, "losses");
        assert_close(&got.validations, &wanted.validations, 1e-4, "validation");
        assert_eq!(got_accuracy, accuracy);
        let (again, _) = run(Some(&gpu));
        assert_eq!(
            got.adapter.to_safetensors().unwrap(),
            again.adapter.to_safetensors().unwrap()
        );
    }
}

/// As many threads as on a GPU.
#[test]
fn blocks_of_a_gpus_size_compute_the_same() {
    let Some(gpu) = host::gpu([256, 128], false) else {
        return;
    };
    let lora = lora();
    let weights = tiny::weights(1);
    let (rows, config) = (tiny::rows(2, 2), TrainConfig::default());
    let (loss, wanted) = gradients(&weights, &lora, &config, &rows, None);
    let (got_loss, got) = gradients(&weights, &lora, &config, &rows, Some(&gpu));
    assert!((got_loss - loss).abs() < 1e-5);
    for ((place, got), (_, wanted)) in got.iter().zip(&wanted) {
        assert_close(got, wanted, 1e-4, place);
    }
}
