//! [`Tree`]: a fold of a run's events into spans. Knows no collector.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use flowrun_engine::event::{RunEvent, StepStatus};
use flowrun_engine::step::TraceSpan;
use opentelemetry::trace::{
    Event, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState,
};
use opentelemetry::{Array, InstrumentationScope, KeyValue, StringValue};
use opentelemetry_sdk::trace::{IdGenerator, RandomIdGenerator, SpanData, SpanEvents, SpanLinks};
use serde_json::Value;

use super::parent::Parent;

/// Bytes of a text that says what went wrong.
const DESCRIPTION: usize = 2000;

/// The spans of a run: those that are open, and those that are done.
pub(super) struct Tree {
    ids: RandomIdGenerator,
    scope: InstrumentationScope,
    trace: TraceId,
    parent: Option<Parent>,
    run: Option<Open>,
    steps: BTreeMap<String, Open>,
    /// Those that are done; whoever sends them takes them.
    pub(super) done: Vec<SpanData>,
}

/// A span that has not ended.
struct Open {
    id: SpanId,
    since: SystemTime,
    name: String,
    attributes: Vec<KeyValue>,
    events: Vec<Event>,
}

impl Tree {
    pub(super) fn new(parent: Option<Parent>) -> Self {
        let ids = RandomIdGenerator::default();
        Self {
            trace: parent.map_or_else(|| ids.new_trace_id(), |parent| parent.trace),
            ids,
            scope: InstrumentationScope::builder("flowrun")
                .with_version(env!("CARGO_PKG_VERSION"))
                .build(),
            parent,
            run: None,
            steps: BTreeMap::new(),
            done: Vec::new(),
        }
    }

    fn open(&self, at: SystemTime, name: String, attributes: Vec<KeyValue>) -> Open {
        Open {
            id: self.ids.new_span_id(),
            since: at,
            name,
            attributes,
            events: Vec::new(),
        }
    }

    pub(super) fn fold(&mut self, at: SystemTime, event: &RunEvent) {
        match event {
            RunEvent::RunStarted {
                run,
                pipeline,
                steps,
                ..
            } => {
                let attributes = vec![
                    KeyValue::new("flowrun.run", run.clone()),
                    KeyValue::new("flowrun.pipeline", pipeline.clone()),
                    KeyValue::new("flowrun.steps", signed(*steps as u64)),
                ];
                self.run = Some(self.open(at, format!("run {pipeline}"), attributes));
            }
            RunEvent::StepStarted {
                step, kind, why, ..
            } => {
                let mut open = self.open(at, format!("step {}", name_of(step)), Vec::new());
                open.attributes = vec![
                    KeyValue::new("flowrun.step", step.clone()),
                    KeyValue::new("flowrun.step.kind", kind.clone()),
                    KeyValue::new("flowrun.step.why", why.clone()),
                ];
                self.steps.insert(step.clone(), open);
            }
            RunEvent::StepRetry {
                step,
                attempt,
                error,
                ..
            } => {
                if let Some(open) = self.steps.get_mut(step) {
                    let attributes = vec![
                        KeyValue::new("flowrun.attempt", i64::from(*attempt)),
                        KeyValue::new("exception.message", cut(error)),
                    ];
                    open.events.push(Event::new("retry", at, attributes, 0));
                }
            }
            RunEvent::Span { step, span } => self.part(step, span),
            RunEvent::StepFinished { .. } => self.step_ended(at, event),
            RunEvent::RunFinished {
                ok,
                ran,
                cached,
                failed,
                skipped,
                ..
            } => {
                self.close_steps(at);
                if let Some(mut run) = self.run.take() {
                    let counts = [
                        ("flowrun.steps.ran", ran),
                        ("flowrun.steps.cached", cached),
                        ("flowrun.steps.failed", failed),
                        ("flowrun.steps.skipped", skipped),
                    ];
                    let counts = counts.map(|(name, n)| KeyValue::new(name, signed(*n as u64)));
                    run.attributes.extend(counts);
                    let status = match *ok {
                        true => Status::Ok,
                        false => Status::error(format!("{failed} failed, {skipped} skipped")),
                    };
                    self.run_ended(run, at, status);
                }
            }
            RunEvent::StepExpanded { .. }
            | RunEvent::Progress { .. }
            | RunEvent::Warning { .. }
            | RunEvent::Recorded { .. }
            | RunEvent::Uploading { .. }
            | RunEvent::Uploaded { .. } => {}
        }
    }

    /// Ends what is open: the run broke off.
    pub(super) fn close(&mut self, at: SystemTime) {
        self.close_steps(at);
        if let Some(run) = self.run.take() {
            self.run_ended(run, at, Status::error("the run broke off"));
        }
    }

