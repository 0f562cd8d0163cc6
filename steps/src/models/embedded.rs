//! Models that run in this process. A loaded model is shared by all steps that name it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

use flowrun_engine::step::{Cancel, StepError, World};
use flowrun_lm::classifier::Embedder;
use flowrun_lm::lm::{Completion, FinishReason, Lm, LmError, Message, OnAnswer, Request};
use flowrun_model::bench::ModelBench;
use flowrun_model::{
    BaseModel, ChatMessage, ChoiceSet, Device, Finish, GenerateOptions, GenerateRequest, Generated,
    Generator, LoraAdapter, ModelError, SentenceEncoder, TemplateArguments,
};

use super::{EmbeddedSpec, EncoderSpec, Host};
use crate::bench::Measured;
use crate::checkpoint::Checkpoint;

type Shared<T> = LazyLock<Mutex<BTreeMap<String, Arc<T>>>>;

/// The variable that says where models compute; the command line's `--device` sets it too.
const DEVICE: &str = "FLOWRUN_DEVICE";

/// Raised whenever the generator may answer the same request otherwise; kept answers are its own.
const GENERATION: u32 = 5;

/// Loaded models by the digest of their files. They stay: a run asks for the same ones again and
/// again. Base models are in them as they answer, without what only training reads.
static BASES: Shared<BaseModel> = LazyLock::new(Mutex::default);
/// Whole base models, which are several times as large: one stays as long as somebody trains it.
static WHOLE: LazyLock<Mutex<BTreeMap<String, Weak<BaseModel>>>> = LazyLock::new(Mutex::default);
static ENCODERS: Shared<SentenceEncoder> = LazyLock::new(Mutex::default);

fn shared<T>(
    all: &Mutex<BTreeMap<String, Arc<T>>>,
    digest: &str,
    load: impl FnOnce() -> Result<T, ModelError>,
) -> Result<Arc<T>, StepError> {
    // Held while loading: whoever else wants this model waits for it.
    let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(model) = all.get(digest) {
        return Ok(Arc::clone(model));
    }
    let model = Arc::new(load().map_err(failed)?);
    all.insert(digest.to_owned(), Arc::clone(&model));
    Ok(model)
}

/// As a step says it.
pub(crate) fn failed(error: ModelError) -> StepError {
    match error {
        ModelError::Cancelled => StepError::cancelled(),
        ModelError::Config { .. }
        | ModelError::Request(_)
        | ModelError::TooLong(_)
        | ModelError::Row { .. } => StepError::invalid(error.to_string()),
        ModelError::NoDevice(_) => StepError::invalid(error.to_string()).help(
            "`--device` and FLOWRUN_DEVICE say where models compute: `cpu`, `cuda`, `cuda-tf32` or `auto`",
        ),
        other => StepError::failed(other.to_string()),
    }
}

/// Where models compute on this machine: what [`DEVICE`] says, else the processor. It is no part
/// of a step's key, as the kind of processor is none.
///
/// # Errors
/// Invalid when the variable says something else.
pub(crate) fn device(world: &World) -> Result<Device, StepError> {
    match world.env.get(DEVICE).map(|text| text.trim()) {
        None | Some("") => Ok(Device::default()),
        Some(text) => text
            .parse()
            .map_err(|error: ModelError| StepError::invalid(format!("{DEVICE}: {error}"))),
    }
}

/// Whether models compute on the processor here: `auto` does where there is no GPU.
fn on_cpu(world: &World) -> Result<bool, StepError> {
    let gpu = device(world)?.gpu_name().map_err(failed)?;
    Ok(gpu.is_none())
}

/// The name of the GPU that a device is; none for the processor.
///
/// # Errors
/// Invalid when there is no such device, or it cannot be used, with what is missing.
pub(super) fn gpu(device: &str) -> Result<Option<String>, StepError> {
    let device: Device = device.parse().map_err(failed)?;
    device.gpu_name().map_err(failed)
}

/// The base model of an entry.
///
/// # Errors
/// When its weights cannot be had or are not a model.
pub(crate) fn open_base(spec: &EmbeddedSpec, host: &Host<'_>) -> Result<Arc<BaseModel>, StepError> {
    let found = spec.weights.locate(host.world, host.cancel)?;
    // A GPU computes in f32.
    let on_cpu = on_cpu(host.world)?;
    shared(&BASES, &found.digest, || match on_cpu {
        true => BaseModel::load_to_answer(&found.path, &found.digest),
        false => BaseModel::load(&found.path, &found.digest),
    })
}

/// The base model of an entry with all that training reads.
///
/// # Errors
/// As [`open_base`].
pub(crate) fn open_whole_base(
    spec: &EmbeddedSpec,
    host: &Host<'_>,
) -> Result<Arc<BaseModel>, StepError> {
    // With a GPU all of it is there anyway, and one copy of the weights on the GPU is enough.
    if !on_cpu(host.world)? {
        return open_base(spec, host);
    }
    let found = spec.weights.locate(host.world, host.cancel)?;
    let mut all = WHOLE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(model) = all.get(&found.digest).and_then(Weak::upgrade) {
        return Ok(model);
    }
    let model = Arc::new(BaseModel::load(&found.path, &found.digest).map_err(failed)?);
    all.insert(found.digest, Arc::downgrade(&model));
    Ok(model)
}

