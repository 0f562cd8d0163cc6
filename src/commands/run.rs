//! `flowrun [PIPELINE]`.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use flowrun_cache::{Cache, RemoteCache};
use flowrun_engine::event::RunEvent;
use flowrun_engine::hook::Hook;
use flowrun_engine::pipeline::Pipeline;
use flowrun_engine::premises::{Changed, Recalled, Unchanged, recall};
use flowrun_engine::retention::tidy as tidy_cache;
use flowrun_engine::run::{RunError, RunOptions, RunSummary, run as run_pipeline, run_changed};
use flowrun_engine::step::{Cancel, StepErrorKind, World};
use flowrun_engine::tracking::Tracking;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::args::{GlobalArgs, RunArgs};
use crate::commands::cache::{removed, retention};
use crate::commands::plan;
use crate::exit::{Exit, Failure};
use crate::hooks;
use crate::output::unwritable;
use crate::reporter::{Reporter, Teller};
use crate::surroundings::{self, Surroundings, wait};
use crate::tracking::Trackers;

/// Threads beside those of steps and of as many lookups: lookups that ask a remote cache, and writers.
const BLOCKING: usize = 24;

/// Runs a pipeline.
pub(crate) fn run(args: &RunArgs, global: &GlobalArgs) -> Result<Exit, Failure> {
    let asked = surroundings::ask(&args.select, global)?;
    let remote = surroundings::remote(global)?;
    let known = asked.run_name();
    let name = known.filter(|_| is_plain(args));
    // What an earlier run did not send is sent by an ordinary one.
    let sends = |remote: &Arc<RemoteCache>| !remote.is_read_only() && remote.waiting() > 0;
    let idle = !remote.as_ref().is_some_and(sends);
    let mut cache = None;
    let mut changed = None;
    if let Some(name) = name.filter(|n| idle && !global.verbose && n.is_known(&global.cache_dir)) {
        let open = cache.insert(surroundings::hold_cache(global, wait(global))?);
        match recall(open, name, &asked.vocabulary, &asked.world) {
            Some(Recalled::Unchanged(unchanged)) => {
                surroundings::remember(&asked.file, open.dir());
                // Nothing listens to signals here: the first one ends the program.
                let nobody = Cancel::default();
                let trackers = Trackers::start(&asked.world, unchanged.tracking(), open.dir());
                let over = finish(&unchanged, open, trackers, global);
                tidy(open, args, &over, global, &nobody);
                drop(cache.take());
                return over.tell(unchanged.hooks(), &asked.world, &nobody);
            }
            found => changed = found,
        }
    }
    let mut options = RunOptions {
        remember: name,
        keep_going: args.keep_going,
        remote,
        ..surroundings::run_options(args.jobs, &args.scope)
    };
    let file = asked.file.clone();
    let work = match changed {
        Some(Recalled::Changed(changed)) => Work::Changed(changed, asked.world),
        _ => Work::Whole(Box::new(asked.load()?)),
    };
    if let Work::Whole(loaded) = &work {
        surroundings::warn(&loaded.pipeline);
    }
    if let (Work::Whole(loaded), true) = (&work, args.dry_run) {
        let options = RunOptions {
            remember: known,
            ..options
        };
        return plan::show(loaded, &options, global);
    }
    let cache = match cache {
        Some(held) => Arc::new(held),
        None => Arc::new(surroundings::hold_cache(global, wait(global))?),
    };
    surroundings::remember(&file, cache.dir());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .max_blocking_threads(2 * options.jobs + work.jobs_elsewhere() + BLOCKING)
        .enable_all()
        .build()?;
    let held = Arc::clone(&cache);
    let Told {
        hooks: told,
        tracking,
        world,
    } = work.told();
    let reporter = work.reporter(global);
    let cancel = Cancel::default();
    listen(cancel.clone(), reporter.teller())?;
    let trackers = Trackers::start(&world, &tracking, cache.dir());
    options.traced = trackers.want_spans();
    let driven = drive(work, held, options, reporter, trackers, cancel.clone());
    let over = runtime.block_on(driven);
    tidy(&cache, args, &over, global, &cancel);
    // A hook may run a pipeline of its own on the same cache.
    drop(cache);
    over.tell(&told, &world, &cancel)
}

/// All of the pipeline, and what is fresh stays.
fn is_plain(args: &RunArgs) -> bool {
    let scope = &args.scope;
    let part = scope.from.is_some() || scope.until.is_some() || scope.only.is_some();
    !(part || scope.force || args.dry_run)
}

