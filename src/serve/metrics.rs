//! [`Metrics`]: what the server counts, for Prometheus.
//!
//! Knows no request's content. Invariant: the values of every label come from a closed list, so
//! that no caller can make the number of series grow.

use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, text::encode};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use super::service::{Backend, Service};

/// The format that [`Metrics::text`] gives.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Request {
    path: &'static str,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Path {
    path: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Label {
    label: String,
}

/// What is counted.
pub(super) struct Metrics {
    registry: Registry,
    requests: Family<Request, Counter>,
    seconds: Family<Path, Histogram, fn() -> Histogram>,
    first_token: Histogram,
    refused: Family<Reason, Counter>,
    given_up: Counter,
    prompt_tokens: Counter,
    cached_tokens: Counter,
    generated_tokens: Counter,
    batch_rows: Histogram,
    step_seconds: Histogram,
    predictions: Family<Label, Counter>,
    confidence: Histogram,
    running: Gauge,
    waiting: Gauge,
    adapters: Gauge,
    connections: Gauge,
}

/// From a millisecond to about two minutes.
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 18))
}

impl Metrics {
    pub(super) fn new() -> Self {
        let mut registry = Registry::with_prefix("flowrun");
        let mut all = Self {
            requests: Family::default(),
            seconds: Family::new_with_constructor(seconds),
            first_token: seconds(),
            refused: Family::default(),
            given_up: Counter::default(),
            prompt_tokens: Counter::default(),
            cached_tokens: Counter::default(),
            generated_tokens: Counter::default(),
            batch_rows: Histogram::new(exponential_buckets(1.0, 2.0, 8)),
            step_seconds: seconds(),
            predictions: Family::default(),
            confidence: Histogram::new((1..=20).map(|i| f64::from(i) / 20.0)),
            running: Gauge::default(),
            waiting: Gauge::default(),
            adapters: Gauge::default(),
            connections: Gauge::default(),
            registry: Registry::default(),
        };
        all.register(&mut registry);
        all.registry = registry;
        all
    }

    fn register(&self, to: &mut Registry) {
        to.register("requests", "Answered requests", self.requests.clone());
        let text = "Time from a request's head to its answer's head";
        to.register("request_seconds", text, self.seconds.clone());
        let text = "Time from a request that has come to the first token of its stream";
        to.register("first_token_seconds", text, self.first_token.clone());
        let text = "Requests that were refused or cut off, by reason";
        to.register("refused", text, self.refused.clone());
        let text = "Requests whose client went away before the answer was whole";
        to.register("given_up", text, self.given_up.clone());
        to.register(
            "prompt_tokens",
            "Tokens of prompts",
            self.prompt_tokens.clone(),
        );
        let text = "Of the tokens of prompts, those computed for an earlier request";
        to.register("cached_prompt_tokens", text, self.cached_tokens.clone());
        to.register(
            "generated_tokens",
            "Tokens of answers",
            self.generated_tokens.clone(),
        );
        to.register(
            "batch_rows",
            "Rows of a step of the batch",
            self.batch_rows.clone(),
        );
        to.register(
            "step_seconds",
            "Time of a step of the batch",
            self.step_seconds.clone(),
        );
        to.register(
            "predictions",
            "Answers of the program, by label",
            self.predictions.clone(),
        );
        to.register(
            "prediction_confidence",
            "Confidence of these",
            self.confidence.clone(),
        );
        to.register("running", "Requests in the batch", self.running.clone());
        to.register("waiting", "Requests that wait for it", self.waiting.clone());
        to.register(
            "adapters_loaded",
            "Adapters in memory",
            self.adapters.clone(),
        );
        to.register("connections", "Open connections", self.connections.clone());
    }

    pub(super) fn request(&self, path: &'static str, status: u16, took: Duration) {
        self.requests.get_or_create(&Request { path, status }).inc();
        let seconds = self.seconds.get_or_create(&Path { path });
        seconds.observe(took.as_secs_f64());
    }

    pub(super) fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&Reason { reason }).inc();
    }

    pub(super) fn given_up(&self) {
        self.given_up.inc();
    }

    pub(super) fn first_token(&self, took: Duration) {
        self.first_token.observe(took.as_secs_f64());
    }

    pub(super) fn tokens(&self, prompt: u64, cached: u64, generated: u64) {
        self.prompt_tokens.inc_by(prompt);
        self.cached_tokens.inc_by(cached);
        self.generated_tokens.inc_by(generated);
    }

    /// Tokens of prompts that were counted already: those computed for an earlier request.
    pub(super) fn cached_tokens(&self, count: u64) {
        self.cached_tokens.inc_by(count);
    }

    pub(super) fn step(&self, rows: usize, took: Duration) {
        self.batch_rows.observe(rows as f64);
        self.step_seconds.observe(took.as_secs_f64());
    }

    /// `label` is one of the program's, or the word for none.
    pub(super) fn prediction(&self, label: &str, confidence: Option<f32>) {
        let label = label.to_owned();
        self.predictions.get_or_create(&Label { label }).inc();
        if let Some(confidence) = confidence {
            self.confidence.observe(f64::from(confidence));
        }
    }

    pub(super) fn connected(&self) {
        self.connections.inc();
    }

    pub(super) fn disconnected(&self) {
        self.connections.dec();
    }

    /// Everything, with the gauges as they are now.
    pub(super) fn text(&self, service: &Service) -> Result<String, std::fmt::Error> {
        let gauge = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        match &service.backend {
            Backend::Engine { engine, .. } => {
                self.running.set(gauge(engine.active()));
                let waiting = service.let_in().saturating_sub(engine.active());
                self.waiting.set(gauge(waiting.max(engine.waiting())));
                self.adapters.set(gauge(engine.adapters_in_memory()));
            }
            Backend::Answerer(_) => {
                self.running.set(gauge(service.let_in()));
            }
        }
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}
