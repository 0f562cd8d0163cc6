//! What a pipeline needs that this machine may lack: weights, keys, servers, downloads.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::time::Duration;

use flowrun_engine::pipeline::Pipeline;
use flowrun_engine::step::{Cancel, World};
use flowrun_lm::client::OpenAiSpec;
use flowrun_steps::download::find_local;
use flowrun_steps::hub::has_token;
use flowrun_steps::models::ModelSpec;
use flowrun_steps::models::weights::WeightsRef;
use serde_json::Value;

use super::Finding;

/// How long a server may take to say which models it has.
const SERVER_WITHIN: Duration = Duration::from_secs(5);

/// What the pipeline names: models, files, keys.
pub(super) fn needs(pipeline: &Pipeline, world: &World, found: &mut Vec<Finding>) {
    let mut packages = Vec::new();
    for (name, entry) in &pipeline.models {
        let what = format!("model {name}");
        match serde_json::from_value::<ModelSpec>(entry.clone()) {
            Ok(ModelSpec::OpenAi(spec)) => found.extend(server(&what, &spec, world)),
            Ok(ModelSpec::Embedded(spec)) => {
                found.push(weights(&what, &[&spec.weights], world, &mut packages));
            }
            Ok(ModelSpec::SentenceEncoder(spec)) => {
                let mut files = vec![&spec.weights, &spec.tokenizer];
                files.extend(&spec.config);
                found.push(weights(&what, &files, world, &mut packages));
            }
            Err(e) => found.push(Finding::missing(&what, e.to_string(), "correct the entry")),
        }
    }
    if !packages.is_empty() {
        found.push(package_client(&packages));
    }
    for step in &pipeline.steps {
        for (url, sha256) in downloads(&step.params) {
            found.push(download(
                &format!("step {}", step.name),
                &url,
                &sha256,
                world,
            ));
        }
    }
}

/// Whether files of weights are on this machine; packages that must be fetched go to `packages`.
fn weights(
    what: &str,
    files: &[&WeightsRef],
    world: &World,
    packages: &mut Vec<String>,
) -> Finding {
    let here = World {
        offline: true,
        ..world.clone()
    };
    let mut absent = Vec::new();
    for file in files {
        if let Err(error) = file.locate(&here, &Cancel::default()) {
            absent.push((file, error));
        }
    }
    let Some((file, error)) = absent.first() else {
        return Finding::ok(what, "its files are on this machine");
    };
    let source = match (&file.pip, &file.hf) {
        (Some(package), _) => format!("package {package}"),
        (None, Some(repo)) => format!("Hugging Face hub, {repo}"),
        (None, None) => {
            let help = error.help.as_deref().unwrap_or("put the file there");
            return Finding::missing(what, error.message.clone(), help);
        }
    };
    if world.offline {
        return Finding::missing(
            what,
            format!("its files ({source}) are not on this machine and `--offline` is set"),
            "run once without `--offline`, or put the files into the folder named by --distdir",
        );
    }
    packages.extend(absent.iter().filter_map(|(file, _)| file.pip.clone()));
    let help = if file.hf.is_some() && !has_token(world) {
        "a gated repository needs its terms accepted and HF_TOKEN set"
    } else {
        "nothing to do: the first run downloads them"
    };
    Finding::warn(
        what,
        format!("its files will be downloaded ({source})"),
        help,
    )
}