/// A run that is over, however it ended.
struct Over {
    /// How its steps ended, unless it broke off.
    summary: Result<RunSummary, RunError>,
    /// Whether those who look on were told.
    reported: std::io::Result<()>,
    trackers: Trackers,
}

impl Over {
    /// Tells all others that it is over, also where those who look on could not be told; how the
    /// program exits. A signal that comes meanwhile does not change that.
    ///
    /// # Errors
    /// When the run broke off, which hooks do not hear of; and when those who look on could not be
    /// told.
    fn tell(
        self,
        hooks: &BTreeMap<String, Hook>,
        world: &World,
        cancel: &Cancel,
    ) -> Result<Exit, Failure> {
        let exit = self.summary.as_ref().map(|run| exit_of(run, cancel));
        let exit = exit.unwrap_or(Exit::Internal);
        warn(&self.trackers.end());
        warn(&hooks::tell(hooks, &self.summary?, world, cancel));
        self.reported.map_err(|e| unwritable(&e))?;
        Ok(exit)
    }
}

/// A run that has nothing to do.
fn finish(
    unchanged: &Unchanged,
    cache: &Cache,
    mut trackers: Trackers,
    global: &GlobalArgs,
) -> Over {
    let mut reporter = Reporter::plain(global);
    let summary = unchanged.run(cache, |event| {
        trackers.hear(event);
        reporter.show(event);
        if matches!(event, RunEvent::RunStarted { .. }) {
            reporter.show_recorded(unchanged.step_events());
            trackers.hear_recorded(unchanged.step_events());
        }
    });
    for text in cache.warnings() {
        reporter.show(&RunEvent::Warning { step: None, text });
    }
    Over {
        summary,
        reported: reporter.end(),
        trackers,
    }
}

/// Removes what the bounds of the cache ask to. The run is over, so that it does not work is
/// worth a warning only.
fn tidy(cache: &Cache, args: &RunArgs, over: &Over, global: &GlobalArgs, cancel: &Cancel) {
    let Ok(summary) = &over.summary else {
        return;
    };
    if cancel.is_cancelled() {
        return;
    }
    let kept = retention(&args.retention);
    let stop = || cancel.is_cancelled();
    let made = (summary.ran > 0).then_some(summary.run_dir.as_path());
    let text = match tidy_cache(cache, &kept, made, &stop) {
        Ok(Some(found)) if !global.quiet => format!("cache: removed {}", removed(&found)),
        Ok(_) => return,
        Err(error) => format!("warning: the cache could not be tidied: {error}"),
    };
    // Whether somebody reads it does not change how the run ended.
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Says what went wrong after the run. It changes nothing of how the run ended.
fn warn(texts: &[String]) {
    for text in texts {
        // Whether somebody reads it does not change that either.
        let _ = writeln!(std::io::stderr(), "warning: {text}");
    }
}

/// Who is told of a run besides those who look on, and with what of the machine.
struct Told {
    hooks: BTreeMap<String, Hook>,
    tracking: Tracking,
    world: World,
}

/// What is to be run.
enum Work {
    Whole(Box<Surroundings>),
    /// What changed files reach; and the world.
    Changed(Box<Changed>, World),
}

impl Work {
    fn told(&self) -> Told {
        match self {
            Self::Whole(loaded) => Told {
                hooks: loaded.pipeline.hooks.clone(),
                tracking: loaded.pipeline.tracking.clone(),
                world: loaded.world.clone(),
            },
            Self::Changed(changed, world) => {
                let pipeline = changed.pipeline();
                Told {
                    hooks: pipeline.hooks,
                    tracking: pipeline.tracking,
                    world: world.clone(),
                }
            }
        }
    }

    /// Shows people or a program how it goes.
    fn reporter(&self, global: &GlobalArgs) -> Reporter {
        match self {
            Self::Whole(loaded) => {
                let steps = loaded.pipeline.steps.iter();
                Reporter::new(global, &loaded.pipeline.name, || {
                    steps.map(|step| step.name.clone()).collect()
                })
            }
            Self::Changed(changed, _) => {
                Reporter::new(global, &changed.pipeline().name, || changed.within_reach())
            }
        }
    }

    /// Jobs of job systems at once: each is followed by a thread.
    fn jobs_elsewhere(&self) -> usize {
        let jobs = |pipeline: &Pipeline| -> usize {
            let runners = pipeline.runners.values();
            runners.map(|runner| runner.settings.jobs).sum()
        };
        match self {
            Self::Whole(loaded) => jobs(&loaded.pipeline),
            Self::Changed(changed, _) => jobs(&changed.pipeline()),
        }
    }
}

async fn drive(
    work: Work,
    cache: Arc<Cache>,
    options: RunOptions,
    reporter: Reporter,
    mut trackers: Trackers,
    cancel: Cancel,
) -> Over {
    let (events, heard) = tokio::sync::mpsc::unbounded_channel();
    let reporting = tokio::task::spawn_blocking(move || {
        let reported = reporter.follow(heard, |event| trackers.hear(event));
        (reported, trackers)
    });
    let summary = match work {
        Work::Whole(loaded) => {
            let Surroundings { pipeline, world } = *loaded;
            run_pipeline(Arc::new(pipeline), cache, world, options, cancel, events).await
        }
        Work::Changed(changed, world) => {
            run_changed(*changed, cache, world, options, cancel, events).await
        }
    };
    // The reporter ends when the run's last sender is gone; its panic would be a bug of ours alone.
    let (reported, trackers) = reporting.await.unwrap_or((Ok(()), Trackers::default()));
    Over {
        summary,
        reported,
        trackers,
    }
}

/// How long killed commands have to be gone once the second signal came.
const LAST_MOMENT: Duration = Duration::from_secs(1);

/// Listens to signals until the program ends, on a thread of its own: what a run does at its end
/// holds up the thread that drives it.
fn listen(cancel: Cancel, tell: Teller) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let signals = {
        let _here = runtime.enter();
        [
            SignalKind::interrupt(),
            SignalKind::terminate(),
            SignalKind::hangup(),
        ]
        .map(signal)
    };
    let [Ok(interrupt), Ok(terminate), Ok(hang_up)] = signals else {
        // Then the system does what it does to any program.
        return Ok(());
    };
    let thread = std::thread::Builder::new().name("signals".to_owned());
    let signals = [interrupt, terminate, hang_up];
    thread.spawn(move || runtime.block_on(stop_on_signal(signals, cancel, tell)))?;
    Ok(())
}

