//! `flowrun doctor`: what this machine lacks to run a pipeline. Looks only: it downloads
//! nothing, and asks a model's server no more than which models it has.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use console::style;
use flowrun_cache::{FileSystem, LockWait, Reach, Survey};
use flowrun_engine::pipeline::Pipeline;
use flowrun_engine::step::{Cancel, World};
use flowrun_lm::client::OpenAiSpec;
use flowrun_steps::download::find_local;
use flowrun_steps::hub::has_token;
use flowrun_steps::models::ModelSpec;
use flowrun_steps::models::weights::WeightsRef;
use serde::Serialize;
use serde_json::Value;

use crate::args::{DoctorArgs, GlobalArgs};
use crate::exit::{Exit, Failure};
use crate::output::{self, bytes};
use crate::surroundings;

/// Free bytes below which a run may fill the disk.
const LITTLE_SPACE: u64 = 2_000_000_000;
/// How long a server may take to say which models it has.
const SERVER_WITHIN: Duration = Duration::from_secs(5);

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    /// All is there.
    Ok,
    /// It will do, but.
    Warn,
    /// Something is missing that a run needs.
    Missing,
}

/// One line of the report.
#[derive(Debug, Serialize)]
struct Finding {
    what: String,
    status: Status,
    text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    help: Option<String>,
    #[serde(skip)]
    exit: Exit,
}

impl Finding {
    fn ok(what: &str, text: impl Into<String>) -> Self {
        Self {
            what: what.to_owned(),
            status: Status::Ok,
            text: text.into(),
            help: None,
            exit: Exit::Ok,
        }
    }
    fn warn(what: &str, text: impl Into<String>, help: &str) -> Self {
        Self {
            status: Status::Warn,
            help: Some(help.to_owned()),
            ..Self::ok(what, text)
        }
    }
    fn missing(what: &str, text: impl Into<String>, help: &str) -> Self {
        Self {
            status: Status::Missing,
            help: Some(help.to_owned()),
            exit: Exit::Invalid,
            ..Self::ok(what, text)
        }
    }
}

/// Looks at the machine, and at what the pipeline names. Exit code 6 when the cache cannot be
/// used, 3 when something else is missing.
pub(crate) fn doctor(args: &DoctorArgs, global: &GlobalArgs) -> Result<Exit, Failure> {
    let mut found = vec![machine(), cache(global), disk(&global.cache_dir)];
    found.extend(locks(&global.cache_dir));
    found.extend(remote(global));
    let named = args.select.pipeline.is_some();
    match surroundings::load(&args.select, global) {
        Ok(loaded) => {
            let (pipeline, world) = (&loaded.pipeline, &loaded.world);
            let text = format!("{}: no errors", pipeline.file.display());
            found.push(Finding::ok("pipeline", text));
            needs(pipeline, world, &mut found);
        }
        // Without a pipeline the machine alone is looked at.
        Err(failure) if failure.exit() == Exit::Usage && !named => {}
        Err(failure) => found.push(Finding::missing(
            "pipeline",
            failure.to_string().trim_end(),
            "`flowrun check` says the same",
        )),
    }
    let exits = found.iter().map(|f| f.exit);
    let exit = exits.max_by_key(|exit| *exit as u8).unwrap_or(Exit::Ok);
    if global.json {
        output::json(&found)?;
    } else {
        output::print(&found.iter().map(text).collect::<String>())?;
    }
    Ok(exit)
}

fn text(finding: &Finding) -> String {
    let mark = match finding.status {
        Status::Ok => style("ok     ").green(),
        Status::Warn => style("warning").yellow(),
        Status::Missing => style("missing").red().bold(),
    };
    let mut lines = finding.text.lines();
    let mut out = format!("{mark}  {}: {}\n", finding.what, lines.next().unwrap_or(""));
    for line in lines {
        out.push_str(&format!("         {line}\n"));
    }
    if let Some(help) = &finding.help {
        out.push_str(&format!("         {} {help}\n", style("help:").cyan()));
    }
    out
}

fn machine() -> Finding {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let free = info.lines().find_map(|line| {
        let kib = line
            .strip_prefix("MemAvailable:")?
            .trim()
            .strip_suffix("kB")?;
        Some(kib.trim().parse::<u64>().ok()? << 10)
    });
    let memory = free.map(|free| format!(", {} of memory free", bytes(free)));
    Finding::ok(
        "machine",
        format!(
            "flowrun {}, {}{}",
            env!("CARGO_PKG_VERSION"),
            output::count(cores, "core"),
            memory.unwrap_or_default()
        ),
    )
}

