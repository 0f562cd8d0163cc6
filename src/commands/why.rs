//! `flowrun why`.

use std::collections::BTreeSet;

use flowrun_engine::plan::{Costs, Plan, PlanStatus, PlannedStep};
use flowrun_engine::run::RunOptions;
use serde::Serialize;

use crate::args::{GlobalArgs, Scope, Select};
use crate::commands::plan::{planned, to_publish, word};
use crate::exit::{Exit, Failure};
use crate::{output, surroundings};

/// A step with the steps that decide about it.
#[derive(Serialize)]
struct Why<'a> {
    step: &'a PlannedStep,
    /// Stale steps before it, when it is known only after them.
    behind: Vec<&'a PlannedStep>,
}

/// Shows why a step would run.
pub(crate) fn why(name: &str, select: &Select, global: &GlobalArgs) -> Result<Exit, Failure> {
    let asked = surroundings::ask(select, global)?;
    let remember = asked.run_name();
    let loaded = asked.load()?;
    let options = RunOptions {
        remember,
        remote: surroundings::remote(global)?,
        ..surroundings::run_options(None, &Scope::default())
    };
    let plan = planned(&loaded, &options, global, Costs::Left)?;
    let steps = plan.named(name);
    if steps.is_empty() {
        let names: Vec<&str> = plan.steps.iter().map(|s| s.step.as_str()).collect();
        let text = format!("there is no step `{name}`; there are {}", names.join(", "));
        return Err(Failure::usage(text));
    }
    for step in steps {
        let why = Why {
            step,
            behind: behind(&plan, step),
        };
        if global.json {
            output::json(&why)?;
        } else {
            output::print(&text(&why, name))?;
        }
    }
    Ok(Exit::Ok)
}

/// The stale steps that a pending step waits for, through those that are pending too.
fn behind<'a>(plan: &'a Plan, step: &PlannedStep) -> Vec<&'a PlannedStep> {
    let mut wanted: BTreeSet<&str> = BTreeSet::new();
    let add = |wanted: &mut BTreeSet<&'a str>, status: &PlanStatus| {
        if let PlanStatus::Pending { after, .. } = status {
            let names = after.iter().filter_map(|name| plan.find(name));
            wanted.extend(names.map(|s| s.step.as_str()));
        }
    };
    add(&mut wanted, &step.status);
    // The plan is in topological order, so one walk from its end meets each step after all
    // that wait for it.
    for before in plan.steps.iter().rev() {
        if wanted.contains(before.step.as_str()) {
            add(&mut wanted, &before.status);
        }
    }
    let decides =
        |s: &&PlannedStep| s.status.is_stale() || matches!(s.status, PlanStatus::Unknown { .. });
    let steps = plan.steps.iter();
    steps
        .filter(|s| wanted.contains(s.step.as_str()))
        .filter(decides)
        .collect()
}

fn text(why: &Why<'_>, name: &str) -> String {
    let mut out = String::new();
    let step = why.step;
    let items: Vec<_> = step
        .items
        .iter()
        .filter(|item| item.id == name || !step.items.iter().any(|i| i.id == name))
        .collect();
    if items.is_empty() {
        describe(&mut out, &step.step, &step.status);
    }
    for item in items {
        describe(&mut out, &item.id, &item.status);
        out.push_str(&to_publish(item.publish.iter(), 4));
    }
    for before in &why.behind {
        describe(&mut out, &before.step, &before.status);
        for item in before.items.iter().filter(|_| before.items.len() > 1) {
            if item.status.is_stale() {
                describe(&mut out, &item.id, &item.status);
            }
        }
    }
    out
}

fn describe(out: &mut String, id: &str, status: &PlanStatus) {
    let word = word(status).to_string();
    match status {
        PlanStatus::Stale {
            why,
            changes,
            against,
        } => {
            let since = against.as_ref().map(|run| format!(", since run {run}"));
            out.push_str(&format!("{word} {id}{}\n", since.unwrap_or_default()));
            let lines = if changes.is_empty() {
                std::slice::from_ref(why)
            } else {
                changes
            };
            for line in lines {
                out.push_str(&format!("    {line}\n"));
            }
        }
        other => out.push_str(&format!("{word} {id}: {}\n", other.why())),
    }
}
