//! [`Outpost`]: the other end of a job whose folder it does not see: takes the order from a
//! remote store, works in a cache of its own, and gives back by the same way what it made and
//! what it has to say.
//!
//! Invariant: what the job made is in the store before its response is.

mod courier;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use flowrun_cache::{ArtifactStore, Cache, Depot, OpenOptions, RemoteCache, RemoteOptions};

use self::courier::{Begun, Courier, News, save};
use super::folder::AttemptFolder;
use super::patience::{A_DAY, Patience};
use super::post::{Environment, Post, Request, exec_with};
use super::saving::{Saving, Stored};
use super::shipment::{CACHE, Order, PLACE, Shipment, USER};
use crate::runner::exec::{ExecError, Host};
use crate::step::{Cancel, StepError};

/// How long a store that does not answer is waited for at the beginning of the work, and at the
/// least at its end.
const PATIENCE: Duration = Duration::from_secs(300);
/// How long the last answers of language models may take.
const LAST_ANSWERS: Duration = Duration::from_secs(60);

/// What an [`Outpost`] has of its own.
pub struct Ground<'a> {
    /// Empty folder, for a cache and the work.
    pub scratch: &'a Path,
    /// The user's cache folder on this machine.
    pub user_cache: &'a Path,
    /// The environment: secrets of the step, and credentials of the store.
    pub env: &'a BTreeMap<String, String>,
}

/// A job that this process has taken from a remote store.
pub struct Outpost {
    post: Post,
    goods: Goods,
    courier: Courier,
}

/// What goes in and out.
pub(super) struct Goods {
    shipment: Shipment,
    order: Order,
    attempt: AttemptFolder,
    cache: Cache,
    /// For kept answers and parts of the work, which other machines may have too.
    pub(super) remote: Arc<RemoteCache>,
    /// Secrets that the environment lacks.
    lacks: Vec<String>,
    /// Where the step saves what its next attempt can go on from.
    saved: Option<PathBuf>,
    cancel: Cancel,
    offer: Arc<Offer>,
    /// Held while something is sent of what the step saves; true once the work is over.
    over: Arc<Mutex<bool>>,
    /// Hears that the work begins.
    begun: Option<Sender<News>>,
}

impl Outpost {
    /// Takes the job `id` whose order lies in the store of this URL; `None` when another process
    /// has it, or nobody wants it any more.
    ///
    /// # Errors
    /// [`ExecError`] when there is no store, or no order that can be read.
    pub fn take(
        url: &str,
        id: &str,
        ground: &Ground<'_>,
        cancel: &Cancel,
    ) -> Result<Option<Self>, ExecError> {
        let no_job = |e: &dyn std::fmt::Display| ExecError::NoJob(e.to_string());
        let options = RemoteOptions {
            url: url.to_owned(),
            read_only: false,
            env: ground.env.clone(),
        };
        let cache_dir = ground.scratch.join("cache");
        let depot = Depot::open(&options, &cache_dir).map_err(|e| no_job(&e))?;
        let shipment = Shipment::new(&Arc::new(depot), id);
        let Some(order) = shipment.ordered().map_err(|e| no_job(&e))? else {
            return Ok(None);
        };
        if !shipment.claim().map_err(|e| no_job(&e))? {
            return Ok(None);
        }
        let attempt = AttemptFolder::at(ground.scratch.join("job"));
        attempt.make().map_err(|e| no_job(&e))?;
        let offer = Arc::new(Offer::new(order.timeout));
        let courier = Courier::start(&shipment, &attempt, Arc::clone(&offer), cancel);
        let cache = OpenOptions::no_wait(format!("job {id}"));
        let cache = Cache::open(&cache_dir, &cache).map_err(|e| no_job(&e))?;
        let remote = RemoteCache::open(&options, &cache_dir).map_err(|e| no_job(&e))?;
        let place = attempt.place();
        let here = |path: &Path| of_here(path, &place, &cache_dir, ground.user_cache);
        let request = order.request.clone().with_paths(&here);
        attempt.write_request(&request).map_err(|e| no_job(&e))?;
        let those = |names: &[String]| -> BTreeMap<String, String> {
            let names = names.iter();
            names
                .filter_map(|name| Some((name.clone(), ground.env.get(name)?.clone())))
                .collect()
        };
        let secrets = those(&order.secrets);
        let names = order
            .secrets
            .iter()
            .filter(|name| !secrets.contains_key(*name));
        let lacks = names.cloned().collect();
        let saved = match &request {
            Request::Step { request, .. } => Some(request.resume_path.clone()),
            Request::Command(_) => None,
        };
        let post = Post::of(
            attempt.clone(),
            request,
            Environment {
                handed: those(&order.handed),
                secrets,
            },
        );
        Ok(Some(Self {
            post,
            goods: Goods {
                shipment,
                order,
                attempt,
                cache,
                remote: Arc::new(remote),
                lacks,
                saved,
                cancel: cancel.clone(),
                offer,
                over: Arc::default(),
                begun: None,
            },
            courier,
        }))
    }

    /// As [`Post::log`].
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn log(&self) -> std::io::Result<File> {
        self.post.log()
    }

    /// As [`super::exec_job`], with what goes in fetched before and what came out sent after.
    ///
    /// # Errors
    /// As [`super::exec_job`].
    pub fn exec(
        self,
        host: Host,
        console: impl Write + Send + 'static,
        abandoned: impl FnOnce() + Send + 'static,
    ) -> Result<bool, ExecError> {
        let Self {
            post,
            mut goods,
            courier,
        } = self;
        goods.begun = Some(courier.tell.clone());
        let ended = exec_with(host, post, &goods.cancel, console, abandoned, Some(&goods));
        courier.end();
        ended
    }
}