    fn close_steps(&mut self, at: SystemTime) {
        while let Some((_, open)) = self.steps.pop_first() {
            self.within_run(open, at, Status::error("it did not end"));
        }
    }

    fn step_ended(&mut self, at: SystemTime, event: &RunEvent) {
        let RunEvent::StepFinished {
            step,
            kind,
            status,
            key,
            took_ms,
            why,
            metrics,
            ..
        } = event
        else {
            return;
        };
        let began = at
            .checked_sub(Duration::from_millis(*took_ms))
            .unwrap_or(at);
        let mut open = self.steps.remove(step).unwrap_or_else(|| {
            let attributes = vec![
                KeyValue::new("flowrun.step", step.clone()),
                KeyValue::new("flowrun.step.kind", kind.clone()),
            ];
            self.open(began, format!("step {}", name_of(step)), attributes)
        });
        // An event is heard a little after it happened.
        open.since = open.since.min(began);
        let word = match status {
            StepStatus::Ran => "ran",
            StepStatus::Cached => "cached",
            StepStatus::Failed => "failed",
            StepStatus::Skipped => "skipped",
        };
        open.attributes.extend([
            KeyValue::new("flowrun.step.status", word),
            KeyValue::new("flowrun.step.cached", *status == StepStatus::Cached),
            KeyValue::new("flowrun.step.key", key.clone()),
        ]);
        let metrics = metrics.iter();
        let metrics =
            metrics.map(|(name, value)| attribute(format!("flowrun.metric.{name}"), value));
        open.attributes.extend(metrics);
        let status = match status {
            StepStatus::Ran | StepStatus::Cached => Status::Ok,
            StepStatus::Failed => Status::error(cut(why)),
            StepStatus::Skipped => Status::Unset,
        };
        self.within_run(open, at, status);
    }

    /// A part of a step's work.
    fn part(&mut self, step: &str, span: &TraceSpan) {
        let step = self.steps.get(step).or(self.run.as_ref());
        let parent = step.map_or(SpanId::INVALID, |open| open.id);
        let attributes = span.attributes.iter();
        let attributes = attributes.map(|(name, value)| attribute(name.clone(), value));
        let mut open = self.open(span.started_at, span.name.clone(), attributes.collect());
        let status = match &span.failed {
            Some(failed) => {
                let error = KeyValue::new("error.type", failed.clone());
                open.attributes.push(error);
                Status::error(failed.clone())
            }
            None => Status::Unset,
        };
        let end = span.started_at.checked_add(span.took);
        let end = end.unwrap_or(span.started_at);
        self.ended(open, end, SpanKind::Client, parent, false, status);
    }

    fn within_run(&mut self, open: Open, at: SystemTime, status: Status) {
        let mut parent = SpanId::INVALID;
        if let Some(run) = &mut self.run {
            // Its beginning too was heard a little later.
            run.since = run.since.min(open.since);
            parent = run.id;
        }
        self.ended(open, at, SpanKind::Internal, parent, false, status);
    }

    fn run_ended(&mut self, run: Open, at: SystemTime, status: Status) {
        let parent = self.parent.map_or(SpanId::INVALID, |parent| parent.span);
        let remote = self.parent.is_some();
        self.ended(run, at, SpanKind::Internal, parent, remote, status);
    }

    fn ended(
        &mut self,
        open: Open,
        at: SystemTime,
        span_kind: SpanKind,
        parent_span_id: SpanId,
        parent_span_is_remote: bool,
        status: Status,
    ) {
        let mut events = SpanEvents::default();
        events.events.extend(open.events);
        self.done.push(SpanData {
            span_context: SpanContext::new(
                self.trace,
                open.id,
                TraceFlags::SAMPLED,
                false,
                TraceState::NONE,
            ),
            parent_span_id,
            parent_span_is_remote,
            span_kind,
            name: Cow::Owned(open.name),
            start_time: open.since,
            end_time: at.max(open.since),
            attributes: open.attributes,
            dropped_attributes_count: 0,
            events,
            links: SpanLinks::default(),
            status,
            instrumentation_scope: self.scope.clone(),
        });
    }
}

