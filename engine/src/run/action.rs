//! One action: look it up, else run it in a scratch folder and store what it
//! made. Blocking; knows nothing of other actions.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use flowrun_cache::action::ACTION_VERSION;
use flowrun_cache::{
    ActionKey, ActionResult, Artifact, ArtifactKind, Cache, CacheError, ListItem, OutputRecord,
    OutputValue,
};
use serde_json::Value;
use tokio::sync::mpsc::UnboundedSender;

use super::reporter::EventReporter;
use crate::event::RunEvent;
use crate::manifest::{ActionManifest, InputKey, MANIFEST_VERSION, diff};
use crate::pipeline::{Action, CachePolicy, StepNode};
use crate::record::{log_path, timestamp};
use crate::sandbox::{Sandbox, inherited, timed_out};
use crate::step::{
    Cancel, InputArtifact, Port, StepContext, StepError, StepErrorKind, StepOutcome, StepReporter,
    StepSummary, World,
};

/// What all actions of a run share.
pub(super) struct Shared {
    pub(super) pipeline: String,
    pub(super) cache: Arc<Cache>,
    pub(super) world: World,
    pub(super) run_dir: std::path::PathBuf,
    pub(super) events: UnboundedSender<RunEvent>,
    pub(super) cancel: Cancel,
}

/// One action to do.
pub(super) struct ActionRequest {
    pub(super) id: String,
    pub(super) node: Arc<StepNode>,
    pub(super) params: Value,
    pub(super) key_params: Value,
    pub(super) env: BTreeMap<String, String>,
    pub(super) inputs: BTreeMap<String, Vec<BoundInput>>,
    pub(super) finished: Arc<Vec<StepSummary>>,
    pub(super) force: bool,
}

/// An input with its source resolved.
pub(super) enum BoundInput {
    Artifact {
        artifact: Artifact,
        label: String,
        listed: bool,
    },
    File(std::path::PathBuf),
}

/// Inputs by port: artifact, label, and whether it is one of a list.
type StoredInputs = BTreeMap<String, Vec<(Artifact, String, bool)>>;

/// How an action ended.
pub(super) struct ActionEnd {
    pub(super) key: Option<ActionKey>,
    pub(super) why: String,
    pub(super) cached: bool,
    pub(super) took_ms: u64,
    pub(super) result: Result<ActionResult, StepError>,
}

impl Shared {
    /// Does the action. Never panics, whatever the step does.
    pub(super) fn perform(&self, request: &ActionRequest) -> ActionEnd {
        let started = Instant::now();
        let mut end = self
            .look_up_or_run(request)
            .unwrap_or_else(|error| ActionEnd {
                key: None,
                why: error.message.clone(),
                cached: false,
                took_ms: 0,
                result: Err(error),
            });
        end.took_ms = millis(started);
        end
    }

    fn look_up_or_run(&self, request: &ActionRequest) -> Result<ActionEnd, StepError> {
        let inputs = self.store_files(&request.inputs)?;
        let manifest = self.manifest(request, &inputs)?;
        let key = manifest.key();
        let reusable = request.node.cache == CachePolicy::Reuse;
        if reusable
            && !request.force
            && let Some(result) = self.cache.actions().get(&key)
            && self.is_whole(&result)
        {
            let why = "nothing changed".to_owned();
            return Ok(ActionEnd {
                key: Some(key),
                why,
                cached: true,
                took_ms: 0,
                result: Ok(result),
            });
        }
        let why = self.why(request, &manifest, key);
        let kind = manifest.kind.clone();
        let _ = self.events.send(RunEvent::StepStarted {
            step: request.id.clone(),
            kind,
            why: why.clone(),
        });
        let result = self.run_with_retry(request, &inputs, &manifest, key);
        Ok(ActionEnd {
            key: Some(key),
            why,
            cached: false,
            took_ms: 0,
            result,
        })
    }

