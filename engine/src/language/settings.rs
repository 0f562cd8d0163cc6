//! The settings of a step that stand by themselves: retry, timeout, resources,
//! runner, secrets, environment, publish, conditions. Knows no other step, but for
//! the paths that they publish to.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::draft::{Draft, inner_path};
use super::expr::{ExprError, has_expression};
use super::node::Node;
use super::published::Published;
use super::resolution::report;
use super::source_map::{SourceMap, Span};
use super::spec::CacheSpec;
use super::token::{references, tokens};
use super::{scalar, suggest};
use crate::pipeline::{CachePolicy, METRICS, Resources, Retry, RunnerKind, StepNode};
use crate::runner::{JobKind, JobRunner};

/// Attempts after the first, when `retry` does not say.
const RETRY_TIMES: u32 = 3;
/// First wait, when `retry` does not say.
const RETRY_BACKOFF: Duration = Duration::from_secs(1);

/// What to do about a path that cannot be published to.
const OWN_PLACE: &str =
    "what is published takes its whole place: give each output a path of its own";

/// What settings may refer to.
pub(crate) struct Around<'a> {
    /// Environment variables that are set.
    pub(crate) environment: &'a BTreeMap<String, String>,
    /// Pools with their sizes.
    pub(crate) pools: &'a BTreeMap<String, usize>,
    /// Job systems of the file.
    pub(crate) runners: &'a BTreeMap<String, JobRunner>,
    /// Job systems that there can be.
    pub(crate) job_kinds: &'a BTreeMap<String, Arc<dyn JobKind>>,
}

/// Reads the settings of a step into `node`. `published` holds the paths that earlier steps
/// publish to.
pub(crate) fn read<'a>(
    map: &mut SourceMap,
    draft: &Draft<'a>,
    around: &Around<'_>,
    published: &mut Published<'a>,
    node: &mut StepNode,
) {
    let spec = &draft.spec;
    node.about.clone_from(&spec.about);
    node.pool = pool(map, draft, around.pools);
    node.cache = match spec.cache {
        Some(CacheSpec::Never) => CachePolicy::Never,
        Some(CacheSpec::Reuse) | None => CachePolicy::Reuse,
    };
    node.when = spec.when.as_deref().map(|w| bare(w).to_owned());
    node.timeout = duration(map, draft, &["timeout"], spec.timeout.as_deref());
    if let Some(retry) = &spec.retry {
        let backoff = duration(map, draft, &["retry", "backoff"], retry.backoff.as_deref());
        node.retry = Retry {
            times: retry.times.unwrap_or(RETRY_TIMES),
            backoff: backoff.unwrap_or(RETRY_BACKOFF),
        };
    }
    if let Some(resources) = &spec.resources {
        node.resources = Resources {
            cpu: resources.cpu.unwrap_or_default(),
            memory: memory(map, draft, resources.memory.as_deref()),
            gpu: resources.gpu.unwrap_or_default(),
            custom: amounts(resources.custom.as_ref()),
        };
    }
    node.runner = runner(map, draft, around);
    check_custom(map, draft, node);
    node.env = env(map, draft);
    node.secrets = secrets(map, draft, around.environment);
    node.publish = publish(map, draft, published);
    node.expect = expect(map, draft);
}

/// The text of a condition without its `${{ }}`.
fn bare(text: &str) -> &str {
    let inner = text
        .trim()
        .strip_prefix("${{")
        .and_then(|t| t.strip_suffix("}}"));
    inner.unwrap_or(text).trim()
}

fn duration(
    map: &mut SourceMap,
    draft: &Draft<'_>,
    path: &[&str],
    text: Option<&str>,
) -> Option<Duration> {
    let text = text.filter(|t| !has_expression(t))?;
    match scalar::duration(text) {
        Ok(duration) => Some(duration),
        Err(message) => {
            let help = "write for example `500ms`, `30s`, `5m` or `1h30m`".to_owned();
            map.report(draft.place(path), "bad-duration", message, "", Some(help));
            None
        }
    }
}

fn memory(map: &mut SourceMap, draft: &Draft<'_>, text: Option<&str>) -> u64 {
    let Some(text) = text.filter(|t| !has_expression(t)) else {
        return 0;
    };
    scalar::bytes(text).unwrap_or_else(|message| {
        let help = "write for example `512MB`, `4GB` or `4GiB`".to_owned();
        let at = draft.place(&["resources", "memory"]);
        map.report(at, "bad-size", message, "", Some(help));
        0
    })
}