/// The step of an item: spans of one kind have one name.
fn name_of(step: &str) -> &str {
    step.split_once('[').map_or(step, |(name, _)| name)
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn cut(text: &str) -> String {
    let mut end = text.len().min(DESCRIPTION);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

/// A value as an attribute; what attributes cannot hold is JSON.
fn attribute(name: String, value: &Value) -> KeyValue {
    match value {
        Value::Bool(flag) => KeyValue::new(name, *flag),
        Value::String(text) => KeyValue::new(name, cut(text)),
        Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(whole), _) => KeyValue::new(name, whole),
            (None, Some(fraction)) => KeyValue::new(name, fraction),
            (None, None) => KeyValue::new(name, number.to_string()),
        },
        Value::Array(items) if items.iter().all(Value::is_string) => {
            let texts = items.iter().filter_map(Value::as_str);
            let texts = texts.map(|text| StringValue::from(text.to_owned()));
            KeyValue::new(
                name,
                opentelemetry::Value::Array(Array::String(texts.collect())),
            )
        }
        Value::Null | Value::Array(_) | Value::Object(_) => {
            KeyValue::new(name, cut(&value.to_string()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn started() -> RunEvent {
        RunEvent::RunStarted {
            run: "r".to_owned(),
            pipeline: "p".to_owned(),
            steps: 1,
            at: String::new(),
        }
    }

    fn step_started(step: &str) -> RunEvent {
        RunEvent::StepStarted {
            step: step.to_owned(),
            kind: "k".to_owned(),
            key: String::new(),
            why: "never ran".to_owned(),
        }
    }

    fn step_finished(step: &str, status: StepStatus, took_ms: u64) -> RunEvent {
        RunEvent::StepFinished {
            step: step.to_owned(),
            kind: "k".to_owned(),
            status,
            key: String::new(),
            took_ms,
            why: "why".to_owned(),
            outputs: BTreeMap::new(),
            metrics: BTreeMap::from([("rows".to_owned(), Value::from(3))]),
            help: None,
            from: None,
        }
    }

    fn call(step: &str, began: u64) -> RunEvent {
        RunEvent::Span {
            step: step.to_owned(),
            span: TraceSpan {
                name: "chat m".to_owned(),
                started_at: at(began),
                took: Duration::from_secs(1),
                failed: Some("unavailable".to_owned()),
                attributes: BTreeMap::new(),
            },
        }
    }

    fn named<'a>(tree: &'a Tree, name: &str) -> &'a SpanData {
        let mut found = tree.done.iter().filter(|span| span.name == name);
        match (found.next(), found.next()) {
            (Some(span), None) => span,
            _ => unreachable!("{name}: {:?}", tree.done),
        }
    }

    #[test]
    fn a_span_lies_in_the_one_that_it_is_a_part_of() {
        let mut tree = Tree::new(None);
        tree.fold(at(10), &started());
        tree.fold(at(11), &step_started("a[x]"));
        tree.fold(at(13), &call("a[x]", 12));
        tree.fold(at(14), &step_finished("a[x]", StepStatus::Ran, 3500));
        tree.fold(at(15), &step_finished("b", StepStatus::Cached, 0));
        let last = RunEvent::RunFinished {
            ok: true,
            ran: 1,
            cached: 1,
            failed: 0,
            skipped: 0,
            run_dir: String::new(),
            took_ms: 6000,
        };
        tree.fold(at(16), &last);
        let [run, a, b, call] = ["run p", "step a", "step b", "chat m"].map(|n| named(&tree, n));
        assert_eq!(tree.done.len(), 4);
        for step in [a, b] {
            assert_eq!(step.parent_span_id, run.span_context.span_id());
            assert_eq!(step.span_context.trace_id(), run.span_context.trace_id());
        }
        assert_eq!(call.parent_span_id, a.span_context.span_id());
        assert_eq!((run.start_time, run.end_time), (at(10), at(16)));
        // Its work began before its event was heard.
        let began = at(14) - Duration::from_millis(3500);
        assert_eq!((a.start_time, a.end_time), (began, at(14)));
        assert_eq!((call.start_time, call.end_time), (at(12), at(13)));
        assert_eq!(call.status, Status::error("unavailable"));
        assert_eq!((&run.status, &a.status), (&Status::Ok, &Status::Ok));
        let cached = KeyValue::new("flowrun.step.cached", true);
        assert!(b.attributes.contains(&cached) && !a.attributes.contains(&cached));
        assert!(
            a.attributes
                .contains(&KeyValue::new("flowrun.metric.rows", 3_i64))
        );
    }

    #[test]
    fn what_broke_off_is_an_error_in_the_trace_of_its_parent() {
        let text = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let parent = Parent::parse(text);
        let mut tree = Tree::new(parent);
        tree.fold(at(10), &started());
        tree.fold(at(11), &step_started("a"));
        tree.close(at(12));
        let (run, a) = (named(&tree, "run p"), named(&tree, "step a"));
        assert_eq!(Some(run.parent_span_id), parent.map(|parent| parent.span));
        assert_eq!(
            Some(a.span_context.trace_id()),
            parent.map(|parent| parent.trace)
        );
        for span in [run, a] {
            assert!(matches!(span.status, Status::Error { .. }));
        }
    }

    #[test]
    fn texts_are_cut_between_characters() {
        let text = "ä".repeat(DESCRIPTION);
        assert_eq!(cut(&text).len(), DESCRIPTION);
        assert_eq!(cut(&format!("x{text}")).len(), DESCRIPTION - 1);
    }
}
