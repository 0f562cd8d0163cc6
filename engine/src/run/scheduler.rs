//! [`Scheduler`]: which action is next.
//!
//! The plan: a step waits until nothing before it is missing; then it opens:
//! its items are known, and each is looked up. What the cache has ends at
//! once; the rest becomes ready, and an attempt starts when there is room.
//! When the last item of a step ends, the step closes: its outputs are
//! gathered, and the steps after it miss one thing less.
//!
//! One task owns all of this; lookups and attempts run on blocking threads and
//! send one message each. Every change of a step's state goes through
//! [`Scheduler::set`].
//!
//! An object may turn out to be damaged only when a step is about to read it.
//! Then the item that made it is looked up again (which finds it broken, and
//! makes it anew), and the step that wanted it stalls until that is done; its
//! items that ended meanwhile stay ended if they are still the same work.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flowrun_cache::{ActionKey, ActionResult, Digest};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::room::Room;
use super::state::{ItemState, Phase, State, StepState};
use super::worker::{End, Looked, Trouble, UNCHANGED, Worker};
use super::{Outputs, RunOptions, RunSummary, Selection};
use crate::dag::{data_predecessors, predecessors, required_predecessors};
use crate::event::{RunEvent, StepStatus};
use crate::expansion::{ActionRequest, expand, gather, kind_of};
use crate::pipeline::{Action, Pipeline, StepNode};
use crate::premises::Changed;
use crate::step::{StepError, StepErrorKind, StepSummary};

/// How often one item may find its inputs damaged before it fails.
const STALLS: u32 = 3;

/// Items that one looker takes at a time.
const LOOKS_AT_ONCE: usize = 64;

/// How long a looker keeps what it found to itself.
const TELL_EVERY: Duration = Duration::from_millis(2);

/// A step and one of its items.
type Place = (usize, usize);

enum Message {
    Looked(Vec<(Place, Looked)>),
    /// A looker is done with its share.
    LookerFree,
    Ended(Place, Box<End>),
}

/// All state of a run.
pub(super) struct Scheduler {
    pipeline: Arc<Pipeline>,
    worker: Arc<Worker>,
    options: RunOptions,
    forced: BTreeSet<String>,
    steps: Vec<StepState>,
    index: BTreeMap<String, usize>,
    /// Items to look up, and items to run. An entry counts only while the item's phase says so.
    looks: VecDeque<Place>,
    ready: VecDeque<Place>,
    lookers: usize,
    room: Room,
    /// Steps of which it was said that they ask for more than there is.
    beyond: BTreeSet<usize>,
    running: usize,
    /// Keys of attempts under way, and who else wants them.
    keys: BTreeMap<ActionKey, Vec<Place>>,
    /// Steps whose end the steps after them do not know yet.
    settled: VecDeque<usize>,
    finished: Arc<Vec<StepSummary>>,
    /// The last run, when only what changed is looked at.
    changed: Option<Arc<Changed>>,
    /// What it finished is among `finished`.
    recalled: bool,
    /// Why nothing new is started.
    stopping: Option<String>,
    counts: BTreeMap<&'static str, usize>,
    gate_failed: bool,
    first_error: Option<(String, StepError)>,
    tell: UnboundedSender<Message>,
    hear: UnboundedReceiver<Message>,
}

impl Scheduler {
    pub(super) fn new(
        pipeline: Arc<Pipeline>,
        options: RunOptions,
        selection: Selection,
        worker: Worker,
    ) -> Self {
        let chosen: Vec<&StepNode> = pipeline
            .steps
            .iter()
            .filter(|s| selection.steps.contains(&s.name))
            .collect();
        let index: BTreeMap<String, usize> = chosen
            .iter()
            .enumerate()
            .map(|(i, step)| (step.name.clone(), i))
            .collect();
        let places = |names: BTreeSet<String>| -> BTreeSet<usize> {
            names.iter().filter_map(|n| index.get(n).copied()).collect()
        };
        let mut steps: Vec<StepState> = chosen
            .into_iter()
            .map(|step| StepState {
                node: Arc::new(step.clone()),
                state: State::Waiting,
                missing: places(predecessors(step)),
                data: places(data_predecessors(step)),
                required: places(required_predecessors(step)),
                after: Vec::new(),
                items: Vec::new(),
                left: 0,
                busy: 0,
                running: 0,
                stalled: false,
                kept: false,
                outputs: Outputs::new(),
            })
            .collect();
        for i in 0..steps.len() {
            for before in steps[i].missing.clone() {
                steps[before].after.push(i);
            }
        }
        Self {
            forced: selection.forced,
            steps,
            index,
            ..Self::empty(pipeline, options, worker)
        }
    }

