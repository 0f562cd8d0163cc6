//! `flowrun check`.

use serde_json::json;

use crate::args::{GlobalArgs, Select};
use crate::exit::{Exit, Failure};
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
    if global.json {
        return output::json(&json!({ "ok": true, "pipeline": file, "steps": n }));
    }
    if global.quiet {
        return Ok(Exit::Ok);
    }
    output::print(&format!(
        "{}: {}, no errors\n",
        file.display(),
        count(n, "step")
    ))
}
