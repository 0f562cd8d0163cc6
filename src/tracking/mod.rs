//! Trackers: programs of others that a run is told to as it goes on.
//!
//! | file | what |
//! |---|---|
//! | `heartbeat` | shows that a tracker gets something done |
//! | `mlflow` | params, metrics and artifacts, for an MLflow server |
//! | `otlp` | traces, for a collector that speaks OTLP |
//! | `points` | names and curves, as trackers take them |
//! | `tensorboard` | numbers and curves, as event files |
//!
//! A tracker is a fold over the run's events, in a thread of its own. Knows no scheduler.
//! Invariant: whatever a tracker meets with is a warning, and costs the run a bounded time and
//! memory; no result and no exit code depends on it.

mod heartbeat;
mod mlflow;
mod otlp;
mod points;
mod tensorboard;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, SystemTime};

use flowrun_engine::event::RunEvent;
use flowrun_engine::step::World;
use flowrun_engine::tracking::Tracking;

pub(crate) use self::heartbeat::Heartbeat;

/// How long a tracker may get nothing done once the run ended; then it is given up.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long a tracker waits for an event before it is told that there is none.
const PAUSE: Duration = Duration::from_secs(2);
/// Spans that may wait for a tracker; further ones are passed over.
const QUEUE: usize = 8192;

/// Hears of a run. What goes wrong is kept for [`Tracker::end`].
trait Tracker {
    /// Something happened at this time.
    fn hear(&mut self, at: SystemTime, event: &RunEvent);
    /// Nothing happened for a while: what waits to be sent may be.
    fn pause(&mut self) {}
    /// The run is over. What went wrong, for people.
    fn end(self) -> Vec<String>;
}

type Heard = (SystemTime, Arc<RunEvent>);

/// The trackers of a run.
#[derive(Default)]
pub(crate) struct Trackers(Vec<Listener>);

/// A tracker's thread, from this side.
struct Listener {
    name: &'static str,
    events: Sender<Heard>,
    ended: Receiver<Vec<String>>,
    beat: Heartbeat,
    /// Events that it did not take yet.
    waiting: Arc<AtomicUsize>,
    passed_over: usize,
    /// Whether it wants spans.
    spans: bool,
}

impl Trackers {
    /// Those that the pipeline and the environment ask for; where no network may be used, those
    /// alone that write files.
    pub(crate) fn start(world: &World, tracking: &Tracking, cache_dir: &Path) -> Self {
        let env = &world.env;
        let mut trackers = Self::default();
        if let Some(tensorboard) = &tracking.tensorboard {
            let folder = world.root.join(&tensorboard.folder);
            trackers.add("TensorBoard", false, |_| {
                Ok(tensorboard::TensorBoard::new(folder))
            });
        }
        if world.offline {
            return trackers;
        }
        if let Some(otlp) = otlp::Settings::of(env) {
            trackers.add("OpenTelemetry", true, |beat| otlp::Otlp::new(otlp, beat));
        }
        if let Some(mlflow) = mlflow::Settings::of(env, &tracking.mlflow, cache_dir) {
            trackers.add("MLflow", false, |beat| mlflow::Mlflow::new(mlflow, beat));
        }
        trackers
    }

    /// Whether a run under this environment is traced.
    pub(crate) fn want_spans(&self) -> bool {
        self.0.iter().any(|listener| listener.spans)
    }

    fn add<T: Tracker + 'static>(
        &mut self,
        name: &'static str,
        spans: bool,
        make: impl FnOnce(Heartbeat) -> Result<T, String> + Send + 'static,
    ) {
        let (events, heard) = channel();
        let (tell, ended) = channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let taken = Arc::clone(&waiting);
        let beat = Heartbeat::default();
        let beating = beat.clone();
        std::thread::spawn(move || {
            let warnings = match make(beating) {
                Ok(tracker) => follow(tracker, &heard, &taken),
                Err(why) => vec![why],
            };
            // The run may have given it up.
            let _ = tell.send(warnings);
        });
        self.0.push(Listener {
            name,
            events,
            ended,
            beat,
            waiting,
            passed_over: 0,
            spans,
        });
    }

    /// Tells them of an event. Returns at once.
    pub(crate) fn hear(&mut self, event: &RunEvent) {
        if self.0.is_empty() || matches!(event, RunEvent::Progress { .. }) {
            return;
        }
        let at = SystemTime::now();
        let is_span = matches!(event, RunEvent::Span { .. });
        let event = Arc::new(event.clone());
        for listener in &mut self.0 {
            if is_span && !listener.spans {
                continue;
            }
            if is_span && listener.waiting.load(Ordering::Relaxed) >= QUEUE {
                listener.passed_over += 1;
                continue;
            }
            listener.waiting.fetch_add(1, Ordering::Relaxed);
            // One that ended early has said why.
            let _ = listener.events.send((at, Arc::clone(&event)));
        }
    }

    /// Tells them of events that were recorded, one JSON object a line.
    pub(crate) fn hear_recorded(&mut self, lines: &[u8]) {
        if !self.0.is_empty() {
            let lines = lines.to_vec();
            self.hear(&RunEvent::Recorded { lines });
        }
    }

    /// Waits for them to end. What went wrong, for people.
    pub(crate) fn end(self) -> Vec<String> {
        // All of them end while the first is waited for.
        let ending = self.0.into_iter().map(Listener::close);
        let ending: Vec<Ending> = ending.collect();
        ending.into_iter().flat_map(Ending::wait).collect()
    }
}