    /// Puts project files into the store, so that every input has a digest.
    fn store_files(
        &self,
        inputs: &BTreeMap<String, Vec<BoundInput>>,
    ) -> Result<StoredInputs, StepError> {
        let mut out = BTreeMap::new();
        for (port, bound) in inputs {
            let mut list = Vec::with_capacity(bound.len());
            for input in bound {
                list.push(match input {
                    BoundInput::Artifact {
                        artifact,
                        label,
                        listed,
                    } => (artifact.clone(), label.clone(), *listed),
                    BoundInput::File(path) => (self.store_file(path)?, port.clone(), false),
                });
            }
            out.insert(port.clone(), list);
        }
        Ok(out)
    }

    fn store_file(&self, path: &Path) -> Result<Artifact, StepError> {
        let meta = std::fs::metadata(path).map_err(|e| StepError::io(path, &e))?;
        if meta.is_file() {
            let digest = self
                .cache
                .index()
                .file_digest(path)
                .map_err(|e| StepError::io(path, &e))?;
            let known = Artifact {
                digest,
                kind: ArtifactKind::File,
                size: meta.len(),
            };
            if self.cache.store().contains(&known) {
                return Ok(known);
            }
        }
        self.cache.store().put_path(path).map_err(cache_error)
    }

    fn manifest(
        &self,
        request: &ActionRequest,
        inputs: &StoredInputs,
    ) -> Result<ActionManifest, StepError> {
        let node = &request.node;
        let (kind, kind_version, observed, command) = match &node.action {
            Action::Uses(step) => (
                step.kind().to_owned(),
                step.version(),
                step.observe(&request.params, &self.world)?,
                None,
            ),
            Action::Run(command) => ("run".to_owned(), 1, BTreeMap::new(), Some(command.clone())),
        };
        let inputs = inputs
            .iter()
            .map(|(port, list)| {
                let keys = list
                    .iter()
                    .map(|(artifact, label, listed)| InputKey {
                        digest: artifact.digest,
                        label: listed.then(|| label.clone()),
                    })
                    .collect();
                (port.clone(), keys)
            })
            .collect();
        Ok(ActionManifest {
            version: MANIFEST_VERSION,
            kind,
            kind_version,
            params: request.key_params.clone(),
            inputs,
            observed,
            env: request.env.clone(),
            command,
            out_paths: node.out_paths.clone(),
        })
    }

    fn is_whole(&self, result: &ActionResult) -> bool {
        result
            .outputs
            .values()
            .flat_map(|output| output.value.artifacts())
            .all(|artifact| self.cache.store().contains(artifact))
    }

    fn label(&self, request: &ActionRequest) -> String {
        format!("{} {}", self.pipeline, request.id)
    }

    fn why(&self, request: &ActionRequest, manifest: &ActionManifest, key: ActionKey) -> String {
        if request.node.cache == CachePolicy::Never {
            return "`cache: never`".to_owned();
        }
        match self.cache.actions().recent(&self.label(request), 1).first() {
            None => "never ran".to_owned(),
            Some(last) if last.key == key && request.force => "forced".to_owned(),
            Some(last) if last.key == key => "an output is no longer in the cache".to_owned(),
            Some(last) => diff(&last.manifest, &manifest.to_value()).join("; "),
        }
    }

    fn run_with_retry(
        &self,
        request: &ActionRequest,
        inputs: &StoredInputs,
        manifest: &ActionManifest,
        key: ActionKey,
    ) -> Result<ActionResult, StepError> {
        let retry = request.node.retry;
        let mut attempt = 1;
        loop {
            let error = match self.attempt(request, inputs, manifest, key) {
                Ok(result) => return Ok(result),
                Err(error) => error,
            };
            let again = error.kind == StepErrorKind::Transient && attempt <= retry.times;
            if !again || self.cancel.is_cancelled() {
                return Err(error);
            }
            let wait = backoff(retry.backoff, attempt, key);
            let _ = self.events.send(RunEvent::StepRetry {
                step: request.id.clone(),
                attempt,
                wait_ms: u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
                error: error.message,
            });
            self.pause(wait);
            attempt += 1;
        }
    }

    fn pause(&self, wait: Duration) {
        let until = Instant::now() + wait;
        while Instant::now() < until && !self.cancel.is_cancelled() {
            std::thread::sleep(Duration::from_millis(20).min(wait));
        }
    }

