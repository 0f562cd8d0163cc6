//! A run on an MLflow tracking server (`MLFLOW_TRACKING_URI`): one MLflow run, with the
//! pipeline's params, the metrics of each step under its name (`evaluate/epoch-2/accuracy`), the
//! curve of the loss, the report, and what the pipeline names besides.
//!
//! One run and not one for each step: MLflow groups metrics by what is before the `/`, compares
//! runs by them, and its table of runs stays a table of runs.
//!
//! | file | what |
//! |---|---|
//! | `api` | the server's REST API |

mod api;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use flowrun_cache::{Artifact, CacheReader, Digest, OutputValue};
use flowrun_engine::event::{RunEvent, StepStatus};
use flowrun_engine::record::RunRecord;
use flowrun_engine::tracking::{MlflowTracking, TrackedOutput};
use serde_json::{Value, json};

use self::api::{Api, ApiError, RunInfo};
use super::{Heartbeat, Tracker};

/// Metrics of one call, of the 1000 that MLflow takes.
const METRICS: usize = 900;
/// Params or tags of one call.
const PARAMS: usize = 100;
/// Bytes of a name.
const NAME: usize = 250;
/// Characters of a param's value.
const PARAM_VALUE: usize = 6000;
/// Characters of a tag's value.
const TAG_VALUE: usize = 5000;
/// Steps that failed, in the run's description.
const FAILURES: usize = 20;
/// Bytes of a curve that is read.
const CURVE: u64 = 64 << 20;
/// Different warnings that are told.
const WARNINGS: usize = 5;

/// What the environment and the pipeline say.
pub(super) struct Settings {
    uri: String,
    env: BTreeMap<String, String>,
    tracking: MlflowTracking,
    cache_dir: PathBuf,
}

impl Settings {
    /// `None` when no server is named.
    pub(super) fn of(
        env: &BTreeMap<String, String>,
        tracking: &MlflowTracking,
        cache_dir: &Path,
    ) -> Option<Self> {
        let uri = env.get("MLFLOW_TRACKING_URI").map(|uri| uri.trim());
        let uri = uri.filter(|uri| !uri.is_empty())?.to_owned();
        // A folder or database of others is no server, and nobody asked for one.
        let is_web = uri.starts_with("http://") || uri.starts_with("https://");
        if !is_web && *tracking == MlflowTracking::default() {
            return None;
        }
        Some(Self {
            uri,
            env: env.clone(),
            tracking: tracking.clone(),
            cache_dir: cache_dir.to_owned(),
        })
    }
}

/// Tells a server of a run.
pub(super) struct Mlflow {
    api: Api,
    settings: Settings,
    run: Option<RunInfo>,
    /// The server does not answer: nothing more is sent.
    gave_up: bool,
    /// Metrics that were not sent yet.
    metrics: Vec<Value>,
    /// Steps that failed, and why.
    failures: Vec<String>,
    /// Results of steps whose outputs are artifacts: step id to key.
    keys: BTreeMap<String, String>,
    /// The report's figures.
    report: Option<PathBuf>,
    warnings: Vec<String>,
    /// Warnings beyond those.
    more: usize,
}

impl Mlflow {
    /// # Errors
    /// When the environment names no server.
    pub(super) fn new(settings: Settings, beat: Heartbeat) -> Result<Self, String> {
        Ok(Self {
            api: Api::new(&settings.uri, &settings.env, beat)?,
            settings,
            run: None,
            gave_up: false,
            metrics: Vec::new(),
            failures: Vec::new(),
            keys: BTreeMap::new(),
            report: None,
            warnings: Vec::new(),
            more: 0,
        })
    }

