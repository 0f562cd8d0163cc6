//! OpenTelemetry traces: what a collector hears of a run.

use std::collections::BTreeMap;

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value};
use opentelemetry_proto::tonic::trace::v1 as otlp;
use prost::Message;
use serde_json::Value;

use crate::classify;
use crate::oracle::Oracle;
use crate::project::{Project, Run};
use crate::receiver::Receiver;
use crate::server::free_port;

const LABEL: &str = "  label:
    uses: bootstrap
    in: { unlabelled: load.test, labels: labels.labels }
    with: { program: classify, model: m }
  elsewhere:
    uses: bootstrap
    runner: process
    in: { unlabelled: load.train, labels: labels.labels }
    with: { program: classify, model: m }
  each:
    foreach: { n: [1, 2] }
    run: echo \"${{ item.n }}\" > \"$out\"
    out: { out: out.txt }
";

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

/// A span as a collector reads it.
#[derive(Debug)]
struct Span {
    id: String,
    parent: String,
    name: String,
    /// 1 is good, 2 an error.
    status: u64,
    attributes: BTreeMap<String, String>,
}

impl Span {
    fn of(span: &Value) -> Self {
        let text = |name: &str| span[name].as_str().unwrap_or_default().to_owned();
        let nanos = |name: &str| text(name).parse::<u64>().unwrap();
        assert_eq!(span["traceId"], TRACE);
        assert!(nanos("endTimeUnixNano") >= nanos("startTimeUnixNano"));
        Self {
            id: text("spanId"),
            parent: text("parentSpanId"),
            name: text("name"),
            status: span["status"]["code"].as_u64().unwrap_or_default(),
            attributes: attributes(&span["attributes"]),
        }
    }

    fn decoded(span: &otlp::Span) -> Self {
        assert_eq!(hex(&span.trace_id), TRACE);
        assert!(span.end_time_unix_nano >= span.start_time_unix_nano);
        let code = span.status.as_ref().map_or(0, |status| status.code);
        Self {
            id: hex(&span.span_id),
            parent: hex(&span.parent_span_id),
            name: span.name.clone(),
            status: code.try_into().unwrap(),
            attributes: values(&span.attributes),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Names to values as text.
fn values(list: &[KeyValue]) -> BTreeMap<String, String> {
    let value = |entry: &KeyValue| {
        let value = entry.value.as_ref().and_then(|value| value.value.clone());
        match value.unwrap() {
            any_value::Value::StringValue(text) => text,
            any_value::Value::IntValue(number) => number.to_string(),
            any_value::Value::BoolValue(flag) => flag.to_string(),
            any_value::Value::DoubleValue(number) => number.to_string(),
            other => format!("{other:?}"),
        }
    };
    let entries = list.iter();
    entries
        .map(|entry| (entry.key.clone(), value(entry)))
        .collect()
}

/// Names to values as text; whole numbers may be texts in JSON.
fn attributes(list: &Value) -> BTreeMap<String, String> {
    let value = |entry: &Value| {
        let value = entry["value"].as_object().unwrap().values().next().unwrap();
        value
            .as_str()
            .map_or_else(|| value.to_string(), str::to_owned)
    };
    let entries = list.as_array().unwrap().iter();
    entries
        .map(|entry| (entry["key"].as_str().unwrap().to_owned(), value(entry)))
        .collect()
}

fn project() -> Project {
    let project = classify::project(&[LABEL]);
    let known = [("a known one", "card_arrival"), ("another", "pin")];
    let known = known.map(|(text, label)| (text.to_owned(), label));
    classify::write_rows(&project, "train.csv", known);
    let queries = (0..4).map(|i| (format!("query {i}"), "pin"));
    classify::write_rows(&project, "test.csv", queries);
    project
}

fn run(project: &Project, oracle: &Oracle, env: &[(&str, &str)]) -> Run {
    let mut command = classify::command(project, oracle);
    command.envs(env.iter().copied());
    Run::of(command.output().unwrap())
}

/// The spans of a run that went well, and the service's name.
fn traced(project: &Project, oracle: &Oracle, collector: &Receiver) -> (Vec<Span>, String) {
    let before = collector.sent().len();
    let parent = format!("00-{TRACE}-{PARENT}-01");
    let env = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url.as_str()),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "x-key=abc"),
        ("OTEL_SERVICE_NAME", "the-service"),
        ("TRACEPARENT", parent.as_str()),
    ];
    let ended = run(project, oracle, &env).ok();
    assert!(!ended.stderr.contains("OpenTelemetry"), "{}", ended.stderr);
    let mut spans = Vec::new();
    let mut service = String::new();
    for sent in collector.sent().into_iter().skip(before) {
        assert_eq!(
            (sent.method.as_str(), sent.path.as_str()),
            ("POST", "/v1/traces")
        );
        assert_eq!(sent.headers["x-key"], "abc");
        assert_eq!(sent.headers["content-type"], "application/json");
        // No prompt and no answer leaves.
        assert!(!String::from_utf8_lossy(&sent.body).contains("query"));
        for resource in sent.json()["resourceSpans"].as_array().unwrap() {
            service = attributes(&resource["resource"]["attributes"])["service.name"].clone();
            for scope in resource["scopeSpans"].as_array().unwrap() {
                assert_eq!(scope["scope"]["name"], "flowrun");
                spans.extend(scope["spans"].as_array().unwrap().iter().map(Span::of));
            }
        }
    }
    (spans, service)
}

