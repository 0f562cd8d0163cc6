//! [`Worker`]: one action: look it up, else run it in a scratch folder and
//! store what it made. Blocking; knows nothing of other actions.
//!
//! Invariant: a result is put into the action cache only after all its outputs
//! are in the store, and nothing that a step does, a panic included, gets out
//! of [`Worker::attempt`] but as an error.

mod inputs;
mod jobs;
mod outputs;
mod publishing;
mod watchdog;
mod workplace;

use std::collections::{BTreeMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use flowrun_cache::action::ACTION_VERSION;
use flowrun_cache::{
    ActionCache, ActionKey, ActionResult, Artifact, Cache, CacheError, Digest, RemoteCache,
};
use tokio::sync::mpsc::UnboundedSender;

use inputs::Placed;
use jobs::{Remotes, Trip};
use outputs::command_metrics;
use watchdog::Watchdog;
use workplace::{Shape, Workplaces};

use super::reporter::{EventReporter, Mask};
use crate::event::RunEvent;
use crate::expansion::{ActionRequest, Expressions, kind_of};
use crate::gates;
use crate::history::History;
use crate::lookup::{Found, Keyed, Lookup};
use crate::pipeline::{Action, CachePolicy, Pipeline, RunnerKind, StepNode};
use crate::places::inside;
use crate::premises::Memory;
use crate::record::{log_path, timestamp};
use crate::runner::{Remote, end_leftover, panicked, runner_of};
use crate::sandbox::{Sandbox, inherited, timed_out};
use crate::step::{
    Cancel, Finished, Step, StepContext, StepError, StepErrorKind, StepOutcome, StepReporter, World,
};
use crate::warden::Warden;
use crate::why::{Cause, why};

/// Longest wait between two attempts.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);
/// Longest wait between two looks at the cancel flag.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Why an action is taken from the cache.
pub(super) const UNCHANGED: &str = "nothing changed";

/// What all actions of a run share.
pub(super) struct Worker {
    pipeline: String,
    cache: Arc<Cache>,
    lookup: Lookup,
    remote_cache: Option<Arc<RemoteCache>>,
    history: History,
    run_dir: PathBuf,
    events: UnboundedSender<RunEvent>,
    pub(super) cancel: Cancel,
    /// What commands see of the environment of all runs.
    inherited: BTreeMap<String, String>,
    expressions: Expressions,
    mask: Mask,
    traced: bool,
    warden: Warden,
    remotes: Remotes,
    workplaces: Workplaces,
    /// Outputs of all results, once somebody asks.
    known_outputs: OnceLock<HashSet<Digest>>,
    /// Outputs of results that this run put others in the place of.
    overwritten: Mutex<HashSet<Digest>>,
    /// Paths of the project that were published to in this run, and by which action.
    places: Mutex<BTreeMap<PathBuf, String>>,
}

/// What a lookup gave.
pub(super) enum Looked {
    /// The action need not run, or cannot.
    End(End),
    /// It must run.
    Miss { keyed: Keyed, why: String },
}

/// How an action ended.
pub(super) struct End {
    pub(super) key: Option<ActionKey>,
    pub(super) why: String,
    pub(super) how: How,
    pub(super) took_ms: u64,
    pub(super) result: Result<ActionResult, Trouble>,
}

/// Where an action's result came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum How {
    /// The action ran.
    Ran,
    /// The cache had it.
    Cached,
    /// The remote cache had it.
    Fetched,
}

/// Why an action did not end well.
pub(super) struct Trouble {
    pub(super) error: StepError,
    /// An input artifact that is missing or damaged.
    pub(super) broken: Option<Digest>,
    /// What it made nevertheless, when only a gate or publishing failed.
    pub(super) made: Option<Box<ActionResult>>,
}

impl From<StepError> for Trouble {
    fn from(error: StepError) -> Self {
        Self {
            error,
            broken: None,
            made: None,
        }
    }
}

