//! [`Worker`]: one action: look it up, else run it in a scratch folder and
//! store what it made. Blocking; knows nothing of other actions.
//!
//! Invariant: a result is put into the action cache only after all its outputs
//! are in the store, and nothing that a step does, a panic included, gets out
//! of [`Worker::attempt`] but as an error.

mod attempt;
mod inputs;
mod jobs;
mod outputs;
mod publishing;
mod watchdog;
mod workplace;

use std::collections::{BTreeMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use flowrun_cache::{ActionKey, ActionResult, Artifact, Cache, CacheError, Digest, RemoteCache};
use tokio::sync::mpsc::UnboundedSender;

use jobs::Remotes;
use workplace::Workplaces;

use super::reporter::{EventReporter, Mask};
use crate::event::RunEvent;
use crate::expansion::{ActionRequest, Expressions, kind_of};
use crate::gates;
use crate::history::History;
use crate::lookup::{Found, Keyed, Lookup};
use crate::pipeline::{Action, CachePolicy, Pipeline};
use crate::premises::Memory;
use crate::record::log_path;
use crate::runner::panicked;
use crate::sandbox::inherited;
use crate::step::{Cancel, Finished, StepError, World};
use crate::warden::Warden;
use crate::why::{Cause, why};

/// Why an action is taken from the cache.
pub(super) const UNCHANGED: &str = "nothing changed";

/// What all actions of a run share.
pub(super) struct Worker {
    pipeline: String,
    cache: Arc<Cache>,
    lookup: Lookup,
    remote_cache: Option<Arc<RemoteCache>>,
    history: History,
    run_dir: PathBuf,
    events: UnboundedSender<RunEvent>,
    pub(super) cancel: Cancel,
    /// What commands see of the environment of all runs.
    inherited: BTreeMap<String, String>,
    expressions: Expressions,
    mask: Mask,
    traced: bool,
    warden: Warden,
    remotes: Remotes,
    workplaces: Workplaces,
    /// Outputs of all results, once somebody asks.
    known_outputs: OnceLock<HashSet<Digest>>,
    /// Outputs of results that this run put others in the place of.
    overwritten: Mutex<HashSet<Digest>>,
    /// Paths of the project that were published to in this run, and by which action.
    places: Mutex<BTreeMap<PathBuf, String>>,
}

/// What a lookup gave.
pub(super) enum Looked {
    /// The action need not run, or cannot.
    End(End),
    /// It must run.
    Miss { keyed: Keyed, why: String },
}

/// How an action ended.
pub(super) struct End {
    pub(super) key: Option<ActionKey>,
    pub(super) why: String,
    pub(super) how: How,
    pub(super) took_ms: u64,
    pub(super) result: Result<ActionResult, Trouble>,
}

/// Where an action's result came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum How {
    /// The action ran.
    Ran,
    /// The cache had it.
    Cached,
    /// The remote cache had it.
    Fetched,
}

/// Why an action did not end well.
pub(super) struct Trouble {
    pub(super) error: StepError,
    /// An input artifact that is missing or damaged.
    pub(super) broken: Option<Digest>,
    /// What it made nevertheless, when only a gate or publishing failed.
    pub(super) made: Option<Box<ActionResult>>,
}

impl From<StepError> for Trouble {
    fn from(error: StepError) -> Self {
        Self {
            error,
            broken: None,
            made: None,
        }
    }
}

