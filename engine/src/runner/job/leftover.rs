//! What an earlier run, which was killed, left of a job: whether it is over, and its end where
//! nobody wants it any more.
//!
//! Invariant: once [`end`] or [`silence`] returned, no process begins the work of the attempt,
//! and one that had begun it has ended, or shows no life.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flowrun_cache::{Cache, Depot};

use super::collect::Collector;
use super::folder::{AttemptFolder, JobFolder, Ordered};
use super::follow::{Answer, Follower};
use super::patience::Patience;
use super::shipment::Shipment;
use super::watch::SILENCE;
use crate::step::{Cancel, StepError, StepReporter};

/// Longest wait for work that was asked to stop and shows that it goes on, and for a store that
/// does not answer.
const LONGEST: Duration = Duration::from_secs(60);
/// Wait between two looks into its folder.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// The response that lies there, if the work is over.
pub(super) fn answer(attempt: &AttemptFolder) -> Option<Answer> {
    unheard(attempt).read()
}

/// Ends the job in `jobs/<action key>/`, if there is one, for an action that is now done without
/// it, and removes the folder. `depot` opens the remote store of this run, if there is one; what the
/// step saved there comes to the folder of `keep`.
///
/// # Errors
/// When the run is asked to stop meanwhile.
pub(crate) fn end(
    path: &Path,
    depot: &dyn Fn() -> Option<Arc<Depot>>,
    keep: (&Cache, &Path),
    cancel: &Cancel,
    reporter: &Arc<dyn StepReporter>,
) -> Result<(), StepError> {
    if !path.exists() {
        return Ok(());
    }
    let folder = JobFolder::at(path.to_owned());
    if let Some(left) = folder.ordered() {
        let depot = left.through.as_ref().and_then(|_| depot());
        silence(
            &folder.attempt(left.attempt),
            &left,
            depot.as_ref(),
            &|shipment| {
                let (cache, folder) = keep;
                let patience = Patience {
                    longest: LONGEST,
                    stop: &|| cancel.is_cancelled(),
                };
                if let Err(error) = shipment.keep(cache, folder, patience) {
                    reporter.warning(&format!("what the step saved cannot be kept: {error}"));
                }
            },
            cancel,
            reporter,
        )?;
    }
    folder.remove();
    Ok(())
}

/// Asks the work of an attempt to stop and waits for its end, not for ever. `depot` is the remote
/// store of this run; `keep` may take from there what the step saved.
///
/// # Errors
/// When the run is asked to stop meanwhile.
pub(super) fn silence(
    attempt: &AttemptFolder,
    left: &Ordered,
    depot: Option<&Arc<Depot>>,
    keep: &dyn Fn(&Shipment),
    cancel: &Cancel,
    reporter: &Arc<dyn StepReporter>,
) -> Result<(), StepError> {
    attempt.cancel();
    let id = &left.id;
    let Some(url) = &left.through else {
        // What this process has taken, or what is gone, nobody begins.
        if !matches!(attempt.claim(), Ok(false)) {
            return Ok(());
        }
        return wait(attempt, id, None, cancel, reporter);
    };
    let Some(depot) = depot.filter(|depot| depot.url() == url) else {
        reporter.warning(&format!(
            "the job {id} of an earlier run cannot be told to stop: its files are in {url}, which is not the remote of this run"
        ));
        return Ok(());
    };
    let shipment = Shipment::new(depot, id);
    let told = shipment.withdraw().and_then(|()| shipment.claim());
    let waited = match told {
        Ok(true) => Ok(()),
        Ok(false) => {
            let collector = Collector::new(shipment.clone(), attempt);
            wait(attempt, id, Some(collector), cancel, reporter)
        }
        Err(error) => {
            reporter.warning(&format!(
                "the job {id} of an earlier run cannot be told to stop: {error}"
            ));
            return Ok(());
        }
    };
    keep(&shipment);
    // What stays there serves nobody, and is small.
    let _ = shipment.clear();
    waited
}

/// Waits for the end of work that was asked to stop, not for ever.
fn wait(
    attempt: &AttemptFolder,
    id: &str,
    mut collector: Option<Collector>,
    cancel: &Cancel,
    reporter: &Arc<dyn StepReporter>,
) -> Result<(), StepError> {
    reporter.log(&format!(
        "waits for the end of the job {id} of an earlier run"
    ));
    let started = Instant::now();
    let (mut beat, mut heard) = (attempt.last_beat(), started);
    let mut follower = unheard(attempt);
    loop {
        if let Some(collector) = &mut collector {
            collector.look();
        }
        if follower.read().is_some() {
            return Ok(());
        }
        if cancel.is_cancelled() {
            return Err(StepError::cancelled());
        }
        let now = attempt.last_beat();
        if now != beat {
            (beat, heard) = (now, Instant::now());
        }
        if heard.elapsed() >= SILENCE {
            return Ok(());
        }
        if started.elapsed() >= LONGEST {
            reporter.warning(&format!(
                "the job {id} of an earlier run was asked to stop and goes on"
            ));
            return Ok(());
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

fn unheard(attempt: &AttemptFolder) -> Follower {
    let nobody: Arc<dyn StepReporter> = Arc::new(Nobody);
    Follower::new(attempt, &nobody)
}

/// Hears nothing.
struct Nobody;

impl StepReporter for Nobody {
    fn progress(&self, _: u64, _: u64, _: &str, _: &str) {}
    fn warning(&self, _: &str) {}
    fn log(&self, _: &str) {}
}
