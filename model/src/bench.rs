//! What this machine makes of a model: training, reading prompts, generating; against the floor
//! that its rate of matrix products sets.
//!
//! Rows are drawn at random, with the lengths of a classification of short texts: a compact
//! prompt with its label, and a full prompt of 500 tokens with a rationale. Knows no printing.
//! Invariant: every figure is measured in this call; nothing is remembered or assumed.

mod breakdown;
mod process;
mod rates;

use std::sync::Arc;
use std::time::Instant;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::base_model::BaseModel;
use crate::chat_template::{ChatMessage, TemplateArguments};
use crate::device::Device;
use crate::error::ModelError;
use crate::generate::{GenerateOptions, GenerateRequest, Generator};
use crate::llama::{Llama, Precision, Run};
use crate::lora::LoraConfig;
use crate::profile;
pub use crate::profile::Operation;
use crate::train::{Hooks, TrainConfig, TrainRow, Trainer};
pub use breakdown::{Breakdown, Part};
use process::{cpu_seconds, forget_peak, peak_bytes};
use rates::Rates;

/// Requests that generate together.
const REQUESTS: usize = 16;

/// All figures.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelBench {
    /// What computed: `cpu`, or the name of a GPU.
    pub device: String,
    /// Values in the model.
    pub parameters: usize,
    /// Threads of the pool.
    pub threads: usize,
    /// Rate of matrix products in the model's own shapes, in 10⁹ operations a second: f32, on a GPU
    /// TF32 where that was asked for.
    pub gemm_gflops: f64,
    /// The same on weights of 8 bits, where the processor does that.
    pub int8_gops: Option<f64>,
    /// Bytes that the processor's threads read together, in 10⁹ a second.
    pub read_gb_per_second: Option<f64>,
    /// Bytes that a GPU copies in its memory, read and written, in 10⁹ a second.
    pub copy_gb_per_second: Option<f64>,
    /// Training, by kind of row.
    pub training: Vec<TrainingBench>,
    /// Reading prompts, by precision.
    pub prompt: Vec<RateBench>,
    /// Generating for 16 requests with a common start, by precision; their prompts included.
    pub generation: Vec<RateBench>,
    /// Where the time of a pass goes; on the processor alone.
    pub profile: Vec<Breakdown>,
    /// The most memory that the process held, in bytes, where the system tells.
    pub peak_bytes: Option<u64>,
    /// Bytes of a GPU's memory that were taken in the end, by all that uses it.
    pub gpu_bytes: Option<u64>,
}

/// One kind of training.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainingBench {
    /// What was trained.
    pub name: &'static str,
    /// Tokens of an example, its prompt included.
    pub tokens: usize,
    /// Seconds an example: the median step.
    pub seconds: f64,
    /// Processor seconds an example over all steps, where the system tells.
    pub cpu_seconds: Option<f64>,
    /// Least seconds an example: its operations at the measured rate.
    pub floor_seconds: f64,
    /// The most memory that the process held meanwhile, in bytes, the base model and what the
    /// allocator kept of what came before included. None where the system does not tell it of a
    /// part of a process's life.
    pub peak_bytes: Option<u64>,
}

/// A rate.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RateBench {
    /// `int8`, `f32` or `tf32`.
    pub precision: &'static str,
    /// Tokens: of the prompts, or generated.
    pub tokens: usize,
    /// Tokens a second.
    pub tokens_per_second: f64,
    /// Most tokens a second: prompts at the measured rate of products of this precision; of
    /// generated tokens, what takes longer: their products at that rate, or the weights, read once
    /// for a token of all requests together, at the measured rate of memory.
    pub floor_tokens_per_second: f64,
    /// Processor seconds in all, where the system tells.
    pub cpu_seconds: Option<f64>,
}