    /// For a run in which only some files changed: the steps that those may reach wait, and
    /// are read when they are reached.
    pub(super) fn changed(
        pipeline: Arc<Pipeline>,
        options: RunOptions,
        changed: Arc<Changed>,
        worker: Worker,
    ) -> Self {
        let known = changed.known();
        let mut after = vec![Vec::new(); known.len()];
        for i in 0..known.len() {
            for before in known.before(i).filter(|before| *before < known.len()) {
                after[before].push(i);
            }
        }
        let mut waits = vec![false; known.len()];
        let mut next: Vec<usize> = changed.affected().iter().copied().collect();
        while let Some(i) = next.pop() {
            if !std::mem::replace(&mut waits[i], true) {
                next.extend(&after[i]);
            }
        }
        let blank = Arc::new(StepNode::default());
        let step = |(i, after): (usize, Vec<usize>)| StepState {
            node: Arc::clone(&blank),
            state: match (waits[i], changed.was_skipped(i)) {
                (true, _) => State::Waiting,
                (false, true) => State::Unwanted,
                (false, false) => State::Done,
            },
            missing: known.before(i).filter(|b| waits[i] && waits[*b]).collect(),
            data: BTreeSet::new(),
            required: BTreeSet::new(),
            after,
            items: Vec::new(),
            left: 0,
            busy: 0,
            running: 0,
            stalled: false,
            kept: true,
            outputs: Outputs::new(),
        };
        let steps = after.into_iter().enumerate().map(step).collect();
        Self {
            steps,
            changed: Some(changed),
            ..Self::empty(pipeline, options, worker)
        }
    }

    fn empty(pipeline: Arc<Pipeline>, options: RunOptions, worker: Worker) -> Self {
        let (tell, hear) = unbounded_channel();
        Self {
            room: Room::new(
                options.jobs,
                options.capacity.clone(),
                pipeline.pools.clone(),
            ),
            pipeline,
            worker: Arc::new(worker),
            options,
            forced: BTreeSet::new(),
            steps: Vec::new(),
            index: BTreeMap::new(),
            changed: None,
            recalled: false,
            looks: VecDeque::new(),
            ready: VecDeque::new(),
            lookers: 0,
            beyond: BTreeSet::new(),
            running: 0,
            keys: BTreeMap::new(),
            settled: VecDeque::new(),
            finished: Arc::default(),
            stopping: None,
            counts: BTreeMap::new(),
            gate_failed: false,
            first_error: None,
            tell,
            hear,
        }
    }

    pub(super) async fn run(&mut self) {
        let affected = self.changed.iter().flat_map(|c| c.affected().clone());
        for i in affected.collect::<Vec<_>>() {
            self.awaken(i);
        }
        for i in 0..self.steps.len() {
            let step = &self.steps[i];
            if step.missing.is_empty() && step.state == State::Waiting {
                self.open(i);
            }
        }
        loop {
            self.ripple();
            self.start();
            if self.lookers + self.running == 0 {
                break;
            }
            match self.hear.recv().await {
                Some(Message::LookerFree) => self.lookers -= 1,
                Some(Message::Looked(batch)) => {
                    for (place, looked) in batch {
                        self.looked(place, looked);
                    }
                }
                Some(Message::Ended(place, end)) => self.attempted(place, *end),
                None => break,
            }
        }
        self.skip_the_rest();
        self.tell_kept();
    }

