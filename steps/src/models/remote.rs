//! Models behind an OpenAI-compatible server. A checkpoint's adapter is put where the server reads
//! adapters from, and the server told of it, when the first call needs it: answers that are kept
//! need no server.
//!
//! Invariant: an id at a server stands for the same values for ever, as it ends with their digest.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use flowrun_cache::Digest;
use flowrun_engine::step::StepError;
use flowrun_lm::client::{AdapterPlace, Api, ApiError, Batched, OpenAi, OpenAiSpec};
use flowrun_lm::lm::{Completion, Ledger, Lm, LmError, OnAnswer, Request};
use serde_json::json;

use super::{Host, traced};
use crate::checkpoint::{Adapter, Checkpoint};
use crate::folder;

/// Length of a digest in hexadecimal: what names a base model that is known by more than a name.
const DIGEST: usize = 64;

/// A server's model, or a checkpoint of it.
pub(super) fn open_lm(
    spec: &OpenAiSpec,
    checkpoint: Option<(&Path, &Checkpoint)>,
    host: &Host<'_>,
) -> Result<Arc<dyn Lm>, StepError> {
    let client = |model: &str| client(spec, model, host);
    let Some((folder, checkpoint)) = checkpoint else {
        return client(&spec.model);
    };
    if let Some(hosted) = &checkpoint.hosted {
        return client(hosted);
    }
    let Some(adapter) = &checkpoint.adapter else {
        return client(&spec.model);
    };
    let place = place(spec, checkpoint, adapter)?;
    let name = checkpoint.unique_name();
    let id = format!("{}:{name}", spec.model);
    Ok(Arc::new(WithAdapter {
        client: client(&id)?,
        api: api(spec, host)?,
        id,
        from: folder.to_owned(),
        to: host.world.root.join(&place.folder).join(&name),
        seen_as: place.seen_as.as_ref().map(|folder| folder.join(&name)),
        load: place.load,
        ready: Mutex::new(false),
    }))
}

/// The server's other calls.
///
/// # Errors
/// When the entry names no server, or its key is missing.
pub(crate) fn api(spec: &OpenAiSpec, host: &Host<'_>) -> Result<Api, StepError> {
    let cancel = host.cancel.clone();
    Api::new(
        spec,
        key(spec, host)?,
        Arc::new(move || cancel.is_cancelled()),
    )
    .map_err(|e| StepError::invalid(e.to_string()))
}

/// The entry's server, asked for the answers of `model`; all its models have one budget.
fn client(spec: &OpenAiSpec, model: &str, host: &Host<'_>) -> Result<Arc<dyn Lm>, StepError> {
    let ledger = ledger(spec, host)?;
    if let Some(ctx) = host.step.filter(|_| spec.batch) {
        let spec = OpenAiSpec {
            model: model.to_owned(),
            ..spec.clone()
        };
        // A step may ask several models.
        let name = Digest::of_record("batch", &json!([spec.base_url, model])).to_hex();
        let folder = ctx.resume_dir()?.join(format!("batch-{}", &name[..16]));
        let reporter = Arc::clone(&ctx.reporter);
        let told = move |done: u64, total: u64, text: &str| {
            reporter.log(text);
            reporter.progress(done, total, "requests", text);
        };
        let api = api(&spec, host)?;
        return Ok(Arc::new(Batched::new(
            &spec,
            api,
            folder,
            ledger,
            Box::new(told),
        )));
    }
    let cancel = host.cancel.clone();
    let client = OpenAi::new(
        spec,
        key(spec, host)?,
        Arc::new(move || cancel.is_cancelled()),
    )
    .map_err(|e| StepError::failed(e.to_string()))?;
    let client = client.as_model(model).with_ledger(ledger);
    Ok(Arc::new(client.heard_by(traced::on_call(host.step))))
}

