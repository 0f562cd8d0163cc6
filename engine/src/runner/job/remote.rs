//! [`Remote`]: the runner for steps that are jobs: orders one, follows it, orders another when
//! what it ran on died, stops it, tidies up.
//!
//! What is under way is written down before it is ordered, so whoever runs the action next
//! follows it. Invariant: when [`Remote::run`] returns with a result or an error of the step,
//! nothing is left of the job.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use flowrun_cache::{ActionKey, Digest};

use super::collect::Collector;
use super::folder::{AttemptFolder, JOB_VERSION, JobFolder, Ordered};
use super::follow::{Answer, Follower};
use super::leftover;
use super::post::{Environment, Request};
use super::shipment::{Input, Shipment};
use super::watch::{BEAT, Verdict, Watch};
use super::way::{Sight, Way, link_all};
use super::{JobEnd, JobError, JobOrder, JobSettings, JobState, JobSystem};
use crate::pipeline::Resources;
use crate::step::{Cancel, StepError, StepErrorKind, StepOutcome, StepReporter};

/// Wait between two looks into the folder; doubles up to the second one.
const FIRST_LOOK: Duration = Duration::from_millis(50);
const LOOK_EVERY: Duration = Duration::from_millis(400);
/// Wait between two questions to the job system, before the work shows that it goes on and after.
const ASK_EVERY: Duration = Duration::from_secs(1);
const ASK_EVERY_ALIVE: Duration = Duration::from_secs(5);
/// Wait between two attempts to order a job from a job system that does not answer.
const ORDER_EVERY: Duration = Duration::from_secs(1);
/// How long work that was asked to stop has to do so.
const GRACE: Duration = Duration::from_secs(10);
/// Hex digits of an id.
const ID: usize = 20;

/// A job system as the steps of a run use it.
pub(crate) struct Remote {
    system: Arc<dyn JobSystem>,
    pub(super) settings: JobSettings,
    /// This program as the workers find it.
    program: String,
    pub(super) root: PathBuf,
    /// How the files of jobs go, where the workers do not see the folder.
    pub(super) way: Option<Way>,
    /// It answered in this run.
    reached: AtomicBool,
    /// Jobs that are to be forgotten once they ended.
    over: Mutex<Vec<String>>,
}

/// What is to be done, by whom, and who hears of it.
pub(crate) struct Errand<'a> {
    /// Step id.
    pub(crate) step: &'a str,
    /// Id of the run.
    pub(crate) run: &'a str,
    /// The step's own.
    pub(crate) timeout: Option<Duration>,
    pub(crate) key: ActionKey,
    /// The work is wanted anew: a result that an earlier run's job left will not do.
    pub(crate) afresh: bool,
    /// `jobs/<action key>/` in the cache.
    pub(crate) folder: PathBuf,
    /// Folder with the inputs in `in/`, and `out/` for the outputs.
    pub(crate) place: &'a Path,
    /// The artifacts in `in/`.
    pub(crate) inputs: Vec<Input>,
    /// Where the step saves what its next attempt can go on from; it may not exist.
    pub(crate) saved: PathBuf,
    /// The request, whose paths below `place` are those of this side.
    pub(crate) request: Request,
    pub(crate) environment: Environment,
    pub(crate) resources: &'a Resources,
    pub(crate) cancel: &'a Cancel,
    pub(crate) reporter: &'a Arc<dyn StepReporter>,
}

/// How the watch over one attempt ended.
enum Ended {
    /// With the response of the other end.
    Answered(Answer),
    /// It is lost.
    Lost(String),
    /// It was never begun.
    Again,
    /// Without a response, for good.
    Error(StepError),
    /// The run was asked to stop.
    Cancelled,
}

impl Remote {
    /// `exe` is this program; `root` the project's root, absolute; `way` is for workers that do
    /// not see the job's folder.
    pub(crate) fn new(
        system: Box<dyn JobSystem>,
        settings: JobSettings,
        exe: &Path,
        root: &Path,
        way: Option<Way>,
    ) -> Self {
        let program = match &settings.program {
            Some(program) => program.clone(),
            None => settings.there(exe, root).display().to_string(),
        };
        Self {
            system: system.into(),
            program,
            settings,
            root: root.to_owned(),
            way,
            reached: AtomicBool::new(false),
            over: Mutex::default(),
        }
    }

    /// The variables that its settings hand to every step.
    pub(crate) fn handed(&self) -> &[String] {
        &self.settings.env
    }

