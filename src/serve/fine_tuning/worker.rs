//! The thread that trains: one job after the other, beside the requests that are answered.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flowrun_engine::step::{Cancel, StepError, StepErrorKind, World};
use flowrun_steps::finetune::tuning::{TuneStep, Tuned, publish, read_chats, tune};
use flowrun_steps::models::{EmbeddedSpec, Host};
use serde_json::json;

use super::jobs::{Job, Jobs, Status};
use crate::exit::Failure;
use crate::serve::files::Files;
use crate::serve::kept::now;
use crate::serve::turn::Turn;

/// Characters of a job's id that tell its models apart.
const SHORT: usize = 8;
/// Events of steps that one job keeps.
const STEPS: usize = 200;

/// Starts the thread; it ends with the process, and so does its turn. A training that this cuts off
/// is gone on with.
pub(super) fn start(
    jobs: Arc<Jobs>,
    turn: Turn,
    files: Files,
    adapters: PathBuf,
    spec: EmbeddedSpec,
    world: World,
) {
    std::thread::spawn(move || {
        if let Err(failure) = wait_for(&turn, &jobs) {
            tracing::error!("this server trains nothing: {failure}");
            return;
        }
        loop {
            let (job, cancel) = jobs.next();
            let work = || train(&jobs, &job, &files, &adapters, &spec, &world, &cancel);
            let done = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
                let text = "the training panicked; the server's log says where";
                Err(StepError::failed(text))
            });
            jobs.change(&job.id, |job| match done {
                Ok(()) => job.end(Status::Succeeded, "the job is done"),
                Err(error) if error.kind == StepErrorKind::Cancelled => {
                    job.end(Status::Cancelled, "the job was cancelled");
                }
                Err(error) => {
                    job.error = Some(error.message.clone());
                    job.end(Status::Failed, &error.message);
                }
            });
            jobs.idle();
            // Only an attempt that was cut off needs it.
            let _ = std::fs::remove_dir_all(jobs.work(&job.id));
        }
    });
}

/// Waits until no other server trains the jobs of the folder.
fn wait_for(turn: &Turn, jobs: &Jobs) -> Result<(), Failure> {
    if jobs.is_mine() {
        return Ok(());
    }
    tracing::warn!(
        "another server trains the jobs of this folder (it holds {}); this one goes on with them \
         when that one has ended",
        turn.path().display()
    );
    turn.wait()?;
    jobs.take_over()?;
    tracing::info!("the other server has ended; this one trains the jobs now");
    Ok(())
}

fn train(
    jobs: &Jobs,
    job: &Job,
    files: &Files,
    adapters: &Path,
    spec: &EmbeddedSpec,
    world: &World,
    cancel: &Cancel,
) -> Result<(), StepError> {
    let path = files.content(&job.training_file);
    let chats = read_chats(&path).map_err(|error| StepError {
        // Callers know the file by its id.
        message: (error.message).replace(&path.display().to_string(), &job.training_file),
        ..error
    })?;
    let work = jobs.work(&job.id);
    std::fs::create_dir_all(&work).map_err(|e| StepError::io(&work, &e))?;
    let on_step = |step: TuneStep| {
        // All of a short training, some of a long one.
        let every = step.total.div_ceil(STEPS).max(1);
        if step.step.is_multiple_of(every) || step.step == step.total {
            jobs.change(&job.id, |job| told(job, step));
        }
    };
    let host = Host {
        world,
        cancel,
        completions: None,
        step: None,
    };
    let how = &job.hyperparameters;
    let outcome = tune(spec, chats, how, job.seed, &work, &on_step, &host)?;
    let mut names = Vec::new();
    for tuned in &outcome.checkpoints {
        let name = name_of(job, tuned);
        publish(&tuned.folder, &adapters.join(&name))?;
        names.push(format!("{}:{name}", job.model));
    }
    jobs.change(&job.id, |job| {
        job.trained_tokens = Some(outcome.tokens);
        job.fine_tuned_model = names.last().cloned();
        let checkpoints = outcome.checkpoints.iter().zip(&names);
        job.checkpoints = checkpoints
            .map(|(tuned, name)| {
                json!({
                    "object": "fine_tuning.job.checkpoint",
                    "id": format!("ftckpt-{}-{}", job.id, tuned.step),
                    "created_at": now(), "fine_tuned_model_checkpoint": name,
                    "fine_tuning_job_id": job.id, "step_number": tuned.step,
                    "metrics": {"step": tuned.step, "train_loss": tuned.loss},
                })
            })
            .collect();
    });
    Ok(())
}

fn told(job: &mut Job, step: TuneStep) {
    let TuneStep { step, total, loss } = step;
    let message = format!("Step {step}/{total}: training loss={loss:.4}");
    let data = json!({"step": step, "total_steps": total, "train_loss": loss});
    job.tell("info", &message, Some(data));
    job.starts = 0;
}

/// The name of the adapter, which no other job gives.
fn name_of(job: &Job, tuned: &Tuned) -> String {
    let short = &job.id[job.id.len().saturating_sub(SHORT)..];
    let suffix = job
        .suffix
        .as_deref()
        .map_or(String::new(), |s| format!("{s}-"));
    format!("{suffix}{}-{short}", tuned.name)
}
