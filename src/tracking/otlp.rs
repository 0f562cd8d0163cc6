//! Traces in OpenTelemetry's protocol (OTLP over HTTP): a span for the run, in it one for each
//! step or item, in that one for each call of a language model.
//!
//! Switched on by the standard variables (`OTEL_EXPORTER_OTLP_ENDPOINT`, …); `TRACEPARENT` names
//! the span that the run is a part of. The spans are made here, from events, and not by a tracer:
//! steps run in other processes and on other machines, and what they tell comes with the events.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use flowrun_engine::event::{RunEvent, StepStatus};
use flowrun_engine::step::TraceSpan;
use opentelemetry::trace::{
    Event, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState,
};
use opentelemetry::{Array, InstrumentationScope, KeyValue, StringValue};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{
    IdGenerator, RandomIdGenerator, SpanData, SpanEvents, SpanExporter as _, SpanLinks,
};
use reqwest::Url;
use serde_json::Value;

use super::{Heartbeat, Tracker};
use crate::address::{causes, is_loopback, shown};

/// Spans of one request.
const BATCH: usize = 512;
/// Requests that fail one after the other before no more is sent.
const FAILURES: usize = 2;
/// Bytes of a text that says what went wrong.
const DESCRIPTION: usize = 2000;

/// Variables that say where to.
const ENDPOINTS: [&str; 2] = [
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
];
/// Variables that say in which encoding.
const PROTOCOLS: [&str; 2] = [
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
    "OTEL_EXPORTER_OTLP_PROTOCOL",
];

/// Variables that say how many milliseconds a request may take.
const TIMEOUTS: [&str; 2] = [
    "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT",
    "OTEL_EXPORTER_OTLP_TIMEOUT",
];
/// The same, when none of them does.
const TIMEOUT: Duration = Duration::from_secs(10);

/// What the environment says; the rest is the exporter's to read.
pub(super) struct Settings {
    /// Where to, for people.
    endpoint: String,
    /// `http/protobuf`, unless another is asked for.
    protocol: Option<String>,
    /// It is on this machine.
    loopback: bool,
    /// Longest time of a request, its further tries included.
    timeout: Duration,
    /// The service has a name.
    named: bool,
    parent: Option<Parent>,
}

/// The span that the run is a part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Parent {
    trace: TraceId,
    span: SpanId,
    /// The trace is kept at all.
    sampled: bool,
}

impl Settings {
    /// `None` when no traces are asked for.
    pub(super) fn of(env: &BTreeMap<String, String>) -> Option<Self> {
        let get = |name: &str| env.get(name).map(|v| v.trim()).filter(|v| !v.is_empty());
        let is = |name: &str, value: &str| get(name).is_some_and(|v| v.eq_ignore_ascii_case(value));
        if is("OTEL_SDK_DISABLED", "true") || is("OTEL_TRACES_EXPORTER", "none") {
            return None;
        }
        let endpoint = ENDPOINTS.iter().find_map(|name| get(name))?;
        let parent = get("TRACEPARENT").and_then(Parent::parse);
        // Whoever began the trace decided that it is not kept.
        if parent.is_some_and(|parent| !parent.sampled) {
            return None;
        }
        let resource = get("OTEL_RESOURCE_ATTRIBUTES");
        let url = Url::parse(endpoint).ok();
        let timeout = TIMEOUTS.iter().find_map(|name| get(name)?.parse().ok());
        Some(Self {
            endpoint: url
                .as_ref()
                .map_or_else(|| "the collector".to_owned(), shown),
            loopback: url.as_ref().is_some_and(is_loopback),
            timeout: timeout.map_or(TIMEOUT, Duration::from_millis),
            protocol: PROTOCOLS
                .iter()
                .find_map(|name| get(name))
                .map(str::to_ascii_lowercase),
            named: get("OTEL_SERVICE_NAME").is_some()
                || resource.is_some_and(|text| text.contains("service.name=")),
            parent,
        })
    }

    fn exporter(&self) -> Result<SpanExporter, String> {
        let builder = SpanExporter::builder().with_http();
        let builder = match self.protocol.as_deref() {
            None => builder.with_protocol(Protocol::HttpBinary),
            Some("http/protobuf" | "http/json") => builder,
            Some(other) => {
                return Err(format!(
                    "`OTEL_EXPORTER_OTLP_PROTOCOL` is `{other}`, and flowrun speaks \
                     `http/protobuf` and `http/json`; set one of them, and the port of the \
                     collector that takes it (usually 4318)"
                ));
            }
        };
        let builder = match self.loopback {
            // No proxy leads there.
            true => builder.with_http_client(self.client()?),
            false => builder,
        };
        let mut exporter = builder.build().map_err(|e| e.to_string())?;
        let resource = Resource::builder();
        let resource = match self.named {
            true => resource,
            false => resource.with_service_name("flowrun"),
        };
        exporter.set_resource(&resource.build());
        Ok(exporter)
    }

    fn client(&self) -> Result<reqwest::blocking::Client, String> {
        let client = reqwest::blocking::Client::builder();
        let client = client.timeout(self.timeout).no_proxy().build();
        client.map_err(|e| format!("no client can be made: {}", causes(e)))
    }
}

