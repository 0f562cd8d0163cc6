//! [`Look`]: all jobs of the project with their pods at one time, asked for once for all who want
//! to know.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::kubectl::CallError;
use super::{Cluster, lock, manifest};

/// Wait between two looks at the jobs; longer where a look takes long.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(2);
/// At most one part in so many of the time is spent on looks.
const SHARE: u32 = 5;

/// A look, which is the answer to all who ask as long as it is new. So is a failure: a server
/// that hangs would else be waited for by each of them in turn.
pub(super) struct Looked {
    /// When it began.
    pub(super) at: Instant,
    pub(super) took: Duration,
    pub(super) seen: Result<Look, CallError>,
}

/// The jobs of the project at one time.
pub(super) struct Look {
    pub(super) jobs: BTreeMap<String, Value>,
    /// The newest pod of each.
    pods: BTreeMap<String, Value>,
}

impl Cluster {
    /// A job and its pod, if there is such a job.
    pub(super) fn find(&self, id: &str) -> Result<Option<(Value, Option<Value>)>, CallError> {
        // Others wait meanwhile, for the same answer.
        let mut slot = lock(&self.look);
        let looked = match slot.take().filter(Looked::is_new) {
            Some(looked) => looked,
            None => self.look(),
        };
        let looked = slot.insert(looked);
        let look = looked.seen.as_ref().map_err(CallError::clone)?;
        let job = look.jobs.get(id).cloned();
        Ok(job.map(|job| (job, look.pods.get(id).cloned())))
    }

    fn look(&self) -> Looked {
        let at = Instant::now();
        let seen = self.see();
        Looked {
            at,
            took: at.elapsed(),
            seen,
        }
    }

    fn see(&self) -> Result<Look, CallError> {
        let label = manifest::PROJECT.replace('/', "%2F");
        let ours = format!("labelSelector={label}%3D{}", self.project);
        // Pods first: one that ended because its job was deleted is then not taken for lost.
        let mut pods = self.list("PodList", &format!("{}?{ours}", self.path("pods")))?;
        let jobs = self.list("JobList", &format!("{}?{ours}", self.jobs()))?;
        pods.sort_by(|a, b| made_at(a).cmp(made_at(b)));
        let named = jobs.into_iter().filter_map(|job| {
            let name = job["metadata"]["name"].as_str()?.to_owned();
            Some((name, job))
        });
        let of_jobs = pods.into_iter().filter_map(|pod| {
            let job = pod["metadata"]["labels"][manifest::JOB]
                .as_str()?
                .to_owned();
            Some((job, pod))
        });
        let look = Look {
            jobs: named.collect(),
            // The last of a job stays.
            pods: of_jobs.collect(),
        };
        lock(&self.known).extend(look.jobs.keys().cloned());
        Ok(look)
    }
}

impl Looked {
    fn is_new(&self) -> bool {
        let long = match self.seen {
            Ok(_) => self.took * SHARE,
            // As long again as it took: the server may be back soon.
            Err(_) => self.took * 2,
        };
        self.at.elapsed() < LOOK_EVERY.max(long)
    }
}

/// When an object was made, in the one form in which times sort as text.
pub(super) fn made_at(object: &Value) -> &str {
    let time = object["metadata"]["creationTimestamp"].as_str();
    time.unwrap_or_default()
}