    /// Keeps what went wrong; one that does not answer is not asked again.
    fn check<T>(&mut self, what: &str, result: Result<T, ApiError>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.gave_up |= matches!(error, ApiError::Unreachable(_));
                self.warn(format!("{what}: {error}"));
                None
            }
        }
    }

    fn warn(&mut self, text: String) {
        if self.warnings.contains(&text) {
            return;
        }
        match self.warnings.len() < WARNINGS {
            true => self.warnings.push(text),
            false => self.more += 1,
        }
    }

    fn begin(&mut self, at: SystemTime, run: &str, pipeline: &str) {
        let named = self.settings.tracking.experiment.clone();
        let of_env = |name: &str| {
            let value = self.settings.env.get(name).cloned();
            value.filter(|value| !value.is_empty())
        };
        let experiment = match of_env("MLFLOW_EXPERIMENT_ID").filter(|_| named.is_none()) {
            Some(id) => Ok(id),
            None => {
                let name = named.or_else(|| of_env("MLFLOW_EXPERIMENT_NAME"));
                let name = name.unwrap_or_else(|| pipeline.to_owned());
                self.api.experiment(&name)
            }
        };
        let Some(experiment) = self.check("the experiment", experiment) else {
            self.gave_up = true;
            return;
        };
        let run_dir = self.settings.cache_dir.join("runs").join(run);
        let plan = RunRecord::load_plan(&run_dir).unwrap_or_default();
        let user = self.settings.env.get("USER").cloned();
        let tags = [
            ("mlflow.source.name", plan.file.display().to_string()),
            ("mlflow.source.type", "LOCAL".to_owned()),
            ("mlflow.user", user.unwrap_or_default()),
            ("flowrun.run", run.to_owned()),
            ("flowrun.pipeline", pipeline.to_owned()),
            ("flowrun.profiles", plan.profiles.join(",")),
            ("flowrun.version", env!("CARGO_PKG_VERSION").to_owned()),
        ];
        let tags = tags.into_iter().filter(|(_, value)| !value.is_empty());
        let body = json!({
            "experiment_id": experiment,
            "start_time": millis(at),
            "run_name": run,
            "tags": tags.map(|(name, value)| pair(name, &value, TAG_VALUE)).collect::<Vec<_>>(),
        });
        let begun = self.api.begin(&body);
        self.run = self.check("the run cannot be begun", begun);
        self.gave_up |= self.run.is_none();
        let params: Vec<Value> = plan
            .params
            .iter()
            .map(|(name, value)| pair(&valid(name), &plain(value), PARAM_VALUE))
            .collect();
        for some in params.chunks(PARAMS) {
            self.log("params", &json!({ "params": some }));
        }
    }

    /// Logs a batch, with the run's id.
    fn log(&mut self, what: &str, batch: &Value) {
        let Some(run) = self.run.as_ref().filter(|_| !self.gave_up) else {
            return;
        };
        let mut body = batch.clone();
        body["run_id"] = json!(run.id);
        let logged = self.api.post("runs/log-batch", &body);
        self.check(what, logged);
    }

    fn flush(&mut self) {
        let metrics = std::mem::take(&mut self.metrics);
        for some in metrics.chunks(METRICS) {
            self.log("metrics", &json!({ "metrics": some }));
        }
    }

    fn step_ended(&mut self, at: SystemTime, event: &RunEvent) {
        let RunEvent::StepFinished {
            step,
            kind,
            status,
            key,
            why,
            outputs,
            metrics,
            ..
        } = event
        else {
            return;
        };
        if *status == StepStatus::Failed && self.failures.len() < FAILURES {
            self.failures.push(format!("`{step}`: {why}"));
        }
        let at = millis(at);
        let prefix = valid(step);
        let mut curves = BTreeSet::new();
        for output in outputs.values().filter(|output| output.ty == "loss") {
            let points = curve(Path::new(&output.path));
            for (name, value, step) in points {
                self.metrics
                    .push(metric(&format!("{prefix}/{name}"), value, at, step));
                curves.insert(name);
            }
        }
        let mut texts = Vec::new();
        for (name, value) in metrics {
            let whole = format!("{prefix}/{}", valid(name));
            match (value.as_f64(), value) {
                // Its last point is the same.
                (Some(_), _) if curves.contains(name) => {}
                (Some(number), _) => self.metrics.push(metric(&whole, number, at, 0)),
                (None, Value::Null) => {}
                (None, other) => texts.push(pair(&whole, &plain(other), TAG_VALUE)),
            }
        }
        for some in texts.chunks(PARAMS) {
            self.log("tags", &json!({ "tags": some }));
        }
        if kind == "report" {
            let json = outputs.get("json");
            self.report = json.map(|output| PathBuf::from(&output.path));
        }
        let (name, _) = parts(step);
        if !key.is_empty() && self.wanted().any(|wanted| wanted.step == name) {
            self.keys.insert(step.clone(), key.clone());
        }
        if self.metrics.len() >= METRICS {
            self.flush();
        }
    }

    /// The outputs that the pipeline names.
    fn wanted(&self) -> impl Iterator<Item = &TrackedOutput> {
        let tracking = &self.settings.tracking;
        let registered = tracking.register.iter().map(|register| &register.output);
        tracking.artifacts.iter().chain(registered)
    }

    fn finish(&mut self, at: SystemTime, ok: bool, failed: usize, run_dir: &Path) {
        self.flush();
        self.send_report(run_dir);
        let artifacts = self.settings.tracking.artifacts.clone();
        for output in &artifacts {
            self.send_outputs(output);
        }
        if ok {
            self.register();
        }
        if !self.failures.is_empty() {
            let text = format!("Failed:\n\n- {}", self.failures.join("\n- "));
            let note = pair("mlflow.note.content", &text, TAG_VALUE);
            self.log("the description", &json!({ "tags": [note] }));
        }
        let status = match (ok, failed) {
            (true, _) => "FINISHED",
            (false, 0) => "KILLED",
            (false, _) => "FAILED",
        };
        self.close(at, status);
    }

    fn close(&mut self, at: SystemTime, status: &str) {
        let Some(run) = self.run.take().filter(|_| !self.gave_up) else {
            return;
        };
        let body = json!({ "run_id": run.id, "status": status, "end_time": millis(at) });
        let closed = self.api.post("runs/update", &body);
        self.check("the run's end", closed);
    }

    fn send_report(&mut self, run_dir: &Path) {
        let page = run_dir.join("report.html");
        let figures = self.report.take();
        let files = [(Some(page), "report.html"), (figures, "report.json")];
        for (file, name) in files {
            if let Some(file) = file.filter(|file| file.is_file()) {
                self.put(name, &file);
            }
        }
    }

    fn put(&mut self, path: &str, file: &Path) -> Option<()> {
        let run = self.run.clone().filter(|_| !self.gave_up)?;
        let put = self.api.put(&run, path, file);
        self.check("artifacts", put)
    }

    /// Sends an output of a step, or of all its items.
    fn send_outputs(&mut self, wanted: &TrackedOutput) {
        let of_step = self
            .keys
            .iter()
            .filter(|(id, _)| parts(id).0 == wanted.step);
        let results: Vec<(String, String)> =
            of_step.map(|(id, key)| (valid(id), key.clone())).collect();
        for (step, key) in results {
            for (label, artifact) in self.artifacts(&key, &wanted.output) {
                let label = label.map(|label| format!("/{label}")).unwrap_or_default();
                self.send(&format!("{step}/{}{label}", wanted.output), &artifact);
            }
        }
    }

    /// The artifacts of a result's output: of a list each with its label.
    fn artifacts(&mut self, key: &str, output: &str) -> Vec<(Option<String>, Artifact)> {
        let reader = CacheReader::open(&self.settings.cache_dir);
        let key = Digest::parse(key);
        let result = key.and_then(|key| reader.actions().get(&key));
        let found = result.and_then(|mut result| result.outputs.remove(output));
        match found.map(|record| record.value) {
            Some(OutputValue::One(artifact)) => vec![(None, artifact)],
            Some(OutputValue::List(items)) => {
                let items = items.into_iter();
                items
                    .map(|item| (Some(item.label), item.artifact))
                    .collect()
            }
            None => {
                self.warn(format!("the output `{output}` is no longer in the cache"));
                Vec::new()
            }
        }
    }

    /// Sends a file or folder of the store, verified.
    fn send(&mut self, path: &str, artifact: &Artifact) -> Option<()> {
        self.run.as_ref().filter(|_| !self.gave_up)?;
        let reader = CacheReader::open(&self.settings.cache_dir);
        let folder = match tempfile::tempdir() {
            Ok(folder) => folder,
            Err(error) => {
                self.warn(format!("artifacts: no folder can be made: {error}"));
                return None;
            }
        };
        let place = folder.path().join("artifact");
        if let Err(error) = reader.store().materialize(artifact, &place) {
            self.warn(format!("artifacts: {error}"));
            return None;
        }
        for (below, file) in files(&place) {
            let whole = match below.is_empty() {
                true => path.to_owned(),
                false => format!("{path}/{below}"),
            };
            self.put(&whole, &file)?;
        }
        Some(())
    }

    /// Makes the output that the pipeline names a version of a registered model.
    fn register(&mut self) -> Option<()> {
        let register = self.settings.tracking.register.clone()?;
        let key = self.keys.get(&register.output.step)?.clone();
        let found = self.artifacts(&key, &register.output.output);
        let (_, artifact) = found.into_iter().next()?;
        let path = format!(
            "{}/{}",
            valid(&register.output.step),
            register.output.output
        );
        self.send(&path, &artifact)?;
        let run = self.run.clone()?;
        let what = format!("the model `{}`", register.name);
        let name = json!({ "name": register.name });
        match self.api.post("registered-models/create", &name) {
            Err(ApiError::Refused { code, .. }) if code == "RESOURCE_ALREADY_EXISTS" => {}
            other => {
                self.check(&what, other)?;
            }
        }
        let version = json!({
            "name": register.name,
            "source": format!("{}/{path}", run.artifact_uri),
            "run_id": run.id,
        });
        let made = self.api.post("model-versions/create", &version);
        self.check(&what, made).map(|_| ())
    }
}