    fn attempt(
        &self,
        request: &ActionRequest,
        inputs: &StoredInputs,
        manifest: &ActionManifest,
        key: ActionKey,
    ) -> Result<ActionResult, StepError> {
        let started = Instant::now();
        let scratch = self.cache.scratch().map_err(cache_error)?;
        let reporter = Arc::new(self.reporter(request)?);
        let folders = ["in", "out", "work"].map(|name| scratch.path().join(name));
        for folder in &folders {
            std::fs::create_dir_all(folder).map_err(|e| StepError::io(folder, &e))?;
        }
        let [in_dir, out_dir, work_dir] = folders;
        let linked = self.link_inputs(request, inputs, &in_dir)?;
        let cancel = self.cancel.child();
        let outcome = match &request.node.action {
            Action::Run(command) => {
                let reporter: Arc<dyn StepReporter> = reporter.clone();
                self.run_command(
                    request,
                    command,
                    &linked,
                    scratch.path(),
                    &cancel,
                    &reporter,
                )
            }
            Action::Uses(step) => {
                let ctx = StepContext {
                    step: request.id.clone(),
                    params: request.params.clone(),
                    world: self.world.clone(),
                    inputs: linked,
                    out_dir: out_dir.clone(),
                    work_dir,
                    completions: self.cache.completions(),
                    finished: Arc::clone(&request.finished),
                    reporter: reporter.clone(),
                    cancel: cancel.clone(),
                };
                let watch = request
                    .node
                    .timeout
                    .map(|limit| Watchdog::start(limit, cancel));
                let outcome = catch_unwind(AssertUnwindSafe(|| step.run(&ctx)))
                    .unwrap_or_else(|panic| Err(panicked(&*panic)));
                match watch.and_then(Watchdog::stop) {
                    Some(limit) if outcome.is_err() => Err(timed_out(limit)),
                    _ => outcome,
                }
            }
        }
        .map_err(|mut error| {
            error.message = reporter.mask(&error.message);
            error
        })?;
        let outputs = self.store_outputs(request, &out_dir, &outcome)?;
        let result = ActionResult {
            version: ACTION_VERSION,
            key,
            manifest: manifest.to_value(),
            outputs,
            metrics: outcome.metrics,
            took_ms: millis(started),
            finished_at: timestamp(SystemTime::now()),
            label: self.label(request),
        };
        self.cache.actions().put(&result).map_err(cache_error)?;
        Ok(result)
    }

    fn reporter(&self, request: &ActionRequest) -> Result<EventReporter, StepError> {
        let path = log_path(&self.run_dir, &request.id);
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(|e| StepError::io(&path, &e))?;
        let secrets = request
            .node
            .secrets
            .iter()
            .filter_map(|n| self.world.env.get(n).cloned())
            .collect();
        Ok(EventReporter {
            step: request.id.clone(),
            events: self.events.clone(),
            log: Mutex::new(Some(log)),
            last: Mutex::default(),
            secrets,
        })
    }

    /// Places inputs under `in/<port>`: a list becomes a folder of numbered entries.
    fn link_inputs(
        &self,
        request: &ActionRequest,
        inputs: &StoredInputs,
        in_dir: &Path,
    ) -> Result<BTreeMap<String, Vec<InputArtifact>>, StepError> {
        let store = self.cache.store();
        let mut out = BTreeMap::new();
        for (port, list) in inputs {
            let many = self.takes_list(request, port, list.len());
            let mut linked = Vec::with_capacity(list.len());
            for (i, (artifact, label, _)) in list.iter().enumerate() {
                let mut path = in_dir.join(port);
                if many {
                    std::fs::create_dir_all(&path).map_err(|e| StepError::io(&path, &e))?;
                    path.push(format!("{i:04}"));
                }
                store.link_read_only(artifact, &path).map_err(cache_error)?;
                linked.push(InputArtifact {
                    path,
                    digest: artifact.digest,
                    label: label.clone(),
                });
            }
            out.insert(port.clone(), linked);
        }
        Ok(out)
    }

    fn takes_list(&self, request: &ActionRequest, port: &str, len: usize) -> bool {
        match &request.node.action {
            Action::Uses(step) => step.inputs().iter().any(|p| p.name == port && p.many),
            Action::Run(_) => len != 1,
        }
    }