    /// Has the work done.
    ///
    /// # Errors
    /// What the work failed with; transient when it was lost too often or the job system does
    /// not answer.
    pub(crate) fn run(&self, errand: &Errand<'_>) -> Result<StepOutcome, StepError> {
        let folder = JobFolder::at(errand.folder.clone());
        let result = self.through(errand, &folder);
        let ended_well = result.is_ok();
        let result = result.and_then(|(attempt, outcome)| {
            let made = attempt.place().join("out");
            // Linked, not moved: while the response stands, so does what it speaks of.
            link_all(&made, &errand.place.join("out")).map_err(|e| StepError::io(&made, &e))?;
            Ok(outcome)
        });
        let ordered = folder.ordered().filter(|_| ended_well);
        folder.remove();
        // What a kill leaves of a result that was not taken yet can be had again.
        if let (Some(way), Some(ordered)) = (&self.way, ordered) {
            clear(errand, &way.shipment(&ordered.id), &ordered.id);
        }
        result
    }

    fn through(
        &self,
        errand: &Errand<'_>,
        folder: &JobFolder,
    ) -> Result<(AttemptFolder, StepOutcome), StepError> {
        let mut number = 1;
        if let Some(left) = folder.ordered() {
            number = left.attempt + 1;
            let attempt = folder.attempt(left.attempt);
            if self.goes_on(errand, &left, &attempt) {
                let text = format!("goes on with the job {} of an earlier run", left.id);
                errand.reporter.log(&text);
                match self.attempt(errand, &left.id, &attempt) {
                    Ended::Lost(why) => errand.reporter.warning(&format!(
                        "the job {} of an earlier run is lost: {why}",
                        left.id
                    )),
                    Ended::Again => {}
                    ended => return finished(ended, attempt),
                }
                // It may work on where nobody can see it.
                attempt.cancel();
            } else {
                let depot = self.way.as_ref().map(|way| &way.depot);
                let keep = |shipment: &Shipment| self.keep(errand, shipment);
                leftover::silence(
                    &attempt,
                    &left,
                    depot,
                    &keep,
                    errand.cancel,
                    errand.reporter,
                )?;
            }
        }
        let mut lost = 0;
        loop {
            let attempt = folder.attempt(number);
            let id = id_of(errand, number);
            self.write(errand, folder, &attempt, number, &id)?;
            let why = match self.attempt(errand, &id, &attempt) {
                Ended::Lost(why) => why,
                Ended::Again => {
                    number += 1;
                    continue;
                }
                ended => return finished(ended, attempt),
            };
            attempt.cancel();
            lost += 1;
            number += 1;
            let text = format!("the job {id} is lost: {why}");
            if lost >= self.settings.attempts {
                let text = format!("{text}; it was tried {lost} times");
                return Err(StepError::new(StepErrorKind::Transient, text));
            }
            errand
                .reporter
                .warning(&format!("{text}; it is begun again"));
        }
    }

    /// What an earlier run left can be followed: it waits or works, or ended well.
    fn goes_on(&self, errand: &Errand<'_>, left: &Ordered, attempt: &AttemptFolder) -> bool {
        let through = self.way.as_ref().map(|way| way.depot.url());
        if left.system != self.system.name()
            || left.through.as_deref() != through
            || attempt.is_cancelled()
            || attempt.request::<Request>().is_err()
        {
            return false;
        }
        if let Some(way) = &self.way {
            let shipment = way.shipment(&left.id);
            // A run was killed while it tidied up.
            if shipment.is_gone().unwrap_or(false) {
                return false;
            }
            Collector::new(shipment, attempt).catch_up(&|| errand.cancel.is_cancelled());
        }
        if let Some(answer) = leftover::answer(attempt) {
            return answer.is_ok() && !errand.afresh;
        }
        let sight = self.sight(errand, attempt);
        let state = self.system.state(&self.job(errand, &left.id, &sight));
        !matches!(
            state,
            Ok(JobState::Ended(JobEnd::Failed(_) | JobEnd::Stopped))
        )
    }

