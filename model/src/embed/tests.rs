//! The encoder on a tiny random model, against a slow pass in f64.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

const WIDTH: usize = 64;
const HEADS: usize = 2;
const WORDS: [&str; 8] = [
    "[UNK]", "[CLS]", "[SEP]", "my", "card", "is", "lost", "stolen",
];

fn tensors() -> HashMap<String, Tensor> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut tensors = HashMap::new();
    let mut add = |name: String, shape: &[usize], centre: f32| {
        let n = shape.iter().product();
        let values: Vec<f32> = (0..n)
            .map(|_| centre + 0.4 * (rng.random::<f32>() - 0.5))
            .collect();
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
        tensors.insert(name, tensor);
    };
    let e = |part: &str| format!("embeddings.{part}.weight");
    add(e("word_embeddings"), &[WORDS.len(), WIDTH], 0.0);
    add(e("position_embeddings"), &[LONGEST, WIDTH], 0.0);
    add(e("token_type_embeddings"), &[2, WIDTH], 0.0);
    add(e("LayerNorm"), &[WIDTH], 1.0);
    add("embeddings.LayerNorm.bias".into(), &[WIDTH], 0.0);
    for layer in 0..2 {
        let mut linear = |part: &str, out: usize, input: usize| {
            let name = format!("encoder.layer.{layer}.{part}");
            add(format!("{name}.weight"), &[out, input], 0.0);
            add(format!("{name}.bias"), &[out], 0.0);
        };
        for part in ["self.query", "self.key", "self.value", "output.dense"] {
            linear(&format!("attention.{part}"), WIDTH, WIDTH);
        }
        linear("intermediate.dense", 96, WIDTH);
        linear("output.dense", WIDTH, 96);
        for part in ["attention.output.LayerNorm", "output.LayerNorm"] {
            let name = format!("encoder.layer.{layer}.{part}");
            add(format!("{name}.weight"), &[WIDTH], 1.0);
            add(format!("{name}.bias"), &[WIDTH], 0.0);
        }
    }
    tensors
}

fn tokenizer_json() -> String {
    let vocab: serde_json::Map<_, _> = WORDS
        .iter()
        .enumerate()
        .map(|(i, word)| ((*word).to_owned(), i.into()))
        .collect();
    let special =
        |name: &str, id: u32| serde_json::json!({"id": name, "ids": [id], "tokens": [name]});
    let piece = |name: &str| serde_json::json!({"SpecialToken": {"id": name, "type_id": 0}});
    serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": {"type": "Whitespace"}, "decoder": null,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [piece("[CLS]"), {"Sequence": {"id": "A", "type_id": 0}}, piece("[SEP]")],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"[CLS]": special("[CLS]", 1), "[SEP]": special("[SEP]", 2)},
        },
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
    })
    .to_string()
}

/// The model in a folder.
fn written(tensors: &HashMap<String, Tensor>) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    candle_core::safetensors::save(tensors, dir.path().join("model.safetensors")).unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer_json()).unwrap();
    std::fs::write(
        dir.path().join("config.json"),
        r#"{"num_attention_heads": 2}"#,
    )
    .unwrap();
    dir
}

fn load(dir: &Path, config: Option<&Path>) -> Result<SentenceEncoder, ModelError> {
    let (weights, tokenizer) = (dir.join("model.safetensors"), dir.join("tokenizer.json"));
    SentenceEncoder::load(&weights, &tokenizer, config)
}

type Rows = Vec<Vec<f64>>;

