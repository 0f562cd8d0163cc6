//! Models behind an OpenAI-compatible server, and the adapters of checkpoints there
//! (`with_adapter`).
//!
//! Invariant: an id at a server stands for the same values for ever, as it ends with their digest.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use flowrun_cache::Digest;
use flowrun_engine::step::StepError;
use flowrun_lm::client::{AdapterPlace, Api, Batched, OnWarning, OpenAi, OpenAiSpec};
use flowrun_lm::lm::{Ledger, Lm};
use serde_json::{Value, json};

use super::adapter_place::Place;
use super::with_adapter::WithAdapter;
use super::{Host, traced};
use crate::checkpoint::{Adapter, Checkpoint};

/// Length of a digest in hexadecimal: what names a base model that is known by more than a name.
const DIGEST: usize = 64;

/// A server's model, or a checkpoint of it; its chat template is told `told`.
pub(super) fn open_lm(
    spec: &OpenAiSpec,
    told: BTreeMap<String, Value>,
    checkpoint: Option<(&Path, &Checkpoint)>,
    host: &Host<'_>,
) -> Result<Arc<dyn Lm>, StepError> {
    let client = |model: &str| client(spec, &told, model, host);
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
    let reporter = host.step.map(|ctx| Arc::clone(&ctx.reporter));
    let name = checkpoint.unique_name();
    let id = format!("{}:{name}", spec.model);
    let place = Place::of(place, &spec.model, &name, host)?;
    Ok(Arc::new(WithAdapter {
        client: client(&id)?,
        api: api(spec, host)?,
        id,
        from: folder.to_owned(),
        unseen_for: place.unseen_for(),
        place,
        cancel: host.cancel.clone(),
        given: Mutex::default(),
        // It may come again and again.
        on_forgotten: Box::new(move |text, is_first| match &reporter {
            Some(reporter) if is_first => reporter.warning(text),
            Some(reporter) => reporter.log(text),
            None => tracing::warn!(text),
        }),
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

/// The entry's server, asked for the answers of `model`; all its models have one budget, whatever
/// their chat templates are told.
fn client(
    entry: &OpenAiSpec,
    told: &BTreeMap<String, Value>,
    model: &str,
    host: &Host<'_>,
) -> Result<Arc<dyn Lm>, StepError> {
    let ledger = ledger(entry, host)?;
    let spec = &OpenAiSpec {
        chat_template_kwargs: told.clone(),
        ..entry.clone()
    };
    let on_warning = on_warning(host);
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
        let client = Batched::new(&spec, api, folder, ledger, Box::new(told));
        return Ok(Arc::new(client.warning(on_warning)));
    }
    let (cancel, kill) = (host.cancel.clone(), host.cancel.clone());
    // The budget is bounded by its file; the limits hold in one process.
    let own = spec.shared_by(host.step.map_or(1, |ctx| ctx.at_once));
    let client = OpenAi::new(
        &own,
        key(spec, host)?,
        Arc::new(move || cancel.is_cancelled()),
    )
    .map_err(|e| StepError::failed(e.to_string()))?;
    let client = client
        .killed_by(Arc::new(move || kill.is_killed()))
        .as_model(model)
        .with_ledger(ledger)
        .warning(on_warning);
    Ok(Arc::new(client.heard_by(traced::on_call(host.step))))
}

/// Where a person reads what should be known of a server's answers.
fn on_warning(host: &Host<'_>) -> Option<OnWarning> {
    let reporter = Arc::clone(&host.step?.reporter);
    Some(Arc::new(move |text: &str| reporter.warning(text)))
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
    // Against a digest, only the server can compare its base model. What was trained on a model of
    // the hub names its commit too, which a server's name has not; but a server's name may have `@`.
    let base = adapter.base.split_once('@');
    let base = base.map_or(adapter.base.as_str(), |(repository, _)| repository);
    let fits = adapter.base == spec.model || base == spec.model || base.len() == DIGEST;
    if !fits {
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
        .help("say with `adapters:` of the model's entry which folder or URL its server reads them from")
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::format_version::FormatVersion;

    #[test]
    fn a_server_is_given_the_adapters_of_its_own_model() {
        let commit = "0123456789abcdef0123456789abcdef01234567";
        for (model, base, fits) in [
            ("org/base", "org/base".to_owned(), true),
            ("org/base", format!("org/base@{commit}"), true),
            ("org/base", "a".repeat(DIGEST), true),
            ("org/base", "org/other".to_owned(), false),
            ("org/base", format!("org/other@{commit}"), false),
            ("m@v2", "m@v2".to_owned(), true),
            ("m@v2", "m@v3".to_owned(), false),
            ("@cf/m", "@cf/m".to_owned(), true),
        ] {
            let spec =
                json!({"base_url": "http://h/v1", "model": model, "adapters": {"folder": "a"}});
            let spec: OpenAiSpec = serde_json::from_value(spec).unwrap();
            let adapter = Adapter {
                digest: "d".to_owned(),
                base: base.clone(),
            };
            let checkpoint = Checkpoint {
                version: FormatVersion,
                name: "epochs-1-total-trained-steps-8".to_owned(),
                epoch: 1,
                step: 8,
                adapter: Some(adapter.clone()),
                hosted: None,
                chat_template_kwargs: None,
                lineage: None,
            };
            assert_eq!(place(&spec, &checkpoint, &adapter).is_ok(), fits, "{base}");
        }
    }
}
