//! Runs a checked pipeline.
//!
//! The plan, in the manner of n2's `work.rs`: a step waits until every step
//! before it is done; then its items are known and each becomes an action in
//! the queue; an action starts when a place is free; when the last item ends,
//! the outputs are gathered and the steps after it are looked at again. One
//! task owns all of this state; actions run on blocking threads and send their
//! end back. Every change of a step's state goes through [`Scheduler::set`].

mod action;
mod expand;
mod reporter;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use flowrun_cache::{Cache, CacheError, ListItem, OutputRecord, OutputValue};
use serde_json::Value;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

use self::action::{ActionEnd, ActionRequest, Shared, cache_error};
use self::expand::{Item, expand};
use crate::dag::{Dag, predecessors};
use crate::event::{OutputInfo, RunEvent, StepStatus};
use crate::pipeline::{Action, Pipeline, StepNode};
use crate::record::{RunRecorder, new_run_id, timestamp};
use crate::step::{Cancel, StepError, StepErrorKind, StepSummary, World};

/// How expressions that need run-time values are evaluated.
#[derive(Clone, Copy)]
pub struct Expressions {
    /// Fills `${{ … item … }}` in a value.
    pub resolve_item: fn(&Value, &BTreeMap<String, Value>) -> Result<Value, String>,
    /// Evaluates a condition over a context object.
    pub eval_bool: fn(&str, &Value) -> Result<bool, String>,
}

/// What to run and how.
#[derive(Clone)]
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
    /// How to evaluate expressions.
    pub expressions: Expressions,
}

/// How a run ended.
#[derive(Debug, Clone)]
pub struct RunSummary {
    /// Run id.
    pub run: String,
    /// Its folder.
    pub run_dir: PathBuf,
    /// Every step ended well.
    pub ok: bool,
    /// Actions that ran.
    pub ran: usize,
    /// Actions taken from the cache.
    pub cached: usize,
    /// Actions that failed.
    pub failed: usize,
    /// Steps that were not run.
    pub skipped: usize,
    /// The run was asked to stop.
    pub interrupted: bool,
    /// The first failure, with the step's id.
    pub first_error: Option<(String, StepError)>,
}

/// Why a run could not begin or be recorded.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The cache cannot be used.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The record cannot be written.
    #[error("{}: {source}", path.display())]
    Record {
        /// The run's folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// No such step.
    #[error("the pipeline has no step `{0}`")]
    NoStep(String),
}

/// Runs a pipeline; every event goes to `events` and into the run's record.
///
/// # Errors
/// [`RunError`] when the run cannot begin. A failed step is not an error: see [`RunSummary`].
pub async fn run(
    pipeline: &Pipeline,
    cache: Arc<Cache>,
    world: World,
    options: RunOptions,
    cancel: Cancel,
    events: UnboundedSender<RunEvent>,
) -> Result<RunSummary, RunError> {
    let started = Instant::now();
    let selection = Selection::of(pipeline, &options)?;
    let now = SystemTime::now();
    let run = new_run_id(now);
    let run_dir = cache.new_run_dir(&run)?;
    let record_error = |source| RunError::Record {
        path: run_dir.clone(),
        source,
    };
    let recorder = RunRecorder::create(&run_dir).map_err(record_error)?;
    let (to_recorder, from_run) = unbounded_channel();
    let writer = std::thread::spawn(move || record(recorder, from_run, &events));
    let shared = Arc::new(Shared {
        pipeline: pipeline.name.clone(),
        cache,
        world,
        run_dir: run_dir.clone(),
        events: to_recorder,
        cancel,
    });
    shared.send(RunEvent::RunStarted {
        run: run.clone(),
        pipeline: pipeline.name.clone(),
        steps: selection.steps.len(),
        at: timestamp(now),
    });
    let mut scheduler = Scheduler::new(pipeline, options, selection, Arc::clone(&shared));
    scheduler.run().await;
    for text in shared.cache.warnings() {
        shared.send(RunEvent::Warning { step: None, text });
    }
    let summary = scheduler.summary(run, run_dir.clone());
    shared.send(RunEvent::RunFinished {
        ok: summary.ok,
        ran: summary.ran,
        cached: summary.cached,
        failed: summary.failed,
        skipped: summary.skipped,
        run_dir: run_dir.display().to_string(),
        took_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
    });
    drop(scheduler);
    drop(shared);
    match writer.join() {
        Ok(written) => written.map_err(record_error)?,
        Err(_) => return Err(record_error(std::io::Error::other("the recorder panicked"))),
    }
    Ok(summary)
}

