//! [`Finished`]: the steps that finished before one began.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::StepSummary;

/// The steps that finished before this one started, in order of finishing. Cheap to clone: all
/// share one list, of which each knows a beginning.
#[derive(Debug, Clone, Default)]
pub struct Finished {
    all: Arc<Mutex<Vec<StepSummary>>>,
    count: usize,
}

impl Finished {
    /// The summaries. That of a step that was made again meanwhile, because its output was
    /// damaged, is the newer one.
    #[must_use]
    pub fn to_vec(&self) -> Vec<StepSummary> {
        let all = self.lock();
        all[..self.count.min(all.len())].to_vec()
    }

    /// One more finished. To be called on the clone that knows the whole list.
    pub(crate) fn push(&mut self, summary: StepSummary) {
        let mut all = self.lock();
        all.push(summary);
        let count = all.len();
        drop(all);
        self.count = count;
    }

    /// As [`Finished::push`], of one that may have finished before: then it keeps its place.
    pub(crate) fn put(&mut self, summary: StepSummary) {
        let mut all = self.lock();
        if let Some(earlier) = all.iter_mut().find(|s| s.step == summary.step) {
            *earlier = summary;
            return;
        }
        drop(all);
        self.push(summary);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<StepSummary>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl From<Vec<StepSummary>> for Finished {
    fn from(all: Vec<StepSummary>) -> Self {
        Self {
            count: all.len(),
            all: Arc::new(Mutex::new(all)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(step: &str, took_ms: u64) -> StepSummary {
        StepSummary {
            step: step.to_owned(),
            kind: "run".to_owned(),
            status: "ran".to_owned(),
            took_ms,
            metrics: std::collections::BTreeMap::new(),
        }
    }

    #[test]
    fn each_clone_knows_what_finished_before_it_was_made() {
        let mut all = Finished::default();
        all.push(summary("a", 1));
        let early = all.clone();
        all.push(summary("b", 2));
        all.put(summary("a", 3));
        all.put(summary("c", 4));
        let told = |list: &Finished| -> Vec<(String, u64)> {
            let list = list.to_vec().into_iter();
            list.map(|s| (s.step, s.took_ms)).collect()
        };
        assert_eq!(told(&early), [("a".to_owned(), 3)]);
        let names: Vec<String> = told(&all).into_iter().map(|(step, _)| step).collect();
        assert_eq!(names, ["a", "b", "c"]);
    }
}
