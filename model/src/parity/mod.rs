//! Against the reference implementations: what `transformers` and PEFT compute, as recorded by
//! `parity/record.py`.
//!
//! Here the tiny models in `parity/tiny/`, which are checked everywhere; in `families` those of
//! other architectures than Llama; in `smollm2` and `minilm` the real ones.
#![allow(clippy::unwrap_used)]

mod at_hand;
mod families;
mod minilm;
mod smollm2;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{Device, Tensor};
use serde::Deserialize;

use crate::base_model::BaseModel;
use crate::chat_template::ChatMessage;
use crate::llama::{Llama, Precision, Run};
use crate::lora::{LoraAdapter, LoraConfig, LoraPair, Module};
use crate::train::{TrainRow, gradients};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("parity")
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> T {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Logits after `tokens`, the adapter in effect where its invocation says.
fn logits(llama: &Llama, tokens: &[u32]) -> Vec<f32> {
    let mut own = llama.cache(tokens.len());
    let start = llama.adapter().map_or(Some(0), |a| a.start(tokens));
    let (plain, adapted) = tokens.split_at(start.unwrap_or(tokens.len()));
    let mut hidden = Vec::new();
    for (tokens, adapter) in [(plain, None), (adapted, llama.adapter())] {
        if !tokens.is_empty() {
            let run = Run {
                tokens,
                past: vec![],
                own: &mut own,
                adapter,
            };
            hidden = llama.forward(vec![run]).unwrap();
        }
    }
    llama.logits(&hidden).unwrap()
}

fn worst(got: &[f32], wanted: &[f32]) -> f32 {
    assert_eq!(got.len(), wanted.len());
    let off = got.iter().zip(wanted).map(|(g, w)| (g - w).abs());
    off.fold(0.0, |most, off| if off <= most { most } else { off })
}

#[derive(Deserialize)]
struct Case {
    tokens: Vec<u32>,
    logits: Vec<f32>,
}

#[derive(Deserialize)]
struct Row {
    prompt: Vec<u32>,
    target: Vec<u32>,
}

#[derive(Deserialize)]
struct Trained {
    rows: Vec<Row>,
    cases: Vec<Case>,
    loss: f64,
    gradients: BTreeMap<String, Vec<f32>>,
}

#[derive(Deserialize)]
struct Encoded {
    text: String,
    tokens: Vec<u32>,
}

#[derive(Deserialize)]
struct Chat {
    messages: Vec<ChatMessage>,
    asking: String,
    told: String,
}

fn check_tokens(base: &BaseModel, recorded: &[Encoded]) {
    for Encoded { text, tokens } in recorded {
        let got = base.tokenizer.encode(text, true).unwrap();
        assert_eq!(&got, tokens, "{text:?}");
    }
}

fn check_chats(base: &BaseModel, recorded: &[Chat]) {
    for chat in recorded {
        let render = |asking| base.chat.render(&chat.messages, asking).unwrap();
        assert_eq!(render(true), chat.asking);
        assert_eq!(render(false), chat.told);
    }
}

#[derive(Deserialize)]
struct Tiny {
    models: BTreeMap<String, Case>,
    adapters: BTreeMap<String, Trained>,
    invocation: Vec<u32>,
    ours: Option<Case>,
}

fn tiny() -> Tiny {
    read(&folder().join("tiny/expected.json"))
}

fn tiny_base(name: &str) -> Arc<BaseModel> {
    Arc::new(BaseModel::load(&folder().join("tiny").join(name), name).unwrap())
}

/// Every type of GGUF tensor, both file formats, rescaled rotary frequencies, tied heads.
#[test]
fn logits_of_every_kind_of_file_equal_transformers() {
    for (name, case) in tiny().models {
        let llama = Llama::new(tiny_base(&name), None, Precision::F32).unwrap();
        let off = worst(&logits(&llama, &case.tokens), &case.logits);
        assert!(off < 2e-4, "{name}: off by {off}");
    }
}

#[test]
fn eight_bits_are_close_to_f32() {
    let (case, base) = (&tiny().models["mixed.gguf"], tiny_base("mixed.gguf"));
    let share = rounding(&base, &case.tokens);
    assert!(share > 0.0 && share < 0.03, "off by {share} of the logits");
}

/// How far 8 bits move the logits after `tokens`, as a share of their size.
fn rounding(base: &Arc<BaseModel>, tokens: &[u32]) -> f32 {
    let compute = |precision| {
        let llama = Llama::new(base.clone(), None, precision).unwrap();
        logits(&llama, tokens)
    };
    let (exact, rounded) = (compute(Precision::F32), compute(Precision::Int8));
    let size = exact.iter().map(|v| v * v).sum::<f32>().sqrt();
    let off = exact.iter().zip(&rounded).map(|(a, b)| (a - b) * (a - b));
    off.sum::<f32>().sqrt() / size
}

#[test]
fn adapters_that_peft_wrote_compute_what_peft_computes() {
    for (name, trained) in tiny().adapters {
        let base = tiny_base("rope");
        let files = folder().join("tiny").join(format!("peft-{name}"));
        let adapter = LoraAdapter::load(&files, &base.weights.config).unwrap();
        let llama = Llama::new(base, Some(&adapter), Precision::F32).unwrap();
        for case in &trained.cases {
            let off = worst(&logits(&llama, &case.tokens), &case.logits);
            assert!(off < 2e-4, "{name}: off by {off}");
        }
        // The other reading of the same values is far off, so that a mix-up would show.
        let mut other = adapter;
        other.config.invocation_tokens = match &other.config.invocation_tokens {
            None => Some(tiny().invocation),
            Some(_) => None,
        };
        let llama = Llama::new(tiny_base("rope"), Some(&other), Precision::F32).unwrap();
        let case = &trained.cases[0];
        assert!(worst(&logits(&llama, &case.tokens), &case.logits) > 0.05);
    }
}

/// Loss and gradient of every factor, those of an activated adapter too.
#[test]
fn gradients_equal_those_of_peft() {
    for (name, trained) in tiny().adapters {
        let files = folder().join("tiny").join(format!("peft-{name}"));
        check_gradients(&name, &tiny_base("rope"), &files, trained);
    }
}

fn check_gradients(name: &str, base: &BaseModel, files: &Path, trained: Trained) {
    let adapter = LoraAdapter::load(files, &base.weights.config).unwrap();
    let rows: Vec<TrainRow> = trained
        .rows
        .into_iter()
        .map(|row| TrainRow {
            prompt: row.prompt,
            target: row.target,
        })
        .collect();
    let (loss, grads) = gradients(&base.weights, &adapter, &rows);
    assert!((loss - trained.loss).abs() < 1e-5, "{name}: {loss}");
    let mut seen = 0;
    for (layer, pairs) in grads.layers.iter().enumerate() {
        for (module, pair) in pairs {
            for (factor, got) in [("lora_A", &pair.a), ("lora_B", &pair.b)] {
                let block = Module::from_name(module).unwrap().block();
                let key = format!(
                    "base_model.model.model.layers.{layer}.{block}.{module}.{factor}.weight"
                );
                let got: Vec<f32> = got.flatten_all().unwrap().to_vec1().unwrap();
                let wanted = &trained.gradients[&key];
                let size = wanted.iter().fold(0f32, |most, v| most.max(v.abs()));
                let off = worst(&got, wanted);
                assert!(
                    size > 0.0 && off < 1e-4 * (1.0 + size),
                    "{name} {key}: {off}"
                );
                seen += 1;
            }
        }
    }
    assert_eq!(seen, trained.gradients.len());
}

/// An adapter of plain numbers, the same on every machine.
fn adapter_of_ours(base: &BaseModel, size: f32) -> LoraAdapter {
    let config = LoraConfig {
        rank: 2,
        alpha: 3.0,
        ..LoraConfig::default()
    };
    let model = &base.weights.config;
    let tensor = |rows: usize, columns: usize, seed: usize| {
        let values: Vec<f32> = (0..rows * columns)
            .map(|i| (((i * 37 + seed * 101) % 61) as f32 - 30.0) / 32.0 * size)
            .collect();
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
    };
    let layers = (0..model.layers).map(|layer| {
        let pair = |module: Module| {
            let seed = layer * 7 + module as usize;
            let a = tensor(2, module.input(model), seed);
            let b = tensor(module.output(model), 2, seed + 50);
            (module.name().to_owned(), LoraPair { a, b })
        };
        Module::ALL.map(pair).into_iter().collect()
    });
    LoraAdapter {
        layers: layers.collect(),
        config,
    }
}

/// PEFT read `tiny/ours` when its logits were recorded; we still write those very bytes.
#[test]
fn adapters_that_we_write_are_those_that_peft_read() {
    let base = tiny_base("rope");
    let kept = folder().join("tiny/ours");
    let adapter = adapter_of_ours(&base, 0.5);
    if std::env::var_os("FLOWRUN_RECORD").is_some() {
        adapter.save(&kept, "rope").unwrap();
    }
    let written = tempfile::tempdir().unwrap();
    adapter.save(written.path(), "rope").unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        let read = |folder: &Path| std::fs::read(folder.join(file)).unwrap();
        assert!(read(written.path()) == read(&kept), "{file} changed");
    }
    let (llama, case) = (
        Llama::new(base, Some(&adapter), Precision::F32).unwrap(),
        tiny().ours.unwrap(),
    );
    let off = worst(&logits(&llama, &case.tokens), &case.logits);
    assert!(off < 2e-4, "off by {off}");
}

#[test]
fn an_activated_adapter_names_its_invocation_as_peft_does() {
    let base = tiny_base("rope");
    let mut adapter = adapter_of_ours(&base, 0.5);
    adapter.config.invocation_tokens = Some(tiny().invocation);
    let written = tempfile::tempdir().unwrap();
    adapter.save(written.path(), "rope").unwrap();
    let config = |folder: &Path| -> serde_json::Value { read(&folder.join("adapter_config.json")) };
    let key = "alora_invocation_tokens";
    let peft = config(&folder().join("tiny/peft-alora"));
    assert_eq!(config(written.path())[key], peft[key]);
    let back = LoraAdapter::load(written.path(), &base.weights.config).unwrap();
    assert_eq!(back.config, adapter.config);
}
