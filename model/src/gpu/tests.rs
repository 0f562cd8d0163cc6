//! The device's passes against the CPU's: with the same kernels run on the CPU where there is a
//! C++ compiler, and with `FLOWRUN_CUDA=1` on a GPU.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

use std::sync::Arc;

use super::{Attended, Gpu, Layer, Plan, Run as GpuRun, Sizes, cuda, host, segment_of};
use crate::architecture;
use crate::chat_template::ChatMessage;
use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::generate::{Batch, ChoiceSet, GenerateOptions, GenerateRequest, Generator};
use crate::llama::{KvCache, Llama, Precision, Run};
use crate::lora::{LoraAdapter, LoraConfig};
use crate::tiny;
use crate::train::{self, Hooks, TrainConfig, TrainRow, Trainer};

/// The devices at hand: the CPU as one with few threads, in both orders, and a real one.
fn devices() -> Vec<Gpu> {
    let as_one = [host::gpu([4, 8], false), host::gpu([8, 4], true)];
    as_one.into_iter().flatten().chain(real()).collect()
}

/// A GPU, where `FLOWRUN_CUDA=1` asks for one.
fn real() -> Option<Gpu> {
    match std::env::var("FLOWRUN_CUDA").as_deref() {
        Ok("1") => Some(Gpu::open(false).unwrap()),
        _ => {
            eprintln!("skipped: no GPU, since FLOWRUN_CUDA=1 does not ask for one");
            None
        }
    }
}

/// Every value within `tolerance` of its size or of the largest value's.
fn assert_close(got: &[f32], wanted: &[f32], tolerance: f32, what: &str) {
    assert_eq!(got.len(), wanted.len(), "{what}");
    let size = wanted.iter().fold(0f32, |most, v| most.max(v.abs()));
    for (at, (got, wanted)) in got.iter().zip(wanted).enumerate() {
        let off = (got - wanted).abs();
        assert!(
            off <= tolerance * size,
            "{what}: {got} is not {wanted} at {at}"
        );
    }
}

/// Feeds runs of mixed lengths, one of them in two parts, with two adapters and with none.
fn fed(base: &Arc<crate::BaseModel>, gpu: Option<&Gpu>) -> Vec<f32> {
    let config = &base.weights.config;
    let on = |adapter: &LoraAdapter| {
        let llama = Llama::new(Arc::clone(base), Some(adapter), Precision::F32).unwrap();
        match gpu {
            Some(gpu) => llama.moved_to(gpu).unwrap(),
            None => llama,
        }
    };
    let llamas = [on(&tiny::adapter(config, 7)), on(&tiny::adapter(config, 8))];
    let llama = &llamas[0];
    let tokens = |from: u32, len: u32| -> Vec<u32> {
        (from..from + len).map(|i| (i * 37 + 5) % 200).collect()
    };
    let feed = |tokens: &[u32], past: Vec<&KvCache>, own: &mut KvCache| {
        let run = Run {
            tokens,
            past,
            own,
            adapter: None,
        };
        llama.forward(vec![run]).unwrap()
    };
    let (mut start, mut more) = (llama.cache(0), llama.cache(0));
    feed(&tokens(0, 9), vec![], &mut start);
    feed(&tokens(9, 3), vec![&start], &mut more);
    // Grows beyond its first room.
    for at in 0..70 {
        feed(&tokens(12 + at, 1), vec![&start], &mut more);
    }
    let mut own: Vec<KvCache> = (0..4).map(|_| llama.cache(0)).collect();
    let texts = [tokens(3, 40), tokens(70, 5), tokens(90, 1), tokens(95, 7)];
    let adapters = [
        llamas[0].adapter(),
        llamas[1].adapter(),
        None,
        llamas[1].adapter(),
    ];
    let pasts = [vec![], vec![&start], vec![&start, &more], vec![]];
    let runs = own.iter_mut().zip(&texts).zip(adapters).zip(pasts);
    let runs = runs.map(|(((own, tokens), adapter), past)| Run {
        tokens,
        past,
        own,
        adapter,
    });
    let hidden = llama.forward(runs.collect()).unwrap();
    let logits = llama.logits(&hidden).unwrap();
    [hidden, logits].concat()
}