/// The first signal asks the steps to stop, the second kills them and ends the program.
#[allow(clippy::exit)]
async fn stop_on_signal(signals: [Signal; 3], cancel: Cancel, tell: Teller) {
    let [mut interrupt, mut terminate, mut hang_up] = signals;
    loop {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hang_up.recv() => {}
        }
        if cancel.is_cancelled() {
            cancel.kill();
            // Commands are gone in a moment; a step inside this process may not listen.
            tokio::time::sleep(LAST_MOMENT).await;
            std::process::exit(Exit::Interrupted as i32);
        }
        tell.say("stopping; what finished is kept. Once more to stop at once");
        cancel.cancel();
    }
}

/// Whoever was asked to stop says so, also where all steps had ended: what follows them was cut
/// short.
fn exit_of(summary: &RunSummary, cancel: &Cancel) -> Exit {
    if summary.interrupted || (summary.ok && cancel.is_cancelled()) {
        return Exit::Interrupted;
    }
    if summary.ok {
        return Exit::Ok;
    }
    match &summary.first_error {
        Some((_, error)) if error.kind == StepErrorKind::Gate => Exit::Gate,
        _ => Exit::StepFailed,
    }
}

#[cfg(test)]
mod tests {
    use flowrun_engine::step::StepError;

    use super::*;

    #[test]
    fn whoever_was_asked_to_stop_exits_so() {
        let summary = |ok: bool, interrupted: bool, failed: bool| RunSummary {
            run_id: String::new(),
            run_dir: std::path::PathBuf::new(),
            ok,
            ran: 0,
            cached: 0,
            failed: usize::from(failed),
            skipped: 0,
            interrupted,
            gate_failed: false,
            first_error: failed.then(|| ("s".to_owned(), StepError::failed("no"))),
            steps: Vec::new(),
        };
        let (calm, stopped) = (Cancel::default(), Cancel::default());
        stopped.cancel();
        let code = |summary: &RunSummary, cancel| exit_of(summary, cancel) as i32;
        assert_eq!(code(&summary(true, false, false), &calm), 0);
        // After the last step.
        assert_eq!(code(&summary(true, false, false), &stopped), 130);
        assert_eq!(code(&summary(false, true, false), &stopped), 130);
        assert_eq!(code(&summary(false, false, true), &calm), 4);
    }
}