    /// Reads a step that was as the last run left it, with what the steps before it gave.
    fn awaken(&mut self, i: usize) {
        let Some(changed) = self.changed.clone().filter(|_| self.steps[i].kept) else {
            return;
        };
        self.steps[i].kept = false;
        let known = changed.known();
        for before in known.before(i) {
            self.recall_outputs(before);
        }
        let Some(node) = known.node(i) else {
            let name = known.ended(i).map(|ended| ended.name).unwrap_or_default();
            self.steps[i].node = Arc::new(StepNode {
                name,
                ..StepNode::default()
            });
            let text = "what is remembered of the last run cannot be read";
            let help = "remove the folder `premises` of the cache";
            self.fail_step(i, StepError::failed(text).help(help));
            return;
        };
        let places = |names: BTreeSet<String>| -> BTreeSet<usize> {
            let names = names.iter();
            names.filter_map(|n| self.index.get(n).copied()).collect()
        };
        let (data, required) = (
            places(data_predecessors(&node)),
            places(required_predecessors(&node)),
        );
        self.index.insert(node.name.clone(), i);
        changed.reach(&node.name, i);
        let step = &mut self.steps[i];
        (step.data, step.required) = (data, required);
        step.node = Arc::new(node);
    }

    /// What a step gave in the last run, until it gives something else.
    fn recall_outputs(&mut self, i: usize) {
        let ended = self.changed.as_ref().filter(|_| self.steps[i].kept);
        if let Some(ended) = ended.and_then(|changed| changed.known().ended(i)) {
            self.index.insert(ended.name, i);
            self.steps[i].outputs = ended.outputs.unwrap_or_default();
        }
    }

    /// The step ended otherwise than in the last run.
    fn differs(&self, i: usize) -> bool {
        let Some(changed) = self.changed.as_ref().filter(|_| !self.steps[i].kept) else {
            return false;
        };
        let step = &self.steps[i];
        let outputs = match step.state {
            State::Done => Some(&step.outputs),
            State::Unwanted => None,
            State::Waiting | State::Open | State::Failed => return true,
        };
        let ended = changed.known().ended(i);
        ended.is_none_or(|ended| ended.outputs.as_ref() != outputs)
    }

    /// Tells of the steps that stayed as they were.
    fn tell_kept(&mut self) {
        let Some(changed) = &self.changed else {
            return;
        };
        let mut lines = Vec::new();
        for (i, _) in self.steps.iter().enumerate().filter(|(_, s)| s.kept) {
            lines.extend_from_slice(changed.events(i));
            *self.counts.entry("cached").or_default() += changed.results(i);
            *self.counts.entry("skipped").or_default() += usize::from(changed.was_skipped(i));
        }
        self.worker.send(RunEvent::Recorded { lines });
    }

    /// Steps of this process are told of all that finished.
    fn recall_finished(&mut self) {
        let Some(changed) = &self.changed else {
            return;
        };
        if self.recalled {
            return;
        }
        self.recalled = true;
        let finished = Arc::make_mut(&mut self.finished);
        for (i, _) in self.steps.iter().enumerate().filter(|(_, s)| s.kept) {
            finished.extend(changed.summaries(i));
        }
    }

    /// Starts what there is room for. Lookups have places of their own: a
    /// cached item never waits behind a running one.
    fn start(&mut self) {
        if self.stopping.is_none() && self.worker.cancel.is_cancelled() {
            self.stopping = Some("the run was interrupted".to_owned());
        }
        if self.stopping.is_some() {
            return;
        }
        while self.lookers < self.options.jobs.max(1) && !self.looks.is_empty() {
            self.start_looks();
        }
        let mut no_room = VecDeque::new();
        while !self.room.is_full() {
            let Some(place) = self.ready.pop_front() else {
                break;
            };
            let step = &self.steps[place.0];
            if !matches!(self.item(place).phase, Phase::Ready(..)) {
                continue;
            }
            if self.room.fits(&step.node, step.running) {
                self.start_attempt(place);
            } else {
                no_room.push_back(place);
            }
        }
        no_room.append(&mut self.ready);
        self.ready = no_room;
    }

