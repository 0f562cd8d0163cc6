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

    #[test]
    fn texts_are_cut_between_characters() {
        let text = "ä".repeat(DESCRIPTION);
        assert_eq!(cut(&text).len(), DESCRIPTION);
        assert_eq!(cut(&format!("x{text}")).len(), DESCRIPTION - 1);
    }
}
