//! `flowrun plan` and `flowrun --dry-run`.

use console::style;
use flowrun_cache::CacheReader;
use flowrun_engine::estimate::{Estimate, TotalEstimate};
use flowrun_engine::plan::{Costs, Plan, PlanStatus, PlannedPublish, plan as make_plan};
use flowrun_engine::run::RunOptions;
use flowrun_steps::report::dollars;

use crate::args::{GlobalArgs, PlanArgs};
use crate::exit::{Exit, Failure};
use crate::output;
use crate::surroundings::{self, Surroundings};

/// Lines about what is published, for each step; `--json` has all.
const PUBLISHED: usize = 10;

/// Shows what a run would do.
pub(crate) fn plan(args: &PlanArgs, global: &GlobalArgs) -> Result<Exit, Failure> {
    let asked = surroundings::ask(&args.select, global)?;
    let remember = asked.run_name();
    let loaded = asked.load()?;
    surroundings::warn(&loaded.pipeline);
    let options = RunOptions {
        remember,
        remote: surroundings::remote(global)?,
        ..surroundings::run_options(None, &args.scope)
    };
    show(&loaded, &options, global)
}

/// Shows what a run with these options would do.
pub(crate) fn show(
    loaded: &Surroundings,
    options: &RunOptions,
    global: &GlobalArgs,
) -> Result<Exit, Failure> {
    let plan = planned(loaded, options, global, Costs::Estimated)?;
    if global.json {
        return output::json(&plan);
    }
    output::print(&text(&plan))
}

#[allow(clippy::print_stderr)]
pub(super) fn planned(
    loaded: &Surroundings,
    options: &RunOptions,
    global: &GlobalArgs,
    costs: Costs,
) -> Result<Plan, Failure> {
    let reader = CacheReader::open(&global.cache_dir);
    let plan = make_plan(&loaded.pipeline, &reader, &loaded.world, options, costs)?;
    let remote = options.remote.iter();
    for text in remote.flat_map(|remote| remote.take_warnings()) {
        eprintln!("warning: {text}");
    }
    Ok(plan)
}

fn text(plan: &Plan) -> String {
    let width = plan.steps.iter().map(|s| s.step.chars().count()).max();
    let width = width.unwrap_or(0);
    let mut out = String::new();
    for step in &plan.steps {
        let why = match &step.status {
            PlanStatus::Fresh => "",
            status => status.why(),
        };
        let line = format!("{} {:width$}  {why}", word(&step.status), step.step);
        out.push_str(line.trim_end());
        out.push('\n');
        for estimate in step.estimates() {
            let indent = width + 9;
            out.push_str(&format!("{:indent$}{}\n", "", shown(estimate)));
        }
        // Under the step's name.
        out.push_str(&to_publish(step.to_publish(), 7));
    }
    out.push_str(&counts(plan));
    if let Some(cost) = &plan.cost {
        out.push_str(&total(cost));
    }
    out
}

/// `publish  results/report.html (missing)`, a line each, so far from the left.
pub(super) fn to_publish<'a>(
    all: impl Iterator<Item = &'a PlannedPublish>,
    indent: usize,
) -> String {
    let mut out = String::new();
    let mut left_out = 0;
    for (at, one) in all.enumerate() {
        if at < PUBLISHED {
            let (path, found) = (&one.path, one.found.word());
            out.push_str(&format!("{:indent$}publish  {path} ({found})\n", ""));
        } else {
            left_out += 1;
        }
    }
    if left_out > 0 {
        out.push_str(&format!("{:indent$}publish  {left_out} more\n", ""));
    }
    out
}

/// `about $0.02, at most $0.10 (12 requests, …)`.
fn shown(estimate: &Estimate) -> String {
    let cost = match estimate.unknown {
        true => "cost unknown".to_owned(),
        false => sum(estimate.usd, estimate.usd_at_most),
    };
    match cost.is_empty() {
        true => estimate.uses.clone(),
        false => format!("{cost} ({})", estimate.uses),
    }
}

fn sum(usd: Option<f64>, at_most: Option<f64>) -> String {
    let at_most = at_most.filter(|most| usd.is_none_or(|usd| usd < *most));
    let likely = usd.map(|usd| format!("about {}", dollars(usd)));
    let most = at_most.map(|usd| format!("at most {}", dollars(usd)));
    let parts: Vec<String> = likely.into_iter().chain(most).collect();
    parts.join(", ")
}

fn total(cost: &TotalEstimate) -> String {
    let sum = sum(cost.usd, cost.usd_at_most);
    let named: Vec<String> = cost.unknown.iter().map(|s| format!("`{s}`")).collect();
    let unknown = format!("unknown for {}", named.join(", "));
    match (sum.is_empty(), named.is_empty()) {
        (false, true) => format!("cost: {sum}\n"),
        (false, false) => format!("cost: {sum}; {unknown}\n"),
        (true, _) => format!("cost: {unknown}\n"),
    }
}

fn counts(plan: &Plan) -> String {
    let of = |wanted: fn(&PlanStatus) -> bool| {
        let statuses = plan.steps.iter().map(|s| &s.status);
        statuses.filter(|s| wanted(s)).count()
    };
    let stale = of(PlanStatus::is_stale);
    let later = of(|s| matches!(s, PlanStatus::Pending { .. }));
    let fresh = of(|s| matches!(s, PlanStatus::Fresh));
    let skipped = of(|s| matches!(s, PlanStatus::Skipped { .. }));
    let unknown = of(|s| matches!(s, PlanStatus::Unknown { .. }));
    if plan.is_idle() {
        return "nothing to do\n".to_owned();
    }
    let publish = plan.to_publish().count();
    let mut parts = vec![format!("{stale} to run")];
    if unknown > 0 {
        parts.push(format!(
            "{unknown} known only when its source was looked at"
        ));
    }
    if later > 0 {
        parts.push(format!("{later} after them, if their inputs change"));
    }
    parts.push(format!("{fresh} cached"));
    if skipped > 0 {
        parts.push(format!("{skipped} skipped"));
    }
    if publish > 0 {
        parts.push(format!("{publish} to publish"));
    }
    format!("{}\n", parts.join(", "))
}

/// What would become of a step, in one word of six places.
pub(super) fn word(status: &PlanStatus) -> console::StyledObject<&'static str> {
    match status {
        PlanStatus::Fresh => style("cached").dim(),
        PlanStatus::Stale { .. } => style("run   ").green().bold(),
        PlanStatus::Pending { .. } => style("later ").yellow(),
        PlanStatus::Unknown { .. } => style("maybe ").yellow(),
        PlanStatus::Skipped { .. } => style("skip  ").dim(),
    }
}

#[cfg(test)]
mod tests {
    use flowrun_engine::plan::OutOfPlace;

    use super::*;

    #[test]
    fn of_many_outputs_of_a_step_the_first_are_named() {
        let one = |n: usize| PlannedPublish {
            path: format!("r/{n}"),
            found: OutOfPlace::Missing,
        };
        let all: Vec<PlannedPublish> = (0..12).map(one).collect();
        let text = to_publish(all.iter(), 2);
        assert_eq!(text.lines().count(), 11);
        assert!(
            text.starts_with("  publish  r/0 (missing)\n  publish  r/1 (missing)\n"),
            "{text}"
        );
        assert!(
            text.ends_with("  publish  r/9 (missing)\n  publish  2 more\n"),
            "{text}"
        );
    }
}