#[test]
fn logits_equal_the_cpu() {
    for architecture in architecture::ALL {
        let base = tiny::base_of(architecture, 1);
        let wanted = fed(&base, None);
        for gpu in devices() {
            let got = fed(&base, Some(&gpu));
            assert_close(&got, &wanted, 2e-5, architecture.gguf);
        }
    }
}

fn request(text: &str) -> GenerateRequest {
    GenerateRequest {
        messages: vec![ChatMessage::new("user", text)],
        template_arguments: crate::TemplateArguments::new(),
        max_tokens: 9,
        temperature: 0.0,
        seed: None,
        stop: vec![],
        choices: None,
    }
}

fn generator(base: &Arc<crate::BaseModel>, seed: u64, gpu: Option<&Gpu>) -> Generator {
    let adapter = tiny::adapter(&base.weights.config, seed);
    let llama = Llama::new(Arc::clone(base), Some(&adapter), Precision::F32).unwrap();
    let llama = match gpu {
        Some(gpu) => llama.moved_to(gpu).unwrap(),
        None => llama,
    };
    Generator::of(llama, GenerateOptions::default())
}

#[test]
fn greedy_answers_and_choices_equal_the_cpu() {
    let choose = GenerateRequest {
        choices: Some(ChoiceSet {
            after: None,
            values: ["card", "card_lost", "cash", "top up"]
                .map(str::to_owned)
                .to_vec(),
            then: String::new(),
        }),
        ..request("where is my card")
    };
    let texts = ["where is my card", "where is my cash", "hello", "a"];
    let requests: Vec<_> = texts.map(request).into_iter().chain([choose]).collect();
    for architecture in architecture::ALL {
        let base = tiny::base_of(architecture, 3);
        let answers = |gpu: Option<&Gpu>| -> Vec<_> {
            let generator = generator(&base, 4, gpu);
            let answers = generator.generate(&requests, &|_, _| {}, &|| false);
            answers.into_iter().map(Result::unwrap).collect()
        };
        let wanted = answers(None);
        for gpu in devices() {
            for (got, wanted) in answers(Some(&gpu)).iter().zip(&wanted) {
                assert_eq!(got.text, wanted.text, "{}", architecture.gguf);
                assert_eq!(got.cached_tokens, wanted.cached_tokens);
                if let (Some(got), Some(wanted)) = (&got.choice_probs, &wanted.choice_probs) {
                    assert_close(got, wanted, 1e-4, architecture.gguf);
                }
            }
        }
    }
}

#[test]
fn rows_of_two_adapters_are_answered_together_and_share_their_starts() {
    let base = tiny::base(5);
    let answers = |gpu: Option<&Gpu>| {
        let on = [generator(&base, 6, gpu), generator(&base, 7, gpu)];
        let mut batch = Batch::new(3, 1 << 20);
        for (id, text) in ["where is my card", "where is my cash", "where is"]
            .into_iter()
            .enumerate()
        {
            for (at, generator) in on.iter().enumerate() {
                let ask = crate::Ask {
                    request: request(text),
                    text: None,
                    top_p: 1.0,
                    logprobs: None,
                };
                batch.add(generator, 2 * id + at, &ask).unwrap();
            }
        }
        let mut texts = vec![String::new(); 6];
        while !batch.is_empty() {
            batch.step(&mut |id, said| {
                if let crate::Said::End(answer) = said {
                    texts[id] = answer.unwrap().text;
                }
            });
        }
        texts
    };
    let wanted = answers(None);
    for gpu in devices() {
        assert_eq!(answers(Some(&gpu)), wanted);
    }
}

