//! `hooks:` of a pipeline file. Knows no steps.

use std::collections::BTreeMap;
use std::time::Duration;

use super::node::{Entry, Node};
use super::scalar;
use super::settings::check_variable;
use super::source_map::{SourceMap, Span};
use super::spec::{HookSpec, WebhookSpec};
use crate::hook::{Hook, HookAction, HookEvent, Webhook, fill};

/// Longest time of a command or a try, when `timeout` does not say.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Further tries of a webhook, when `retries` does not say.
const RETRIES: u32 = 2;

/// The hooks of the file; one that is not right is left out. One that is null was taken out.
pub(crate) fn read(
    map: &mut SourceMap,
    tree: &Node,
    environment: &BTreeMap<String, String>,
) -> BTreeMap<String, Hook> {
    let mut hooks = BTreeMap::new();
    for (name, entry) in tree.entries("hooks") {
        // What is wrong with its shape was told.
        if map.has_error_in(entry.value.span) {
            continue;
        }
        let Ok(spec) = serde_json::from_value::<HookSpec>(entry.value.to_value()) else {
            continue;
        };
        if let Some(hook) = hook(map, name, entry, spec, environment) {
            hooks.insert(name.clone(), hook);
        }
    }
    hooks
}

fn hook(
    map: &mut SourceMap,
    name: &str,
    entry: &Entry,
    spec: HookSpec,
    environment: &BTreeMap<String, String>,
) -> Option<Hook> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    if name.is_empty() || !name.chars().all(allowed) {
        let help = "letters, digits, `-` and `_`".to_owned();
        let message = format!("`{name}` is not a name for a hook");
        map.report(entry.key, "bad-name", message, "", Some(help));
    }
    let secrets = spec.secrets.unwrap_or_default();
    check_secrets(map, entry, &secrets, environment);
    let timeout = timeout(map, entry, spec.timeout.as_deref());
    let action = match (spec.command, spec.webhook) {
        (Some(command), None) if !command.is_empty() => HookAction::Command(command),
        (None, Some(webhook)) => HookAction::Webhook(check_webhook(map, entry, webhook, &secrets)?),
        (Some(_), Some(_)) => {
            let at = entry.value.place(&path(&["webhook"]), true, entry.key);
            let message = "a hook has a `command` or a `webhook`, not both";
            map.report(at, "misplaced-field", message, "", None);
            return None;
        }
        (Some(_) | None, None) => {
            let message = format!("the hook `{name}` does nothing");
            let help = "give it `command: [PROGRAM, ARGUMENT, …]` or `webhook: { url: … }`";
            map.report(
                entry.key,
                "missing-field",
                message,
                "",
                Some(help.to_owned()),
            );
            return None;
        }
    };
    Some(Hook {
        on: spec.on.unwrap_or_else(|| vec![HookEvent::Finished]),
        action,
        secrets,
        timeout,
    })
}

fn path(parts: &[&str]) -> Vec<String> {
    parts.iter().map(|part| (*part).to_owned()).collect()
}

fn place(entry: &Entry, parts: &[&str]) -> Span {
    entry.value.place(&path(parts), false, entry.key)
}

fn check_secrets(
    map: &mut SourceMap,
    entry: &Entry,
    secrets: &[String],
    environment: &BTreeMap<String, String>,
) {
    for (index, secret) in secrets.iter().enumerate() {
        let at = place(entry, &["secrets", &index.to_string()]);
        if check_variable(map, secret, at) && environment.get(secret).is_none_or(String::is_empty) {
            let help = format!("set it before running: `export {secret}=…`");
            let message = format!("the secret `{secret}` is not set");
            map.report(at, "missing-secret", message, "", Some(help));
        }
    }
}

fn timeout(map: &mut SourceMap, entry: &Entry, text: Option<&str>) -> Duration {
    let Some(text) = text else {
        return TIMEOUT;
    };
    scalar::duration(text).unwrap_or_else(|message| {
        let help = "write for example `500ms`, `30s` or `5m`".to_owned();
        let at = place(entry, &["timeout"]);
        map.report(at, "bad-duration", message, "", Some(help));
        TIMEOUT
    })
}

fn check_webhook(
    map: &mut SourceMap,
    entry: &Entry,
    spec: WebhookSpec,
    secrets: &[String],
) -> Option<Webhook> {
    let Some(url) = spec.url else {
        let message = "the field `url` is missing";
        let at = entry.value.place(&path(&["webhook"]), true, entry.key);
        map.report(at, "missing-field", message, "", None);
        return None;
    };
    let headers = spec.headers.unwrap_or_default();
    let at_url = place(entry, &["webhook", "url"]);
    // A whole URL may be a secret.
    if !["http://", "https://", "${"]
        .iter()
        .any(|start| url.starts_with(start))
    {
        let message = format!("`{url}` is no URL of a web server");
        let help = "it begins with `https://`, `http://`, or `${NAME}` of a secret".to_owned();
        map.report(at_url, "bad-url", message, "", Some(help));
    }
    check_placeholders(map, at_url, &url, secrets);
    for (name, value) in &headers {
        let fits = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
        if name.is_empty() || !name.chars().all(fits) {
            let at = path(&["webhook", "headers", name]);
            let at = entry.value.place(&at, true, entry.key);
            let message = format!("`{name}` is not a name for a header");
            map.report(at, "bad-name", message, "", None);
        }
        let at = place(entry, &["webhook", "headers", name]);
        check_placeholders(map, at, value, secrets);
    }
    Some(Webhook {
        url,
        headers,
        retries: spec.retries.unwrap_or(RETRIES),
    })
}

/// Each `${NAME}` is one of the hook's secrets.
fn check_placeholders(map: &mut SourceMap, at: Span, text: &str, secrets: &[String]) {
    let known = |name: &str| secrets.iter().any(|s| s == name).then(String::new);
    if let Err(name) = fill(text, known) {
        let message = format!("`${{{name}}}` is no secret of this hook");
        let help = format!("add it: `secrets: [{name}]`");
        map.report(at, "bad-reference", message, "", Some(help));
    }
}