/// Writes each event, then passes it on. Goes on passing on after a write failed.
fn record(
    mut recorder: RunRecorder,
    mut from_run: tokio::sync::mpsc::UnboundedReceiver<RunEvent>,
    events: &UnboundedSender<RunEvent>,
) -> std::io::Result<()> {
    let mut written = Ok(());
    while let Some(event) = from_run.blocking_recv() {
        if written.is_ok() {
            written = recorder.append(&event);
        }
        // A caller who does not listen loses nothing but the live view.
        let _ = events.send(event);
    }
    written
}

/// Which steps take part, and which of them run even if fresh.
struct Selection {
    steps: BTreeSet<String>,
    forced: BTreeSet<String>,
}

impl Selection {
    fn of(pipeline: &Pipeline, options: &RunOptions) -> Result<Self, RunError> {
        let dag = Dag::of(pipeline);
        let all: BTreeSet<String> = pipeline.steps.iter().map(|s| s.name.clone()).collect();
        for name in [&options.from, &options.until, &options.only]
            .into_iter()
            .flatten()
        {
            if !all.contains(name) {
                return Err(RunError::NoStep(name.clone()));
            }
        }
        let mut steps = all.clone();
        let mut forced = if options.force { all } else { BTreeSet::new() };
        if let Some(from) = &options.from {
            forced.extend(dag.cone(from));
        }
        if let Some(last) = options.until.as_ref().or(options.only.as_ref()) {
            steps = dag.needed_for(last);
        }
        forced.extend(options.only.clone());
        Ok(Self { steps, forced })
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    /// Something before it is not done.
    Waiting,
    /// Its actions are queued or running.
    Running,
    /// Its outputs are there.
    Done,
    /// It failed or was not run; why.
    Out(String),
}

/// A step and how far it is.
struct Progress {
    node: Arc<StepNode>,
    before: BTreeSet<String>,
    state: State,
    items: Vec<Item>,
    ends: Vec<Option<BTreeMap<String, OutputRecord>>>,
    running: usize,
    outputs: BTreeMap<String, OutputRecord>,
}

struct Scheduler {
    shared: Arc<Shared>,
    options: RunOptions,
    forced: BTreeSet<String>,
    steps: BTreeMap<String, Progress>,
    order: Vec<String>,
    queue: VecDeque<(String, usize)>,
    in_flight: usize,
    finished: Vec<StepSummary>,
    stopping: bool,
    counts: [usize; 4],
    first_error: Option<(String, StepError)>,
}

impl Scheduler {
    fn new(
        pipeline: &Pipeline,
        options: RunOptions,
        selection: Selection,
        shared: Arc<Shared>,
    ) -> Self {
        let chosen = pipeline
            .steps
            .iter()
            .filter(|s| selection.steps.contains(&s.name));
        let order: Vec<String> = chosen.clone().map(|s| s.name.clone()).collect();
        let steps = chosen
            .map(|step| {
                let progress = Progress {
                    node: Arc::new(step.clone()),
                    before: predecessors(step),
                    state: State::Waiting,
                    items: Vec::new(),
                    ends: Vec::new(),
                    running: 0,
                    outputs: BTreeMap::new(),
                };
                (step.name.clone(), progress)
            })
            .collect();
        Self {
            shared,
            options,
            forced: selection.forced,
            steps,
            order,
            queue: VecDeque::new(),
            in_flight: 0,
            finished: Vec::new(),
            stopping: false,
            counts: [0; 4],
            first_error: None,
        }
    }

    async fn run(&mut self) {
        let (tell, mut ends) = unbounded_channel();
        loop {
            self.wake();
            self.start(&tell);
            if self.in_flight == 0 {
                break;
            }
            let Some((step, item, end)) = ends.recv().await else {
                break;
            };
            self.in_flight -= 1;
            self.ended(&step, item, end);
        }
        self.skip_the_rest();
    }