impl Worker {
    #[allow(clippy::too_many_arguments)]
    pub(super) fn new(
        pipeline: &Pipeline,
        cache: &Arc<Cache>,
        world: World,
        run_dir: PathBuf,
        events: UnboundedSender<RunEvent>,
        cancel: Cancel,
        expressions: Expressions,
        memory: Option<Arc<Memory>>,
        remote: Option<Arc<RemoteCache>>,
        secrets: &[String],
        traced: bool,
    ) -> Self {
        let names = pipeline
            .steps
            .iter()
            .flat_map(|s| &s.secrets)
            .chain(secrets);
        let runners = pipeline.runners.values();
        let handed = runners.flat_map(|runner| &runner.settings.env);
        let handed = handed
            .filter_map(|name| world.env.get(name).cloned())
            .filter(|value| Mask::is_likely(value));
        let secrets = names.filter_map(|name| world.env.get(name).cloned());
        let mask = Mask::new(secrets.chain(handed));
        Self {
            pipeline: pipeline.name.clone(),
            cache: Arc::clone(cache),
            inherited: inherited(&world.env),
            lookup: Lookup::holding(
                &pipeline.root,
                world.until(&cancel),
                cache,
                memory,
                remote.clone(),
            ),
            remote_cache: remote.clone(),
            history: History::new(&pipeline.name, cache.dir(), Some(run_dir.clone())),
            run_dir,
            events,
            cancel,
            expressions,
            mask,
            traced,
            warden: Warden::new(cache),
            remotes: Remotes::new(pipeline, cache, remote),
            workplaces: Workplaces::new(cache),
            known_outputs: OnceLock::new(),
            overwritten: Mutex::default(),
            places: Mutex::default(),
        }
    }

    /// Hears what the run rests on, if it is to be remembered.
    pub(super) fn memory(&self) -> Option<&Memory> {
        self.lookup.memory.as_deref()
    }

    pub(super) fn send(&self, event: RunEvent) {
        // The recorder listens until the run is over.
        let _ = self.events.send(event);
    }

    /// An artifact is in the store.
    pub(super) fn has(&self, artifact: &Artifact) -> bool {
        self.cache.store().contains(artifact)
    }

    /// Looks an action up. Never panics, whatever the step's `observe` does.
    pub(super) fn look(&self, request: &ActionRequest, forced: bool) -> Looked {
        let started = Instant::now();
        let looked = catch_unwind(AssertUnwindSafe(|| self.look_up(request, forced)))
            .unwrap_or_else(|panic| Err(panicked(&*panic)));
        let mut looked = looked.unwrap_or_else(|error| {
            Looked::End(End {
                key: None,
                why: String::new(),
                how: How::Ran,
                took_ms: 0,
                result: Err(self.masked(error).into()),
            })
        });
        if let Looked::End(end) = &mut looked {
            end.took_ms = millis(started);
        }
        looked
    }

    fn look_up(&self, request: &ActionRequest, forced: bool) -> Result<Looked, StepError> {
        let mut keyed = self.key(request)?;
        keyed.replaces = forced;
        let cause = if forced {
            Cause::Forced
        } else if request.node.cache == CachePolicy::Never {
            Cause::NoResult
        } else {
            match self.find(request, &keyed.key) {
                Ok(end) => return Ok(Looked::End(end)),
                Err(cause) => cause,
            }
        };
        if cause == Cause::Broken {
            self.send(RunEvent::Warning {
                step: Some(request.id.clone()),
                text: "an output was missing from the cache or damaged; it is made again"
                    .to_owned(),
            });
        }
        let why = why(&self.history, request, &keyed, cause).text();
        Ok(Looked::Miss { keyed, why })
    }

    /// The key of an action. To find it may take downloads: they have the time of an attempt.
    fn key(&self, request: &ActionRequest) -> Result<Keyed, StepError> {
        let node = &request.node;
        if node.timeout.is_none() || matches!(node.action, Action::Run(_)) {
            return self.lookup.key(request);
        }
        let cancel = self.cancel.child();
        let world = self.lookup.world_of(request).until(&cancel);
        self.in_time(node, &cancel, || self.lookup.key_in(&world, request))
    }

    /// The end of an action that need not run; else why it must.
    fn find(&self, request: &ActionRequest, key: &ActionKey) -> Result<End, Cause> {
        let mut cause = Cause::NoResult;
        // What turns out to be damaged here may be whole in the remote cache.
        for _ in 0..2 {
            let found = self.lookup.find(request, key);
            self.tell_of_remote();
            let (how, result) = match found {
                Found::Whole(result) => (How::Cached, result),
                Found::Fetched(result) => (How::Fetched, result),
                Found::Broken => return Err(Cause::Broken),
                Found::Nothing => return Err(cause),
                Found::Flawed(why) => {
                    self.send(RunEvent::Warning {
                        step: Some(request.id.clone()),
                        text: format!("the remote cache has a result, but {why}; the step runs"),
                    });
                    return Err(cause);
                }
            };
            let result = self.settle(request, *result);
            if !result.as_ref().is_err_and(|t| t.broken.is_some()) {
                return Ok(End {
                    key: Some(*key),
                    why: UNCHANGED.to_owned(),
                    how,
                    took_ms: 0,
                    result,
                });
            }
            cause = Cause::Broken;
        }
        Err(cause)
    }

