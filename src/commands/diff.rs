//! `flowrun diff`.

use console::style;
use flowrun_cache::CacheReader;
use flowrun_engine::diff::{Change, RunDiff, StepDiff};
use serde_json::Value;

use crate::args::GlobalArgs;
use crate::exit::{Exit, Failure};
use crate::reporter::{duration, status_word};
use crate::{output, recorded};

/// Characters of a digest.
const DIGEST: usize = 12;

/// Shows what differs between two runs. Without `new` the last run is compared, without both
/// it is compared with the one before.
pub(crate) fn diff(
    old: Option<&str>,
    new: Option<&str>,
    global: &GlobalArgs,
) -> Result<Exit, Failure> {
    let old = recorded::find_dir(Some(old.unwrap_or("last~1")), global)?;
    let new = recorded::find_dir(new, global)?;
    let reader = CacheReader::open(&global.cache_dir);
    let diff = RunDiff::of(&old, &new, &reader).map_err(|e| {
        let text = format!("the record of a run cannot be read: {e}");
        Failure::new(Exit::Cache, text)
    })?;
    if global.json {
        return output::json(&diff);
    }
    output::print(&text(&diff))
}

fn text(diff: &RunDiff) -> String {
    let mut out = format!("{} → {}\n", diff.old, diff.new);
    if let Some(change) = &diff.pipeline {
        out.push_str(&format!("pipeline: {}\n", arrow(change, String::clone)));
    }
    if let Some(change) = &diff.profiles {
        let shown = |names: &Vec<String>| match names.as_slice() {
            [] => "none".to_owned(),
            names => names.join(", "),
        };
        out.push_str(&format!("profiles: {}\n", arrow(change, shown)));
    }
    for (name, change) in &diff.params {
        out.push_str(&format!(
            "param `{name}`: {}\n",
            arrow(change, Value::to_string)
        ));
    }
    for step in &diff.steps {
        step_text(&mut out, step);
    }
    let same = output::count(diff.same, "step");
    out.push_str(&match diff.steps.len() {
        0 if diff.is_empty() => format!("no difference: {same} alike\n"),
        _ => format!("{same} alike\n"),
    });
    out
}

fn step_text(out: &mut String, step: &StepDiff) {
    let ended = arrow(&step.status, |s| status_word(*s).to_owned());
    let took = arrow(&step.took_ms, |ms| duration(*ms));
    let head = match (step.status.old, step.status.new) {
        (None, Some(_)) => format!("{} only in the new run", style("+").green()),
        (Some(_), None) => format!("{} only in the old run", style("-").red()),
        _ => format!("{} {ended}, {took}", style("~").yellow()),
    };
    let (mark, rest) = head.split_once(' ').unwrap_or((&head, ""));
    out.push_str(&format!("{mark} {}: {rest}\n", style(&step.step).bold()));
    let short = |digest: &String| digest.chars().take(DIGEST).collect::<String>();
    if let Some(change) = &step.key {
        out.push_str(&format!("    key {}\n", arrow(change, short)));
    }
    for line in &step.changes {
        out.push_str(&format!("    {line}\n"));
    }
    for (name, change) in &step.metrics {
        out.push_str(&format!(
            "    metric {name}: {}{}\n",
            arrow(change, Value::to_string),
            gap(change)
        ));
    }
    for (port, change) in &step.outputs {
        out.push_str(&format!("    output {port}: {}\n", arrow(change, short)));
    }
}

fn arrow<T: PartialEq>(change: &Change<T>, show: impl Fn(&T) -> String) -> String {
    let side = |value: &Option<T>| value.as_ref().map_or_else(|| "none".to_owned(), &show);
    if change.old == change.new {
        return side(&change.new);
    }
    format!("{} → {}", side(&change.old), side(&change.new))
}

/// The difference of two numbers.
fn gap(change: &Change<Value>) -> String {
    let number = |value: &Option<Value>| value.as_ref().and_then(Value::as_f64);
    match (number(&change.old), number(&change.new)) {
        (Some(a), Some(b)) if change.new.as_ref().is_some_and(Value::is_f64) => {
            format!(" ({:+.4})", b - a)
        }
        (Some(a), Some(b)) => format!(" ({:+})", b - a),
        _ => String::new(),
    }
}
