//! Trackers: programs of others that a run is told to as it goes on.
//!
//! | file | what |
//! |---|---|
//! | `otlp` | traces, for a collector that speaks OTLP |
//!
//! A tracker is a fold over the run's events, in a thread of its own. Knows no scheduler.
//! Invariant: whatever a tracker meets with is a warning, and costs the run a bounded time and
//! memory; no result and no exit code depends on it.

mod otlp;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant, SystemTime};

use flowrun_engine::event::RunEvent;

/// How long the trackers may take, all together, to end once the run did.
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
    /// Events that it did not take yet.
    waiting: Arc<AtomicUsize>,
    passed_over: usize,
    /// Whether it wants spans.
    spans: bool,
}

impl Trackers {
    /// Those that the environment asks for; none where no network may be used.
    pub(crate) fn start(env: &BTreeMap<String, String>, offline: bool) -> Self {
        let mut trackers = Self::default();
        if offline {
            return trackers;
        }
        if let Some(otlp) = otlp::Settings::of(env) {
            trackers.add("OpenTelemetry", true, move || otlp::Otlp::new(otlp));
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
        make: impl FnOnce() -> Result<T, String> + Send + 'static,
    ) {
        let (events, heard) = channel();
        let (tell, ended) = channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let taken = Arc::clone(&waiting);
        std::thread::spawn(move || {
            let warnings = match make() {
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
        let until = Instant::now() + PATIENCE;
        let mut warnings = Vec::new();
        // All of them end while the first is waited for.
        let ending = self.0.into_iter().map(|listener| {
            drop(listener.events);
            (listener.name, listener.passed_over, listener.ended)
        });
        for (name, passed_over, ended) in ending.collect::<Vec<_>>() {
            let left = until.saturating_duration_since(Instant::now());
            let told = match ended.recv_timeout(left) {
                Ok(told) => told,
                Err(RecvTimeoutError::Timeout) => {
                    let seconds = PATIENCE.as_secs();
                    vec![format!("not all was sent within {seconds} s after the run")]
                }
                Err(RecvTimeoutError::Disconnected) => {
                    vec!["the tracker panicked; this is a fault of flowrun".to_owned()]
                }
            };
            warnings.extend(told.into_iter().map(|text| format!("{name}: {text}")));
            if passed_over > 0 {
                warnings.push(format!(
                    "{name}: {passed_over} spans were left out, as they came faster than they \
                     could be sent"
                ));
            }
        }
        warnings
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
