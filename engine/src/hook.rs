//! [`Hook`]: who is told that a run ended. Knows neither runs nor how anybody is told: that is
//! the command line's. Invariant: nothing of a hook is in an action key.

use std::collections::BTreeMap;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Who is told that a run ended, and when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hook {
    /// When.
    pub on: Vec<HookEvent>,
    /// How.
    pub action: HookAction,
    /// Environment variables whose values the command, the URL and the headers may have.
    pub secrets: Vec<String>,
    /// Longest time of the command, or of one try of a webhook.
    pub timeout: Duration,
}

/// What a hook is told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum HookEvent {
    /// The run ended, well or not.
    Finished,
    /// The run ended, and not well: a step failed, a gate was not met, or it was interrupted.
    Failed,
}

/// How somebody is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum HookAction {
    /// A program and its arguments.
    Command(Vec<String>),
    /// A request to a server.
    Webhook(Webhook),
}

/// A request to a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Webhook {
    /// Where it goes; `${NAME}` stands for a secret's value.
    pub url: String,
    /// Headers by name, likewise.
    pub headers: BTreeMap<String, String>,
    /// Further tries after the first.
    pub retries: u32,
}

/// `text` with each `${NAME}` replaced by what `value` gives for the name.
///
/// # Errors
/// The first name that has no value.
pub fn fill(text: &str, value: impl Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut filled = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("${") {
        let Some((name, after)) = after.split_once('}') else {
            break;
        };
        filled.push_str(before);
        filled.push_str(&value(name).ok_or_else(|| name.to_owned())?);
        rest = after;
    }
    filled.push_str(rest);
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_replaced_and_a_name_without_a_value_is_told() {
        let value = |name: &str| (name == "A").then(|| "${B}".to_owned());
        let filled = |text: &str| fill(text, value);
        assert_eq!(filled("x ${A}${A} y"), Ok("x ${B}${B} y".to_owned()));
        assert_eq!(filled("$A {A} ${A"), Ok("$A {A} ${A".to_owned()));
        assert_eq!(filled("${A} ${C} ${D}"), Err("C".to_owned()));
    }
}
