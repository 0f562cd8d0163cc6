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
//! | `artifacts` | files, and the registered model |
//! | `entries` | params, metrics and tags |

mod api;
mod artifacts;
mod entries;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use flowrun_engine::event::{RunEvent, StepStatus};
use flowrun_engine::record::RunRecord;
use flowrun_engine::tracking::{MlflowTracking, TrackedOutput};
use serde_json::{Value, json};

use self::api::{Api, ApiError, RunInfo};
use self::entries::{metric, pair, plain};
use super::points::{curve, parts, valid};
use super::{Heartbeat, Tracker};

/// Metrics of one call, of the 1000 that MLflow takes.
const METRICS: usize = 900;
/// Params or tags of one call.
const PARAMS: usize = 100;
/// Characters of a param's value.
const PARAM_VALUE: usize = 6000;
/// Characters of a tag's value.
const TAG_VALUE: usize = 5000;
/// Steps that failed, in the run's description.
const FAILURES: usize = 20;
/// Different warnings that are told.
const WARNINGS: usize = 5;
/// How long a file may not move on its way out of the store and to the server. One that has it
/// all may copy it to a bucket before it answers.
const STALL: Duration = Duration::from_secs(600);

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
    /// The server does not answer: nothing more is sent but the run's end.
    gave_up: bool,
    /// A file did not get there in time: no more files are sent.
    stalled: bool,
    beat: Heartbeat,
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
            api: Api::new(&settings.uri, &settings.env, beat.clone())?,
            settings,
            run: None,
            gave_up: false,
            stalled: false,
            beat,
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
                self.stalled |= matches!(error, ApiError::Stalled(_));
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
        self.close(at, status(ok, failed));
    }

    /// Ends the run, also on a server that did not answer before: else it goes on there for ever.
    fn close(&mut self, at: SystemTime, status: &str) {
        let Some(run) = self.run.take() else {
            return;
        };
        // The calls before it may have taken all patience.
        self.beat.beat();
        let body = json!({ "run_id": run.id, "status": status, "end_time": millis(at) });
        let closed = self.api.post("runs/update", &body);
        // That it does not answer was told.
        if closed.is_ok() || !self.gave_up {
            self.check("the run's end", closed);
        }
    }
}

impl Tracker for Mlflow {
    fn hear(&mut self, at: SystemTime, event: &RunEvent) {
        if self.gave_up {
            if let RunEvent::RunFinished { ok, failed, .. } = event {
                self.close(at, status(*ok, *failed));
            }
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

/// MLflow's word for how a run ended.
fn status(ok: bool, failed: usize) -> &'static str {
    match (ok, failed) {
        (true, _) => "FINISHED",
        (false, 0) => "KILLED",
        (false, _) => "FAILED",
    }
}

fn millis(at: SystemTime) -> u64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

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
