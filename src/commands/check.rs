//! `flowrun check`.

use serde_json::json;

use crate::args::{GlobalArgs, Select};
use crate::exit::{Exit, Failure, for_programs};
use crate::output::{self, count};
use crate::surroundings;

/// Checks a pipeline.
pub(crate) fn check(select: &Select, global: &GlobalArgs) -> Result<Exit, Failure> {
    let loaded = match surroundings::load(select, global) {
        Err(failure) if global.json && !failure.mistakes().is_empty() => {
            output::json(&json!({ "ok": false, "errors": failure.mistakes() }))?;
            return Ok(failure.exit());
        }
        loaded => loaded?,
    };
    let (file, n) = (&loaded.pipeline.file, loaded.pipeline.steps.len());
    let warnings = &loaded.pipeline.warnings.errors;
    if global.json {
        let mut about = json!({ "ok": true, "pipeline": file, "steps": n });
        if !warnings.is_empty() {
            about["warnings"] = warnings.iter().map(for_programs).collect();
        }
        return output::json(&about);
    }
    surroundings::warn(&loaded.pipeline);
    if global.quiet {
        return Ok(Exit::Ok);
    }
    let warned = match warnings.len() {
        0 => String::new(),
        some => format!(", {}", count(some, "warning")),
    };
    output::print(&format!(
        "{}: {}, no errors{warned}\n",
        file.display(),
        count(n, "step")
    ))
}
