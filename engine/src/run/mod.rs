//! Runs a checked pipeline: [`run`] takes a [`Pipeline`] and gives events, a
//! record and cached results.
//!
//! | module | does | does not know |
//! |---|---|---|
//! | `scheduler` | which action is next; owns all state of a run | files, processes, threads |
//! | `crew` | the threads that do what the scheduler asks for | what it is |
//! | `state` | how far each step and item is | who changes it |
//! | `room` | whether there is room for one more | what it is for |
//! | `together` | whether one more item of a fan-out may run (`max_parallel`) | other steps |
//! | `worker` | one action: look it up, or run it and store what it made | other actions |
//! | `reporter` | what a step says, as events and log lines | the scheduler |

mod crew;
mod ready;
mod reporter;
mod room;
mod scheduler;
mod state;
mod together;
mod worker;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use flowrun_cache::remote::Sent;
use flowrun_cache::{Cache, CacheError, CacheReader, RemoteCache};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

pub use self::reporter::Mask;
pub use self::room::Capacity;
use self::scheduler::Scheduler;
use self::worker::Worker;
use crate::dag::{Dag, predecessors};
use crate::event::RunEvent;
pub use crate::expansion::Expressions;
use crate::expansion::kind_of;
use crate::pipeline::Pipeline;
use crate::premises::{Changed, Memory, RunName};
use crate::record::{
    PLAN_VERSION, PlanSource, PlanStep, RunPlan, RunRecorder, discard, next_run_id, timestamp,
};
use crate::step::{Cancel, StepError, StepSummary, World};

/// Events written at once, when they come faster than they can be written.
const EVENTS_AT_ONCE: usize = 256;
/// While events come faster than this, they are gathered for so long before they are written:
/// each write wakes two threads.
const GATHER: Duration = Duration::from_millis(10);

/// What to run and how.
#[derive(Debug, Clone)]
pub struct RunOptions {
    /// Re-run this step and all after it; what is before comes from the cache, or is run if missing.
    pub from: Option<String>,
    /// Run this step and what it needs, nothing else.
    pub until: Option<String>,
    /// Re-run this step alone; what it needs comes from the cache, or is run if missing.
    pub only: Option<String>,
    /// Re-run everything.
    pub force: bool,
    /// Actions at once.
    pub jobs: usize,
    /// Go on with what does not depend on a failed step.
    pub keep_going: bool,
    /// What the machine has.
    pub capacity: Capacity,
    /// How to evaluate expressions.
    pub expressions: Expressions,
    /// A cache that other machines share: asked for what the local one lacks, and given what the
    /// run makes.
    pub remote: Option<Arc<RemoteCache>>,
    /// Remember what the run rests on, if it ends whole: [`crate::premises`]. A plan reads there what
    /// the last run knew of files.
    pub remember: Option<RunName>,
    /// Steps tell of the parts of their work: [`RunEvent::Span`].
    pub traced: bool,
}

impl RunOptions {
    /// Everything that is stale, one action at a time.
    #[must_use]
    pub fn new(expressions: Expressions) -> Self {
        Self {
            from: None,
            until: None,
            only: None,
            force: false,
            jobs: 1,
            keep_going: false,
            capacity: Capacity::default(),
            expressions,
            remote: None,
            remember: None,
            traced: false,
        }
    }
}

/// How a run ended.
#[derive(Debug, Clone)]
pub struct RunSummary {
    /// Run id.
    pub run_id: String,
    /// Its folder.
    pub run_dir: PathBuf,
    /// Every step ended well, or was skipped because of its `when`.
    pub ok: bool,
    /// Actions that ran.
    pub ran: usize,
    /// Actions taken from the cache.
    pub cached: usize,
    /// Actions that failed.
    pub failed: usize,
    /// Actions, or whole steps, that were not run.
    pub skipped: usize,
    /// The run was asked to stop, and something was left undone.
    pub interrupted: bool,
    /// A gate (`expect:`) was not met.
    pub gate_failed: bool,
    /// The first failure, with the step's id; an unmet gate only when no step failed otherwise.
    pub first_error: Option<(String, StepError)>,
    /// The actions that ended well, in order of finishing.
    pub steps: Vec<StepSummary>,
}

/// Why a run could not begin or be recorded.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The cache cannot be used.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The record cannot be written.
    #[error("{}: the run's record cannot be written: {source}", path.display())]
    Record {
        /// The run's folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// No such step.
    #[error("the pipeline has no step `{name}`; it has {}", steps.join(", "))]
    NoStep {
        /// The name that was given.
        name: String,
        /// The names that there are.
        steps: Vec<String>,
    },
}

