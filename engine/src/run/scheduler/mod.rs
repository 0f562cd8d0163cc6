//! [`Scheduler`]: which action is next.
//!
//! The plan: a step waits until nothing before it is missing; then it opens:
//! its items are known, and each is looked up. What the cache has ends at
//! once; the rest becomes ready, and an attempt starts when there is room.
//! When the last item of a step ends, the step closes: its outputs are
//! gathered, and the steps after it miss one thing less.
//!
//! It is asked by one thread at a time: lookups and attempts are tasks for others
//! ([`super::crew`]), which tell what they found. Every change of a step's state goes
//! through [`Scheduler::set`].
//!
//! | file | does |
//! |---|---|
//! | this one | what is looked up, what is started |
//! | `opening` | how a step opens once nothing before it is missing, and closes after its last item |
//! | `task` | what a thread does: lookups, or an attempt |
//! | `ending` | what is told and counted of what ended |
//! | `mending` | has objects that turn out to be damaged made again |
//! | `keys` | has actions of one key run one after the other |
//! | `kept` | leaves alone what changed files do not reach |

mod ending;
mod kept;
mod keys;
mod mending;
mod opening;
mod task;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use self::keys::{Keys, Turn};
pub(super) use self::task::{News, Task};

use super::ready::Ready;
use super::room::Room;
use super::state::{ItemState, Phase, State, StepState};
use super::together::{Together, most_together};
use super::worker::{End, Looked, Trouble, Worker};
use super::{RunOptions, Selection};
use crate::dag::{data_predecessors, predecessors, required_predecessors};
use crate::event::RunEvent;
use crate::pipeline::{Action, CachePolicy, Pipeline, RunnerKind, StepNode};
use crate::premises::Changed;
use crate::step::{Finished, StepError};

/// How often one item may find its inputs damaged before it fails.
const STALLS: u32 = 3;

/// Items that one looker takes at a time.
const LOOKS_AT_ONCE: usize = 64;

/// Lookers at once when there is a remote cache.
pub(super) const REMOTE_LOOKERS: usize = 16;

/// A step and one of its items.
type Place = (usize, usize);

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
    ready: Ready,
    lookers: usize,
    room: Room,
    /// Steps of which it was said that they ask for more than there is.
    beyond: BTreeSet<usize>,
    running: usize,
    keys: Keys,
    /// Steps whose end the steps after them do not know yet.
    settled: VecDeque<usize>,
    finished: Finished,
    /// The last run, when only what changed is looked at.
    changed: Option<Arc<Changed>>,
    /// What it finished is among `finished`.
    recalled: bool,
    /// Why nothing new is started.
    stopping: Option<String>,
    counts: BTreeMap<&'static str, usize>,
    gate_failed: bool,
    first_error: Option<(String, StepError)>,
    /// What threads are to do next.
    tasks: Vec<Task>,
}