    fn run_command(
        &self,
        request: &ActionRequest,
        command: &str,
        linked: &BTreeMap<String, Vec<InputArtifact>>,
        folder: &Path,
        cancel: &Cancel,
        reporter: &Arc<dyn StepReporter>,
    ) -> Result<StepOutcome, StepError> {
        let node = &request.node;
        let mut env = inherited(&self.world.env);
        env.extend(request.env.clone());
        for name in &node.secrets {
            if let Some(value) = self.world.env.get(name) {
                env.insert(name.clone(), value.clone());
            }
        }
        env.extend(
            linked
                .keys()
                .map(|port| (port.clone(), format!("in/{port}"))),
        );
        for (port, path) in &node.out_paths {
            env.insert(port.clone(), format!("out/{path}"));
            if let Some(parent) = folder.join("out").join(path).parent() {
                std::fs::create_dir_all(parent).map_err(|e| StepError::io(parent, &e))?;
            }
        }
        Sandbox {
            command,
            folder,
            env,
            timeout: node.timeout,
        }
        .run(cancel, reporter)?;
        Ok(StepOutcome::default())
    }

    fn store_outputs(
        &self,
        request: &ActionRequest,
        out_dir: &Path,
        outcome: &StepOutcome,
    ) -> Result<BTreeMap<String, OutputRecord>, StepError> {
        let mut outputs = BTreeMap::new();
        for port in &request.node.outputs {
            let relative = request.node.out_paths.get(&port.name).unwrap_or(&port.name);
            let path = out_dir.join(relative);
            let value = if port.many {
                self.store_list(port, &path, outcome)?
            } else {
                if !path.exists() {
                    return Err(StepError::failed(format!(
                        "`{}` did not write its output `{}` ({relative})",
                        request.id, port.name
                    )));
                }
                OutputValue::One(self.cache.store().put_path(&path).map_err(cache_error)?)
            };
            outputs.insert(
                port.name.clone(),
                OutputRecord {
                    ty: port.ty.clone(),
                    value,
                },
            );
        }
        Ok(outputs)
    }

    fn store_list(
        &self,
        port: &Port,
        folder: &Path,
        outcome: &StepOutcome,
    ) -> Result<OutputValue, StepError> {
        let labels = outcome.lists.get(&port.name).map_or(&[][..], Vec::as_slice);
        let mut items = Vec::with_capacity(labels.len());
        for label in labels {
            let artifact = self
                .cache
                .store()
                .put_path(&folder.join(label))
                .map_err(cache_error)?;
            items.push(ListItem {
                label: label.clone(),
                artifact,
            });
        }
        Ok(OutputValue::List(items))
    }
}

/// Sets a cancel flag when time is up.
struct Watchdog {
    limit: Duration,
    tell: std::sync::mpsc::Sender<()>,
    thread: std::thread::JoinHandle<bool>,
}

impl Watchdog {
    fn start(limit: Duration, cancel: Cancel) -> Self {
        let (tell, told) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let late = told.recv_timeout(limit) == Err(std::sync::mpsc::RecvTimeoutError::Timeout);
            if late {
                cancel.cancel();
            }
            late
        });
        Self {
            limit,
            tell,
            thread,
        }
    }

    /// The limit, if it was passed.
    fn stop(self) -> Option<Duration> {
        let _ = self.tell.send(());
        self.thread.join().unwrap_or(false).then_some(self.limit)
    }
}

fn panicked(panic: &(dyn std::any::Any + Send)) -> StepError {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    StepError::failed(format!("the step panicked: {text}"))
        .help("this is a fault of the step, not of the pipeline")
}

/// Doubles each time; the upper half is jitter, taken from the key so that steps differ.
fn backoff(first: Duration, attempt: u32, key: ActionKey) -> Duration {
    let full = first.saturating_mul(1 << (attempt - 1).min(16));
    let byte = u8::from_str_radix(&key.to_hex()[..2], 16).unwrap_or(0);
    full / 2 + full.mul_f64(f64::from(byte) / 510.0)
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

pub(super) fn cache_error(error: CacheError) -> StepError {
    StepError::failed(error.to_string())
}