impl Worker {
    #[allow(clippy::too_many_arguments)]
    pub(super) fn new(
        pipeline: &Pipeline,
        cache: &Arc<Cache>,
        world: World,
        run_dir: PathBuf,
        events: UnboundedSender<RunEvent>,
        cancel: Cancel,
        expressions: Expressions,
        memory: Option<Arc<Memory>>,
        remote: Option<Arc<RemoteCache>>,
        secrets: &[String],
        traced: bool,
    ) -> Self {
        let names = pipeline
            .steps
            .iter()
            .flat_map(|s| &s.secrets)
            .chain(secrets);
        let runners = pipeline.runners.values();
        let handed = runners.flat_map(|runner| &runner.settings.env);
        let handed = handed
            .filter_map(|name| world.env.get(name).cloned())
            .filter(|value| Mask::is_likely(value));
        let secrets = names.filter_map(|name| world.env.get(name).cloned());
        let mask = Mask::new(secrets.chain(handed));
        Self {
            pipeline: pipeline.name.clone(),
            cache: Arc::clone(cache),
            inherited: inherited(&world.env),
            lookup: Lookup::holding(
                &pipeline.root,
                world.until(&cancel),
                cache,
                memory,
                remote.clone(),
            ),
            remote_cache: remote.clone(),
            history: History::new(&pipeline.name, cache.dir(), Some(run_dir.clone())),
            run_dir,
            events,
            cancel,
            expressions,
            mask,
            traced,
            warden: Warden::new(cache),
            remotes: Remotes::new(pipeline, cache, remote),
            workplaces: Workplaces::new(cache),
            known_outputs: OnceLock::new(),
            overwritten: Mutex::default(),
            places: Mutex::default(),
        }
    }

    /// Hears what the run rests on, if it is to be remembered.
    pub(super) fn memory(&self) -> Option<&Memory> {
        self.lookup.memory.as_deref()
    }

    pub(super) fn send(&self, event: RunEvent) {
        // The recorder listens until the run is over.
        let _ = self.events.send(event);
    }

    /// An artifact is in the store.
    pub(super) fn has(&self, artifact: &Artifact) -> bool {
        self.cache.store().contains(artifact)
    }

    /// Looks an action up. Never panics, whatever the step's `observe` does.
    pub(super) fn look(&self, request: &ActionRequest, forced: bool) -> Looked {
        let started = Instant::now();
        let looked = catch_unwind(AssertUnwindSafe(|| self.look_up(request, forced)))
            .unwrap_or_else(|panic| Err(panicked(&*panic)));
        let mut looked = looked.unwrap_or_else(|error| {
            Looked::End(End {
                key: None,
                why: String::new(),
                how: How::Ran,
                took_ms: 0,
                result: Err(self.masked(error).into()),
            })
        });
        if let Looked::End(end) = &mut looked {
            end.took_ms = millis(started);
        }
        looked
    }

    fn look_up(&self, request: &ActionRequest, forced: bool) -> Result<Looked, StepError> {
        let mut keyed = self.key(request)?;
        keyed.replaces = forced;
        let cause = if forced {
            Cause::Forced
        } else if request.node.cache == CachePolicy::Never {
            Cause::NoResult
        } else {
            match self.find(request, &keyed.key) {
                Ok(end) => return Ok(Looked::End(end)),
                Err(cause) => {
                    keyed.is_new = cause == Cause::NoResult;
                    cause
                }
            }
        };
        if cause == Cause::Broken {
            self.send(RunEvent::Warning {
                step: Some(request.id.clone()),
                text: "an output was missing from the cache or damaged; it is made again"
                    .to_owned(),
            });
        }
        let why = why(&self.history, request, &keyed, cause).text();
        Ok(Looked::Miss { keyed, why })
    }

    /// The key of an action. To find it may take downloads: they have the time of an attempt.
    fn key(&self, request: &ActionRequest) -> Result<Keyed, StepError> {
        let node = &request.node;
        if node.timeout.is_none() || matches!(node.action, Action::Run(_)) {
            return self.lookup.key(request);
        }
        let cancel = self.cancel.child();
        let world = self.lookup.world_of(request).until(&cancel);
        self.in_time(node, &cancel, || self.lookup.key_in(&world, request))
    }

