//! `flowrun check`.

use std::path::Path;

use flowrun_engine::finding::Severity;
use flowrun_engine::{Diagnostic, Diagnostics};
use serde_json::{Value, json};

use crate::args::{GlobalArgs, Select};
use crate::exit::{Exit, Failure, for_programs};
use crate::output::{self, count};
use crate::surroundings;

/// What was found, with the profile that it is found with alone.
type Found = Vec<(Option<String>, Diagnostic)>;

/// Checks a pipeline: with the profiles that are named, else without and with each of its own.
pub(crate) fn check(select: &Select, global: &GlobalArgs) -> Result<Exit, Failure> {
    let asked = surroundings::ask(select, global)?;
    let (steps, plain) = match asked.pipeline() {
        Ok(pipeline) => (Some(pipeline.steps.len()), pipeline.warnings.errors),
        Err(found) => (None, found.errors),
    };
    let more = match select.profile.is_empty() {
        true => asked.in_profiles(&plain),
        false => Vec::new(),
    };
    let plain = plain.into_iter().map(|found| (None, found));
    let more = more.into_iter().map(|one| (Some(one.profile), one.found));
    let (errors, warnings): (Found, Found) = plain
        .chain(more)
        .partition(|(_, found)| found.severity == Severity::Error);
    match steps.filter(|_| errors.is_empty()) {
        Some(steps) => well(&asked.file, steps, warnings, global),
        None => wrong(errors, warnings, global),
    }
}

fn well(file: &Path, steps: usize, warnings: Found, global: &GlobalArgs) -> Result<Exit, Failure> {
    if global.json {
        let mut about = json!({ "ok": true, "pipeline": file, "steps": steps });
        if !warnings.is_empty() {
            about["warnings"] = warnings.iter().map(listed).collect();
        }
        return output::json(&about);
    }
    let warned = match warnings.len() {
        0 => String::new(),
        some => format!(", {}", count(some, "warning")),
    };
    surroundings::tell(&without_names(warnings));
    if global.quiet {
        return Ok(Exit::Ok);
    }
    output::print(&format!(
        "{}: {}, no errors{warned}\n",
        file.display(),
        count(steps, "step")
    ))
}

fn wrong(errors: Found, warnings: Found, global: &GlobalArgs) -> Result<Exit, Failure> {
    if global.json {
        let mut about = json!({ "ok": false });
        about["errors"] = errors.iter().map(listed).collect();
        if !warnings.is_empty() {
            about["warnings"] = warnings.iter().map(listed).collect();
        }
        output::json(&about)?;
        return Ok(Exit::Invalid);
    }
    surroundings::tell(&without_names(warnings));
    Err(without_names(errors).into())
}

fn listed((profile, found): &(Option<String>, Diagnostic)) -> Value {
    let mut about = for_programs(found);
    if let Some(profile) = profile {
        about["profile"] = json!(profile);
    }
    about
}

/// Their messages name the profiles.
fn without_names(found: Found) -> Diagnostics {
    let errors = found.into_iter().map(|(_, found)| found).collect();
    Diagnostics { errors }
}
