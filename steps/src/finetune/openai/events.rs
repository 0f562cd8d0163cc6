//! What a job tells of itself: the log, the curve of its loss, and how long it is.

use std::collections::{BTreeMap, BTreeSet};

use flowrun_engine::step::StepError;
use serde::{Deserialize, Serialize};

use super::shapes::{EventRow, Metrics, PAGE, Page, failed, read};
use super::{State, Training};

/// What was heard of a job. Servers keep events for a while only: it outlives a kill.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Seen {
    pub(super) events: BTreeSet<String>,
    pub(super) losses: BTreeMap<u64, f64>,
    pub(super) total_steps: Option<u64>,
}

impl Seen {
    /// Takes a page of events, the newest first, into `fresh`; whether older ones are yet to be
    /// heard. One that was heard before ends it, and so does a server that lists the same again.
    pub(super) fn take(&self, page: Page<EventRow>, fresh: &mut Vec<EventRow>) -> bool {
        let listed = page.data.len();
        let before = fresh.len();
        for event in page.data {
            let is_known = |other: &EventRow| other.id == event.id;
            if !self.events.contains(&event.id) && !fresh.iter().any(is_known) {
                fresh.push(event);
            }
        }
        page.has_more && listed > 0 && fresh.len() - before == listed
    }

    /// Steps of the whole training, as far as they were told.
    pub(super) fn total_steps(&self) -> Option<u64> {
        self.total_steps
            .max(self.losses.keys().next_back().copied())
    }
}

impl Training<'_> {
    /// Tells of what happened since; whether all of it could be read. Events are for people:
    /// without them a training is as good.
    pub(super) fn hear(&self, id: &str, state: &mut State) -> Result<bool, StepError> {
        let seen = &mut state.seen;
        let mut fresh: Vec<EventRow> = Vec::new();
        loop {
            let after = fresh.last().map(|event| event.id.clone());
            let mut query = vec![("limit", PAGE)];
            query.extend(after.as_deref().map(|after| ("after", after)));
            let page = self.api.get(&["fine_tuning", "jobs", id, "events"], &query);
            let Ok(page) = page.map_err(failed).and_then(read::<Page<EventRow>>) else {
                // With a gap, the next look would not go back beyond what was heard now.
                return Ok(false);
            };
            if !seen.take(page, &mut fresh) {
                break;
            }
        }
        if fresh.is_empty() {
            return Ok(true);
        }
        for event in fresh.into_iter().rev() {
            seen.events.insert(event.id);
            self.ctx.reporter.log(&event.message);
            let Some(Metrics {
                step: Some(step),
                total_steps,
                train_loss,
            }) = event.data
            else {
                continue;
            };
            seen.total_steps = total_steps.or(seen.total_steps);
            let text = train_loss.map_or_else(String::new, |loss| format!("loss {loss:.4}"));
            if let Some(loss) = train_loss {
                seen.losses.insert(step, loss);
            }
            let total = seen.total_steps.unwrap_or(0);
            self.ctx.reporter.progress(step, total, "steps", &text);
        }
        self.remember(state)?;
        Ok(true)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn page(ids: &[&str], has_more: bool) -> Page<EventRow> {
        let data: Vec<Value> = ids.iter().map(|id| json!({"id": id})).collect();
        serde_json::from_value(json!({"data": data, "has_more": has_more})).unwrap()
    }

    #[test]
    fn events_are_heard_back_to_a_known_one() {
        let mut seen = Seen::default();
        let mut fresh = Vec::new();
        assert!(seen.take(page(&["e5", "e4"], true), &mut fresh));
        assert!(seen.take(page(&["e3", "e2"], true), &mut fresh));
        assert!(!seen.take(page(&["e1"], false), &mut fresh));
        let ids: Vec<&str> = fresh.iter().map(|event| event.id.as_str()).collect();
        assert_eq!(ids, ["e5", "e4", "e3", "e2", "e1"]);

        seen.events = ["e1", "e2"].map(str::to_owned).into();
        let mut fresh = Vec::new();
        assert!(!seen.take(page(&["e3", "e2"], true), &mut fresh));
        assert_eq!(fresh.len(), 1);
        // A server that knows no `after`.
        assert!(!seen.take(page(&["e3", "e2"], true), &mut fresh));
        assert_eq!(fresh.len(), 1);
    }

    #[test]
    fn what_was_heard_outlives_a_kill_and_says_how_long_the_training_was() {
        let old: State = serde_json::from_value(json!({"file": "f", "job": "j"})).unwrap();
        assert_eq!(old.seen.total_steps(), None);
        let seen = Seen {
            events: ["e1".to_owned()].into(),
            losses: [(10, 0.5), (30, 0.25)].into(),
            total_steps: None,
        };
        let text = serde_json::to_string(&State { seen, ..old }).unwrap();
        let State { seen, .. } = serde_json::from_str(&text).unwrap();
        assert_eq!(seen.losses[&30], 0.25);
        assert!(seen.events.contains("e1"));
        assert_eq!(seen.total_steps(), Some(30));
    }
}
