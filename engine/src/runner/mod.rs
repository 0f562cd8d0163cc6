//! [`Runner`]: where the work of a step kind is done.
//!
//! | runner | where |
//! |---|---|
//! | [`Inline`] | a thread of this process |
//! | [`Process`] | a process of its own (`flowrun step exec`), for a memory bound and isolation |
//! | `job::Remote` | a machine that a job system chooses (`flowrun step exec --job`) |
//!
//! A runner outside of this process sends a [`StepRequest`](protocol::StepRequest) and hears
//! [`StepMessage`](protocol::StepMessage)s; [`exec`] is the other end. Knows no cache key and no
//! schedule. Invariant: whatever the work does, it comes back as an outcome or an error.

mod exec;
mod job;
mod process;
pub mod protocol;
#[cfg(test)]
mod tests;

use std::panic::{AssertUnwindSafe, catch_unwind};

pub use crate::child::start;
pub use exec::{ExecError, Host, exec};
pub use job::{
    CONSOLE, Ground, JobEnd, JobError, JobKind, JobOrder, JobRunner, JobSettings, JobState,
    JobSystem, Outpost, Post, Through, exec_job,
};
pub(crate) use job::{
    CommandRequest, Environment, Errand, Remote, Request, ShippedInput, Way, end_leftover,
    runner_schema,
};
pub use process::Process;

use crate::pipeline::{RunnerKind, StepNode};
use crate::step::{Step, StepContext, StepError, StepOutcome, World};
use crate::warden::Warden;

/// Where the work of a step kind is done.
pub trait Runner {
    /// Does the work of `step` and waits for its end. When `ctx.cancel` is set, ends soon.
    ///
    /// # Errors
    /// What the step failed with; a panic or a crash is a failure of the step.
    fn run(&self, step: &dyn Step, ctx: &StepContext) -> Result<StepOutcome, StepError>;
}

/// The runner that a step kind's step asks for, when it is no job.
pub(crate) fn runner_of<'a>(
    node: &StepNode,
    world: &World,
    warden: &'a Warden,
) -> Box<dyn Runner + 'a> {
    match node.runner {
        RunnerKind::Inline | RunnerKind::Job(_) => Box::new(Inline),
        RunnerKind::Process => {
            let process = Process::new(&world.exe, node.resources.memory);
            Box::new(process.guarded_by(warden))
        }
    }
}

/// Works in a thread of this process.
pub struct Inline;

impl Runner for Inline {
    fn run(&self, step: &dyn Step, ctx: &StepContext) -> Result<StepOutcome, StepError> {
        catch_unwind(AssertUnwindSafe(|| step.run(ctx)))
            .unwrap_or_else(|panic| Err(panicked(&*panic)))
    }
}

/// A panic as the failure of a step.
pub(crate) fn panicked(panic: &(dyn std::any::Any + Send)) -> StepError {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    StepError::failed(format!("the step panicked: {text}"))
        .help("this is a fault of the step, not of the pipeline")
}