/// The pool of a step; it must be declared.
fn pool(map: &mut SourceMap, draft: &Draft<'_>, pools: &BTreeMap<String, usize>) -> Option<String> {
    let name = draft.spec.pool.clone().filter(|p| !has_expression(p))?;
    if !pools.contains_key(&name) {
        let help = suggest::help(&name, "pools", pools.keys().map(String::as_str));
        let help = help.unwrap_or_else(|| {
            format!("say how many run at once at the top of the file: `pools: {{ {name}: 2 }}`")
        });
        let message = format!("there is no pool `{name}`");
        map.report(
            draft.place(&["pool"]),
            "unknown-pool",
            message,
            "",
            Some(help),
        );
    }
    Some(name)
}

fn runner(map: &mut SourceMap, draft: &Draft<'_>, around: &Around<'_>) -> RunnerKind {
    match draft.spec.runner.as_deref() {
        None | Some("inline") => RunnerKind::Inline,
        Some(text) if has_expression(text) => RunnerKind::Inline,
        // A command is a process of its own already. One inside a definition may have it from
        // the use, where it is meant for others.
        Some("process") if draft.is_run() => {
            if draft.scope().is_empty() {
                let help = "leave the field out: a command is always a process".to_owned();
                let at = draft.key_of(&["runner"]);
                let message = "`runner: process` belongs to `uses`";
                map.report(at, "misplaced-field", message, "", Some(help));
            }
            RunnerKind::Inline
        }
        Some("process") => RunnerKind::Process,
        Some(name) => {
            if !around.runners.contains_key(name) {
                unknown_runner(map, draft, name, around);
            }
            RunnerKind::Job(name.to_owned())
        }
    }
}

fn unknown_runner(map: &mut SourceMap, draft: &Draft<'_>, name: &str, around: &Around<'_>) {
    let at = draft.place(&["runner"]);
    if map.has_error_in(at) {
        return;
    }
    let help = match around.job_kinds.get(name) {
        Some(kind) => format!(
            "say where it is at the top of the file: `runners: {{ {name}: {} }}`",
            kind.example()
        ),
        None => {
            let known = ["inline", "process"].into_iter();
            let known = known
                .chain(around.runners.keys().map(String::as_str))
                .chain(around.job_kinds.keys().map(String::as_str));
            suggest::help(name, "runners", known).unwrap_or_default()
        }
    };
    let message = format!("there is no runner `{name}`");
    map.report(at, "unknown-runner", message, "", Some(help));
}

fn amounts(custom: Option<&BTreeMap<String, Value>>) -> BTreeMap<String, f64> {
    let amounts = custom.into_iter().flatten();
    amounts
        .filter_map(|(name, amount)| Some((name.clone(), amount.as_f64()?)))
        .collect()
}

/// Nobody here counts what only a job system knows.
fn check_custom(map: &mut SourceMap, draft: &Draft<'_>, node: &StepNode) {
    // One inside a definition may have it from the use.
    let is_own = draft.scope().is_empty();
    if is_own && !node.resources.custom.is_empty() && node.runner.job().is_none() {
        let at = draft.key_of(&["resources", "custom"]);
        let message = "`custom` resources belong to steps that are jobs";
        let help = "name a job system in `runner`, or use a `pool`".to_owned();
        map.report(at, "misplaced-field", message, "", Some(help));
    }
}

fn env(map: &mut SourceMap, draft: &Draft<'_>) -> BTreeMap<String, String> {
    let mut env = BTreeMap::new();
    for (name, value) in draft.spec.env.iter().flatten() {
        check_variable(map, name, draft.key_of(&["env", name]));
        let text = match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        env.insert(name.clone(), text);
    }
    env
}