    /// Looks at every waiting step: those whose predecessors are all done are
    /// expanded, those behind one that is out are out too.
    fn wake(&mut self) {
        for name in self.order.clone() {
            let Some(step) = self.steps.get(&name) else {
                continue;
            };
            if step.state != State::Waiting || self.stopping {
                continue;
            }
            let states: Vec<(&String, &State)> = step
                .before
                .iter()
                .filter_map(|before| Some((before, &self.steps.get(before)?.state)))
                .collect();
            if let Some((before, _)) = states.iter().find(|(_, s)| matches!(s, State::Out(_))) {
                let why = format!("`{before}` was not done");
                self.skip(&name, why);
            } else if states.iter().all(|(_, state)| **state == State::Done) {
                self.begin(&name);
            }
        }
    }

    /// Expands a step into its items and queues them.
    fn begin(&mut self, name: &str) {
        let node = Arc::clone(&self.steps[name].node);
        let expanded = expand(&node, &self.options.expressions, |step, output| {
            self.steps
                .get(step)
                .and_then(|s| s.outputs.get(output))
                .cloned()
        });
        match expanded {
            Ok(None) => self.skip(name, "its `when` is false".to_owned()),
            Ok(Some(items)) => {
                if node.foreach.is_some() {
                    self.shared.send(RunEvent::StepExpanded {
                        step: name.to_owned(),
                        items: items.iter().filter_map(|i| i.label.clone()).collect(),
                    });
                }
                self.queue
                    .extend((0..items.len()).map(|i| (name.to_owned(), i)));
                if let Some(step) = self.steps.get_mut(name) {
                    step.ends = items.iter().map(|_| None).collect();
                    step.items = items;
                }
                self.set(name, State::Running);
                self.gather(name);
            }
            Err(error) => self.fail(name, name, None, 0, error),
        }
    }

    /// Starts queued actions while there is room.
    fn start(&mut self, tell: &UnboundedSender<(String, usize, ActionEnd)>) {
        let mut put_back = VecDeque::new();
        while self.in_flight < self.options.jobs.max(1) {
            if self.shared.cancel.is_cancelled() {
                self.stopping = true;
            }
            if self.stopping {
                break;
            }
            let Some((name, index)) = self.queue.pop_front() else {
                break;
            };
            if !self.has_room(&name) {
                put_back.push_back((name, index));
                continue;
            }
            let request = self.request(&name, index);
            self.in_flight += 1;
            if let Some(step) = self.steps.get_mut(&name) {
                step.running += 1;
            }
            let (shared, tell) = (Arc::clone(&self.shared), tell.clone());
            tokio::task::spawn_blocking(move || {
                let end = shared.perform(&request);
                // The scheduler waits for every action it started.
                let _ = tell.send((name, index, end));
            });
        }
        put_back.append(&mut self.queue);
        self.queue = put_back;
    }

    /// `max_parallel`, the pool (one at a time) and the declared cores allow one more.
    fn has_room(&self, name: &str) -> bool {
        let step = &self.steps[name];
        let max = step
            .node
            .foreach
            .as_ref()
            .and_then(|f| f.max_parallel)
            .unwrap_or(usize::MAX);
        let running = || self.steps.values().filter(|s| s.running > 0);
        let pool_free =
            step.node.pool.is_none() || running().all(|s| s.node.pool != step.node.pool);
        let cores: f64 = running()
            .map(|s| s.node.resources.cpu * s.running as f64)
            .sum();
        let demand = step.node.resources.cpu;
        let cores_free =
            demand == 0.0 || cores == 0.0 || cores + demand <= self.options.jobs as f64;
        step.running < max && pool_free && cores_free
    }

    fn request(&self, name: &str, index: usize) -> ActionRequest {
        let step = &self.steps[name];
        let item = &step.items[index];
        ActionRequest {
            id: item.id(name),
            node: Arc::clone(&step.node),
            params: item.params.clone(),
            key_params: item.key_params.clone(),
            env: item.env.clone(),
            inputs: item.bind(),
            finished: Arc::new(self.finished.clone()),
            force: self.forced.contains(name),
        }
    }