    /// Gives one looker its share of the items that are to be looked up.
    fn start_looks(&mut self) {
        let jobs = self.options.jobs.max(1);
        let share = self.looks.len().div_ceil(jobs).min(LOOKS_AT_ONCE);
        let mut batch = Vec::with_capacity(share);
        while batch.len() < share
            && let Some(place) = self.looks.pop_front()
        {
            if matches!(self.item(place).phase, Phase::Look) {
                self.steps[place.0].busy += 1;
                self.set_phase(place, Phase::Busy);
                let request = Arc::clone(&self.item(place).request);
                let forced = self.forced.contains(&request.node.name);
                batch.push((place, request, forced));
            }
        }
        if batch.is_empty() {
            return;
        }
        self.lookers += 1;
        let (worker, tell) = (Arc::clone(&self.worker), self.tell.clone());
        tokio::task::spawn_blocking(move || {
            let mut looked = Vec::new();
            let mut told = Instant::now();
            for (place, request, forced) in batch {
                looked.push((place, worker.look(&request, forced)));
                if told.elapsed() > TELL_EVERY {
                    // The scheduler listens while anything is under way.
                    let _ = tell.send(Message::Looked(std::mem::take(&mut looked)));
                    told = Instant::now();
                }
            }
            let _ = tell.send(Message::Looked(looked));
            let _ = tell.send(Message::LookerFree);
        });
    }

    fn start_attempt(&mut self, place: Place) {
        let request = Arc::clone(&self.item(place).request);
        self.tell_beyond(place.0);
        let Phase::Ready(keyed, why) = self.set_phase(place, Phase::Busy) else {
            return;
        };
        if let Some(waiting) = self.keys.get_mut(&keyed.key) {
            waiting.push(place);
            self.set_phase(place, Phase::Parked);
            return;
        }
        self.keys.insert(keyed.key, Vec::new());
        self.running += 1;
        self.room.take(&request.node);
        let step = &mut self.steps[place.0];
        step.busy += 1;
        step.running += 1;
        let (worker, tell) = (Arc::clone(&self.worker), self.tell.clone());
        if matches!(request.node.action, Action::Uses(_)) {
            self.recall_finished();
        }
        let finished = match &request.node.action {
            Action::Uses(_) => Arc::clone(&self.finished),
            // A command cannot see it.
            Action::Run(_) => Arc::default(),
        };
        tokio::task::spawn_blocking(move || {
            let end = worker.attempt(&request, &keyed, why, &finished);
            drop(finished);
            // The scheduler listens while anything is under way.
            let _ = tell.send(Message::Ended(place, Box::new(end)));
        });
    }

    /// Says once of a step that it asks for more than the machine has.
    fn tell_beyond(&mut self, i: usize) {
        let node = Arc::clone(&self.steps[i].node);
        if let Some(text) = self.room.beyond(&node)
            && self.beyond.insert(i)
        {
            let step = Some(node.name.clone());
            self.worker.send(RunEvent::Warning { step, text });
        }
    }

    fn looked(&mut self, place: Place, looked: Looked) {
        self.steps[place.0].busy -= 1;
        match looked {
            Looked::End(end) => self.ended(place, end),
            Looked::Miss { keyed, why } if !self.steps[place.0].stalled => {
                self.set_phase(place, Phase::Ready(Arc::new(keyed), why));
                self.ready.push_back(place);
            }
            Looked::Miss { .. } => {
                self.set_phase(place, Phase::Stalled);
                self.rebind(place.0);
            }
        }
    }

    fn attempted(&mut self, place: Place, end: End) {
        self.running -= 1;
        let node = Arc::clone(&self.steps[place.0].node);
        self.room.give_back(&node);
        let step = &mut self.steps[place.0];
        step.busy -= 1;
        step.running -= 1;
        let parked = end.key.and_then(|key| self.keys.remove(&key));
        for other in parked.unwrap_or_default() {
            if matches!(self.item(other).phase, Phase::Parked) {
                self.look_again(other);
            }
        }
        self.ended(place, end);
    }

    fn look_again(&mut self, place: Place) {
        self.set_phase(place, Phase::Look);
        self.looks.push_back(place);
    }