fn named<'a>(spans: &'a [Span], name: &str) -> Vec<&'a Span> {
    spans.iter().filter(|span| span.name == name).collect()
}

#[test]
fn a_run_is_a_trace_of_its_steps_and_their_calls() {
    let oracle = Oracle::start(|_| Some("pin".to_owned()));
    let project = project();
    let collector = Receiver::start(|_, _| (200, "{}".to_owned()));
    let (spans, service) = traced(&project, &oracle, &collector);
    assert_eq!(service, "the-service");
    are_those_of_a_first_run(&spans);
    // What is in the cache asks nobody, and nothing of the trace is in a key.
    for _ in 0..2 {
        let (spans, _) = traced(&project, &oracle, &collector);
        assert_eq!(spans.len(), 1 + 6, "{spans:#?}");
        let steps = spans.iter().filter(|span| span.name.starts_with("step "));
        for step in steps {
            assert_eq!(step.attributes["flowrun.step.cached"], "true");
            assert_eq!(step.parent, named(&spans, "run classify")[0].id);
        }
    }
}

fn are_those_of_a_first_run(spans: &[Span]) {
    let [whole] = named(spans, "run classify")[..] else {
        unreachable!("{spans:#?}");
    };
    assert_eq!((whole.parent.as_str(), whole.status), (PARENT, 1));
    assert_eq!(whole.attributes["flowrun.steps.ran"], "6");
    for (name, count, calls) in [
        ("load", 1, 0),
        ("labels", 1, 0),
        ("label", 1, 4),
        // Its calls come from another process.
        ("elsewhere", 1, 2),
        ("each", 2, 0),
    ] {
        let steps = named(spans, &format!("step {name}"));
        assert_eq!(steps.len(), count, "{name}");
        for step in steps {
            assert_eq!((&step.parent, step.status), (&whole.id, 1), "{name}");
            assert_eq!(step.attributes["flowrun.step.status"], "ran");
            assert_eq!(step.attributes["flowrun.step.cached"], "false");
            let parts = spans.iter().filter(|span| span.parent == step.id);
            let parts: Vec<&Span> = parts.collect();
            assert_eq!(parts.len(), calls, "{name}");
            for call in parts {
                assert_eq!(call.name, "chat m");
                for (attribute, value) in [
                    ("gen_ai.operation.name", "chat"),
                    ("gen_ai.request.model", "m"),
                    ("gen_ai.usage.input_tokens", "5"),
                    ("gen_ai.usage.output_tokens", "2"),
                    ("server.address", "127.0.0.1"),
                ] {
                    assert_eq!(call.attributes[attribute], value, "{attribute}");
                }
            }
        }
    }
}

