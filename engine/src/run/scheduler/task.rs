//! [`Task`]: what a thread does for the scheduler, and [`News`]: what it tells it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Place;
use crate::expansion::ActionRequest;
use crate::lookup::Keyed;
use crate::run::worker::{End, Looked, Worker};
use crate::step::Finished;

/// How long a looker keeps what it found to itself.
const TELL_EVERY: Duration = Duration::from_millis(2);

/// What a thread is to do.
pub(in crate::run) enum Task {
    /// Look these items up; those with `true` run whatever the cache has.
    Look(Vec<(Place, Arc<ActionRequest>, bool)>),
    /// Run an item.
    Attempt {
        place: Place,
        request: Arc<ActionRequest>,
        keyed: Arc<Keyed>,
        why: String,
        finished: Finished,
        at_once: usize,
    },
}

/// What the scheduler is told.
pub(in crate::run) enum News {
    /// The run begins.
    Begun,
    /// Some lookups of a looker that goes on.
    Looked(Vec<(Place, Looked)>),
    /// A looker's last lookups.
    LookerFree(Vec<(Place, Looked)>),
    /// An attempt ended.
    Ended(Place, Box<End>),
}

impl Task {
    /// Does it; what is known before it is done goes to `tell`.
    pub(in crate::run) fn perform(self, worker: &Worker, tell: impl Fn(News)) -> News {
        match self {
            Self::Look(batch) => {
                let mut looked = Vec::with_capacity(batch.len());
                let mut told = Instant::now();
                for (place, request, forced) in batch {
                    looked.push((place, worker.look(&request, forced)));
                    if told.elapsed() > TELL_EVERY {
                        tell(News::Looked(std::mem::take(&mut looked)));
                        told = Instant::now();
                    }
                }
                News::LookerFree(looked)
            }
            Self::Attempt {
                place,
                request,
                keyed,
                why,
                finished,
                at_once,
            } => {
                let end = worker.attempt(&request, &keyed, why, &finished, at_once);
                News::Ended(place, Box::new(end))
            }
        }
    }
}