    fn ended(&mut self, place: Place, end: End) {
        match end.result {
            Ok(result) => self.succeed(place, end.key, end.cached, end.took_ms, end.why, result),
            Err(Trouble {
                broken: Some(digest),
                ..
            }) if self.item(place).stalls < STALLS && self.stopping.is_none() => {
                self.stall(place, digest);
            }
            Err(trouble) => self.fail(place, end.key, end.took_ms, trouble),
        }
        if self.steps[place.0].stalled {
            self.rebind(place.0);
        } else {
            self.close_if_over(place.0);
        }
    }

    fn succeed(
        &mut self,
        place: Place,
        key: Option<ActionKey>,
        cached: bool,
        took_ms: u64,
        why: String,
        result: ActionResult,
    ) {
        let status = if cached {
            StepStatus::Cached
        } else {
            StepStatus::Ran
        };
        let request = Arc::clone(&self.item(place).request);
        let summary = StepSummary {
            step: request.id.clone(),
            kind: kind_of(&request.node).to_owned(),
            status: if cached { "cached" } else { "ran" }.to_owned(),
            took_ms: result.took_ms,
            metrics: result.metrics.clone(),
        };
        let again = self.item(place).counted.is_some() || self.recalled;
        let finished = Arc::make_mut(&mut self.finished);
        match finished
            .iter_mut()
            .find(|s| again && s.step == summary.step)
        {
            Some(earlier) => *earlier = summary,
            None => finished.push(summary),
        }
        self.count(place, status);
        let event = |status, took_ms, why, metrics| RunEvent::StepFinished {
            step: request.id.clone(),
            kind: kind_of(&request.node).to_owned(),
            status,
            key: key.map(|k| k.to_hex()).unwrap_or_default(),
            took_ms,
            why,
            outputs: self.worker.infos(&result.outputs),
            metrics,
            help: None,
        };
        if let Some((memory, key)) = self.worker.memory().zip(key) {
            let unchanged = UNCHANGED.to_owned();
            let metrics = result.metrics.clone();
            let name = &request.node.name;
            memory.event(name, &event(StepStatus::Cached, 0, unchanged, metrics));
            memory.outputs(name, &key, &result.outputs, result.took_ms);
        }
        let ended = event(status, took_ms, why, result.metrics.clone());
        self.worker.send(ended);
        self.set_phase(place, Phase::Ended(result.outputs));
    }

    fn fail(&mut self, place: Place, key: Option<ActionKey>, took_ms: u64, trouble: Trouble) {
        let request = Arc::clone(&self.item(place).request);
        let error = trouble.error;
        let interrupted = error.kind == StepErrorKind::Cancelled;
        let status = if interrupted {
            StepStatus::Skipped
        } else {
            StepStatus::Failed
        };
        let (outputs, metrics) = trouble
            .made
            .map(|made| (self.worker.infos(&made.outputs), made.metrics))
            .unwrap_or_default();
        self.count(place, status);
        self.worker.send(RunEvent::StepFinished {
            step: request.id.clone(),
            kind: kind_of(&request.node).to_owned(),
            status,
            key: key.map(|k| k.to_hex()).unwrap_or_default(),
            took_ms,
            why: error.message.clone(),
            outputs,
            metrics,
            help: error.help.clone(),
        });
        self.set_phase(place, Phase::Failed);
        self.note(&request.id, error);
    }

    /// Remembers a failure, and stops the run unless it is to go on.
    fn note(&mut self, id: &str, error: StepError) {
        if error.kind == StepErrorKind::Cancelled {
            let why = || "the run was interrupted".to_owned();
            self.stopping.get_or_insert_with(why);
            return;
        }
        self.gate_failed |= error.kind == StepErrorKind::Gate;
        if !self.options.keep_going {
            let why = || format!("the run stopped after `{id}` failed");
            self.stopping.get_or_insert_with(why);
        }
        self.first_error.get_or_insert((id.to_owned(), error));
    }