/// Measures `base` on `device`. `progress` hears what is measured next. Takes some minutes for a
/// model of 135 M parameters.
///
/// # Errors
/// When a prompt does not fit the model's context of at least 1,024 tokens, when the device
/// cannot be used, and those of training and generation.
pub fn bench(
    base: &Arc<BaseModel>,
    device: Device,
    progress: &mut dyn FnMut(&str),
) -> Result<ModelBench, ModelError> {
    let gpu = device.gpu_name()?;
    let config = &base.weights.config;
    if config.context < 1024 || config.vocab < 1024 {
        return Err(ModelError::Config {
            name: "model",
            reason: "is too small to measure: it needs a context and a vocabulary of 1,024 tokens"
                .to_owned(),
        });
    }
    progress("matrix products");
    let rates = Rates::of(base, device)?;
    let (mut training, mut peak) = (Vec::new(), peak_bytes());
    for kind in KINDS {
        progress(kind.name);
        let alone = forget_peak();
        let mut found = kind.run(base, device, rates.gemm)?;
        let meanwhile = peak_bytes();
        peak = peak.max(meanwhile);
        found.peak_bytes = meanwhile.filter(|_| alone);
        training.push(found);
    }
    let (mut prompt, mut generation) = (Vec::new(), Vec::new());
    let precisions = match gpu {
        None => &[Precision::Int8, Precision::F32][..],
        // It computes in what the device says.
        Some(_) => &[Precision::F32],
    };
    for precision in precisions {
        progress("prompts");
        prompt.push(read_prompts(base, device, *precision, rates)?);
        progress("generation");
        generation.push(generate(base, device, *precision, rates)?);
    }
    let mut profile = Vec::new();
    if gpu.is_none() {
        progress("profile");
        // Those that share what rows begin with, as `finetune` does, or need not.
        for kind in KINDS
            .iter()
            .filter(|kind| kind.share_prefix || kind.activated)
        {
            profile.push(kind.breakdown(base)?);
        }
        for precision in precisions {
            profile.extend(breakdown::answering(base, *precision)?);
        }
    }
    let (on_cpu, memory) = (gpu.is_none(), rates.memory / 1e9);
    Ok(ModelBench {
        device: gpu.unwrap_or_else(|| Device::Cpu.to_string()),
        parameters: parameters(base),
        threads: rayon::current_num_threads(),
        gemm_gflops: rates.gemm / 1e9,
        int8_gops: rates.int8.map(|rate| rate / 1e9),
        read_gb_per_second: on_cpu.then_some(memory),
        copy_gb_per_second: (!on_cpu).then_some(memory),
        training,
        prompt,
        generation,
        profile,
        peak_bytes: peak.max(peak_bytes()),
        gpu_bytes: gpu_bytes(device)?,
    })
}

fn gpu_bytes(device: Device) -> Result<Option<u64>, ModelError> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = device.open()? {
        let (free, all) = gpu.memory()?;
        return Ok(Some((all - free) as u64));
    }
    device.gpu_name().map(|_| None)
}

/// Values of the linear layers, which are what costs.
fn linear_values(base: &BaseModel) -> usize {
    let c = &base.weights.config;
    let attention = 2 * c.hidden * (c.q_width() + c.kv_width());
    c.layers * (attention + 3 * c.hidden * c.ffn)
}

fn parameters(base: &BaseModel) -> usize {
    let c = &base.weights.config;
    let heads = if c.tied_head { 1 } else { 2 };
    let vectors = 2 * c.hidden
        + usize::from(c.parts.qkv_bias) * (c.q_width() + 2 * c.kv_width())
        + usize::from(c.parts.head_norms) * 2 * c.head_dim
        + usize::from(c.parts.post_norms) * 2 * c.hidden;
    linear_values(base) + heads * c.vocab * c.hidden + c.layers * vectors + c.hidden
}

/// A kind of training row.
struct Kind {
    name: &'static str,
    /// Tokens that all rows begin with, about as many of their own, and tokens to learn.
    lengths: [usize; 3],
    share_prefix: bool,
    activated: bool,
    /// Rows of a step.
    batch: usize,
    /// Steps after a first one, which warms up.
    steps: usize,
}

const KINDS: [Kind; 4] = [
    Kind {
        name: "short prompt, label only",
        lengths: [17, 22, 16],
        share_prefix: true,
        activated: false,
        batch: 8,
        steps: 4,
    },
    Kind {
        name: "full prompt, each row by itself",
        lengths: [440, 61, 42],
        share_prefix: false,
        activated: false,
        batch: 2,
        steps: 1,
    },
    Kind {
        name: "full prompt, common start once",
        lengths: [440, 61, 42],
        share_prefix: true,
        activated: false,
        batch: 8,
        steps: 2,
    },
    Kind {
        name: "full prompt, activated adapter",
        lengths: [440, 61, 42],
        share_prefix: false,
        activated: true,
        batch: 8,
        steps: 2,
    },
];