/// Runs a pipeline; every event goes into the run's record, then to `events`.
/// Must be called in a tokio runtime.
///
/// # Errors
/// [`RunError`] when the run cannot begin or its record cannot be written. A
/// failed step is not an error: see [`RunSummary`].
pub async fn run(
    pipeline: Arc<Pipeline>,
    cache: Arc<Cache>,
    world: World,
    options: RunOptions,
    cancel: Cancel,
    events: UnboundedSender<RunEvent>,
) -> Result<RunSummary, RunError> {
    let selection = Selection::of(&pipeline, &options)?;
    let work = Work::Whole(selection);
    perform(work, pipeline, cache, world, options, cancel, events).await
}

/// Runs what changed files reach; the rest stays as the last run left it. Otherwise as [`run`].
///
/// # Errors
/// As [`run`].
pub async fn run_changed(
    changed: Changed,
    cache: Arc<Cache>,
    world: World,
    options: RunOptions,
    cancel: Cancel,
    events: UnboundedSender<RunEvent>,
) -> Result<RunSummary, RunError> {
    let pipeline = Arc::new(changed.pipeline());
    let work = Work::Changed(Arc::new(changed));
    perform(work, pipeline, cache, world, options, cancel, events).await
}

/// What is to be done.
enum Work {
    Whole(Selection),
    Changed(Arc<Changed>),
}

async fn perform(
    work: Work,
    pipeline: Arc<Pipeline>,
    cache: Arc<Cache>,
    world: World,
    options: RunOptions,
    cancel: Cancel,
    events: UnboundedSender<RunEvent>,
) -> Result<RunSummary, RunError> {
    let started = Instant::now();
    let now = SystemTime::now();
    let earlier = CacheReader::open(cache.dir()).runs();
    let newest = earlier.first().and_then(|dir| dir.file_name()?.to_str());
    let run_id = next_run_id(now, newest);
    let run_dir = cache.new_run_dir(&run_id)?;
    let record_error = |source| RunError::Record {
        path: run_dir.clone(),
        source,
    };
    let mut plan = None;
    let recorder = match &work {
        Work::Whole(selection) => {
            let plan = plan.insert(plan_of(&pipeline, selection, &run_id));
            RunRecorder::create(&run_dir, plan)
        }
        Work::Changed(changed) => RunRecorder::with_plan(&run_dir, &changed.plan(&run_id)),
    };
    let recorder = recorder.map_err(|source| {
        discard(&run_dir);
        record_error(source)
    })?;
    let (to_recorder, from_run) = unbounded_channel();
    let writer = tokio::task::spawn_blocking(move || record(recorder, from_run, &events));
    let send = |event| {
        // The recorder listens until the last sender is gone.
        let _ = to_recorder.send(event);
    };
    let (steps, secrets, changed) = match &work {
        Work::Whole(selection) => (selection.steps.len(), [].as_slice(), None),
        Work::Changed(all) => (all.known().len(), all.secrets(), Some(Arc::clone(all))),
    };
    if let Some(report) = changed.as_ref().and_then(|changed| changed.report()) {
        let place = run_dir.join("report.html");
        cache.store().materialize(report, &place)?;
    }
    send(RunEvent::RunStarted {
        run: run_id.clone(),
        pipeline: pipeline.name.clone(),
        steps,
        at: timestamp(now),
    });
    let memory = options
        .remember
        .map(|name| (name, Arc::new(Memory::default())));
    let surroundings = world.clone();
    let (remote, stop) = (options.remote.clone(), cancel.clone());
    let worker = Arc::new(Worker::new(
        &pipeline,
        &cache,
        world,
        run_dir.clone(),
        to_recorder.clone(),
        cancel,
        options.expressions,
        memory.as_ref().map(|(_, memory)| Arc::clone(memory)),
        remote.clone(),
        secrets,
        options.traced,
    ));
    let scheduler = match work {
        Work::Whole(selection) => {
            Scheduler::new(Arc::clone(&pipeline), options, selection, &worker)
        }
        Work::Changed(changed) => {
            Scheduler::changed(Arc::clone(&pipeline), options, changed, &worker)
        }
    };
    if let Some(remote) = &remote {
        remote.send_waiting(&cache);
        let stop = stop.clone();
        let stop = move || stop.is_cancelled();
        cache.completions().share(remote, stop);
    }
    let scheduler = crew::run(scheduler, &worker).await;
    if let Some(remote) = remote {
        remote.send_answers(&cache.completions());
        upload(remote, stop, to_recorder.clone()).await;
    }
    let synced = cache.sync();
    for text in cache.warnings() {
        send(RunEvent::Warning { step: None, text });
    }
    let summary = scheduler.summary(run_id, run_dir.clone());
    send(RunEvent::RunFinished {
        ok: summary.ok,
        ran: summary.ran,
        cached: summary.cached,
        failed: summary.failed,
        skipped: summary.skipped,
        run_dir: run_dir.display().to_string(),
        took_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
    });
    drop((scheduler, worker, to_recorder));
    match writer.await {
        Ok(written) => written.map_err(record_error)?,
        Err(_) => return Err(record_error(std::io::Error::other("the recorder panicked"))),
    }
    synced?;
    match (memory, plan, changed) {
        (Some((name, memory)), Some(plan), _) => {
            memory.keep(&cache, name, &pipeline, &plan, &summary, &surroundings);
        }
        (Some((_, memory)), None, Some(changed)) => {
            memory.keep_changed(&cache, &changed, &summary);
        }
        _ => {}
    }
    Ok(summary)
}

