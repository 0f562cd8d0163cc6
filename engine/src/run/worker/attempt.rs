//! Attempts at an action, until one ends well or no more are due: a folder to work in, the
//! inputs, the work, the outputs, the result.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use flowrun_cache::action::ACTION_VERSION;
use flowrun_cache::{ActionCache, ActionKey, ActionResult, Digest};

use super::inputs::Placed;
use super::jobs::Trip;
use super::outputs::command_metrics;
use super::watchdog::Watchdog;
use super::workplace::Shape;
use super::{Trouble, Worker, cache_error, millis};
use crate::event::RunEvent;
use crate::expansion::ActionRequest;
use crate::history::History;
use crate::lookup::Keyed;
use crate::pipeline::{Action, CachePolicy, RunnerKind, StepNode};
use crate::places::inside;
use crate::record::timestamp;
use crate::runner::{Remote, end_leftover, runner_of};
use crate::sandbox::{Sandbox, timed_out};
use crate::step::{
    Cancel, Finished, Step, StepContext, StepError, StepErrorKind, StepOutcome, StepReporter,
};

/// Longest wait between two attempts.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);
/// Longest wait between two looks at the cancel flag.
const LOOK_EVERY: Duration = Duration::from_millis(20);

impl Worker {
    pub(super) fn with_retries(
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
        if !keyed.is_new {
            self.remember_outputs(&keyed.key);
        }
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
    pub(super) fn in_time<T>(
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

    /// Results for parts of steps' work, which the remote cache may have too.
    fn step_actions(&self) -> ActionCache {
        let actions = self.cache.actions();
        match &self.remote_cache {
            Some(remote) => actions.shared_through(remote, self.cache.store()),
            None => actions.clone(),
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