    /// Tells the steps after those that closed.
    fn ripple(&mut self) {
        while let Some(before) = self.settled.pop_front() {
            let name = self.steps[before].node.name.clone();
            let differs = self.differs(before);
            for i in self.steps[before].after.clone() {
                if differs {
                    self.awaken(i);
                }
                match self.steps[before].state {
                    State::Waiting | State::Open => {}
                    State::Failed => {
                        self.give_up(i, &format!("needs `{name}`, which did not finish"), true);
                    }
                    State::Unwanted if self.steps[i].required.contains(&before) => {
                        self.give_up(i, &format!("needs `{name}`, which was skipped"), false);
                    }
                    State::Done | State::Unwanted => self.arrived(i, before),
                }
            }
        }
    }

    fn arrived(&mut self, i: usize, before: usize) {
        let step = &mut self.steps[i];
        if !step.missing.remove(&before) || !step.missing.is_empty() {
            return;
        }
        if step.state == State::Waiting {
            self.open(i);
        } else {
            self.rebind(i);
        }
    }

    /// A step that can never begin, or go on.
    fn give_up(&mut self, i: usize, why: &str, failed: bool) {
        match self.steps[i].state {
            State::Waiting => {
                self.skipped(i, why);
                let state = if failed {
                    State::Failed
                } else {
                    State::Unwanted
                };
                self.set(i, state);
            }
            State::Open if self.steps[i].stalled => {
                self.steps[i].stalled = false;
                self.skip_items(i, why);
                self.close_if_over(i);
            }
            _ => {}
        }
    }

    /// Expands a step into its items and has them looked up.
    fn open(&mut self, i: usize) {
        if let Some(changed) = self.changed.as_ref().filter(|_| self.steps[i].kept) {
            let skipped = changed.was_skipped(i);
            self.set(
                i,
                if skipped {
                    State::Unwanted
                } else {
                    State::Done
                },
            );
            return;
        }
        match self.expand(i) {
            Ok(None) => {
                self.skipped(i, "its `when` is false");
                self.set(i, State::Unwanted);
            }
            Ok(Some(requests)) => {
                let items = requests.into_iter().map(|request| ItemState {
                    request: Arc::new(request),
                    phase: Phase::Look,
                    counted: None,
                    stalls: 0,
                });
                self.steps[i].items = items.collect();
                self.steps[i].left = self.steps[i].items.len();
                self.set(i, State::Open);
                self.expanded(i);
                self.looks
                    .extend((0..self.steps[i].items.len()).map(|item| (i, item)));
                self.close_if_over(i);
            }
            Err(error) => self.fail_step(i, error),
        }
    }

    fn expand(&self, i: usize) -> Result<Option<Vec<ActionRequest>>, StepError> {
        let output = |step: &str, port: &str| {
            let step = &self.steps[*self.index.get(step)?];
            step.outputs.get(port).cloned()
        };
        let node = &self.steps[i].node;
        expand(&self.pipeline, node, &self.options.expressions, output)
    }

    fn expanded(&self, i: usize) {
        let step = &self.steps[i];
        if step.node.foreach.is_some() {
            let labels = step.items.iter().filter_map(|i| i.request.label.clone());
            let event = RunEvent::StepExpanded {
                step: step.node.name.clone(),
                items: labels.collect(),
            };
            if let Some(memory) = self.worker.memory() {
                memory.event(&step.node.name, &event);
            }
            self.worker.send(event);
        }
    }

    fn fail_step(&mut self, i: usize, error: StepError) {
        let step = &self.steps[i];
        let name = step.node.name.clone();
        self.bump("failed");
        self.worker.send(RunEvent::StepFinished {
            step: name.clone(),
            kind: kind_of(&self.steps[i].node).to_owned(),
            status: StepStatus::Failed,
            key: String::new(),
            took_ms: 0,
            why: error.message.clone(),
            outputs: BTreeMap::new(),
            metrics: BTreeMap::new(),
            help: error.help.clone(),
        });
        self.note(&name, error);
        self.set(i, State::Failed);
    }

    /// When all items ended: outputs, and the state that follows.
    fn close_if_over(&mut self, i: usize) {
        let step = &mut self.steps[i];
        if step.state != State::Open || step.busy > 0 || step.left > 0 {
            return;
        }
        let mut ends = Vec::with_capacity(step.items.len());
        for item in &step.items {
            if let Phase::Ended(outputs) = &item.phase {
                ends.push((item.request.label.as_deref(), outputs));
            }
        }
        if ends.len() < step.items.len() {
            self.set(i, State::Failed);
            return;
        }
        step.outputs = if step.node.foreach.is_some() {
            gather(&step.node, &ends)
        } else {
            ends.first().map(|(_, o)| (*o).clone()).unwrap_or_default()
        };
        self.set(i, State::Done);
    }