/// Waits until what the run made is in the remote cache, or the run is asked to stop.
async fn upload(remote: Arc<RemoteCache>, stop: Cancel, events: UnboundedSender<RunEvent>) {
    let send = move |event| {
        // As in `perform`.
        let _ = events.send(event);
    };
    let work = move || {
        let sent = remote.flush(&|| stop.is_cancelled(), &mut |now| {
            send(RunEvent::Uploading {
                objects: now.objects,
                of_objects: now.of_objects,
                bytes: now.bytes,
                of_bytes: now.of_bytes,
            });
        });
        for text in remote.take_warnings() {
            send(RunEvent::Warning { step: None, text });
        }
        if sent != Sent::default() {
            send(RunEvent::Uploaded {
                to: remote.url().to_owned(),
                results: sent.results,
                objects: sent.objects,
                bytes: sent.bytes,
                waiting: sent.waiting,
            });
        }
    };
    // Its panic would be a bug of ours alone; what was not sent is in the outbox.
    let _ = tokio::task::spawn_blocking(work).await;
}

fn plan_of(pipeline: &Pipeline, selection: &Selection, run_id: &str) -> RunPlan {
    let chosen = pipeline
        .steps
        .iter()
        .filter(|s| selection.steps.contains(&s.name));
    RunPlan {
        version: PLAN_VERSION,
        run: run_id.to_owned(),
        pipeline: pipeline.name.clone(),
        file: pipeline.file.clone(),
        profiles: pipeline.profiles.clone(),
        params: pipeline.params.clone(),
        steps: chosen
            .map(|step| PlanStep {
                step: step.name.clone(),
                kind: kind_of(step).to_owned(),
                after: predecessors(step).into_iter().collect(),
                inputs: PlanSource::of(step),
                forced: selection.forced.contains(&step.name),
            })
            .collect(),
    }
}

/// Writes each event, then passes it on. Goes on passing on after a write failed.
fn record(
    mut recorder: RunRecorder,
    mut from_run: UnboundedReceiver<RunEvent>,
    events: &UnboundedSender<RunEvent>,
) -> std::io::Result<()> {
    let mut written = Ok(());
    let mut batch = Vec::new();
    let mut last = None;
    while from_run.blocking_recv_many(&mut batch, EVENTS_AT_ONCE) > 0 {
        if last.is_some_and(|at: Instant| at.elapsed() < GATHER) {
            std::thread::sleep(GATHER);
            while batch.len() < EVENTS_AT_ONCE
                && let Ok(event) = from_run.try_recv()
            {
                batch.push(event);
            }
        }
        last = Some(Instant::now());
        if written.is_ok() {
            written = recorder.append(&batch);
        }
        for event in batch.drain(..) {
            // A caller who does not listen loses nothing but the live view.
            let _ = events.send(event);
        }
    }
    written
}

/// Which steps take part, and which of them run even if fresh.
#[derive(Debug)]
pub(crate) struct Selection {
    pub(crate) steps: BTreeSet<String>,
    pub(crate) forced: BTreeSet<String>,
}

impl Selection {
    pub(crate) fn of(pipeline: &Pipeline, options: &RunOptions) -> Result<Self, RunError> {
        let dag = Dag::of(pipeline);
        let all: BTreeSet<String> = pipeline.steps.iter().map(|s| s.name.clone()).collect();
        let named = [&options.from, &options.until, &options.only];
        for name in named.into_iter().flatten() {
            if pipeline.named(name).is_empty() {
                return Err(RunError::NoStep {
                    name: name.clone(),
                    steps: pipeline.steps.iter().map(|s| s.name.clone()).collect(),
                });
            }
        }
        let mut steps = all.clone();
        let mut forced = if options.force { all } else { BTreeSet::new() };
        // A name may stand for all steps of a use of a step definition.
        let meant = |name: &String| pipeline.named(name).into_iter().map(|s| s.name.clone());
        for from in options.from.iter().flat_map(meant) {
            forced.extend(dag.cone(&from));
        }
        for last in options.until.iter().chain(&options.only) {
            let needed: BTreeSet<String> =
                meant(last).flat_map(|step| dag.needed_for(&step)).collect();
            steps.retain(|step| needed.contains(step));
        }
        forced.extend(options.only.iter().flat_map(meant));
        Ok(Self { steps, forced })
    }
}

/// The outputs of a step by port.
pub(crate) type Outputs = BTreeMap<String, flowrun_cache::OutputRecord>;