impl Listener {
    /// Tells the tracker that the run is over.
    fn close(self) -> Ending {
        drop(self.events);
        Ending {
            name: self.name,
            ended: self.ended,
            beat: self.beat,
            passed_over: self.passed_over,
        }
    }
}

/// A tracker that was told that the run is over.
struct Ending {
    name: &'static str,
    ended: Receiver<Vec<String>>,
    beat: Heartbeat,
    passed_over: usize,
}

impl Ending {
    /// Waits for its end, for as long as it gets something done.
    fn wait(self) -> Vec<String> {
        let mut told = loop {
            let before = self.beat.count();
            match self.ended.recv_timeout(PATIENCE) {
                Ok(told) => break told,
                Err(RecvTimeoutError::Timeout) if self.beat.count() != before => {}
                Err(RecvTimeoutError::Timeout) => {
                    let seconds = PATIENCE.as_secs();
                    break vec![format!("given up, as nothing was sent for {seconds} s")];
                }
                Err(RecvTimeoutError::Disconnected) => {
                    break vec!["the tracker panicked; this is a fault of flowrun".to_owned()];
                }
            }
        };
        if self.passed_over > 0 {
            let count = self.passed_over;
            told.push(format!(
                "{count} spans were left out, as they came faster than they could be sent"
            ));
        }
        let named = |text: String| format!("{}: {text}", self.name);
        told.into_iter().map(named).collect()
    }
}

/// Hands events on until the run is over.
fn follow(mut tracker: impl Tracker, heard: &Receiver<Heard>, taken: &AtomicUsize) -> Vec<String> {
    loop {
        match heard.recv_timeout(PAUSE) {
            Ok((at, event)) => {
                taken.fetch_sub(1, Ordering::Relaxed);
                tell(&mut tracker, at, &event);
            }
            Err(RecvTimeoutError::Timeout) => tracker.pause(),
            Err(RecvTimeoutError::Disconnected) => return tracker.end(),
        }
    }
}

/// Events that stand in a record as they were are told one by one.
fn tell(tracker: &mut impl Tracker, at: SystemTime, event: &RunEvent) {
    let RunEvent::Recorded { lines } = event else {
        return tracker.hear(at, event);
    };
    for line in lines.split(|byte| *byte == b'\n') {
        if let Ok(event) = serde_json::from_slice::<RunEvent>(line) {
            tracker.hear(at, &event);
        }
    }
}

#[cfg(test)]
#[allow(clippy::panic)]
mod tests {
    use std::collections::BTreeMap;

    use flowrun_engine::step::TraceSpan;

    use super::*;

    /// Takes the first event only when it is let.
    struct Slow(Receiver<()>, usize);

    impl Tracker for Slow {
        fn hear(&mut self, _: SystemTime, _: &RunEvent) {
            if self.1 == 0 {
                // Whoever lets it may be gone.
                let _ = self.0.recv();
            }
            self.1 += 1;
        }

        fn end(self) -> Vec<String> {
            vec![self.1.to_string()]
        }
    }

    struct Broken;

    impl Tracker for Broken {
        fn hear(&mut self, _: SystemTime, _: &RunEvent) {
            panic!("on purpose");
        }

        fn end(self) -> Vec<String> {
            Vec::new()
        }
    }

    fn span() -> RunEvent {
        RunEvent::Span {
            step: "s".to_owned(),
            span: TraceSpan {
                name: "x".to_owned(),
                started_at: SystemTime::UNIX_EPOCH,
                took: Duration::ZERO,
                failed: None,
                attributes: BTreeMap::new(),
            },
        }
    }

    #[test]
    fn spans_that_come_too_fast_are_counted_and_left_out() {
        let (letting, lets) = channel();
        let mut trackers = Trackers::default();
        trackers.add("slow", true, move |_| Ok(Slow(lets, 0)));
        let all = QUEUE + 10;
        for _ in 0..all {
            trackers.hear(&span());
        }
        let left_out = trackers.0[0].passed_over;
        // One may be under way besides those that wait.
        assert!((9..=10).contains(&left_out), "{left_out}");
        drop(letting);
        let warnings = trackers.end();
        assert_eq!(warnings[0], format!("slow: {}", all - left_out));
        assert!(warnings[1].starts_with(&format!("slow: {left_out} spans were left out")));
    }

    #[test]
    fn a_tracker_that_breaks_is_told_and_others_go_on() {
        let (letting, lets) = channel();
        drop(letting);
        let mut trackers = Trackers::default();
        trackers.add("broken", true, |_| Ok(Broken));
        trackers.add("refused", true, |_| Err::<Broken, _>("no".to_owned()));
        trackers.add("slow", false, move |_| Ok(Slow(lets, 0)));
        // A span is for those who want some.
        trackers.hear(&span());
        let warning = RunEvent::Warning {
            step: None,
            text: String::new(),
        };
        trackers.hear(&warning);
        let warnings = trackers.end();
        assert!(warnings[0].starts_with("broken: the tracker panicked"));
        assert_eq!(warnings[1..], ["refused: no", "slow: 1"]);
    }
}