impl Tracker for Mlflow {
    fn hear(&mut self, at: SystemTime, event: &RunEvent) {
        if self.gave_up {
            return;
        }
        match event {
            RunEvent::RunStarted { run, pipeline, .. } => self.begin(at, run, pipeline),
            RunEvent::StepFinished { .. } => self.step_ended(at, event),
            RunEvent::RunFinished {
                ok,
                failed,
                run_dir,
                ..
            } => self.finish(at, *ok, *failed, Path::new(run_dir)),
            RunEvent::StepExpanded { .. }
            | RunEvent::StepStarted { .. }
            | RunEvent::Progress { .. }
            | RunEvent::Warning { .. }
            | RunEvent::StepRetry { .. }
            | RunEvent::Span { .. }
            | RunEvent::Recorded { .. }
            | RunEvent::Uploading { .. }
            | RunEvent::Uploaded { .. } => {}
        }
    }

    fn pause(&mut self) {
        self.flush();
    }

    fn end(mut self) -> Vec<String> {
        // It broke off.
        self.close(SystemTime::now(), "KILLED");
        if self.more > 0 {
            let more = format!("and {} more went wrong", self.more);
            self.warnings.push(more);
        }
        self.warnings
    }
}

fn millis(at: SystemTime) -> u64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn metric(name: &str, value: f64, at: u64, step: u64) -> Value {
    json!({ "key": cut(name, NAME), "value": value, "timestamp": at, "step": step })
}