/// The tokenizer of a GGUF file in Hugging Face's files: names and texts.
///
/// # Errors
/// Invalid when the file has no tokenizer that is understood.
pub(crate) fn tokenizer_files(weights: &Path) -> Result<Vec<(&'static str, String)>, StepError> {
    let files = flowrun_model::files_of_gguf(weights);
    files
        .map(Vec::from)
        .map_err(|e| StepError::invalid(e.to_string()))
}

/// The sentence encoder of an entry.
///
/// # Errors
/// When its files cannot be had or are not an encoder.
pub(crate) fn open_encoder(
    spec: &EncoderSpec,
    host: &Host<'_>,
) -> Result<Arc<dyn Embedder + Send + Sync>, StepError> {
    let weights = spec.weights.locate(host.world, host.cancel)?;
    let tokenizer = spec.tokenizer.locate(host.world, host.cancel)?;
    let config = match &spec.config {
        Some(config) => Some(config.locate(host.world, host.cancel)?),
        None => None,
    };
    let of_config = config.as_ref().map_or("", |found| &found.digest);
    let digest = format!("{}+{}+{of_config}", weights.digest, tokenizer.digest);
    let encoder = shared(&ENCODERS, &digest, || {
        let config = config.as_ref().map(|found| found.path.as_path());
        SentenceEncoder::load(&weights.path, &tokenizer.path, config)
    })?;
    Ok(Arc::new(Encoder(encoder)))
}

struct Encoder(Arc<SentenceEncoder>);

impl Embedder for Encoder {
    fn embed(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, String> {
        self.0.embed(texts).map_err(|e| e.to_string())
    }
}

/// The model of an entry, or a checkpoint of it; its chat template is told `told`.
pub(super) fn open_lm(
    spec: &EmbeddedSpec,
    told: TemplateArguments,
    checkpoint: Option<(&Path, &Checkpoint)>,
    host: &Host<'_>,
) -> Result<Arc<dyn Lm>, StepError> {
    let base = open_base(spec, host)?;
    let mut id = format!("embedded-{GENERATION}:{}", base.id);
    if !told.is_empty() {
        id = format!("{id} with {}", serde_json::json!(told));
    }
    let adapter = match checkpoint {
        Some((
            folder,
            Checkpoint {
                adapter: Some(adapter),
                ..
            },
        )) => {
            if adapter.base != base.id {
                return Err(StepError::invalid(format!(
                    "the checkpoint was trained on another model than `{}`",
                    spec.weights.name()
                ))
                .help("name the model that it was trained on, or train again"));
            }
            id = format!("{id}+{}", adapter.digest);
            Some(LoraAdapter::load(folder, &base.weights.config).map_err(failed)?)
        }
        // The base alone would answer in its name.
        Some((
            _,
            Checkpoint {
                hosted: Some(hosted),
                ..
            },
        )) => {
            return Err(StepError::invalid(format!(
                "the checkpoint is the model `{hosted}` of the server that trained it, and `{}` runs in this process",
                spec.weights.name()
            ))
            .help("ask the entry that was trained"));
        }
        _ => None,
    };
    let options = GenerateOptions {
        batch: spec.batch,
        device: device(host.world)?,
        ..GenerateOptions::default()
    };
    let generator = Generator::new(base, adapter.as_ref(), options).map_err(failed)?;
    Ok(Arc::new(LocalLm {
        id,
        generator,
        template_arguments: told,
        cancel: host.cancel.clone(),
    }))
}

/// Measures a model.
///
/// # Errors
/// When its weights cannot be had or are not a model.
pub(crate) fn bench(
    spec: &EmbeddedSpec,
    host: &Host<'_>,
    progress: &mut dyn FnMut(&str),
) -> Result<Measured, StepError> {
    let base = open_whole_base(spec, host)?;
    let found =
        flowrun_model::bench::bench(&base, device(host.world)?, progress).map_err(failed)?;
    let json = serde_json::to_value(&found).map_err(|e| StepError::failed(e.to_string()))?;
    Ok(Measured {
        text: table(&spec.weights.name(), &found),
        json,
    })
}

fn table(name: &str, found: &ModelBench) -> String {
    let cpu = |seconds: Option<f64>| seconds.map_or("-".to_owned(), |s| format!("{s:.3}"));
    let mut out = format!(
        "{name}: {:.1} M parameters, {}, {} threads, products at {:.0} GFLOP/s",
        found.parameters as f64 / 1e6,
        found.device,
        found.threads,
        found.gemm_gflops
    );
    if let Some(rate) = found.copy_gb_per_second {
        out.push_str(&format!(", copies at {rate:.0} GB/s"));
    }
    if let Some(rate) = found.int8_gops {
        out.push_str(&format!(", on 8-bit weights at {rate:.0} G/s"));
    }
    if let Some(rate) = found.read_gb_per_second {
        out.push_str(&format!(", memory read at {rate:.1} GB/s"));
    }
    out.push_str("\n\n");
    out.push_str(
        "training                          tokens  s/example  cpu s/example  floor s  memory GB\n",
    );
    for row in &found.training {
        out.push_str(&format!(
            "{:33} {:6}  {:9.3}  {:>13}  {:7.3}  {:>9}\n",
            row.name,
            row.tokens,
            row.seconds,
            cpu(row.cpu_seconds),
            row.floor_seconds,
            row.peak_bytes
                .map_or("-".to_owned(), |bytes| format!("{:.2}", bytes as f64 / 1e9))
        ));
    }
    for (title, rates) in [
        ("prompts", &found.prompt),
        ("generation", &found.generation),
    ] {
        out.push_str(&format!(
            "\n{title:33} tokens   tokens/s          cpu s  floor tokens/s\n"
        ));
        for rate in rates {
            out.push_str(&format!(
                "{:33} {:6}  {:9.1}  {:>13}  {:14.1}\n",
                rate.precision,
                rate.tokens,
                rate.tokens_per_second,
                cpu(rate.cpu_seconds),
                rate.floor_tokens_per_second
            ));
        }
    }
    for breakdown in &found.profile {
        let title = format!("{}:", breakdown.name);
        out.push_str(&format!(
            "\n{title:50} {:9.2} ms\n",
            1e3 * breakdown.seconds
        ));
        for part in breakdown.parts.iter().filter(|part| part.seconds > 0.0) {
            out.push_str(&format!(
                "  {:48} {:9.2} ms  {:5.1} %\n",
                part.operation.name(),
                1e3 * part.seconds,
                100.0 * part.seconds / breakdown.seconds
            ));
        }
    }
    if let Some(bytes) = found.peak_bytes {
        out.push_str(&format!("\nmemory at most: {:.2} GB\n", bytes as f64 / 1e9));
    }
    if let Some(bytes) = found.gpu_bytes {
        out.push_str(&format!(
            "the GPU's in the end: {:.2} GB\n",
            bytes as f64 / 1e9
        ));
    }
    out
}

/// The generator as the program layer sees a model.
struct LocalLm {
    id: String,
    generator: Generator,
    template_arguments: TemplateArguments,
    cancel: Cancel,
}

impl Lm for LocalLm {
    fn id(&self) -> &str {
        &self.id
    }