    /// Results for parts of steps' work, which the remote cache may have too.
    fn step_actions(&self) -> ActionCache {
        let actions = self.cache.actions();
        match &self.remote_cache {
            Some(remote) => actions.shared_through(remote, self.cache.store()),
            None => actions.clone(),
        }
    }

    /// Passes on what there is to say of the remote cache.
    fn tell_of_remote(&self) {
        let remote = self.remote_cache.iter();
        for text in remote.flat_map(|remote| remote.take_warnings()) {
            self.send(RunEvent::Warning { step: None, text });
        }
    }

    /// Runs an action, with its retries; `at_once` says how many processes may do its step's work at
    /// the same time. Never panics, whatever the step does.
    pub(super) fn attempt(
        &self,
        request: &ActionRequest,
        keyed: &Keyed,
        why: String,
        finished: &Finished,
        at_once: usize,
    ) -> End {
        let started = Instant::now();
        self.send(RunEvent::StepStarted {
            step: request.id.clone(),
            kind: kind_of(&request.node).to_owned(),
            key: keyed.key.to_hex(),
            why: why.clone(),
        });
        let work = || {
            let result = self.with_retries(request, keyed, finished, at_once)?;
            self.settle(request, result)
        };
        let result = catch_unwind(AssertUnwindSafe(work))
            .unwrap_or_else(|panic| Err(panicked(&*panic).into()));
        End {
            key: Some(keyed.key),
            why,
            how: How::Ran,
            took_ms: millis(started),
            result: result.map_err(|trouble| Trouble {
                error: self.masked(trouble.error),
                ..trouble
            }),
        }
    }

    fn masked(&self, mut error: StepError) -> StepError {
        error.message = self.mask.apply(&error.message);
        error.help = error.help.map(|help| self.mask.apply(&help));
        error
    }

    fn with_retries(
        &self,
        request: &ActionRequest,
        keyed: &Keyed,
        finished: &Finished,
        at_once: usize,
    ) -> Result<ActionResult, Trouble> {
        let retry = request.node.retry;
        let mut attempt = 1;
        loop {
            let trouble = match self.once(request, keyed, finished, at_once) {
                Ok(result) => return Ok(result),
                Err(trouble) => trouble,
            };
            let again = trouble.error.kind == StepErrorKind::Transient && attempt <= retry.times;
            if !again || self.cancel.is_cancelled() {
                return Err(trouble);
            }
            let wait = backoff(retry.backoff, attempt, keyed.key);
            self.send(RunEvent::StepRetry {
                step: request.id.clone(),
                attempt,
                wait_ms: u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
                error: self.mask.apply(&trouble.error.message),
            });
            self.pause(wait);
            if self.cancel.is_cancelled() {
                return Err(StepError::cancelled().into());
            }
            attempt += 1;
        }
    }

    fn pause(&self, wait: Duration) {
        let started = Instant::now();
        while !self.cancel.is_cancelled() {
            match wait.checked_sub(started.elapsed()) {
                None | Some(Duration::ZERO) => return,
                Some(left) => std::thread::sleep(left.min(LOOK_EVERY)),
            }
        }
    }