    fn ended(&mut self, name: &str, index: usize, end: ActionEnd) {
        let step = &self.steps[name];
        let id = step.items[index].id(name);
        let node = Arc::clone(&step.node);
        if let Some(step) = self.steps.get_mut(name) {
            step.running -= 1;
        }
        let key = end.key.map(|k| k.to_hex());
        let result = end.result.and_then(|result| {
            self.check_gates(&node, &result.metrics)?;
            self.publish(&node, &result.outputs)?;
            Ok(result)
        });
        match result {
            Err(error) => self.fail(name, &id, key, end.took_ms, error),
            Ok(result) => {
                let status = if end.cached {
                    StepStatus::Cached
                } else {
                    StepStatus::Ran
                };
                self.counts[usize::from(end.cached)] += 1;
                self.finished.push(StepSummary {
                    step: id.clone(),
                    kind: kind_of(&node),
                    status: if end.cached { "cached" } else { "ran" }.to_owned(),
                    took_ms: result.took_ms,
                    metrics: result.metrics.clone(),
                });
                self.shared.send(RunEvent::StepFinished {
                    step: id,
                    kind: kind_of(&node),
                    status,
                    key: key.unwrap_or_default(),
                    took_ms: end.took_ms,
                    why: end.why,
                    outputs: self.output_infos(&result.outputs),
                    metrics: result.metrics,
                    help: None,
                });
                if let Some(step) = self.steps.get_mut(name) {
                    step.ends[index] = Some(result.outputs);
                }
                self.gather(name);
            }
        }
    }

    /// When all items ended, makes the step's outputs of theirs.
    fn gather(&mut self, name: &str) {
        let Some(step) = self.steps.get_mut(name) else {
            return;
        };
        if step.state != State::Running || step.ends.iter().any(Option::is_none) {
            return;
        }
        let ends: Vec<_> = step.ends.iter().flatten().collect();
        step.outputs = if step.node.foreach.is_none() {
            ends.first().map(|end| (*end).clone()).unwrap_or_default()
        } else {
            let ports = step.node.outputs.iter();
            ports
                .map(|p| {
                    (
                        p.name.clone(),
                        gather_port(&p.name, &p.ty, &step.items, &ends),
                    )
                })
                .collect()
        };
        self.set(name, State::Done);
    }

    fn check_gates(
        &self,
        node: &StepNode,
        metrics: &BTreeMap<String, Value>,
    ) -> Result<(), StepError> {
        let context = Value::Object(metrics.clone().into_iter().collect());
        for gate in &node.expect {
            let met = (self.options.expressions.eval_bool)(gate, &context)
                .map_err(|e| StepError::invalid(format!("`expect: {gate}`: {e}")))?;
            if !met {
                let text = format!("the gate `{gate}` was not met: the metrics are {context}");
                return Err(StepError::new(StepErrorKind::Gate, text));
            }
        }
        Ok(())
    }

    /// Puts outputs into the project tree where they are missing or different.
    fn publish(
        &self,
        node: &StepNode,
        outputs: &BTreeMap<String, OutputRecord>,
    ) -> Result<(), StepError> {
        let store = self.shared.cache.store();
        for (port, path) in &node.publish {
            let Some(OutputValue::One(artifact)) = outputs.get(port).map(|o| &o.value) else {
                continue;
            };
            let dest = self.shared.world.root.join(path);
            let same = dest.exists() && store.put_path(&dest).is_ok_and(|there| there == *artifact);
            if !same {
                store.materialize(artifact, &dest).map_err(cache_error)?;
            }
        }
        if let Some(OutputValue::One(artifact)) = outputs
            .values()
            .find(|o| o.ty == "report")
            .map(|o| &o.value)
        {
            let dest = self.shared.run_dir.join("report.html");
            store.materialize(artifact, &dest).map_err(cache_error)?;
        }
        Ok(())
    }

    fn output_infos(
        &self,
        outputs: &BTreeMap<String, OutputRecord>,
    ) -> BTreeMap<String, OutputInfo> {
        let store = self.shared.cache.store();
        let info = |output: &OutputRecord| OutputInfo {
            ty: output.ty.clone(),
            digest: output.value.digest().to_hex(),
            path: match &output.value {
                OutputValue::One(artifact) => {
                    store.object_path(&artifact.digest).display().to_string()
                }
                OutputValue::List(_) => String::new(),
            },
        };
        outputs
            .iter()
            .map(|(port, output)| (port.clone(), info(output)))
            .collect()
    }