impl Parent {
    /// A `traceparent` of the W3C's Trace Context: version, trace, span, flags.
    fn parse(text: &str) -> Option<Self> {
        let parts: Vec<&str> = text.split('-').collect();
        let &[version, trace, span, flags, ..] = parts.as_slice() else {
            return None;
        };
        let is_hex = |text: &str, length: usize| {
            text.len() == length && text.bytes().all(|b| b.is_ascii_hexdigit())
        };
        // Later versions may have further parts, the first has not.
        let known = is_hex(version, 2) && version != "ff" && (version != "00" || parts.len() == 4);
        if !(known && is_hex(trace, 32) && is_hex(span, 16) && is_hex(flags, 2)) {
            return None;
        }
        let parent = Self {
            trace: TraceId::from_hex(trace).ok()?,
            span: SpanId::from_hex(span).ok()?,
            sampled: u8::from_str_radix(flags, 16).ok()? & 1 == 1,
        };
        let valid = parent.trace != TraceId::INVALID && parent.span != SpanId::INVALID;
        valid.then_some(parent)
    }
}

/// Makes spans of a run's events and sends them.
pub(super) struct Otlp {
    exporter: SpanExporter,
    endpoint: String,
    beat: Heartbeat,
    tree: Tree,
    /// Requests that failed since one was answered.
    failures: usize,
    lost: usize,
    /// The first that went wrong.
    error: Option<String>,
}

impl Otlp {
    /// # Errors
    /// When the environment says what cannot be done.
    pub(super) fn new(settings: Settings, beat: Heartbeat) -> Result<Self, String> {
        Ok(Self {
            beat,
            exporter: settings.exporter()?,
            tree: Tree::new(settings.parent),
            endpoint: settings.endpoint,
            failures: 0,
            lost: 0,
            error: None,
        })
    }

    fn send(&mut self) {
        let spans = std::mem::take(&mut self.tree.done);
        let count = spans.len();
        if count == 0 {
            return;
        }
        if self.failures >= FAILURES {
            self.lost += count;
            return;
        }
        match futures::executor::block_on(self.exporter.export(spans)) {
            Ok(()) => {
                self.failures = 0;
                self.beat.beat();
            }
            Err(error) => {
                self.failures += 1;
                self.lost += count;
                self.error.get_or_insert_with(|| error.to_string());
            }
        }
    }
}

impl Tracker for Otlp {
    fn hear(&mut self, at: SystemTime, event: &RunEvent) {
        self.tree.fold(at, event);
        if self.tree.done.len() >= BATCH {
            self.send();
        }
    }

    fn pause(&mut self) {
        self.send();
    }

    fn end(mut self) -> Vec<String> {
        self.tree.close(SystemTime::now());
        self.send();
        let Some(error) = self.error else {
            return Vec::new();
        };
        let (lost, endpoint) = (self.lost, self.endpoint);
        vec![format!("{lost} spans did not reach {endpoint}: {error}")]
    }
}

/// The spans of a run: those that are open, and those that are done.
struct Tree {
    ids: RandomIdGenerator,
    scope: InstrumentationScope,
    trace: TraceId,
    parent: Option<Parent>,
    run: Option<Open>,
    steps: BTreeMap<String, Open>,
    done: Vec<SpanData>,
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
    fn new(parent: Option<Parent>) -> Self {
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

    fn fold(&mut self, at: SystemTime, event: &RunEvent) {
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
    fn close(&mut self, at: SystemTime) {
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
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

    fn env(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        let pairs = pairs.iter();
        pairs
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    }

    #[test]
    fn the_standard_variables_switch_it_on_and_off() {
        let on = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://u:p@collector:4318/x");
        let settings = Settings::of(&env(&[on])).unwrap();
        assert_eq!(settings.endpoint, "http://collector:4318");
        assert!(!settings.named && settings.parent.is_none());
        let not_kept = format!("00-{TRACE}-00f067aa0ba902b7-00");
        for off in [
            ("OTEL_SDK_DISABLED", "TRUE"),
            ("OTEL_TRACES_EXPORTER", "none"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", ""),
            ("TRACEPARENT", not_kept.as_str()),
        ] {
            assert!(Settings::of(&env(&[on, off])).is_none(), "{off:?}");
        }
        let grpc = env(&[on, ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")]);
        let told = Settings::of(&grpc).unwrap().exporter().err().unwrap();
        assert!(
            told.contains("`grpc`") && told.contains("http/json"),
            "{told}"
        );
    }

    #[test]
    fn a_parent_is_read_and_a_wrong_one_is_none() {
        let parse = |text: &str| Parent::parse(text);
        let parent = parse(&format!("00-{TRACE}-00f067aa0ba902b7-01")).unwrap();
        assert_eq!(parent.trace.to_string(), TRACE);
        assert_eq!(parent.span.to_string(), "00f067aa0ba902b7");
        assert!(parent.sampled);
        assert!(parse(&format!("cc-{TRACE}-00f067aa0ba902b7-01-more")).is_some());
        for wrong in [
            String::new(),
            format!("00-{TRACE}-00f067aa0ba902b7"),
            format!("00-{TRACE}-00f067aa0ba902b7-01-more"),
            format!("ff-{TRACE}-00f067aa0ba902b7-01"),
            format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32)),
            format!("00-{TRACE}-+0f067aa0ba902b7-01"),
        ] {
            assert!(parse(&wrong).is_none(), "{wrong}");
        }
    }

    #[test]
    fn texts_are_cut_between_characters() {
        let text = "ä".repeat(DESCRIPTION);
        assert_eq!(cut(&text).len(), DESCRIPTION);
        assert_eq!(cut(&format!("x{text}")).len(), DESCRIPTION - 1);
    }
}