    /// Writes down an attempt, with links to its inputs; or brings the inputs to the store through
    /// which they go.
    pub(super) fn write(
        &self,
        errand: &Errand<'_>,
        folder: &JobFolder,
        attempt: &AttemptFolder,
        number: u32,
        id: &str,
    ) -> Result<(), StepError> {
        let io = |e: io::Error| StepError::io(attempt.path(), &e);
        attempt.make().map_err(io)?;
        match &self.way {
            None => self.place(errand, attempt).map_err(io)?,
            Some(way) => self.ship(errand, attempt, way, &way.shipment(id))?,
        }
        let ordered = Ordered {
            version: JOB_VERSION,
            system: self.system.name(),
            id: id.to_owned(),
            attempt: number,
            through: self.way.as_ref().map(|way| way.depot.url().to_owned()),
        };
        folder.order(&ordered).map_err(io)
    }

    /// Orders a job, unless somebody works for the attempt already, and follows it to its end.
    fn attempt(&self, errand: &Errand<'_>, id: &str, attempt: &AttemptFolder) -> Ended {
        let sight = self.sight(errand, attempt);
        let order = self.job(errand, id, &sight);
        let mut collector = self
            .way
            .as_ref()
            .map(|way| Collector::new(way.shipment(id), attempt));
        if let Some(collector) = &mut collector {
            collector.look_now();
        }
        let ordered = match attempt.is_claimed() {
            true => Ok(()),
            false => self.order(errand, &order),
        };
        let mut ended = match ordered {
            Ok(()) => {
                let ended = self.follow(errand, &order, attempt, collector.as_mut());
                self.forget_with_others(id);
                ended
            }
            Err(ended) => ended,
        };
        if let (Some(way), Some(collector)) = (&self.way, collector) {
            let shipment = collector.shipment();
            if let Ended::Answered(Ok(_)) = &ended {
                let patience = Duration::from_secs(self.settings.patience);
                let stop = || errand.cancel.is_cancelled();
                if let Err(error) = shipment.bring(&way.cache, attempt, patience, &stop) {
                    ended = Ended::Error(error);
                }
            } else {
                self.keep(errand, shipment);
            }
            let is_answered = matches!(ended, Ended::Answered(_));
            // The notes of one that ended well stay until its result is taken.
            let stay = matches!(ended, Ended::Answered(Ok(_)));
            if !stay && !clear(errand, shipment, id) && !is_answered {
                // It does not learn from the store that nobody hears of it any more.
                let _ = self.system.stop(id);
            }
        }
        ended
    }

    fn job<'a>(&'a self, errand: &Errand<'a>, id: &'a str, sight: &'a Sight) -> JobOrder<'a> {
        let mut args = ["step", "exec", "--job"].map(str::to_owned).to_vec();
        match (&sight.folder, &self.way) {
            (Some(folder), _) => args.push(folder.display().to_string()),
            (None, Some(way)) => {
                let through = ["--through".to_owned(), way.depot.url().to_owned()];
                args.push(id.to_owned());
                args.extend(through);
            }
            (None, None) => {}
        }
        JobOrder {
            id,
            step: errand.step,
            run: errand.run,
            timeout: errand.timeout,
            program: &self.program,
            args,
            folder: sight.folder.as_deref(),
            variables: &sight.variables,
            resources: errand.resources,
        }
    }

    /// Its process may not have ended yet, and nobody waits for that here. The job system is
    /// asked without the lock: other steps do not wait for its answers.
    fn forget_with_others(&self, id: &str) {
        let over = || self.over.lock().unwrap_or_else(PoisonError::into_inner);
        let mut ids = std::mem::take(&mut *over());
        ids.push(id.to_owned());
        forget(self.system.as_ref(), &mut ids);
        over().append(&mut ids);
    }

    fn order(&self, errand: &Errand<'_>, order: &JobOrder<'_>) -> Result<(), Ended> {
        let started = Instant::now();
        let mut told = false;
        loop {
            let error = match self.system.submit(order) {
                Ok(()) => {
                    self.reached.store(true, Ordering::Relaxed);
                    let text = format!("job {} at {}", order.id, self.system.name());
                    errand.reporter.log(&text);
                    return Ok(());
                }
                Err(error) => error,
            };
            let JobError::Unreachable(why) = &error else {
                return Err(Ended::Error(step_error(error)));
            };
            // One that never answered is not there; one that did may come back.
            let patience = Duration::from_secs(self.settings.patience);
            if !self.reached.load(Ordering::Relaxed) || started.elapsed() > patience {
                return Err(Ended::Error(step_error(error)));
            }
            if !told {
                told = true;
                errand.reporter.warning(&format!("{why}; waiting for it"));
            }
            if errand.cancel.is_cancelled() {
                return Err(Ended::Cancelled);
            }
            std::thread::sleep(ORDER_EVERY);
        }
    }