impl Kind {
    fn run(
        &self,
        base: &BaseModel,
        device: Device,
        rate: f64,
    ) -> Result<TrainingBench, ModelError> {
        let rows = self.rows(base);
        let (lora, config) = self.settings();
        let adapted = linear_values(base) as f64;
        let trained = lora_values(base, &lora) as f64;
        let head = (base.weights.config.vocab * base.weights.config.hidden) as f64;
        let (mut times, mut operations, mut last) = (Vec::new(), 0.0, None);
        let mut cpu = None;
        let hooks = Hooks::default().on_step(|step| {
            let now = Instant::now();
            if let Some(last) = last.replace(now) {
                times.push((now - last).as_secs_f64());
            } else {
                // What comes before the first step's end is not the steps' own.
                cpu = cpu_seconds();
            }
            // Frozen weights: forward and the gradient of the input. Trained ones: theirs too.
            operations = step.tokens as f64 * (4.0 * adapted + 6.0 * trained)
                + step.targets as f64 * 4.0 * head;
        });
        let trainer = Trainer::new(&base.weights, lora, config, &rows)?;
        trainer.compute_on(base, device)?.run(hooks)?;
        let used = cpu.zip(cpu_seconds()).map(|(from, to)| to - from);
        times.sort_by(f64::total_cmp);
        let step = times.get(times.len() / 2).copied().unwrap_or(f64::NAN);
        Ok(TrainingBench {
            name: self.name,
            tokens: self.lengths.iter().sum(),
            seconds: step / self.batch as f64,
            cpu_seconds: used.map(|used| used / (self.batch * self.steps) as f64),
            floor_seconds: operations / rate / self.batch as f64,
            peak_bytes: None,
        })
    }

    /// Where the time of a second step goes.
    fn breakdown(&self, base: &BaseModel) -> Result<Breakdown, ModelError> {
        let mut rows = self.rows(base);
        rows.truncate(2 * self.batch);
        let (lora, config) = self.settings();
        let mut spent = profile::Spent::default();
        let hooks = Hooks::default().on_step(|step| {
            if step.step + 1 == step.steps {
                profile::start();
            } else if step.step == step.steps {
                spent = profile::stop();
            }
        });
        let ran = Trainer::new(&base.weights, lora, config, &rows)?.run(hooks);
        // Where it ended early its clock still runs.
        profile::stop();
        ran?;
        Ok(Breakdown::of(
            format!("training step of {} rows: {}", self.batch, self.name),
            &spent,
            1,
        ))
    }

    fn settings(&self) -> (LoraConfig, TrainConfig) {
        let lora = LoraConfig {
            // The mark that ends the common start: the row's own part is adapted.
            invocation_tokens: self.activated.then(|| vec![MARK]),
            ..LoraConfig::default()
        };
        let config = TrainConfig {
            share_prefix: self.share_prefix,
            batch_size: self.batch,
            ..TrainConfig::default()
        };
        (lora, config)
    }

    fn rows(&self, base: &BaseModel) -> Vec<TrainRow> {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let most = base.weights.config.vocab as u32;
        let mut draw = |count: usize| -> Vec<u32> {
            (0..count)
                .map(|_| rng.random_range(MARK + 1..most))
                .collect()
        };
        let [common, own, target] = self.lengths;
        let mut shared = draw(common - 1);
        shared.push(MARK);
        let count = self.batch * (self.steps + 1);
        let rows = (0..count).map(|row| TrainRow {
            prompt: [shared.clone(), draw((own + row % 9).saturating_sub(4))].concat(),
            target: draw(target),
        });
        rows.collect()
    }
}

/// A token that is drawn nowhere else.
const MARK: u32 = 512;

fn lora_values(base: &BaseModel, lora: &LoraConfig) -> usize {
    let c = &base.weights.config;
    let modules = crate::lora::Module::ALL;
    let widths = modules.map(|module| module.input(c) + module.output(c));
    c.layers * lora.rank * widths.iter().sum::<usize>()
}

fn name(precision: Precision, device: Device) -> &'static str {
    match (device, precision) {
        (Device::CudaTf32, _) => "tf32",
        (_, Precision::Int8) => "int8",
        (_, Precision::F32) => "f32",
    }
}