/// Whether the cache can be written, and who holds it.
fn cache(global: &GlobalArgs) -> Finding {
    let dir = &global.cache_dir;
    let place = dir.display();
    if !dir.exists() {
        let there = |path: &&Path| path.exists() || path.as_os_str().is_empty();
        let around = match dir.ancestors().skip(1).find(there) {
            Some(path) if !path.as_os_str().is_empty() => path,
            _ => Path::new("."),
        };
        return match tempfile::tempfile_in(around) {
            Ok(_) => Finding::ok("cache", format!("{place} is made by the first run")),
            Err(e) => unusable(format!("{place} cannot be made: {e}")),
        };
    }
    match surroundings::hold_cache(global, LockWait::NoWait) {
        Ok(cache) => {
            let size = Survey::of(cache.dir()).total().bytes;
            Finding::ok("cache", format!("{place}, {}, free to use", bytes(size)))
        }
        Err(failure) if failure.is_locked() => Finding::warn(
            "cache",
            failure.to_string(),
            "a run waits for it, unless `--no-wait` is given",
        ),
        Err(failure) => unusable(failure.to_string()),
    }
}

/// Whether the cache folder can be used from several machines, where they may see it.
fn locks(cache_dir: &Path) -> Option<Finding> {
    let found = FileSystem::of(cache_dir)?;
    let what = "cache folder";
    let kind = &found.kind;
    let several = "one run after the other; for several at once give each machine a cache folder of its own and a common `--remote`";
    match found.reach {
        Reach::Local => None,
        Reach::All => Some(Finding::ok(
            what,
            format!("on {kind}, whose locks hold for all machines: their runs wait for each other"),
        )),
        Reach::Unknown => Some(Finding::warn(
            what,
            format!(
                "on {kind}: it is not known whether its locks hold for other machines that see it"
            ),
            several,
        )),
        Reach::ThisMachine | Reach::None => Some(Finding::warn(
            what,
            found.danger().unwrap_or_default(),
            several,
        )),
    }
}

/// Whether the remote cache, if one is named, lets itself be read.
fn remote(global: &GlobalArgs) -> Option<Finding> {
    let what = "remote cache";
    let help = "runs go on without it; look at the URL, the server and the credentials (AWS_…, GOOGLE_…, AZURE_…)";
    let remote = match surroundings::open_remote(global) {
        Some(Ok(remote)) => remote,
        Some(Err(error)) => return Some(Finding::missing(what, error.to_string(), help)),
        None if global.remote.is_some() => {
            let help = "leave `--offline` out to ask it";
            return Some(Finding::warn(what, "it was not asked", help));
        }
        None => return None,
    };
    let url = remote.url();
    Some(match remote.check() {
        Ok(()) if remote.is_read_only() => Finding::ok(what, format!("{url} can be read")),
        Ok(()) => {
            let waiting = match remote.waiting() {
                0 => String::new(),
                n => format!("; {} to be sent", output::count(n, "result")),
            };
            Finding::ok(what, format!("{url} can be read{waiting}"))
        }
        Err(why) => Finding::warn(what, format!("{url} cannot be read: {why}"), help),
    })
}

fn unusable(text: String) -> Finding {
    Finding {
        exit: Exit::Cache,
        ..Finding::missing("cache", text, "choose another place with `--cache-dir`")
    }
}

#[allow(
    clippy::useless_conversion,
    reason = "the counts are narrower on other systems"
)]
fn disk(cache_dir: &Path) -> Finding {
    let there = cache_dir
        .ancestors()
        .find(|p| p.is_dir())
        .unwrap_or(Path::new("."));
    match nix::sys::statvfs::statvfs(there) {
        Err(e) => Finding::warn(
            "disk",
            format!("its space is not known: {e}"),
            "look at it with `df`",
        ),
        Ok(stat) => {
            let free = u64::from(stat.blocks_available()) * u64::from(stat.fragment_size());
            let text = format!("{} free", bytes(free));
            if free < LITTLE_SPACE {
                return Finding::warn("disk", text, "`flowrun cache gc --max-size 0` makes room");
            }
            Finding::ok("disk", text)
        }
    }
}

/// What the pipeline names: models, files, keys.
fn needs(pipeline: &Pipeline, world: &World, found: &mut Vec<Finding>) {
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