    /// An input of the item is damaged: has it made again, and waits for it.
    fn stall(&mut self, place: Place, digest: Digest) {
        if let Some(memory) = self.worker.memory() {
            memory.spoil();
        }
        let item = self.item_mut(place);
        item.stalls += 1;
        let id = item.request.id.clone();
        self.set_phase(place, Phase::Stalled);
        self.worker.send(RunEvent::Warning {
            step: Some(id),
            text: format!(
                "an input ({}…) was missing from the cache or damaged; it is made again",
                digest.short()
            ),
        });
        for before in self.steps[place.0].data.clone() {
            self.reopen(before, digest);
            if self.steps[before].state != State::Done {
                self.steps[place.0].missing.insert(before);
                if !self.steps[before].after.contains(&place.0) {
                    self.steps[before].after.push(place.0);
                }
            }
        }
        let step = &mut self.steps[place.0];
        step.stalled = true;
        for item in &mut step.items {
            if matches!(item.phase, Phase::Look | Phase::Ready(..) | Phase::Parked) {
                item.phase = Phase::Stalled;
            }
        }
    }

    /// Has the items of a step that made this object looked up again.
    fn reopen(&mut self, i: usize, digest: Digest) {
        let step = &self.steps[i];
        let lacks = |outputs: &Outputs| {
            let mut artifacts = outputs.values().flat_map(|o| o.value.artifacts());
            artifacts.any(|a| a.digest == digest && !self.worker.has(a))
        };
        if step.kept {
            if lacks(&step.outputs) {
                self.awaken(i);
                self.set(i, State::Waiting);
                self.open(i);
            }
            return;
        }
        let lost = |item: &ItemState| match &item.phase {
            Phase::Ended(outputs) => lacks(outputs),
            _ => false,
        };
        let lost: Vec<usize> = (0..step.items.len())
            .filter(|&item| lost(&step.items[item]))
            .collect();
        if lost.is_empty() {
            return;
        }
        for item in lost {
            self.look_again((i, item));
        }
        if self.steps[i].state == State::Done {
            self.set(i, State::Open);
        }
    }

    /// A stalled step goes on, with what its inputs are now.
    fn rebind(&mut self, i: usize) {
        let step = &self.steps[i];
        if !step.stalled || step.busy > 0 || !step.missing.is_empty() {
            return;
        }
        self.steps[i].stalled = false;
        let requests = match self.expand(i) {
            Ok(requests) => requests.unwrap_or_default(),
            Err(error) => {
                self.skip_items(i, "its inputs could not be made again");
                self.fail_step(i, error);
                return;
            }
        };
        let old = std::mem::take(&mut self.steps[i].items);
        let mut old: BTreeMap<String, ItemState> = old
            .into_iter()
            .map(|item| (item.request.id.clone(), item))
            .collect();
        for request in requests {
            let item = match old.remove(&request.id) {
                Some(item) if item.phase.is_over() && item.request.same_work(&request) => item,
                earlier => ItemState {
                    request: Arc::new(request),
                    phase: Phase::Look,
                    counted: earlier.as_ref().and_then(|e| e.counted),
                    stalls: earlier.map_or(0, |e| e.stalls),
                },
            };
            self.steps[i].items.push(item);
        }
        let step = &mut self.steps[i];
        step.left = step.items.iter().filter(|i| !i.phase.is_over()).count();
        self.expanded(i);
        let places = (0..self.steps[i].items.len()).map(|item| (i, item));
        self.looks.extend(places);
        self.close_if_over(i);
    }

    fn skip_the_rest(&mut self) {
        let why = self
            .stopping
            .clone()
            .unwrap_or_else(|| "the run ended".to_owned());
        for i in 0..self.steps.len() {
            match self.steps[i].state {
                State::Waiting => {
                    self.awaken(i);
                    self.skipped(i, &why);
                    self.set(i, State::Failed);
                }
                State::Open => {
                    self.skip_items(i, &why);
                    self.set(i, State::Failed);
                }
                State::Done | State::Unwanted | State::Failed => {}
            }
        }
    }