    fn complete(
        &self,
        requests: &[Request],
        on_answer: &OnAnswer<'_>,
    ) -> Vec<Result<Completion, LmError>> {
        let request =
            |asked: &Request| generate_request(asked.clone(), self.template_arguments.clone());
        let requests: Vec<GenerateRequest> = requests.iter().map(request).collect();
        let tell = |index: usize, answer: &Result<Generated, ModelError>| {
            on_answer(index, &completion(answer));
        };
        let answers = self
            .generator
            .generate(&requests, &tell, &|| self.cancel.is_cancelled());
        answers.iter().map(completion).collect()
    }
}

/// A request as the generator takes it.
pub(crate) fn generate_request(
    request: Request,
    template_arguments: TemplateArguments,
) -> GenerateRequest {
    let sampling = request.sampling;
    let message = |m: Message| ChatMessage::new(m.role.as_str(), m.content);
    GenerateRequest {
        messages: request.messages.into_iter().map(message).collect(),
        template_arguments,
        max_tokens: sampling.max_tokens as usize,
        temperature: sampling.temperature,
        // Another rollout is another draw of the same prompt.
        seed: Some(
            sampling
                .seed
                .unwrap_or(0)
                .wrapping_add(sampling.rollout.unwrap_or(0)),
        ),
        stop: sampling.stop,
        choices: request.choices.map(|choices| ChoiceSet {
            after: choices.after,
            values: choices.values,
            then: choices.then,
        }),
    }
}

fn completion(answer: &Result<Generated, ModelError>) -> Result<Completion, LmError> {
    match answer {
        Ok(generated) => Ok(Completion {
            text: generated.text.clone(),
            finish: match generated.finish {
                Finish::Stop => FinishReason::Stop,
                Finish::Length => FinishReason::Length,
            },
            prompt_tokens: generated.prompt_tokens as u64,
            completion_tokens: generated.completion_tokens as u64,
            choice_probs: generated.choice_probs.clone(),
            cached: false,
        }),
        Err(ModelError::Cancelled) => Err(LmError::Cancelled),
        Err(ModelError::TooLong(why)) => Err(LmError::TooLong(why.clone())),
        Err(error @ (ModelError::Device(_) | ModelError::NoDevice(_))) => {
            Err(LmError::Barred(error.to_string()))
        }
        Err(error) => Err(LmError::Rejected(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_fails_is_no_answer_of_the_models() {
        for error in [
            ModelError::Device("lost".to_owned()),
            ModelError::NoDevice("lost".to_owned()),
        ] {
            let barred = LmError::Barred("GPU: lost".to_owned());
            assert_eq!(completion(&Err(error)), Err(barred));
        }
        let bad = completion(&Err(ModelError::Request("bad".to_owned())));
        assert_eq!(bad, Err(LmError::Rejected("bad".to_owned())));
    }
}
