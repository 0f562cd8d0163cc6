//! Jobs: the work of a step on a machine that a job system (Kubernetes, Ray, Slurm) chooses.
//!
//! Both sides see one folder, the *job folder*, in the cache. The runner writes the request into
//! it and has the job system start `flowrun step exec --job FOLDER` somewhere; the other end
//! appends what it has to say, and its response last, to a file there. So the folder is the
//! truth, and the job system is asked only whether it still means to do the job: a head that
//! dies and forgets all jobs costs nothing while the work itself goes on.
//!
//! | file | does |
//! |---|---|
//! | this one | the words: what a job system is, and what it says of a job |
//! | `settings` | what `runners:` says of every job system |
//! | `folder` | the files of a job |
//! | `follow` | reads what the other end appends |
//! | `leftover` | what a run that was killed left |
//! | `watch` | from what is heard of a job to what it means; pure |
//! | `remote` | the runner: order, watch, begin again, stop, tidy |
//! | `post` | the other end |
//! | `way` | how files reach the workers: in the folder, or through a remote store |
//! | `shipment` | what lies in a remote store, where the workers do not see the folder |
//! | `patience` | how a store that does not answer is asked again |
//! | `collect` | makes the folder here say what the one there says |
//! | `absence` | what becomes of a job while the remote store is away |
//! | `outpost` | the other end, with a folder of its own |
//! | `saving` | when what a step saved there is sent |
//!
//! Knows no job system. Invariant: at most one process works for one attempt, and an attempt
//! that was ordered is followed by whoever runs the action next, not ordered again.

mod absence;
mod collect;
mod folder;
mod follow;
mod leftover;
mod outpost;
mod patience;
mod post;
mod remote;
mod saving;
mod settings;
mod shipment;
#[cfg(test)]
mod tests;
mod watch;
mod way;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

pub(crate) use self::leftover::end as end_leftover;
pub use self::outpost::{Ground, Outpost};
pub(crate) use self::post::{CommandRequest, Environment, Request};
pub use self::post::{Post, exec_job};
pub(crate) use self::remote::{Errand, Remote};
pub(crate) use self::settings::schema as runner_schema;
pub use self::settings::{JobSettings, Through};
pub(crate) use self::shipment::Input as ShippedInput;
pub(crate) use self::way::Way;
use crate::pipeline::Resources;
use crate::step::{StepError, World};

/// A sort of job system: what `runners:` and a step's `runner` may name.
pub trait JobKind: Send + Sync {
    /// The name, kebab-case.
    fn name(&self) -> &'static str;
    /// One sentence for people.
    fn about(&self) -> &'static str;
    /// JSON Schema of its own settings: an object that allows no other fields. Those of
    /// [`JobSettings`] are added to it.
    fn settings_schema(&self) -> Value;
    /// How `runners:` may name it in the shortest way, for messages: `{ address: … }`.
    fn example(&self) -> &'static str;
    /// Opens it. Nothing is sent yet.
    ///
    /// # Errors
    /// When the settings cannot work here.
    fn open(&self, settings: &Value, world: &World) -> Result<Box<dyn JobSystem>, StepError>;
    /// Whether the workers see the remote cache, which is this folder, as far as its own settings
    /// tell. They know it by the same path.
    ///
    /// # Errors
    /// When they do not.
    fn sees(&self, _settings: &Value, _remote: &Path) -> Result<(), StepError> {
        Ok(())
    }
}

/// A job system that can be reached.
pub trait JobSystem: Send + Sync {
    /// Which one it is, for messages and to tell it from others: `Ray at http://…`.
    fn name(&self) -> String;
    /// Orders a job, unless there is one of that id already.
    ///
    /// # Errors
    /// [`JobError`].
    fn submit(&self, order: &JobOrder<'_>) -> Result<(), JobError>;
    /// What has become of a job.
    ///
    /// # Errors
    /// [`JobError`]: refused only where asking again cannot help. An answer that makes no sense
    /// is none.
    fn state(&self, order: &JobOrder<'_>) -> Result<JobState, JobError>;
    /// Asks a job to stop, which it may do some time later.
    ///
    /// # Errors
    /// [`JobError`].
    fn stop(&self, id: &str) -> Result<(), JobError>;
    /// Removes what is left of a job, if it ended; false when it did not yet.
    ///
    /// # Errors
    /// [`JobError`].
    fn forget(&self, id: &str) -> Result<bool, JobError>;
}

/// File in a job's folder for what its process prints.
pub const CONSOLE: &str = "console";

/// A job, as a job system is to know it.
#[derive(Debug, Clone)]
pub struct JobOrder<'a> {
    /// Its id, letters, digits and `-`, never used for another attempt.
    pub id: &'a str,
    /// Step id, for people.
    pub step: &'a str,
    /// Id of the run that orders it, for people.
    pub run: &'a str,
    /// How long the step may take: the run stops it then. Where no run looks after it any more,
    /// the job system should.
    pub timeout: Option<Duration>,
    /// This program as the workers find it.
    pub program: &'a str,
    /// Its arguments.
    pub args: Vec<String>,
    /// The job's folder as the workers see it; none where they do not. What its process prints may
    /// go to [`CONSOLE`] in it, where the job system keeps no log of its own.
    pub folder: Option<&'a Path>,
    /// Names of variables of this process that the job's process needs and no file brings to it:
    /// secrets, and credentials of the remote store. They are for the job's environment alone.
    pub variables: &'a [String],
    /// What the step asks for.
    pub resources: &'a Resources,
}

/// What a job system says of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobState {
    /// It was not started yet.
    Waiting {
        /// Why not, when it is known.
        why: String,
        /// Nothing that is there now can ever start it.
        hopeless: bool,
    },
    /// It was started.
    Running,
    /// It is over.
    Ended(JobEnd),
    /// There is no such job, or no more.
    Unknown,
}

/// How a job ended, as far as the job system can tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobEnd {
    /// With success.
    Well,
    /// Its process failed by itself.
    Failed(String),
    /// It was ended from outside, or what it ran on died: it may work elsewhere.
    Killed(String),
    /// It was never started, for want of a place.
    NotStarted(String),
    /// Somebody stopped it.
    Stopped,
}

/// Why a job system did not do what it was asked.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum JobError {
    /// It does not answer: it may later.
    #[error("{0}")]
    Unreachable(String),
    /// It answers that it cannot now: it may later.
    #[error("{0}")]
    Busy(String),
    /// It answers that it will not.
    #[error("{text}")]
    Refused {
        /// What it said.
        text: String,
        /// What to do about it.
        help: Option<String>,
    },
}

impl JobError {
    /// It will not.
    #[must_use]
    pub fn refused(text: impl Into<String>) -> Self {
        Self::Refused {
            text: text.into(),
            help: None,
        }
    }
}

/// One entry of `runners:`, checked.
#[derive(Clone)]
pub struct JobRunner {
    /// Which sort of job system.
    pub kind: Arc<dyn JobKind>,
    /// What all of them have.
    pub settings: JobSettings,
    /// Its own settings.
    pub own: Value,
    /// The entry as it was written.
    pub entry: Value,
}

impl JobRunner {
    /// From an entry that fits the schema.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn new(kind: &Arc<dyn JobKind>, entry: &Value) -> Result<Self, String> {
        let (settings, own) = settings::split(entry)?;
        Ok(Self {
            kind: Arc::clone(kind),
            settings,
            own,
            entry: entry.clone(),
        })
    }
}
