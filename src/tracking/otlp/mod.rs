//! Traces in OpenTelemetry's protocol (OTLP over HTTP): a span for the run, in it one for each
//! step or item, in that one for each call of a language model.
//!
//! Switched on by the standard variables (`OTEL_EXPORTER_OTLP_ENDPOINT`, …); `TRACEPARENT` names
//! the span that the run is a part of. The spans are made here, from events, and not by a tracer:
//! steps run in other processes and on other machines, and what they tell comes with the events.
//!
//! | file | what |
//! |---|---|
//! | `parent` | the span that the run is a part of |
//! | `tree` | events to spans |

mod parent;
mod tree;

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use flowrun_engine::event::RunEvent;
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SpanExporter as _;
use reqwest::Url;

use self::parent::Parent;
use self::tree::Tree;
use super::{Heartbeat, Tracker};
use crate::address::{causes, is_loopback, shown};

/// Spans of one request.
const BATCH: usize = 512;
/// Requests that fail one after the other before no more is sent.
const FAILURES: usize = 2;

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
    /// The variable that says it.
    variable: &'static str,
    /// What it says, which may hold a password.
    address: String,
    /// It is an address of a web server.
    web: bool,
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

impl Settings {
    /// `None` when no traces are asked for.
    pub(super) fn of(env: &BTreeMap<String, String>) -> Option<Self> {
        let get = |name: &str| env.get(name).map(|v| v.trim()).filter(|v| !v.is_empty());
        let is = |name: &str, value: &str| get(name).is_some_and(|v| v.eq_ignore_ascii_case(value));
        if is("OTEL_SDK_DISABLED", "true") || is("OTEL_TRACES_EXPORTER", "none") {
            return None;
        }
        let of_name = |name: &&'static str| Some((*name, get(name)?));
        let (variable, endpoint) = ENDPOINTS.iter().find_map(of_name)?;
        let parent = get("TRACEPARENT").and_then(Parent::parse);
        // Whoever began the trace decided that it is not kept.
        if parent.is_some_and(|parent| !parent.sampled) {
            return None;
        }
        let resource = get("OTEL_RESOURCE_ATTRIBUTES");
        let url = Url::parse(endpoint).ok();
        let timeout = TIMEOUTS.iter().find_map(|name| get(name)?.parse().ok());
        let is_web = |url: &Url| matches!(url.scheme(), "http" | "https") && url.has_host();
        Some(Self {
            variable,
            address: endpoint.to_owned(),
            web: url.as_ref().is_some_and(is_web),
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
        let no_address = || {
            let variable = self.variable;
            format!(
                "`{variable}` is no address of a collector; give it as `http://…`, with the port \
                 that takes OTLP over HTTP (usually 4318)"
            )
        };
        if !self.web {
            return Err(no_address());
        }
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
        let built = builder.build().map_err(|e| match e.to_string() {
            // It repeats what it does not understand.
            text if text.contains(&self.address) => no_address(),
            text => text,
        });
        let mut exporter = built?;
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
    fn what_is_no_address_is_told_without_its_password() {
        for wrong in [
            "u:s3cret@collector:4318",
            "http://u:s3cret@collector:no-port",
            "http://u:s3cret@",
            "grpc://u:s3cret@collector:4317",
        ] {
            let settings = Settings::of(&env(&[(ENDPOINTS[0], wrong)])).unwrap();
            let told = settings.exporter().err().unwrap();
            assert!(told.contains(ENDPOINTS[0]), "{told}");
            assert!(!told.contains("s3cret") && !settings.endpoint.contains("s3cret"));
        }
    }
}
