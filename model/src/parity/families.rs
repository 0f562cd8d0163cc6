//! The architectures beside Llama against `parity/families/`: one tiny model of each, in both
//! formats, with an adapter that PEFT made.
//!
//! Until `record.py families` has run, the folder has no `expected.json` and these tests say that
//! they skip; from then on it must have every architecture.
#![allow(clippy::print_stdout)]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use candle_core::Device;
use serde::Deserialize;

use super::{Case, Chat, Encoded, Trained, check_chats, check_gradients, check_tokens};
use super::{folder, logits, read, rounding, worst};
use crate::architecture;
use crate::base_model::BaseModel;
use crate::llama::{Llama, Precision};
use crate::lora::{LoraAdapter, LoraConfig};
use crate::train::{Hooks, TrainConfig, TrainRow, Trainer};

#[derive(Deserialize)]
struct Family {
    /// Of the GGUF file and of the folder.
    cases: [Case; 2],
    trained: Trained,
    tokenizer: Vec<Encoded>,
    chats: Vec<Chat>,
}

fn families() -> PathBuf {
    folder().join("families")
}

/// What was recorded, by architecture.
fn recorded() -> BTreeMap<String, Family> {
    let path = families().join("expected.json");
    if !path.is_file() {
        println!("skipped: `record.py families` has not run");
        return BTreeMap::new();
    }
    let recorded: BTreeMap<String, Family> = read(&path);
    for architecture in architecture::ALL {
        let name = architecture.gguf;
        assert!(name == "llama" || recorded.contains_key(name), "{name}");
    }
    recorded
}

/// The GGUF file and the folder of one.
fn bases(name: &str) -> [Arc<BaseModel>; 2] {
    [format!("{name}.gguf"), name.to_owned()].map(|file| {
        let base = BaseModel::load(&families().join(file), name);
        Arc::new(base.unwrap())
    })
}

#[test]
fn logits_equal_transformers() {
    for (name, family) in recorded() {
        for (base, case) in bases(&name).into_iter().zip(&family.cases) {
            let llama = Llama::new(base, None, Precision::F32).unwrap();
            let off = worst(&logits(&llama, &case.tokens), &case.logits);
            assert!(off < 2e-4, "{name}: off by {off}");
        }
    }
}

#[test]
fn eight_bits_are_close_to_f32() {
    for (name, family) in recorded() {
        for (base, case) in bases(&name).iter().zip(&family.cases) {
            let share = rounding(base, &case.tokens);
            // One rounded layer is allowed 0.03 elsewhere; these have up to seven.
            assert!(share < 0.06, "{name}: off by {share} of the logits");
        }
    }
}

#[test]
fn a_model_loaded_to_answer_gives_the_same_bits_and_is_not_taken_for_a_whole_one() {
    for (name, family) in recorded() {
        let files = [format!("{name}.gguf"), name.clone()];
        for (file, case) in files.into_iter().zip(&family.cases) {
            let path = families().join(file);
            let whole = Arc::new(BaseModel::load(&path, &name).unwrap());
            let part = Arc::new(BaseModel::load_to_answer(&path, &name).unwrap());
            let is_fast = crate::kernels::int8::is_fast();
            assert_eq!(
                (part.answers_only(), whole.answers_only()),
                (is_fast, false)
            );
            let int8 =
                |base: &Arc<BaseModel>| Llama::new(base.clone(), None, Precision::Int8).unwrap();
            let (of_whole, of_part) = (int8(&whole), int8(&part));
            let wanted = logits(&of_whole, &case.tokens);
            assert!(wanted == logits(&of_part, &case.tokens), "{name}");
            let hidden = vec![0.5; whole.weights.config.hidden];
            let few = |llama: &Llama| llama.logits_of(&hidden, &[3, 7]).unwrap();
            assert_eq!(few(&of_whole), few(&of_part), "{name}");
            let f32 = Llama::new(part.clone(), None, Precision::F32);
            assert_eq!(f32.is_err(), is_fast);
            let row = TrainRow {
                prompt: vec![1, 2],
                target: vec![3],
                earlier: Vec::new(),
            };
            let (lora, config) = (LoraConfig::default(), TrainConfig::default());
            let rows = [row];
            let trained = Trainer::new(&part.weights, lora, config, &rows)
                .and_then(|mut trainer| trainer.run(Hooks::default()).map(|_| ()));
            assert_eq!(trained.is_err(), is_fast, "{name}");
        }
    }
}

#[test]
fn adapters_that_peft_wrote_compute_what_peft_computes() {
    for (name, family) in recorded() {
        let files = families().join(&name).join("peft-lora");
        let [_, base] = bases(&name);
        let adapter = LoraAdapter::load(&files, &base.weights.config).unwrap();
        let llama = Llama::new(base, Some(&adapter), Precision::F32).unwrap();
        for case in &family.trained.cases {
            let off = worst(&logits(&llama, &case.tokens), &case.logits);
            assert!(off < 2e-4, "{name}: off by {off}");
        }
    }
}

#[test]
fn gradients_equal_those_of_peft() {
    for (name, family) in recorded() {
        let files = families().join(&name).join("peft-lora");
        let [_, base] = bases(&name);
        check_gradients(&name, &base, &files, family.trained);
    }
}

/// An adapter of PEFT's, read and written again, has PEFT's names and values.
#[test]
fn adapters_are_written_as_peft_writes_them() {
    for name in recorded().into_keys() {
        let [_, base] = bases(&name);
        let peft = families().join(&name).join("peft-lora");
        let adapter = LoraAdapter::load(&peft, &base.weights.config).unwrap();
        let written = tempfile::tempdir().unwrap();
        adapter.save(written.path(), &name).unwrap();
        let read = |folder: &std::path::Path| {
            let path = folder.join("adapter_model.safetensors");
            let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
            let tensors = tensors.into_iter().map(|(name, tensor)| {
                let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                (name, (tensor.dims().to_vec(), values))
            });
            tensors.collect::<BTreeMap<_, _>>()
        };
        assert!(read(written.path()) == read(&peft), "{name}");
    }
}

#[test]
fn tokens_and_chats_equal_the_reference() {
    for (name, family) in recorded() {
        for base in bases(&name) {
            check_tokens(&base, &family.tokenizer);
            check_chats(&base, &family.chats);
        }
    }
}