    /// The end of an action that need not run; else why it must.
    fn find(&self, request: &ActionRequest, key: &ActionKey) -> Result<End, Cause> {
        let mut cause = Cause::NoResult;
        // What turns out to be damaged here may be whole in the remote cache.
        for _ in 0..2 {
            let found = self.lookup.find(request, key);
            self.tell_of_remote();
            let (how, result) = match found {
                Found::Whole(result) => (How::Cached, result),
                Found::Fetched(result) => (How::Fetched, result),
                Found::Broken => return Err(Cause::Broken),
                Found::Nothing => return Err(cause),
                Found::Flawed(why) => {
                    self.send(RunEvent::Warning {
                        step: Some(request.id.clone()),
                        text: format!("the remote cache has a result, but {why}; the step runs"),
                    });
                    return Err(cause);
                }
            };
            let result = self.settle(request, *result);
            if !result.as_ref().is_err_and(|t| t.broken.is_some()) {
                return Ok(End {
                    key: Some(*key),
                    why: UNCHANGED.to_owned(),
                    how,
                    took_ms: 0,
                    result,
                });
            }
            cause = Cause::Broken;
        }
        Err(cause)
    }

    /// Passes on what there is to say of the remote cache.
    fn tell_of_remote(&self) {
        let remote = self.remote_cache.iter();
        for text in remote.flat_map(|remote| remote.take_warnings()) {
            self.send(RunEvent::Warning { step: None, text });
        }
    }

    /// Runs an action, with its retries; `at_once` says how many processes may do its step's work at
    /// the same time. Never panics, whatever the step does.
    pub(super) fn attempt(
        &self,
        request: &ActionRequest,
        keyed: &Keyed,
        why: String,
        finished: &Finished,
        at_once: usize,
    ) -> End {
        let started = Instant::now();
        self.send(RunEvent::StepStarted {
            step: request.id.clone(),
            kind: kind_of(&request.node).to_owned(),
            key: keyed.key.to_hex(),
            why: why.clone(),
        });
        let work = || {
            let result = self.with_retries(request, keyed, finished, at_once)?;
            self.settle(request, result)
        };
        let result = catch_unwind(AssertUnwindSafe(work))
            .unwrap_or_else(|panic| Err(panicked(&*panic).into()));
        End {
            key: Some(keyed.key),
            why,
            how: How::Ran,
            took_ms: millis(started),
            result: result.map_err(|trouble| Trouble {
                error: self.masked(trouble.error),
                ..trouble
            }),
        }
    }

    fn masked(&self, mut error: StepError) -> StepError {
        error.message = self.mask.apply(&error.message);
        error.help = error.help.map(|help| self.mask.apply(&help));
        error
    }

    fn reporter(&self, id: &str) -> EventReporter {
        EventReporter {
            step: id.to_owned(),
            events: self.events.clone(),
            path: log_path(&self.run_dir, id),
            log: Mutex::default(),
            last: Mutex::default(),
            mask: self.mask.clone(),
            traced: self.traced,
        }
    }

    /// What follows a result, ran or cached: gates, then the project tree and the run's report.
    fn settle(
        &self,
        request: &ActionRequest,
        result: ActionResult,
    ) -> Result<ActionResult, Trouble> {
        let settled = gates::check(&request.node, &result.metrics, &self.expressions)
            .map_err(Trouble::from)
            .and_then(|()| self.publish(request, &result));
        match settled {
            Ok(()) => Ok(result),
            Err(trouble) => Err(Trouble {
                made: Some(Box::new(result)),
                ..trouble
            }),
        }
    }
}

fn cache_error(error: CacheError) -> StepError {
    StepError::failed(error.to_string())
}

fn broken_or_failed(error: CacheError, artifact: &Artifact) -> Trouble {
    let broken = matches!(
        error,
        CacheError::Missing { .. } | CacheError::Damaged { .. }
    );
    Trouble {
        broken: broken.then_some(artifact.digest),
        ..cache_error(error).into()
    }
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}