#[test]
fn a_failed_step_and_its_call_are_errors() {
    let oracle = Oracle::start(|_| None);
    let project = project();
    let collector = Receiver::start(|_, _| (200, "{}".to_owned()));
    let parent = format!("00-{TRACE}-{PARENT}-01");
    let env = [
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", collector.url.as_str()),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
        ("TRACEPARENT", parent.as_str()),
    ];
    let ended = run(&project, &oracle, &env);
    assert_eq!(ended.code, Some(4));
    let mut failed = Vec::new();
    for sent in collector.sent() {
        for resource in sent.json()["resourceSpans"].as_array().unwrap() {
            let spans = &resource["scopeSpans"][0]["spans"];
            let spans = spans.as_array().unwrap().iter().map(Span::of);
            failed.extend(spans.filter(|span| span.status == 2));
        }
    }
    let has = |name: &str| failed.iter().any(|span| span.name == name);
    assert!(has("run classify") && has("chat m"), "{failed:#?}");
    assert!(has("step label") || has("step elsewhere"), "{failed:#?}");
    let call = failed.iter().find(|span| span.name == "chat m").unwrap();
    assert_eq!(call.attributes["error.type"], "server_error");
}

#[test]
fn a_collector_that_is_not_there_is_a_warning() {
    let oracle = Oracle::start(|_| Some("pin".to_owned()));
    let project = project();
    let nobody = format!("http://127.0.0.1:{}", free_port());
    let refuses = Receiver::start(|_, _| (401, "{}".to_owned()));
    for (env, words) in [
        (
            vec![("OTEL_EXPORTER_OTLP_ENDPOINT", nobody.as_str())],
            nobody.as_str(),
        ),
        (
            vec![("OTEL_EXPORTER_OTLP_ENDPOINT", refuses.url.as_str())],
            "401",
        ),
        (
            vec![
                ("OTEL_EXPORTER_OTLP_ENDPOINT", nobody.as_str()),
                ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
            ],
            "`grpc`",
        ),
        (
            vec![(
                "OTEL_EXPORTER_OTLP_ENDPOINT",
                "http://user:my s3cret@127.0.0.1:4318",
            )],
            "`OTEL_EXPORTER_OTLP_ENDPOINT` is no address",
        ),
    ] {
        let ended = run(&project, &oracle, &env).ok();
        let warning = ended
            .stderr
            .lines()
            .find(|line| line.contains("OpenTelemetry: "));
        let warning = warning.unwrap_or_default();
        assert!(
            warning.starts_with("warning: ") && warning.contains(words),
            "{}",
            ended.stderr
        );
        assert!(!ended.stderr.contains("s3cret"), "{}", ended.stderr);
    }
    let quiet = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", refuses.url.as_str()),
        ("OTEL_SDK_DISABLED", "true"),
    ];
    let before = refuses.sent().len();
    let ended = run(&project, &oracle, &quiet).ok();
    assert!(!ended.stderr.contains("OpenTelemetry"), "{}", ended.stderr);
    assert_eq!(refuses.sent().len(), before);
}

#[test]
fn protobuf_is_sent_unless_json_is_asked_for() {
    let oracle = Oracle::start(|_| Some("pin".to_owned()));
    let project = project();
    let collector = Receiver::start(|_, _| (200, String::new()));
    let parent = format!("00-{TRACE}-{PARENT}-01");
    let env = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url.as_str()),
        ("OTEL_SERVICE_NAME", "the-service"),
        ("TRACEPARENT", parent.as_str()),
    ];
    let ended = run(&project, &oracle, &env).ok();
    assert!(!ended.stderr.contains("OpenTelemetry"), "{}", ended.stderr);
    let sent = collector.sent();
    assert!(!sent.is_empty());
    let mut spans = Vec::new();
    for one in &sent {
        assert_eq!(one.headers["content-type"], "application/x-protobuf");
        let told = ExportTraceServiceRequest::decode(one.body.as_slice()).unwrap();
        for resource in &told.resource_spans {
            let of = resource.resource.as_ref().unwrap();
            assert_eq!(values(&of.attributes)["service.name"], "the-service");
            for scope in &resource.scope_spans {
                assert_eq!(scope.scope.as_ref().unwrap().name, "flowrun");
                spans.extend(scope.spans.iter().map(Span::decoded));
            }
        }
    }
    are_those_of_a_first_run(&spans);
}