/// Loss, and every gradient with its place.
fn gradients(
    weights: &crate::LlamaWeights,
    lora: &LoraConfig,
    config: &TrainConfig,
    rows: &[TrainRow],
    gpu: Option<&Gpu>,
) -> (f64, Vec<(String, Vec<f32>)>) {
    let adapter = train::tiny::adapter(lora, &weights.config, 3);
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
    let lora = LoraConfig {
        rank: 3,
        alpha: 6.0,
        ..LoraConfig::default()
    };
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
    let rows = train::tiny::rows(5, 2);
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
        let weights = train::tiny::weights_of(architecture, 1);
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
    let weights = train::tiny::weights(1);
    let lora = LoraConfig {
        rank: 3,
        alpha: 6.0,
        ..LoraConfig::default()
    };
    let config = TrainConfig {
        epochs: 2,
        batch_size: 4,
        ..TrainConfig::default()
    };
    let (rows, unseen) = (train::tiny::rows(12, 2), train::tiny::rows(5, 9));
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

/// Attention of one head over all columns up to `end`, or the last `window` of them, in f64.
fn slow_attention(q: &[f32], k: &[&[f32]], v: &[&[f32]], window: Option<usize>) -> Vec<f64> {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter()
            .zip(b)
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum()
    };
    let first = window.map_or(0, |window| k.len().saturating_sub(window));
    let scale = 1.0 / (q.len() as f64).sqrt();
    let scores: Vec<f64> = k[first..]
        .iter()
        .map(|k| (dot(q, k) * scale).exp())
        .collect();
    let total: f64 = scores.iter().sum();
    let mut out = vec![0.0; q.len()];
    for (score, v) in scores.iter().zip(&v[first..]) {
        for (out, v) in out.iter_mut().zip(*v) {
            *out += score / total * f64::from(*v);
        }
    }
    out
}

/// Heads of real widths, more keys than a block takes, segments, groups and windows.
#[test]
fn attention_of_real_heads_equals_a_plain_implementation() {
    let value = |i: usize| ((i * 7919 + 13) % 1009) as f32 / 500.0 - 1.0;
    for (heads, kv_heads, dim) in [(6, 2, 64), (4, 4, 128), (3, 1, 256), (2, 1, 80)] {
        for gpu in devices() {
            for window in [None, Some(20)] {
                let (past, rows) = (37, 43);
                let (width, kv) = (heads * dim, kv_heads * dim);
                let total = past + rows;
                let q: Vec<f32> = (0..rows * width).map(value).collect();
                // Two layers; the second one is asked for.
                let part = |tokens: usize, seed: usize| -> Vec<f32> {
                    (0..2 * 2 * tokens * kv).map(|i| value(i + seed)).collect()
                };
                let (before, own) = (part(past, 5), part(rows, 77));
                let buffers = [gpu.copy_of(&before).unwrap(), gpu.copy_of(&own).unwrap()];
                let segments = vec![
                    segment_of(buffers[0].all(), kv, past, 0, past),
                    segment_of(buffers[1].all(), kv, rows, 0, rows),
                ];
                let sizes = Sizes::of(&LlamaConfig {
                    heads,
                    kv_heads,
                    head_dim: dim,
                    ..train::tiny::config()
                });
                let run = GpuRun {
                    first: 0,
                    rows,
                    segments,
                };
                let plan = Plan::new(&gpu, sizes, &[run]).unwrap();
                let (q_there, out) = (gpu.copy_of(&q).unwrap(), gpu.room(q.len()).unwrap());
                let log_sums = gpu.room(rows * heads).unwrap();
                let values = Attended {
                    q: q_there.all(),
                    out: out.all(),
                    log_sums: log_sums.all(),
                };
                gpu.attention(&plan, Layer { slot: 1, window }, values)
                    .unwrap();
                let got = out.all().read(&gpu).unwrap();
                let row = |which: usize, token: usize, head: usize| {
                    let (values, tokens, at) = match token.checked_sub(past) {
                        None => (&before, past, token),
                        Some(at) => (&own, rows, at),
                    };
                    let start = ((2 + which) * tokens + at) * kv + head * dim;
                    &values[start..start + dim]
                };
                for token in 0..rows {
                    for head in 0..heads {
                        let kv_head = head / (heads / kv_heads);
                        let end = total - rows + token + 1;
                        let k: Vec<&[f32]> = (0..end).map(|t| row(0, t, kv_head)).collect();
                        let v: Vec<&[f32]> = (0..end).map(|t| row(1, t, kv_head)).collect();
                        let at = token * width + head * dim;
                        let wanted = slow_attention(&q[at..at + dim], &k, &v, window);
                        let wanted: Vec<f32> = wanted.iter().map(|v| *v as f32).collect();
                        let what = format!("{dim} {window:?} row {token} head {head}");
                        assert_close(&got[at..at + dim], &wanted, 2e-5, &what);
                    }
                }
            }
        }
    }
}