    /// One attempt: scratch folder, inputs, the work, outputs, result.
    fn once(
        &self,
        request: &ActionRequest,
        keyed: &Keyed,
        finished: &Finished,
        at_once: usize,
    ) -> Result<ActionResult, Trouble> {
        let started = Instant::now();
        let shape = Shape {
            inputs: !keyed.inputs.is_empty(),
            work: matches!(request.node.action, Action::Uses(_)),
        };
        let place = self.workplaces.take(shape).map_err(cache_error)?;
        let reporter: Arc<dyn StepReporter> = Arc::new(self.reporter(&request.id));
        let out_dir = place.path().join("out");
        let (inputs, loans) = self.link_inputs(keyed, &place.path().join("in"))?;
        let cancel = self.cancel.child();
        let resume_path = self.cache.partial_path(&keyed.key);
        if request.node.runner.job().is_none() {
            // A killed run's job would work beside this attempt, on the same saved state.
            let depot = || self.remotes.depot(&self.lookup.world).ok();
            end_leftover(
                &self.cache.job_path(&keyed.key),
                &depot,
                (self.cache.as_ref(), resume_path.as_path()),
                &cancel,
                &reporter,
            )?;
        }
        let outcome = match &request.node.action {
            Action::Run(_) => self
                .run_command(request, keyed, inputs, place.path(), &cancel, &reporter)
                .map_err(|error| may_pass(error, &request.node))
                .and_then(|()| command_metrics(request, &out_dir))
                .map(|metrics| StepOutcome {
                    metrics,
                    ..StepOutcome::default()
                }),
            Action::Uses(step) => {
                let ctx = StepContext {
                    step: request.id.clone(),
                    params: request.params.clone(),
                    observed: keyed.manifest.observed.clone(),
                    world: self.lookup.world_of(request).until(&cancel),
                    inputs,
                    out_dir: out_dir.clone(),
                    work_dir: place.path().join("work"),
                    resume_path: resume_path.clone(),
                    run_path: self.run_dir.clone(),
                    started_at: SystemTime::now(),
                    completions: self.cache.completions(),
                    actions: self.step_actions(),
                    finished: finished.clone(),
                    at_once,
                    reporter,
                    cancel,
                };
                self.run_step(step.as_ref(), &ctx, request, keyed, place.path())
            }
        };
        // First of all: a failure may come of an input that somebody spoilt.
        self.check_lent(&loans)?;
        let outcome = outcome?;
        let outputs = self.store_outputs(request, &out_dir, &outcome)?;
        let result = ActionResult {
            version: ACTION_VERSION,
            key: keyed.key,
            manifest: keyed.manifest.to_value(),
            outputs,
            metrics: self.mask.metrics(outcome.metrics),
            took_ms: millis(started),
            finished_at: timestamp(SystemTime::now()),
            label: History::label(&self.pipeline, &request.id),
        };
        self.remember_outputs(&keyed.key);
        self.cache.actions().put(&result).map_err(cache_error)?;
        self.cache.sync_if_due().map_err(cache_error)?;
        if let Some(remote) = &self.remote_cache
            && request.node.cache != CachePolicy::Never
        {
            remote.send(self.cache.store(), &result, keyed.replaces);
        }
        if matches!(request.node.action, Action::Uses(_)) || request.node.runner.job().is_some() {
            // The result is recorded: what is left of earlier attempts serves nobody.
            let _ = std::fs::remove_dir_all(resume_path);
        }
        Ok(result)
    }

    fn run_step(
        &self,
        step: &dyn Step,
        ctx: &StepContext,
        request: &ActionRequest,
        keyed: &Keyed,
        place: &Path,
    ) -> Result<StepOutcome, StepError> {
        let node = &request.node;
        let outcome = self.in_time(node, &ctx.cancel, || match node.runner.job() {
            None => runner_of(node, &ctx.world, &self.warden).run(step, ctx),
            Some(name) => Trip {
                remote: self.remotes.get(name, &ctx.world)?,
                request,
                keyed,
                place,
                cancel: &ctx.cancel,
                reporter: &ctx.reporter,
            }
            .step(self, step, ctx),
        });
        self.expect_answers(node, ctx);
        outcome
    }

    /// What a step asked of models in another process is known to the steps of this one.
    fn expect_answers(&self, node: &StepNode, ctx: &StepContext) {
        if node.runner == RunnerKind::Inline {
            return;
        }
        ctx.completions.expect_others();
        let job = node.runner.job();
        let remote = job.and_then(|name| self.remotes.get(name, &ctx.world).ok());
        if remote.is_some_and(Remote::is_far) {
            ctx.completions.expect_from_remote();
        }
    }

    /// Stops the work when its `timeout` is over.
    fn in_time<T>(
        &self,
        node: &StepNode,
        cancel: &Cancel,
        work: impl FnOnce() -> Result<T, StepError>,
    ) -> Result<T, StepError> {
        let watch = node
            .timeout
            .map(|limit| Watchdog::start(limit, cancel.clone()));
        let outcome = work();
        let late = watch.and_then(Watchdog::stop);
        match outcome {
            Ok(outcome) => Ok(outcome),
            Err(_) if late.is_some() && !self.cancel.is_cancelled() => {
                Err(timed_out(late.unwrap_or_default()))
            }
            Err(error) if error.kind == StepErrorKind::Cancelled && !self.cancel.is_cancelled() => {
                Err(StepError::failed(error.message)
                    .help("the step stopped although nobody asked it to"))
            }
            Err(error) => Err(error),
        }
    }