    /// Skips the items of a step that neither ended nor are under way.
    fn skip_items(&mut self, i: usize, why: &str) {
        for item in 0..self.steps[i].items.len() {
            let state = self.item((i, item));
            if state.phase.is_over() || matches!(state.phase, Phase::Busy) {
                continue;
            }
            let id = state.request.id.clone();
            self.set_phase((i, item), Phase::Failed);
            self.count((i, item), StepStatus::Skipped);
            self.skip_event(i, id, why);
        }
    }

    fn skipped(&mut self, i: usize, why: &str) {
        self.bump("skipped");
        self.skip_event(i, self.steps[i].node.name.clone(), why);
    }

    fn skip_event(&self, i: usize, id: String, why: &str) {
        let event = RunEvent::StepFinished {
            step: id,
            kind: kind_of(&self.steps[i].node).to_owned(),
            status: StepStatus::Skipped,
            key: String::new(),
            took_ms: 0,
            why: why.to_owned(),
            outputs: BTreeMap::new(),
            metrics: BTreeMap::new(),
            help: None,
        };
        if let Some(memory) = self.worker.memory() {
            memory.event(&self.steps[i].node.name, &event);
        }
        self.worker.send(event);
    }

    fn set(&mut self, i: usize, state: State) {
        let step = &mut self.steps[i];
        tracing::debug!(step = step.node.name, from = ?step.state, to = ?state, "step state");
        step.state = state;
        if let Some(memory) = self.worker.memory().filter(|_| !step.kept) {
            match state {
                State::Done => memory.ended(&step.node.name, Some(&step.outputs)),
                State::Unwanted => memory.ended(&step.node.name, None),
                State::Waiting | State::Open | State::Failed => {}
            }
        }
        if matches!(state, State::Done | State::Unwanted | State::Failed) {
            self.settled.push_back(i);
        }
    }

    /// Every change of an item's phase, but for the new items of a step that goes on.
    fn set_phase(&mut self, place: Place, phase: Phase) -> Phase {
        let is_over = phase.is_over();
        let old = std::mem::replace(&mut self.item_mut(place).phase, phase);
        let step = &mut self.steps[place.0];
        match (old.is_over(), is_over) {
            (false, true) => step.left -= 1,
            (true, false) => step.left += 1,
            _ => {}
        }
        old
    }

    fn item(&self, (step, item): Place) -> &ItemState {
        &self.steps[step].items[item]
    }

    fn item_mut(&mut self, (step, item): Place) -> &mut ItemState {
        &mut self.steps[step].items[item]
    }

    /// Counts an item's end; one that ended before counts as it ended last.
    fn count(&mut self, place: Place, status: StepStatus) {
        let name = |status| match status {
            StepStatus::Ran => "ran",
            StepStatus::Cached => "cached",
            StepStatus::Failed => "failed",
            StepStatus::Skipped => "skipped",
        };
        if let Some(earlier) = self.item_mut(place).counted.replace(status)
            && let Some(count) = self.counts.get_mut(name(earlier))
        {
            *count -= 1;
        }
        self.bump(name(status));
    }

    fn bump(&mut self, name: &'static str) {
        *self.counts.entry(name).or_default() += 1;
    }

    pub(super) fn summary(&self, run_id: String, run_dir: PathBuf) -> RunSummary {
        let count = |name| self.counts.get(name).copied().unwrap_or_default();
        let ok = self
            .steps
            .iter()
            .all(|s| matches!(s.state, State::Done | State::Unwanted));
        RunSummary {
            run_id,
            run_dir,
            ok,
            ran: count("ran"),
            cached: count("cached"),
            failed: count("failed"),
            skipped: count("skipped"),
            interrupted: !ok && self.worker.cancel.is_cancelled(),
            gate_failed: self.gate_failed,
            first_error: self.first_error.clone(),
            steps: self.finished.as_ref().clone(),
        }
    }
}
