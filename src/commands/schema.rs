//! `flowrun schema`: JSON Schemas, for editors and for those who read events.

use flowrun_engine::event::event_schema;
use flowrun_engine::{definition_schema, pipeline_schema, step_schema};

use super::steps::find;
use crate::exit::{Exit, Failure};
use crate::output;

/// Prints the schema of pipelines, of step definitions, of a step kind's `with`, or of events.
pub(crate) fn schema(kind: Option<&str>, events: bool, definition: bool) -> Result<Exit, Failure> {
    let vocabulary = flowrun_steps::registry();
    let schema = match kind {
        None if events => event_schema(),
        None if definition => definition_schema(&vocabulary),
        None => pipeline_schema(&vocabulary),
        Some(kind) => step_schema(find(kind, &vocabulary.steps)?),
    };
    output::print(&format!("{schema:#}\n"))
}