    fn fail(&mut self, name: &str, id: &str, key: Option<String>, took_ms: u64, error: StepError) {
        let interrupted = error.kind == StepErrorKind::Cancelled;
        self.counts[if interrupted { 3 } else { 2 }] += 1;
        self.stopping |= interrupted || !self.options.keep_going;
        self.queue.retain(|(queued, _)| queued != name);
        let status = if interrupted {
            StepStatus::Skipped
        } else {
            StepStatus::Failed
        };
        self.finish_without_outputs(
            name,
            id,
            key,
            took_ms,
            status,
            &error.message,
            error.help.clone(),
        );
        if !interrupted && self.first_error.is_none() {
            self.first_error = Some((id.to_owned(), error));
        }
        self.set(name, State::Out("failed".to_owned()));
    }

    fn skip(&mut self, name: &str, why: String) {
        self.counts[3] += 1;
        self.finish_without_outputs(name, name, None, 0, StepStatus::Skipped, &why, None);
        self.set(name, State::Out(why));
    }

    #[allow(clippy::too_many_arguments, reason = "the fields of one event")]
    fn finish_without_outputs(
        &self,
        name: &str,
        id: &str,
        key: Option<String>,
        took_ms: u64,
        status: StepStatus,
        why: &str,
        help: Option<String>,
    ) {
        self.shared.send(RunEvent::StepFinished {
            step: id.to_owned(),
            kind: self
                .steps
                .get(name)
                .map(|s| kind_of(&s.node))
                .unwrap_or_default(),
            status,
            key: key.unwrap_or_default(),
            took_ms,
            why: why.to_owned(),
            outputs: BTreeMap::new(),
            metrics: BTreeMap::new(),
            help,
        });
    }

    fn skip_the_rest(&mut self) {
        for name in self.order.clone() {
            if matches!(self.steps[&name].state, State::Waiting | State::Running) {
                self.skip(&name, "the run stopped before it".to_owned());
            }
        }
    }

    fn set(&mut self, name: &str, state: State) {
        if let Some(step) = self.steps.get_mut(name) {
            tracing::debug!(step = name, from = ?step.state, to = ?state, "step state");
            step.state = state;
        }
    }

    fn summary(&self, run: String, run_dir: PathBuf) -> RunSummary {
        let [ran, cached, failed, skipped] = self.counts;
        let done = self.steps.values().all(|s| match &s.state {
            State::Done => true,
            State::Out(why) => why == "its `when` is false" || why.ends_with("was not done"),
            State::Waiting | State::Running => false,
        });
        RunSummary {
            run,
            run_dir,
            ok: done && failed == 0,
            ran,
            cached,
            failed,
            skipped,
            interrupted: self.shared.cancel.is_cancelled(),
            first_error: self.first_error.clone(),
        }
    }
}

fn gather_port(
    port: &str,
    ty: &str,
    items: &[Item],
    ends: &[&BTreeMap<String, OutputRecord>],
) -> OutputRecord {
    let mut list = Vec::new();
    for (item, end) in items.iter().zip(ends) {
        let label = item.label.clone().unwrap_or_default();
        match end.get(port).map(|o| &o.value) {
            Some(OutputValue::One(artifact)) => {
                list.push(ListItem {
                    label,
                    artifact: artifact.clone(),
                });
            }
            Some(OutputValue::List(inner)) => list.extend(inner.iter().map(|i| ListItem {
                label: format!("{label}/{}", i.label),
                artifact: i.artifact.clone(),
            })),
            None => {}
        }
    }
    OutputRecord {
        ty: ty.to_owned(),
        value: OutputValue::List(list),
    }
}

fn kind_of(node: &StepNode) -> String {
    match &node.action {
        Action::Uses(step) => step.kind().to_owned(),
        Action::Run(_) => "run".to_owned(),
    }
}

impl Shared {
    fn send(&self, event: RunEvent) {
        // The recorder listens until this is dropped.
        let _ = self.events.send(event);
    }
}