fn pair(name: &str, value: &str, longest: usize) -> Value {
    json!({ "key": cut(name, NAME), "value": cut(value, longest) })
}

/// The first characters.
fn cut(text: &str, longest: usize) -> String {
    text.chars().take(longest).collect()
}

/// A value as people write it.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// A step's name, and its item.
fn parts(step: &str) -> (&str, Option<&str>) {
    match step.split_once('[') {
        Some((name, item)) => (name, Some(item.strip_suffix(']').unwrap_or(item))),
        None => (step, None),
    }
}

/// A name that MLflow takes: `evaluate[epoch 2]` becomes `evaluate/epoch 2`. Letters, digits, `_`,
/// `-`, `.`, spaces and `/`; a path without empty or dotted parts.
fn valid(name: &str) -> String {
    let (name, item) = parts(name);
    let whole = match item {
        Some(item) => format!("{name}/{}", item.replace('/', "_")),
        None => name.to_owned(),
    };
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_-. /".contains(c);
    let whole: String = whole
        .chars()
        .map(|c| if allowed(c) { c } else { '_' })
        .collect();
    let segments = whole.split('/').map(|part| match part {
        "" | "." | ".." => "_",
        part => part,
    });
    segments.collect::<Vec<_>>().join("/")
}

/// The points of a curve: name, value, step.
fn curve(file: &Path) -> Vec<(String, f64, u64)> {
    let small = std::fs::metadata(file).is_ok_and(|meta| meta.len() <= CURVE);
    let bytes = match small {
        true => std::fs::read(file).unwrap_or_default(),
        false => Vec::new(),
    };
    let points: Vec<BTreeMap<String, Value>> = serde_json::from_slice(&bytes).unwrap_or_default();
    let mut all = Vec::new();
    for point in points {
        let Some(step) = point.get("step").and_then(Value::as_u64) else {
            continue;
        };
        let values = point.iter().filter(|(name, _)| *name != "step");
        all.extend(values.filter_map(|(name, value)| Some((valid(name), value.as_f64()?, step))));
    }
    all
}