/// As many threads as on a GPU.
#[test]
fn blocks_of_a_gpus_size_compute_the_same() {
    let Some(gpu) = host::gpu([256, 128], false) else {
        return;
    };
    let lora = LoraConfig {
        rank: 3,
        alpha: 6.0,
        ..LoraConfig::default()
    };
    let weights = train::tiny::weights(1);
    let (rows, config) = (train::tiny::rows(2, 2), TrainConfig::default());
    let (loss, wanted) = gradients(&weights, &lora, &config, &rows, None);
    let (got_loss, got) = gradients(&weights, &lora, &config, &rows, Some(&gpu));
    assert!((got_loss - loss).abs() < 1e-5);
    for ((place, got), (_, wanted)) in got.iter().zip(&wanted) {
        assert_close(got, wanted, 1e-4, place);
    }
}

#[test]
fn a_model_that_does_not_fit_is_refused_with_the_sizes() {
    let Some(gpu) = host::small(1 << 20) else {
        return;
    };
    let base = tiny::base(1);
    let llama = Llama::new(base, None, Precision::F32).unwrap();
    let error = llama.moved_to(&gpu).err().unwrap();
    assert!(matches!(error, ModelError::NoDevice(_)));
    let text = error.to_string();
    assert!(
        text.contains("too little memory: 0.54 GB are needed"),
        "{text}"
    );
    assert!(text.contains("0.00 of 0.00 GB are free"), "{text}");
}

#[test]
fn nvrtc_compiles_the_kernels() {
    if !cuda::has_compiler() {
        eprintln!(
            "skipped: NVRTC cannot be loaded; LD_LIBRARY_PATH names its folder \
             (`pip install nvidia-cuda-nvrtc-cu12` brings one)"
        );
        return;
    }
    for architecture in ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90"] {
        let image = cuda::compile(architecture).unwrap();
        assert!(image.starts_with(b"\x7fELF"), "{architecture}");
    }
    let error = cuda::compile("sm_1").unwrap_err().to_string();
    assert!(
        error.contains("cannot compile the kernels for sm_1"),
        "{error}"
    );
}

/// What a machine without a GPU says. One with a GPU has nothing to say.
#[test]
fn a_missing_gpu_is_a_clear_error() {
    if let Err(error) = Gpu::open(false) {
        let text = error.to_string();
        assert!(
            text.starts_with("GPU: ") && text.contains("use the CPU"),
            "{text}"
        );
        assert_eq!(crate::Device::Auto.gpu_name().unwrap_or_default(), None);
    }
}

/// The calls that reach a GPU, with a library in the place of NVIDIA's: all the tests above once
/// more, in a process that finds it.
#[test]
fn a_gpus_libraries_are_called_as_their_headers_say() {
    let folder = tempfile::tempdir().unwrap();
    if std::env::var_os("FLOWRUN_CUDA").is_some() || host::stubs(folder.path()).is_none() {
        eprintln!("skipped: there is a GPU, or no compiler");
        return;
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["gpu::tests::", "--skip", "a_gpus_libraries"])
        .env("LD_LIBRARY_PATH", folder.path())
        .env("FLOWRUN_CUDA", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{errors}");
    let asked = "a_real_gpu_is_the_one_that_was_asked_for ... ok";
    assert!(text.contains(asked), "{text}");
}

/// What `FLOWRUN_CUDA=1` opens is no test's own device, and says how fast it is.
#[test]
fn a_real_gpu_is_the_one_that_was_asked_for() {
    let Some(gpu) = real() else { return };
    eprintln!("on {gpu:?}");
    assert!(!gpu.name().contains("as a GPU"));
    let (free, all) = gpu.memory().unwrap();
    assert!(0 < free && free <= all);
    let (gemm, copy) = super::rates(&gpu, [32, 16, 16]).unwrap();
    assert!(gemm > 0.0 && copy > 0.0);
    let error = gpu.room::<f32>(1 << 45).unwrap_err().to_string();
    assert!(error.contains("too little memory"), "{error}");
}
