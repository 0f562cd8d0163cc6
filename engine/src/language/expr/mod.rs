//! `${{ expr }}`: expressions inside the text of a pipeline.
//!
//! An expression is one of tera's, over a context of JSON values. It sees no
//! environment, clock, file or random number, so it gives the same at any time.
//! Knows no places; a mistake is told by where it stands in the text.
//!
//! Invariant: text is evaluated at most once. While a value waits for `item`, what
//! is already final in it is kept escaped (`$${{`), and [`resolve_item`] takes that out.
//!
//! | file | has |
//! |---|---|
//! | this one | a text or a condition, with what is known filled in |
//! | `text` | where expressions begin and end in a text |
//! | `names` | whether what an expression names is there |
//! | `closing` | an expression of which only `item` is left |
//! | `evaluation` | what an expression gives |
//! | `budget` | how much expressions may hold |
//! | `run_time` | what waited for an item, or for metrics |

mod budget;
mod closing;
mod evaluation;
mod names;
mod run_time;
#[cfg(test)]
mod tests;
mod text;

pub(crate) use evaluation::parse;
pub use run_time::{eval_bool, resolve_item};
pub(crate) use text::{escape, escaped, has_expression, holds_expression, unescaped};

use std::collections::BTreeMap;

use serde_json::Value;

use budget::Budget;
use closing::{fill, renamed};
use evaluation::{as_text, evaluate};
use names::{check, refers_to_item};
use text::{ESCAPED, OPEN, Part, split};

use super::token::{Reference, Segment};

/// A mistake in an expression.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ExprError {
    /// How many expressions come before it in the text.
    pub(crate) skip: usize,
    /// The piece of the text that is wrong, as written.
    pub(crate) snippet: String,
    /// Stable name of the kind of mistake.
    pub(crate) code: &'static str,
    /// What is wrong.
    pub(crate) message: String,
    /// What to do about it.
    pub(crate) help: Option<String>,
}

impl ExprError {
    fn new(snippet: &str, code: &'static str, message: impl Into<String>) -> Self {
        let snippet = snippet.to_owned();
        Self {
            skip: 0,
            snippet,
            code,
            message: message.into(),
            help: None,
        }
    }

    fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

/// What an expression may refer to.
#[derive(Debug, Clone, Default)]
pub(crate) struct Scope {
    /// `params`, `run`, `models`: what is known before the run.
    pub(crate) context: Value,
    /// The `foreach` variables, when the text belongs to a step that has some.
    pub(crate) items: Option<Vec<String>>,
    /// The params of the step definition around that differ from item to item, each with the
    /// variable of `item` that holds it.
    pub(crate) deferred: BTreeMap<String, String>,
    /// The text belongs to a definition whose use has a `foreach`: it is read once more, per item.
    pub(crate) walked: bool,
    /// The text is read once more when the item is known, if it asks for it.
    pub(crate) may_wait: bool,
    /// How much the expressions of the pipeline have taken.
    pub(crate) budget: Budget,
}

impl Scope {
    /// The variable of `item` that holds what is referred to, when that is a deferred param.
    fn variable(&self, reference: &Reference<'_>) -> Option<&str> {
        match reference.segments.get(1) {
            Some(Segment::Key(name)) if reference.root() == "params" => {
                self.deferred.get(name).map(String::as_str)
            }
            _ => None,
        }
    }

    /// `name` is a variable that stands for a deferred param.
    fn is_deferred(&self, name: &str) -> bool {
        self.deferred.values().any(|variable| variable == name)
    }
}

/// What became of a text.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Resolved {
    /// It is final; a single expression keeps its type.
    Done(Value),
    /// It waits for `item`; everything else in it is filled in.
    Waits(String),
}

/// Fills in what is known of a text.
///
/// # Errors
/// The first mistake in it.
pub(crate) fn resolve(text: &str, scope: &Scope) -> Result<Resolved, ExprError> {
    if !text.contains(OPEN) {
        return Ok(Resolved::Done(Value::String(text.to_owned())));
    }
    let parts = split(text)?;
    let mut waits = false;
    let mut count = 0;
    for part in &parts {
        if let Part::Expr(source) = part {
            let checked = check(source, scope).map_err(|e| ExprError { skip: count, ..e })?;
            waits |= checked;
            count += 1;
        }
    }
    if let ([Part::Expr(source)], false) = (parts.as_slice(), waits) {
        return evaluate(source, &scope.context, &scope.budget).map(Resolved::Done);
    }
    let mut out = String::new();
    let mut skip = 0;
    for part in parts {
        match part {
            Part::Text(text) => out.push_str(text),
            Part::Escape => out.push_str(if waits { ESCAPED } else { OPEN }),
            Part::Expr(source) => {
                let at = |e| ExprError { skip, ..e };
                let renamed = renamed(source, scope).map_err(at)?;
                if refers_to_item(&renamed) {
                    let filled = fill(&renamed, &scope.context, &scope.budget).map_err(at)?;
                    out.push_str(&format!("${{{{ {filled} }}}}"));
                } else {
                    let value = evaluate(source, &scope.context, &scope.budget).map_err(at)?;
                    let text = as_text(&value, source).map_err(at)?;
                    out.push_str(&if waits { escape(&text) } else { text });
                }
                skip += 1;
            }
        }
    }
    Ok(if waits {
        Resolved::Waits(out)
    } else {
        Resolved::Done(Value::String(out))
    })
}

/// The expression of `when` or `expect`: the text, or what stands inside its `${{ }}`.
///
/// # Errors
/// Text around the expression, or a mistake in it.
pub(crate) fn condition<'a>(text: &'a str, scope: &Scope) -> Result<&'a str, ExprError> {
    let source = match split(text)?.as_slice() {
        [Part::Expr(source)] => source,
        [Part::Text(_)] => text.trim(),
        _ => {
            let message = "a condition is one expression";
            return Err(ExprError::new(text, "expression", message)
                .help("write the whole condition inside one `${{ … }}`"));
        }
    };
    check(source, scope)?;
    Ok(source)
}

/// A condition with all that is known filled in: `true`, `false`, or one that asks for `item`.
///
/// # Errors
/// A mistake in it, or a value that is neither true nor false.
pub(crate) fn close_condition(text: &str, scope: &Scope) -> Result<String, ExprError> {
    let source = condition(text, scope)?;
    let renamed = renamed(source, scope)?;
    if refers_to_item(&renamed) {
        return fill(&renamed, &scope.context, &scope.budget);
    }
    match evaluate(source, &scope.context, &scope.budget)? {
        Value::Bool(holds) => Ok(holds.to_string()),
        other => {
            let what = super::node::describe(&other);
            let message = format!("`{source}` is {what}, not true or false");
            Err(ExprError::new(source, "expression", message))
        }
    }
}