/// The files of a folder, or the file itself, with their paths below it.
fn files(place: &Path) -> Vec<(String, PathBuf)> {
    if place.is_file() {
        return vec![(String::new(), place.to_owned())];
    }
    let mut all = Vec::new();
    let mut folders = vec![(String::new(), place.to_owned())];
    while let Some((below, folder)) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let below = match below.is_empty() {
                true => name,
                false => format!("{below}/{name}"),
            };
            match entry.path() {
                path if path.is_dir() => folders.push((below, path)),
                path => all.push((below, path)),
            }
        }
    }
    all.sort();
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_mlflow_takes() {
        for (name, expected) in [
            ("load", "load"),
            ("evaluate[epoch-2]", "evaluate/epoch-2"),
            ("frequent/rank", "frequent/rank"),
            ("a[x/../y: ü]", "a/x_.._y_ _"),
            ("../a//b", "_/a/_/b"),
        ] {
            assert_eq!(valid(name), expected);
        }
    }

    #[test]
    fn a_curve_has_a_point_for_each_number_of_a_step() -> std::io::Result<()> {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("loss");
        std::fs::write(
            &file,
            r#"[{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.5, "x": "y"}, {}]"#,
        )?;
        let expected = [("loss".to_owned(), 2.5, 1), ("loss".to_owned(), 1.5, 2)];
        assert_eq!(curve(&file), expected);
        std::fs::write(&file, "nonsense")?;
        assert!(curve(&file).is_empty() && curve(folder.path()).is_empty());
        Ok(())
    }

    #[test]
    fn a_folder_of_others_is_no_server() {
        let env = |uri: &str| BTreeMap::from([("MLFLOW_TRACKING_URI".to_owned(), uri.to_owned())]);
        let none = MlflowTracking::default();
        let some = MlflowTracking {
            experiment: Some("x".to_owned()),
            ..MlflowTracking::default()
        };
        let is_on =
            |uri: &str, tracking| Settings::of(&env(uri), tracking, Path::new("")).is_some();
        assert!(is_on("http://localhost:5000", &none));
        assert!(!is_on("file:./mlruns", &none) && !is_on(" ", &some));
        // Who names an experiment is told.
        assert!(is_on("file:./mlruns", &some));
    }
}
