//! `flowrun plan`, `flowrun why` and `flowrun --dry-run`.

use flowrun_cache::CacheReader;
use flowrun_engine::plan::{Plan, PlanStatus, plan as make_plan};
use flowrun_engine::run::RunOptions;

use crate::args::{GlobalArgs, Select};
use crate::exit::{Exit, Failure};
use crate::surroundings::{self, Surroundings};

/// Shows what a run would do.
pub(crate) fn plan(select: &Select, global: &GlobalArgs) -> Result<Exit, Failure> {
    let loaded = surroundings::load(select, global)?;
    show(&loaded, &surroundings::run_options(None), global)
}

/// Shows what a run with these options would do.
#[allow(clippy::print_stdout)]
pub(crate) fn show(
    loaded: &Surroundings,
    options: &RunOptions,
    global: &GlobalArgs,
) -> Result<Exit, Failure> {
    let plan = planned(loaded, options, global)?;
    if global.json {
        println!(
            "{}",
            serde_json::to_string(&plan).map_err(std::io::Error::from)?
        );
        return Ok(Exit::Ok);
    }
    for step in &plan.steps {
        let (word, why) = words(&step.status);
        println!("{word:8} {:24} {why}", step.step);
    }
    if plan.is_fresh() {
        println!("nothing to do");
    }
    Ok(Exit::Ok)
}

/// Shows why a step would run.
#[allow(clippy::print_stdout)]
pub(crate) fn why(name: &str, select: &Select, global: &GlobalArgs) -> Result<Exit, Failure> {
    let loaded = surroundings::load(select, global)?;
    let plan = planned(&loaded, &surroundings::run_options(None), global)?;
    let Some(step) = plan.find(name) else {
        let names: Vec<&str> = plan.steps.iter().map(|s| s.step.as_str()).collect();
        let text = format!("there is no step `{name}`; there are {}", names.join(", "));
        return Err(Failure::usage(text));
    };
    let items = step
        .items
        .iter()
        .filter(|item| item.id == name || step.step == name);
    let mut shown = false;
    for item in items {
        let (word, why) = words(&item.status);
        println!("{}: {word}\n    {}", item.id, why.replace("; ", "\n    "));
        shown = true;
    }
    if !shown {
        let (word, why) = words(&step.status);
        println!("{}: {word}\n    {why}", step.step);
    }
    Ok(Exit::Ok)
}

fn planned(
    loaded: &Surroundings,
    options: &RunOptions,
    global: &GlobalArgs,
) -> Result<Plan, Failure> {
    let reader = CacheReader::open(&global.cache_dir);
    Ok(make_plan(
        &loaded.pipeline,
        &reader,
        &loaded.world,
        options,
    )?)
}

fn words(status: &PlanStatus) -> (&'static str, &str) {
    match status {
        PlanStatus::Fresh => ("cached", "nothing changed"),
        PlanStatus::Stale { why } => ("run", why),
        PlanStatus::Pending { why } => ("later", why),
        PlanStatus::Skipped { why } => ("skip", why),
    }
}