/// The slow pass for one text.
fn slow(tensors: &HashMap<String, Tensor>, tokens: &[usize]) -> Vec<f64> {
    let get = |name: &str| -> Rows {
        let tensor = &tensors[name];
        let columns = *tensor.dims().last().unwrap();
        let flat: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
        let flat: Vec<f64> = flat.into_iter().map(f64::from).collect();
        flat.chunks(columns).map(<[f64]>::to_vec).collect()
    };
    let norm = |x: &mut Rows, name: &str| {
        let (w, b) = (get(&format!("{name}.weight")), get(&format!("{name}.bias")));
        for row in x {
            let n = row.len() as f64;
            let mean = row.iter().sum::<f64>() / n;
            let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
            for (i, v) in row.iter_mut().enumerate() {
                *v = (*v - mean) / (variance + 1e-12).sqrt() * w[0][i] + b[0][i];
            }
        }
    };
    let linear = |x: &Rows, name: &str| -> Rows {
        let (w, b) = (get(&format!("{name}.weight")), get(&format!("{name}.bias")));
        let one = |x: &Vec<f64>| {
            let dots = w
                .iter()
                .map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>());
            dots.zip(&b[0]).map(|(y, b)| y + b).collect()
        };
        x.iter().map(one).collect()
    };
    let add = |x: &mut Rows, y: Rows| {
        let pairs = x.iter_mut().flatten().zip(y.into_iter().flatten());
        pairs.for_each(|(x, y)| *x += y);
    };
    let words = get("embeddings.word_embeddings.weight");
    let places = get("embeddings.position_embeddings.weight");
    let types = get("embeddings.token_type_embeddings.weight");
    let mut x: Rows = tokens
        .iter()
        .enumerate()
        .map(|(at, token)| {
            let value = |i| words[*token][i] + places[at][i] + types[0][i];
            (0..WIDTH).map(value).collect()
        })
        .collect();
    norm(&mut x, "embeddings.LayerNorm");
    for layer in 0..2 {
        let name = |part: &str| format!("encoder.layer.{layer}.{part}");
        let [q, k, v] = ["query", "key", "value"]
            .map(|part| linear(&x, &name(&format!("attention.self.{part}"))));
        let mut mixed = vec![vec![0.0; WIDTH]; x.len()];
        let size = WIDTH / HEADS;
        for (t, head) in (0..x.len()).flat_map(|t| (0..HEADS).map(move |h| (t, h * size))) {
            let score = |s: usize| {
                let dot: f64 = (head..head + size).map(|d| q[t][d] * k[s][d]).sum();
                (dot / (size as f64).sqrt()).exp()
            };
            let scores: Vec<f64> = (0..x.len()).map(score).collect();
            let total: f64 = scores.iter().sum();
            for d in head..head + size {
                mixed[t][d] = scores.iter().zip(&v).map(|(p, v)| p / total * v[d]).sum();
            }
        }
        add(&mut x, linear(&mixed, &name("attention.output.dense")));
        norm(&mut x, &name("attention.output.LayerNorm"));
        let mut inner = linear(&x, &name("intermediate.dense"));
        inner
            .iter_mut()
            .flatten()
            .for_each(|v| *v = 0.5 * *v * (1.0 + erf(*v / 2f64.sqrt())));
        add(&mut x, linear(&inner, &name("output.dense")));
        norm(&mut x, &name("output.LayerNorm"));
    }
    let mean: Vec<f64> = (0..WIDTH)
        .map(|i| x.iter().map(|row| row[i]).sum())
        .collect();
    let length = mean.iter().map(|v| v * v).sum::<f64>().sqrt();
    mean.into_iter().map(|v| v / length).collect()
}

/// The error function by its Taylor series, exact enough for small arguments.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..60 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

#[test]
fn vectors_equal_the_slow_pass_in_any_company() {
    let tensors = tensors();
    let dir = written(&tensors);
    let config = dir.path().join("config.json");
    let encoder = load(dir.path(), Some(&config)).unwrap();
    assert_eq!(encoder.width(), WIDTH);
    let texts = [
        "my card is lost",
        "stolen",
        "",
        "card card unknown my is lost",
    ];
    let tokens: [&[usize]; 4] = [
        &[1, 3, 4, 5, 6, 2],
        &[1, 7, 2],
        &[1, 2],
        &[1, 4, 4, 0, 3, 5, 6, 2],
    ];
    let together = encoder.embed(&texts).unwrap();
    for ((text, tokens), got) in texts.iter().zip(tokens).zip(&together) {
        let wanted = slow(&tensors, tokens);
        for (got, wanted) in got.iter().zip(&wanted) {
            assert!(
                (f64::from(*got) - wanted).abs() < 1e-5,
                "{text}: {got} {wanted}"
            );
        }
        let alone = encoder.embed(&[text]).unwrap();
        for (alone, got) in alone[0].iter().zip(got) {
            assert!((alone - got).abs() < 1e-6);
        }
    }
}

#[test]
fn a_long_text_is_cut() {
    let dir = written(&tensors());
    let encoder = load(dir.path(), Some(&dir.path().join("config.json"))).unwrap();
    let text = "card ".repeat(300);
    let vectors = encoder
        .embed(&[&text, &"card ".repeat(LONGEST - 2)])
        .unwrap();
    assert_eq!(vectors[0], vectors[1]);
}

#[test]
fn a_missing_tensor_is_named() {
    let mut tensors = tensors();
    tensors.remove("encoder.layer.1.attention.self.key.bias");
    let dir = written(&tensors);
    let config = dir.path().join("config.json");
    let error = load(dir.path(), Some(&config)).err().unwrap().to_string();
    assert!(
        error.contains("`encoder.layer.1.attention.self.key.bias`"),
        "{error}"
    );
    let error = load(&dir.path().join("nowhere"), None)
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("nowhere"), "{error}");
}

#[test]
fn heads_are_not_guessed() {
    let dir = written(&tensors());
    let error = load(dir.path(), None).err().unwrap().to_string();
    assert!(error.contains("give its `config.json`"), "{error}");
}

#[test]
fn files_that_do_not_fit_are_errors_and_no_panic() {
    let name = "embeddings.word_embeddings.weight";
    let mut without_width = tensors();
    let nothing = Tensor::zeros((WORDS.len(), 0usize), DType::F32, &Device::Cpu).unwrap();
    without_width.insert(name.to_owned(), nothing);
    let dir = written(&without_width);
    let config = dir.path().join("config.json");
    let error = load(dir.path(), Some(&config)).err().unwrap().to_string();
    assert!(error.contains(name), "{error}");

    let dir = written(&tensors());
    let config = dir.path().join("config.json");
    let path = dir.path().join("tokenizer.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let other = text.replace("\"ids\":[2]", "\"ids\":[3000]");
    assert_ne!(text, other);
    std::fs::write(&path, other).unwrap();
    let encoder = load(dir.path(), Some(&config)).unwrap();
    let error = encoder.embed(&["card"]).unwrap_err().to_string();
    assert!(error.contains("token 3000"), "{error}");
}