impl Goods {
    /// Gets what the work reads.
    pub(super) fn fetch(&self) -> Result<(), StepError> {
        if let [name, ..] = self.lacks.as_slice() {
            let text = format!("the worker has no variable `{name}`, a secret of the step");
            return Err(StepError::failed(text).help(
                "a job through the remote store carries no values: set the variable in the workers' own environment",
            ));
        }
        let place = self.attempt.place();
        let saved = self.saved.as_deref();
        let (cache, order) = (&self.cache, &self.order);
        let patience = Patience {
            longest: PATIENCE,
            stop: &|| self.is_unwanted(),
        };
        self.shipment.fetch(cache, order, &place, saved, patience)?;
        if let Some(begun) = &self.begun {
            // It listens until it is told of the end.
            let _ = begun.send(News::Begun(Begun {
                remote: Arc::clone(&self.remote),
                completions: self.cache.completions(),
                stored: self.stored(),
                saving: self.saved.clone().map(Saving::new),
                over: Arc::clone(&self.over),
                sent: Instant::now(),
            }));
        }
        Ok(())
    }

    /// Sends what the work made, if it ended `well`, and the answers that were paid for in any case.
    pub(super) fn deliver(&self, well: bool) -> Result<(), StepError> {
        // What is under way of what the step saved comes before what it saved last.
        *self.over.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.remote.send_answers(&self.cache.completions());
        let delivered = match well {
            true => {
                let patience = Patience {
                    longest: self.offer.patience(),
                    stop: &|| self.is_unwanted(),
                };
                self.shipment.deliver(&self.cache, &self.attempt, patience)
            }
            false => {
                if let Some(saved) = self.saved.as_ref().filter(|saved| saved.exists()) {
                    match save(&self.shipment, &mut self.stored(), saved) {
                        Ok(true) => {}
                        Ok(false) => tracing::warn!("what the step saved last is still written to"),
                        Err(e) => tracing::warn!("what the step saved last is lost: {e}"),
                    }
                }
                Ok(())
            }
        };
        let started = Instant::now();
        let late = || started.elapsed() > LAST_ANSWERS || self.cancel.is_killed();
        let _ = self.remote.flush(&late, &mut |_| {});
        delivered
    }

    fn stored(&self) -> Stored {
        let inputs = self.order.inputs.iter().map(|input| &input.artifact);
        Stored::new(self.cache.store(), inputs.chain(&self.order.saved))
    }

    /// The work is to stop.
    fn is_unwanted(&self) -> bool {
        self.cancel.is_cancelled() || self.attempt.is_cancelled()
    }

    /// The objects that this end has.
    pub(super) fn store(&self) -> &ArtifactStore {
        self.cache.store()
    }
}

/// How long what came of the work is offered to a store that does not answer: it lies here, and
/// may have taken long.
#[derive(Debug)]
struct Offer {
    /// When the job was taken.
    taken: Instant,
    /// The step's own.
    timeout: Option<Duration>,
    /// When it began, and for how long: once for all that is offered.
    begun: OnceLock<(Instant, Duration)>,
}

impl Offer {
    fn new(timeout: Option<Duration>) -> Self {
        Self {
            taken: Instant::now(),
            timeout,
            begun: OnceLock::new(),
        }
    }

    /// What is left; the first call begins it.
    fn patience(&self) -> Duration {
        let (begun, longest) = self.begun.get_or_init(|| {
            let left = |timeout: Duration| timeout.saturating_sub(self.taken.elapsed());
            let longest = self.timeout.map_or(A_DAY, left).max(PATIENCE);
            (Instant::now(), longest)
        });
        longest.saturating_sub(begun.elapsed())
    }
}

/// A path of an order as this machine has it.
fn of_here(path: &Path, place: &Path, cache: &Path, user: &Path) -> PathBuf {
    for (sign, folder) in [(PLACE, place), (CACHE, cache), (USER, user)] {
        if let Ok(rest) = path.strip_prefix(sign) {
            return match rest.as_os_str().is_empty() {
                true => folder.to_owned(),
                false => folder.join(rest),
            };
        }
    }
    path.to_owned()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_was_made_is_offered_as_long_as_the_step_may_take() {
        for (timeout, longest) in [
            (None, A_DAY),
            (Some(1), PATIENCE),
            (Some(7200), Duration::from_secs(7200)),
        ] {
            let offer = Offer::new(timeout.map(Duration::from_secs));
            let first = offer.patience();
            assert!(first > longest / 2 && first <= longest, "{timeout:?}");
            // What is offered next has what the first one left.
            std::thread::sleep(Duration::from_millis(2));
            assert!(offer.patience() < first, "{timeout:?}");
        }
    }

    #[test]
    fn paths_of_an_order_are_those_of_this_machine() {
        let here = |path: &str| {
            let [place, cache, user] = ["/w/place", "/w/cache", "/home/.cache"].map(Path::new);
            of_here(Path::new(path), place, cache, user)
                .display()
                .to_string()
        };
        assert_eq!(here("@place/in/x"), "/w/place/in/x");
        assert_eq!(here("@place"), "/w/place");
        assert_eq!(here("@cache/completions"), "/w/cache/completions");
        assert_eq!(here("@user"), "/home/.cache");
        assert_eq!(here("/project"), "/project");
        assert_eq!(here("@placex"), "@placex");
    }
}