/// Four prompts of 512 tokens that have nothing in common.
fn read_prompts(
    base: &Arc<BaseModel>,
    device: Device,
    precision: Precision,
    rates: Rates,
) -> Result<RateBench, ModelError> {
    let llama = Llama::on(Arc::clone(base), None, precision, device)?;
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let most = base.weights.config.vocab as u32;
    let mut prompts = || -> Vec<Vec<u32>> {
        let mut prompt = || (0..512).map(|_| rng.random_range(0..most)).collect();
        (0..4).map(|_| prompt()).collect()
    };
    let read = |prompts: Vec<Vec<u32>>| {
        let mut caches: Vec<_> = prompts.iter().map(|p| llama.cache(p.len())).collect();
        let runs = prompts.iter().zip(&mut caches).map(|(tokens, own)| Run {
            tokens,
            past: Vec::new(),
            own,
            adapter: None,
        });
        llama.forward(runs.collect())
    };
    read(prompts())?;
    let (cpu, start) = (cpu_seconds(), Instant::now());
    read(prompts())?;
    let seconds = start.elapsed().as_secs_f64();
    let tokens = 4 * 512;
    let floor = rates.products(precision) / (2.0 * linear_values(base) as f64);
    Ok(RateBench {
        precision: name(precision, device),
        tokens,
        tokens_per_second: tokens as f64 / seconds,
        floor_tokens_per_second: floor,
        cpu_seconds: cpu.zip(cpu_seconds()).map(|(from, to)| to - from),
    })
}

/// 16 requests with about 440 tokens in common, 20 of their own and 48 to come.
fn generate(
    base: &Arc<BaseModel>,
    device: Device,
    precision: Precision,
    rates: Rates,
) -> Result<RateBench, ModelError> {
    let options = GenerateOptions {
        batch: REQUESTS,
        precision,
        device,
    };
    let generator = Generator::new(Arc::clone(base), None, options)?;
    let system: Vec<String> = (0..55)
        .map(|i| format!("Rule {i}: answer every question."))
        .collect();
    let system = system.join(" ");
    let request = |index: usize| GenerateRequest {
        messages: vec![
            ChatMessage::new("system", system.clone()),
            ChatMessage::new(
                "user",
                format!("Tell me a long story about the number {index}."),
            ),
        ],
        template_arguments: TemplateArguments::new(),
        max_tokens: 48,
        temperature: 0.0,
        seed: None,
        stop: Vec::new(),
        choices: None,
    };
    let requests: Vec<_> = (0..REQUESTS).map(request).collect();
    let (cpu, start) = (cpu_seconds(), Instant::now());
    let answers = generator.generate(&requests, &|_, _| {}, &|| false);
    let seconds = start.elapsed().as_secs_f64();
    let used = cpu.zip(cpu_seconds()).map(|(from, to)| to - from);
    let (mut tokens, mut steps, mut read, mut shortest) = (0, 0, 0, usize::MAX);
    for answer in answers {
        let answer = answer?;
        tokens += answer.completion_tokens;
        steps = steps.max(answer.completion_tokens);
        read += answer.prompt_tokens;
        shortest = shortest.min(answer.prompt_tokens);
    }
    // Nearly all of the shortest prompt is what they have in common.
    let read = read - (REQUESTS - 1) * shortest.min(read / REQUESTS);
    let c = &base.weights.config;
    let matrices = linear_values(base) as f64;
    let rate = rates.products(precision);
    let prompts = 2.0 * matrices * read as f64 / rate;
    // The first token of each comes from its prompt and takes the head alone, the last is not fed.
    let (fed, passes) = (tokens.saturating_sub(REQUESTS), steps.saturating_sub(1));
    let head = (c.vocab * c.hidden) as f64;
    let computing = 2.0 * (matrices * fed as f64 + head * tokens as f64) / rate;
    let reading = passes as f64 * generator.matrix_bytes()? as f64 / rates.memory;
    let least = prompts + computing.max(reading);
    Ok(RateBench {
        precision: name(precision, device),
        tokens,
        tokens_per_second: tokens as f64 / seconds,
        floor_tokens_per_second: tokens as f64 / least,
        cpu_seconds: used,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::tiny;

    #[test]
    fn a_model_that_is_too_small_is_refused() {
        let error = bench(&tiny::base(1), Device::Cpu, &mut |_| {})
            .unwrap_err()
            .to_string();
        assert!(error.contains("too small to measure"), "{error}");
    }
}