impl Scheduler {
    pub(super) fn new(
        pipeline: Arc<Pipeline>,
        options: RunOptions,
        selection: Selection,
        worker: &Arc<Worker>,
    ) -> Self {
        let chosen: Vec<&Arc<StepNode>> = pipeline
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
                node: Arc::clone(step),
                state: State::Waiting,
                missing: places(predecessors(step)),
                data: places(data_predecessors(step)),
                required: places(required_predecessors(step)),
                after: Vec::new(),
                items: Vec::new(),
                left: 0,
                busy: 0,
                together: Together::default(),
                stalled: false,
                kept: false,
                outputs: Arc::default(),
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

    fn empty(pipeline: Arc<Pipeline>, options: RunOptions, worker: &Arc<Worker>) -> Self {
        Self {
            room: Room::new(
                options.jobs,
                options.capacity.clone(),
                pipeline.pools.clone(),
                pipeline
                    .runners
                    .iter()
                    .map(|(name, runner)| (name.clone(), runner.settings.jobs))
                    .collect(),
            ),
            pipeline,
            worker: Arc::clone(worker),
            options,
            forced: BTreeSet::new(),
            steps: Vec::new(),
            index: BTreeMap::new(),
            changed: None,
            recalled: false,
            looks: VecDeque::new(),
            ready: Ready::default(),
            lookers: 0,
            beyond: BTreeSet::new(),
            running: 0,
            keys: Keys::default(),
            settled: VecDeque::new(),
            finished: Finished::default(),
            stopping: None,
            counts: BTreeMap::new(),
            gate_failed: false,
            first_error: None,
            tasks: Vec::new(),
        }
    }

    /// Takes in what happened, and gives what is to be done about it; `None` when the run is over.
    pub(super) fn hear(&mut self, news: News) -> Option<Vec<Task>> {
        match news {
            News::Begun => self.begin(),
            News::Looked(batch) => {
                for (place, looked) in batch {
                    self.looked(place, looked);
                }
            }
            News::LookerFree(batch) => {
                self.lookers -= 1;
                for (place, looked) in batch {
                    self.looked(place, looked);
                }
            }
            News::Ended(place, end) => self.attempted(place, *end),
        }
        self.ripple();
        self.start();
        if self.lookers + self.running > 0 {
            return Some(std::mem::take(&mut self.tasks));
        }
        self.skip_the_rest();
        self.tell_kept();
        None
    }

    fn begin(&mut self) {
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
    }

    /// Starts what there is room for. Lookups have places of their own: what the cache has when
    /// an item is due never waits behind a running one.
    fn start(&mut self) {
        if self.stopping.is_none() && self.worker.cancel.is_cancelled() {
            self.stopping = Some("the run was interrupted".to_owned());
        }
        if self.stopping.is_some() {
            return;
        }
        self.start_lookers();
        // Lines whose first item found no room are passed over.
        let mut from = 0;
        while !self.room.is_full() {
            let Some((head, place)) = self.ready.head(from) else {
                break;
            };
            if !matches!(self.phase(place), Some(Phase::Ready(..))) {
                self.ready.pop(head);
                continue;
            }
            match self.admitted(head, place) {
                Some(place) => self.start_attempt(place),
                None => from = head + 1,
            }
        }
        // Some of them are looked up again.
        self.start_lookers();
    }

    fn start_lookers(&mut self) {
        while self.lookers < self.most_lookers() && !self.looks.is_empty() {
            self.start_looks();
        }
    }

    /// Takes the first item of a line that may run now; `first` is the line's first.
    fn admitted(&mut self, head: u64, first: Place) -> Option<Place> {
        if !self.room.fits(&self.steps[first.0].node) {
            return None;
        }
        let (steps, is_nested) = (&self.steps, levels(&self.steps[first.0].node) > 1);
        let admits = |place: Place| {
            let step = &steps[place.0];
            step.items.get(place.1).is_some_and(|item| {
                let label = item.request.label.as_deref();
                matches!(item.phase, Phase::Ready(..)) && step.together.admits(&step.node, label)
            })
        };
        // Where a step has several levels, one item may be held up by those around and the next not.
        if admits(first) || is_nested {
            return self.ready.take(head, admits);
        }
        None
    }

    /// Lookers at once: those that ask a remote cache wait more than they work.
    fn most_lookers(&self) -> usize {
        match self.options.remote {
            Some(_) => self.options.jobs.max(REMOTE_LOOKERS),
            None => self.options.jobs.max(1),
        }
    }

    /// Gives one looker its share of the items that are to be looked up.
    fn start_looks(&mut self) {
        let share = self.looks.len().div_ceil(self.most_lookers());
        let share = share.min(LOOKS_AT_ONCE);
        let mut batch = Vec::with_capacity(share);
        while batch.len() < share
            && let Some(place) = self.looks.pop_front()
        {
            if matches!(self.phase(place), Some(Phase::Look)) {
                self.steps[place.0].busy += 1;
                self.set_phase(place, Phase::Busy);
                self.item_mut(place).looked_after = self.keys.ended();
                let request = Arc::clone(&self.item(place).request);
                let forced = self.forced.contains(&request.node.name);
                batch.push((place, request, forced));
            }
        }
        if batch.is_empty() {
            return;
        }
        self.lookers += 1;
        self.tasks.push(Task::Look(batch));
    }

    /// How many processes may do the work of a step at the same time.
    fn at_once(&self, at: usize) -> usize {
        let step = &self.steps[at];
        let node = &step.node;
        if node.runner == RunnerKind::Inline {
            return 1;
        }
        let items = step.items.len().min(most_together(node));
        self.room.at_once(node).min(items).max(1)
    }

    fn start_attempt(&mut self, place: Place) {
        let request = Arc::clone(&self.item(place).request);
        self.tell_beyond(place.0);
        let Phase::Ready(keyed, why) = self.set_phase(place, Phase::Busy) else {
            return;
        };
        // What is to run anyway would not find it.
        let may_find = !keyed.replaces && request.node.cache != CachePolicy::Never;
        let looked_after = may_find.then_some(self.item(place).looked_after);
        match self.keys.take(keyed.key, place, looked_after) {
            Turn::Now => {}
            Turn::Later => {
                self.set_phase(place, Phase::Parked);
                return;
            }
            Turn::LookFirst => return self.look_again(place),
        }
        self.running += 1;
        self.room.take(&request.node);
        let at_once = self.at_once(place.0);
        let step = &mut self.steps[place.0];
        step.busy += 1;
        step.together.add(&step.node, request.label.as_deref());
        if matches!(request.node.action, Action::Uses(_)) {
            self.recall_finished();
        }
        let finished = match &request.node.action {
            Action::Uses(_) => self.finished.clone(),
            // A command cannot see it.
            Action::Run(_) => Finished::default(),
        };
        self.tasks.push(Task::Attempt {
            place,
            request,
            keyed,
            why,
            finished,
            at_once,
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
                self.ready.push(place, &self.steps[place.0].node);
            }
            Looked::Miss { .. } => {
                self.set_phase(place, Phase::Stalled);
                self.rebind(place.0);
            }
        }
    }

    fn attempted(&mut self, place: Place, end: End) {
        self.running -= 1;
        let request = Arc::clone(&self.item(place).request);
        self.room.give_back(&request.node);
        let step = &mut self.steps[place.0];
        step.busy -= 1;
        step.together.remove(&step.node, request.label.as_deref());
        let made = match &end.result {
            Ok(_) => true,
            // It was recorded before its gate or publishing failed.
            Err(trouble) => trouble.made.is_some(),
        };
        for other in self.keys.give_back(end.key, made) {
            if matches!(self.phase(other), Some(Phase::Parked)) {
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
            Ok(result) => self.succeed(place, end.key, end.how, end.took_ms, end.why, result),
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

    /// The phase of an item, if there still is one: a step that goes on may have fewer.
    fn phase(&self, (step, item): Place) -> Option<&Phase> {
        self.steps[step].items.get(item).map(|item| &item.phase)
    }

    fn item(&self, (step, item): Place) -> &ItemState {
        &self.steps[step].items[item]
    }

    fn item_mut(&mut self, (step, item): Place) -> &mut ItemState {
        &mut self.steps[step].items[item]
    }
}

/// How many lists a step's items are of.
fn levels(node: &StepNode) -> usize {
    node.foreach
        .as_ref()
        .map_or(0, |foreach| foreach.levels.len())
}