fn package_client(packages: &[String]) -> Finding {
    let version = Command::new("python3")
        .args(["-m", "pip", "--version"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output();
    let needed = packages.join(", ");
    match version {
        Ok(output) if output.status.success() => {
            let text = String::from_utf8_lossy(&output.stdout);
            let words: Vec<&str> = text.split_whitespace().take(2).collect();
            Finding::ok("package client", words.join(" "))
        }
        _ => Finding::missing(
            "package client",
            format!("`python3 -m pip` does not run; it downloads {needed}"),
            "install Python's pip, or put the files into the folder named by --distdir",
        ),
    }
}

/// The key of a model's server, and whether it answers and has the model.
fn server(what: &str, spec: &OpenAiSpec, world: &World) -> Vec<Finding> {
    let mut found = Vec::new();
    let key = spec
        .api_key_env
        .as_ref()
        .map(|name| (name, world.env.get(name)));
    match &key {
        Some((name, None)) => found.push(Finding::missing(
            what,
            format!("the environment variable `{name}` is not set"),
            "it holds the key of the model's server",
        )),
        Some((name, Some(_))) => found.push(Finding::ok(what, format!("the key `{name}` is set"))),
        None => {}
    }
    if world.offline {
        let help = "leave `--offline` out to ask the server";
        found.push(Finding::warn(what, "its server was not asked", help));
        return found;
    }
    let key = key.and_then(|(_, key)| key.cloned());
    found.push(match models_of(spec, key.as_deref()) {
        Ok(models) if models.contains(&spec.model) => {
            Finding::ok(what, format!("{} serves `{}`", spec.base_url, spec.model))
        }
        Ok(models) => Finding::missing(
            what,
            format!("{} does not serve `{}`", spec.base_url, spec.model),
            &format!("it serves {}", models.join(", ")),
        ),
        Err((why, help)) => Finding::missing(what, format!("{} {why}", spec.base_url), help),
    });
    found
}

/// The ids that `GET /models` lists; else what is wrong, and what to do.
fn models_of(spec: &OpenAiSpec, key: Option<&str>) -> Result<Vec<String>, (String, &'static str)> {
    let deaf = |why: String| {
        (
            format!("does not answer: {why}"),
            "start the server, or correct `base_url`",
        )
    };
    let url = format!("{}/models", spec.base_url.trim_end_matches('/'));
    let client = reqwest::blocking::Client::builder()
        .timeout(SERVER_WITHIN)
        .build()
        .map_err(|e| deaf(innermost(&e)))?;
    let mut request = client.get(url);
    if let Some(key) = key {
        request = request.bearer_auth(key);
    }
    let answer = request.send().map_err(|e| deaf(innermost(&e)))?;
    let status = answer.status();
    if matches!(status.as_u16(), 401 | 403) {
        let help = match key {
            Some(_) => "correct the key in the variable that `api_key_env` names",
            None => "set `api_key_env` to the variable that holds the key",
        };
        return Err((format!("does not let this user in: it says {status}"), help));
    }
    if !status.is_success() {
        return Err(deaf(format!("it says {status}")));
    }
    let list: Value = answer.json().map_err(|e| deaf(innermost(&e)))?;
    let models = list["data"].as_array().into_iter().flatten();
    Ok(models
        .filter_map(|model| model["id"].as_str().map(str::to_owned))
        .collect())
}

fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// Every `url` with a `sha256` in a step's params.
fn downloads(params: &Value) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    let mut left = vec![params];
    while let Some(value) = left.pop() {
        if let (Some(url), Some(sha256)) = (value["url"].as_str(), value["sha256"].as_str()) {
            all.insert(url.to_owned(), sha256.to_owned());
        }
        match value {
            Value::Object(map) => left.extend(map.values()),
            Value::Array(list) => left.extend(list),
            _ => {}
        }
    }
    all
}

fn download(what: &str, url: &str, sha256: &str, world: &World) -> Finding {
    if find_local(sha256, world).is_some() {
        return Finding::ok(what, format!("{url} is on this machine"));
    }
    if world.offline {
        return Finding::missing(
            what,
            format!("{url} is not on this machine and `--offline` is set"),
            "put the file into the folder named by --distdir",
        );
    }
    match reaches(url) {
        Ok(()) => Finding::ok(
            what,
            format!("{url} will be downloaded; its server answers"),
        ),
        Err(why) => Finding::missing(
            what,
            format!("{url} is not on this machine, and its server does not answer: {why}"),
            "put the file into the folder named by --distdir",
        ),
    }
}

/// Whether a URL's server takes a request for it.
fn reaches(url: &str) -> Result<(), String> {
    let client = reqwest::blocking::Client::builder()
        .timeout(SERVER_WITHIN)
        .build()
        .map_err(|e| innermost(&e))?;
    let answer = client.head(url).send().map_err(|e| innermost(&e))?;
    if answer.status().is_client_error() || answer.status().is_server_error() {
        return Err(format!("it says {}", answer.status()));
    }
    Ok(())
}