fn secrets(
    map: &mut SourceMap,
    draft: &Draft<'_>,
    environment: &BTreeMap<String, String>,
) -> Vec<String> {
    let mut secrets: Vec<String> = Vec::new();
    for item in items(draft, "secrets") {
        let Some(name) = item.as_text().filter(|t| !has_expression(t)) else {
            continue;
        };
        if !check_variable(map, name, item.span) {
            continue;
        }
        if draft
            .spec
            .env
            .as_ref()
            .is_some_and(|env| env.contains_key(name))
        {
            let message = format!("`{name}` is in `env` too");
            map.report(item.span, "bad-name", message, "", None);
        } else if environment.get(name).is_none_or(String::is_empty) {
            let help = format!("set it before running: `export {name}=…`");
            let message = format!("the secret `{name}` is not set");
            map.report(item.span, "missing-secret", message, "", Some(help));
        }
        if !secrets.iter().any(|s| s == name) {
            secrets.push(name.to_owned());
        }
    }
    secrets
}

/// `[A-Za-z_][A-Za-z0-9_]*`
pub(crate) fn check_variable(map: &mut SourceMap, name: &str, at: Span) -> bool {
    let good = !name.starts_with(|c: char| c.is_ascii_digit())
        && !name.is_empty()
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    if !good {
        let message = format!("`{name}` is not a name for an environment variable");
        map.report(at, "bad-name", message, "", None);
    }
    good
}

fn publish<'a>(
    map: &mut SourceMap,
    draft: &Draft<'a>,
    published: &mut Published<'a>,
) -> BTreeMap<String, String> {
    let mut publish = BTreeMap::new();
    for (port, path) in draft.spec.publish.iter().flatten() {
        if let Some(ports) = &draft.outputs
            && !ports.iter().any(|p| p.name == *port)
        {
            let names = ports.iter().map(|p| p.name.as_str());
            let help = suggest::help(port, "its outputs", names);
            let message = format!("the step `{}` has no output `{port}`", draft.name);
            map.report(
                draft.key_of(&["publish", port]),
                "unknown-output",
                message,
                "",
                help,
            );
        }
        let at = draft.place(&["publish", port]);
        if has_expression(path) {
            // It depends on the item, so it is checked when the item is known.
            publish.insert(port.clone(), path.clone());
            continue;
        }
        if let Err(why) = inner_path(path) {
            let help = "publish to a path inside the project, relative to its root".to_owned();
            map.report(at, "bad-path", format!("`{path}` {why}"), "", Some(help));
            continue;
        }
        let list = draft
            .outputs
            .iter()
            .flatten()
            .any(|p| p.name == *port && p.many);
        if let Err(message) = published.add(path, draft.name, list) {
            map.report(at, "bad-path", message, "", Some(OWN_PLACE.to_owned()));
        }
        publish.insert(port.clone(), path.clone());
    }
    publish
}

fn expect(map: &mut SourceMap, draft: &Draft<'_>) -> Vec<String> {
    let mut expect = Vec::new();
    let has_metrics = draft.outputs.iter().flatten().any(|p| p.name == METRICS);
    if draft.is_run() && !has_metrics && !items(draft, "expect").is_empty() {
        let help = format!(
            "write them as a JSON object to an output: `out: {{ {METRICS}: {METRICS}.json }}`"
        );
        let message = format!("the command of `{}` has no metrics", draft.name);
        map.report(
            draft.key_of(&["expect"]),
            "misplaced-field",
            message,
            "",
            Some(help),
        );
    }
    for item in items(draft, "expect") {
        let Some(text) = item.as_text() else { continue };
        if map.has_error_in(item.span) {
            continue;
        }
        match check_gate(bare(text)) {
            Ok(gate) => expect.push(gate),
            Err(error) => report(map, item.span, &error),
        }
    }
    expect
}

/// Checks the form of a gate; which metrics there are is known only when the step ran.
fn check_gate(text: &str) -> Result<String, ExprError> {
    let wrong = |message: String, help: &str| ExprError {
        skip: 0,
        snippet: text.to_owned(),
        code: "expression",
        message,
        help: Some(help.to_owned()),
    };
    let help = "write a condition on a metric: `accuracy >= 0.8`";
    if references(text, &tokens(text)?)?.is_empty() {
        return Err(wrong(format!("`{text}` names no metric"), help));
    }
    super::expr::parse(text)?;
    Ok(text.to_owned())
}

fn items<'a>(draft: &Draft<'a>, field: &str) -> &'a [Node] {
    draft
        .node
        .get(field)
        .and_then(Node::as_list)
        .unwrap_or_default()
}