/// The ledger of the entry's budget in this run: steps with equal entries share it.
fn ledger(spec: &OpenAiSpec, host: &Host<'_>) -> Result<Option<Ledger>, StepError> {
    let (Some(budget), Some(ctx)) = (spec.budget, host.step) else {
        return Ok(None);
    };
    let name = Digest::of_record("budget", &json!(spec)).to_hex();
    let path = ctx.run_dir()?.join(format!("budget-{}.json", &name[..16]));
    let ledger = Ledger::open(&path, budget, spec.prices);
    ledger.map(Some).map_err(|e| StepError::io(&path, &e))
}

fn key(spec: &OpenAiSpec, host: &Host<'_>) -> Result<Option<String>, StepError> {
    let Some(name) = &spec.api_key_env else {
        return Ok(None);
    };
    host.world.env.get(name).cloned().map(Some).ok_or_else(|| {
        StepError::invalid(format!("the environment variable `{name}` is not set"))
            .help("it holds the key of the model's server; set it, or remove `api_key_env`")
    })
}

/// Where the server reads adapters from, if it may be given this one.
fn place<'a>(
    spec: &'a OpenAiSpec,
    checkpoint: &Checkpoint,
    adapter: &Adapter,
) -> Result<&'a AdapterPlace, StepError> {
    // Against a digest, only the server can compare its base model.
    if adapter.base.len() != DIGEST && adapter.base != spec.model {
        return Err(StepError::invalid(format!(
            "the checkpoint `{}` was trained on `{}`, and this server has `{}`",
            checkpoint.name, adapter.base, spec.model
        )));
    }
    spec.adapters.as_ref().ok_or_else(|| {
        StepError::invalid(format!(
            "`{}` cannot answer as the checkpoint `{}`: its server is not known to take adapters",
            spec.model, checkpoint.name
        ))
        .help("say with `adapters:` of the model's entry which folder its server reads them from")
    })
}

/// A checkpoint that its server may not have yet.
struct WithAdapter {
    client: Arc<dyn Lm>,
    api: Api,
    id: String,
    from: PathBuf,
    to: PathBuf,
    seen_as: Option<PathBuf>,
    load: bool,
    /// Set once the server has it; held while it is given to it.
    ready: Mutex<bool>,
}

impl WithAdapter {
    fn make_ready(&self) -> Result<(), LmError> {
        let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        if *ready {
            return Ok(());
        }
        folder::copy_whole(&self.from, &self.to).map_err(|e| LmError::Rejected(e.message))?;
        if self.load {
            self.tell()?;
        }
        *ready = true;
        Ok(())
    }

    fn tell(&self) -> Result<(), LmError> {
        let here = std::path::absolute(&self.to).unwrap_or_else(|_| self.to.clone());
        let path = self.seen_as.as_ref().unwrap_or(&here);
        let body = json!({ "lora_name": self.id, "lora_path": path });
        match self.api.post(&["load_lora_adapter"], &body) {
            Ok(_) => Ok(()),
            // Of the same name is of the same values.
            Err(ApiError::Status { message, .. }) if message.contains("already been loaded") => {
                Ok(())
            }
            Err(ApiError::Cancelled) => Err(LmError::Cancelled),
            Err(error) if error.may_pass() => Err(LmError::Unavailable(error.to_string())),
            Err(error) => Err(LmError::Rejected(format!(
                "{error}; the server does not take the adapter in {}",
                path.display()
            ))),
        }
    }
}

impl Lm for WithAdapter {
    fn id(&self) -> &str {
        self.client.id()
    }

    fn complete(
        &self,
        requests: &[Request],
        on_answer: &OnAnswer<'_>,
    ) -> Vec<Result<Completion, LmError>> {
        if let Err(error) = self.make_ready() {
            let answers: Vec<_> = requests.iter().map(|_| Err(error.clone())).collect();
            answers
                .iter()
                .enumerate()
                .for_each(|(i, a)| on_answer(i, a));
            return answers;
        }
        self.client.complete(requests, on_answer)
    }
}
