//! Jobs that wait for their start: why, and for how long they may.

use std::time::{Duration, Instant};

use flowrun_engine::runner::JobState;
use serde_json::Value;

use super::look::made_at;
use super::{Cluster, lock};

/// Wait between two questions for the events of what waits without a reason.
const EVENTS_EVERY: Duration = Duration::from_secs(5);
/// Characters of an event that are told.
const SAID: usize = 600;

/// A job that waits.
#[derive(Debug, Clone)]
pub(super) struct Wait {
    since: Instant,
    /// When events were asked for, and what the last one said.
    asked: Option<Instant>,
    said: Option<String>,
}

impl Cluster {
    /// What is to be said of a job that waits: why, and whether it has waited for too long.
    pub(super) fn waiting(&self, id: &str, why: String, object: Option<&str>) -> JobState {
        let wait = lock(&self.waits).get(id).cloned();
        let mut wait = wait.unwrap_or_else(|| Wait {
            since: Instant::now(),
            asked: None,
            said: None,
        });
        if let Some(object) = object
            && wait.asked.unwrap_or(wait.since).elapsed() >= EVENTS_EVERY
        {
            wait.asked = Some(Instant::now());
            wait.said = self.last_warning(object);
        }
        let mut why = match (object, &wait.said) {
            (Some(_), Some(said)) => format!("{why}: {said}"),
            _ => why,
        };
        let limit = self.settings.queue_timeout;
        let hopeless = wait.since.elapsed() >= Duration::from_secs(limit);
        if hopeless {
            why = format!("it waited for {limit} s (`queue_timeout`): {why}");
        }
        lock(&self.waits).insert(id.to_owned(), wait);
        JobState::Waiting { why, hopeless }
    }

    /// What the cluster warned of last about an object; nothing where it may not be asked.
    fn last_warning(&self, object: &str) -> Option<String> {
        let fields = format!("involvedObject.name%3D{object}%2Ctype%3DWarning");
        let path = format!("{}?fieldSelector={fields}", self.path("events"));
        let events = self.list("EventList", &path).ok()?;
        let last = events.iter().max_by_key(|event| {
            let times = [&event["lastTimestamp"], &event["eventTime"]];
            let time = times.into_iter().find_map(Value::as_str);
            time.unwrap_or_else(|| made_at(event)).to_owned()
        })?;
        let part = |name: &str| last[name].as_str().unwrap_or_default().trim();
        let said = format!("{}: {}", part("reason"), part("message"));
        Some(said.chars().take(SAID).collect())
    }
}