    fn run_command(
        &self,
        request: &ActionRequest,
        keyed: &Keyed,
        inputs: Placed,
        folder: &Path,
        cancel: &Cancel,
        reporter: &Arc<dyn StepReporter>,
    ) -> Result<(), StepError> {
        let world = &self.lookup.world;
        let mut env = request.env.clone();
        env.extend(inputs.into_keys().map(|port| {
            let path = format!("in/{port}");
            (port, path)
        }));
        for (port, path) in &request.node.out_paths {
            env.insert(port.clone(), format!("out/{path}"));
            let place = inside(&folder.join("out"), path)?;
            if let Some(parent) = place.parent().filter(|_| path.contains('/')) {
                std::fs::create_dir_all(parent).map_err(|e| StepError::io(parent, &e))?;
            }
        }
        if let Some(name) = request.node.runner.job() {
            let trip = Trip {
                remote: self.remotes.get(name, world)?,
                request,
                keyed,
                place: folder,
                cancel,
                reporter,
            };
            let done = self.in_time(&request.node, cancel, || trip.command(self, env));
            return done.map(|_| ());
        }
        let mut around = self.inherited.clone();
        let secrets = request.node.secrets.iter();
        around.extend(secrets.filter_map(|n| Some((n.clone(), world.env.get(n)?.clone()))));
        around.extend(env);
        Sandbox {
            command: request.command.as_deref().unwrap_or_default(),
            folder,
            env: around,
            timeout: request.node.timeout,
            warden: &self.warden,
        }
        .run(cancel, reporter)
    }

    fn reporter(&self, id: &str) -> EventReporter {
        EventReporter {
            step: id.to_owned(),
            events: self.events.clone(),
            path: log_path(&self.run_dir, id),
            log: Mutex::default(),
            last: Mutex::default(),
            mask: self.mask.clone(),
            traced: self.traced,
        }
    }

    /// What follows a result, ran or cached: gates, then the project tree and the run's report.
    fn settle(
        &self,
        request: &ActionRequest,
        result: ActionResult,
    ) -> Result<ActionResult, Trouble> {
        let settled = gates::check(&request.node, &result.metrics, &self.expressions)
            .map_err(Trouble::from)
            .and_then(|()| self.publish(request, &result));
        match settled {
            Ok(()) => Ok(result),
            Err(trouble) => Err(Trouble {
                made: Some(Box::new(result)),
                ..trouble
            }),
        }
    }
}

/// Nobody knows why a command failed: one that declares `retry` says itself that it may pass.
fn may_pass(error: StepError, node: &StepNode) -> StepError {
    let kind = match error.kind {
        StepErrorKind::Failed if node.retry.times > 0 => StepErrorKind::Transient,
        kind => kind,
    };
    StepError { kind, ..error }
}

fn cache_error(error: CacheError) -> StepError {
    StepError::failed(error.to_string())
}

fn broken_or_failed(error: CacheError, artifact: &Artifact) -> Trouble {
    let broken = matches!(
        error,
        CacheError::Missing { .. } | CacheError::Damaged { .. }
    );
    Trouble {
        broken: broken.then_some(artifact.digest),
        ..cache_error(error).into()
    }
}

/// Doubles each time; the upper half is jitter, taken from the key and the
/// attempt so that steps that failed together do not come back together.
fn backoff(first: Duration, attempt: u32, key: ActionKey) -> Duration {
    let full = first
        .saturating_mul(1 << (attempt - 1).min(16))
        .min(LONGEST_WAIT);
    let hex = Digest::of_bytes(format!("{key} {attempt}").as_bytes()).to_hex();
    let byte = u8::from_str_radix(&hex[..2], 16).unwrap_or(0);
    full / 2 + full.mul_f64(f64::from(byte) / 510.0)
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_doubles_and_stays_between_half_and_whole() {
        let first = Duration::from_millis(100);
        for attempt in 1..6 {
            let full = first * (1 << (attempt - 1));
            for name in 0..50 {
                let key = Digest::of_bytes(&[name]);
                let wait = backoff(first, attempt, key);
                assert!(wait >= full / 2 && wait <= full, "{wait:?} of {full:?}");
            }
        }
        assert!(backoff(Duration::MAX, 40, Digest::of_bytes(b"k")) <= LONGEST_WAIT);
    }
}