    fn follow(
        &self,
        errand: &Errand<'_>,
        order: &JobOrder<'_>,
        attempt: &AttemptFolder,
        mut collector: Option<&mut Collector>,
    ) -> Ended {
        let started = Instant::now();
        let patience = Duration::from_secs(self.settings.patience);
        let mut follower = Follower::new(attempt, errand.reporter);
        let mut watch = Watch::default();
        let mut asked = None;
        let mut looked = None;
        let mut pause = FIRST_LOOK;
        let mut told = false;
        loop {
            if let Some(collector) = collector.as_deref_mut() {
                collector.look();
            }
            match follower.read() {
                // Not this runner told it to stop: the job system knows who did.
                Some(Err(error)) if is_foreign_stop(&error, errand) => watch.stops(),
                Some(answer) => return Ended::Answered(answer),
                None => {}
            }
            if errand.cancel.is_cancelled() {
                return self.stop(errand, order, attempt, &mut follower, collector);
            }
            if collector.as_deref().is_some_and(Collector::is_behind) {
                continue;
            }
            // Nothing that the job system says can be judged by one who does not hear the job.
            if let Some((since, why)) = collector.as_deref().and_then(Collector::away) {
                if since > patience {
                    return Ended::Lost(format!("{why}, for {} s", since.as_secs()));
                }
                if !told {
                    told = true;
                    errand.reporter.warning(&format!("{why}; waiting for it"));
                }
                std::thread::sleep(LOOK_EVERY);
                continue;
            }
            let now = started.elapsed();
            if looked.is_none_or(|at| now.saturating_sub(at) > BEAT / 2) {
                looked = Some(now);
                watch.beats(attempt.last_beat(), now);
            }
            let every = match watch.is_alive(now) {
                true => ASK_EVERY_ALIVE,
                false => ASK_EVERY,
            };
            let said = asked
                .is_none_or(|at| now.saturating_sub(at) > every)
                .then(|| self.system.state(order));
            if let Some(said) = &said {
                asked = Some(now);
                self.hear(said, errand);
            }
            match watch.judge(said, now, patience) {
                Verdict::Wait => {}
                Verdict::Tell(text) => errand.reporter.warning(&text),
                Verdict::Lost(why) => return Ended::Lost(why),
                Verdict::Again => return Ended::Again,
                Verdict::Failed(why) => {
                    return Ended::Error(failed(order, &why, attempt, &mut follower));
                }
                Verdict::Hopeless(why) => {
                    let _ = self.system.stop(order.id);
                    let text = format!("{} cannot run the step: {why}", self.system.name());
                    let help = "change what it asks for (`resources`, the runner's settings), or the cluster";
                    return Ended::Error(StepError::failed(text).help(help));
                }
                Verdict::Stopped => {
                    let text = format!("the job {} was stopped by somebody", order.id);
                    return Ended::Error(StepError::failed(text));
                }
                Verdict::Refused(error) => {
                    // It may be stopped by one who may not look at it.
                    let _ = self.system.stop(order.id);
                    return Ended::Error(step_error(error));
                }
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(LOOK_EVERY);
        }
    }

    fn hear(&self, said: &Result<JobState, JobError>, errand: &Errand<'_>) {
        if said.is_ok() {
            self.reached.store(true, Ordering::Relaxed);
        }
        if let Ok(JobState::Waiting { why, .. }) = said {
            errand.reporter.progress(0, 0, "", &format!("waits: {why}"));
        }
    }

    /// Stops a job and waits for its end, not for ever.
    fn stop(
        &self,
        errand: &Errand<'_>,
        order: &JobOrder<'_>,
        attempt: &AttemptFolder,
        follower: &mut Follower,
        mut collector: Option<&mut Collector>,
    ) -> Ended {
        attempt.cancel();
        if let Some(collector) = &collector
            && let Err(error) = collector.shipment().withdraw()
        {
            let text = format!("the job {} could not be told to stop: {error}", order.id);
            errand.reporter.warning(&text);
        }
        let stopped = self.system.stop(order.id);
        if let Err(error) = &stopped {
            let text = format!("the job {} could not be stopped: {error}", order.id);
            errand.reporter.warning(&text);
        }
        let started = Instant::now();
        while stopped.is_ok() && started.elapsed() < GRACE && !errand.cancel.is_killed() {
            if let Some(collector) = collector.as_deref_mut() {
                collector.look();
            }
            match follower.read() {
                // What finished in the last moment is kept.
                Some(answer @ Ok(_)) => return Ended::Answered(answer),
                // It stopped, though the job system may see that much later.
                Some(Err(_)) => break,
                None => {}
            }
            let state = self.system.state(order);
            if matches!(state, Ok(JobState::Ended(_) | JobState::Unknown)) {
                break;
            }
            std::thread::sleep(LOOK_EVERY);
        }
        Ended::Cancelled
    }
}

impl Drop for Remote {
    /// Forgets the jobs that are over.
    fn drop(&mut self) {
        let over = self.over.get_mut().unwrap_or_else(PoisonError::into_inner);
        let mut over = std::mem::take(over);
        let system = Arc::clone(&self.system);
        // Clients that block may not be used on the run's own thread.
        let thread = std::thread::spawn(move || {
            let started = Instant::now();
            while forget(system.as_ref(), &mut over)
                && !over.is_empty()
                && started.elapsed() < GRACE
            {
                std::thread::sleep(LOOK_EVERY);
            }
        });
        // It has nothing to tell.
        let _ = thread.join();
    }
}

/// Removes those that are gone, or that the job system will not let go. False when it does not
/// answer: the others are not tried then.
pub(super) fn forget(system: &dyn JobSystem, over: &mut Vec<String>) -> bool {
    let mut answers = true;
    over.retain(|id| {
        if !answers {
            return true;
        }
        match system.forget(id) {
            Ok(gone) => !gone,
            Err(JobError::Unreachable(_)) => {
                answers = false;
                true
            }
            Err(JobError::Refused { .. }) => false,
        }
    });
    answers
}

/// Removes the notes of a job from the remote store; false when they stay.
fn clear(errand: &Errand<'_>, shipment: &Shipment, id: &str) -> bool {
    let cleared = shipment.clear();
    if let Err(error) = &cleared {
        // What stays there serves nobody, and is small.
        let text = format!("notes of the job {id} stay in the remote store: {error}");
        errand.reporter.log(&text);
    }
    cleared.is_ok()
}

/// The other end was told to stop, and not by this runner: a preempted job, a drained node.
fn is_foreign_stop(error: &StepError, errand: &Errand<'_>) -> bool {
    error.kind == StepErrorKind::Cancelled && !errand.cancel.is_cancelled()
}

fn finished(
    ended: Ended,
    attempt: AttemptFolder,
) -> Result<(AttemptFolder, StepOutcome), StepError> {
    match ended {
        Ended::Answered(answer) => Ok((attempt, answer?)),
        Ended::Error(error) => Err(error),
        Ended::Cancelled => Err(StepError::cancelled()),
        Ended::Lost(why) => Err(StepError::new(StepErrorKind::Transient, why)),
        Ended::Again => Err(StepError::new(
            StepErrorKind::Transient,
            "the job was never begun",
        )),
    }
}

fn step_error(error: JobError) -> StepError {
    match error {
        JobError::Unreachable(why) => StepError::new(StepErrorKind::Transient, why),
        JobError::Refused { text, help } => StepError {
            help,
            ..StepError::failed(text)
        },
    }
}

/// The error of a job that ended without a response.
fn failed(
    order: &JobOrder<'_>,
    why: &str,
    attempt: &AttemptFolder,
    follower: &mut Follower,
) -> StepError {
    let id = order.id;
    let begun = attempt.is_claimed();
    let last = match begun {
        true => follower.last_words(),
        false => attempt.console(),
    };
    let text = format!("the job {id} failed: {why}\n{last}");
    let error = StepError::failed(text.trim_end());
    match (begun, order.folder) {
        (true, _) => error,
        (false, Some(_)) => error.help(
            "the workers must have this program and see the cache folder; where their paths differ, say so with `program` and `shared` of the runner; where they see no folder of this machine, with `through: remote`",
        ),
        (false, None) => error.help(
            "the workers must have this program (`program` of the runner), reach the remote store, and have its credentials in their own environment",
        ),
    }
}

/// Never the same for two attempts.
fn id_of(errand: &Errand<'_>, number: u32) -> String {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let what = format!(
        "{} {number} {} {}",
        errand.key,
        now.as_nanos(),
        std::process::id()
    );
    let hex = Digest::of_bytes(what.as_bytes()).to_hex();
    format!("flowrun-{}", &hex[..ID.min(hex.len())])
}
