//! An object may turn out to be damaged only when a step is about to read it. Then the item
//! that made it is looked up again (which finds it broken, and makes it anew), and the step
//! that wanted it stalls until that is done; its items that ended meanwhile stay ended if
//! they are still the same work.

use std::collections::BTreeMap;
use std::sync::Arc;

use flowrun_cache::Digest;

use super::{ItemState, Phase, Place, Scheduler, State};
use crate::event::RunEvent;
use crate::run::Outputs;

impl Scheduler {
    /// An input of the item is damaged: has it made again, and waits for it.
    pub(super) fn stall(&mut self, place: Place, digest: Digest) {
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
    pub(super) fn reopen(&mut self, i: usize, digest: Digest) {
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
    pub(super) fn rebind(&mut self, i: usize) {
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
                    looked_after: 0,
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
}
