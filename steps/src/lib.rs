//! The step kinds that a pipeline may use.
//!
//! One file a kind, and [`registry`], the visible list of them. Joins the
//! program layer and the embedded model; knows no command line.

pub mod download;
pub mod filter_top_n;
pub mod holdout;
pub mod hub;
pub mod load;
pub mod models;
pub mod report;
pub mod rows;
pub mod split;
pub mod stand_in;
pub mod table;

use std::sync::Arc;

use flowrun_engine::step::Step;
use flowrun_engine::vocabulary::Vocabulary;
use schemars::JsonSchema;
use serde_json::{Value, json};

/// Every step kind, and the shape of `models:` and `programs:`.
#[must_use]
pub fn registry() -> Vocabulary {
    let steps: Vec<Arc<dyn Step>> = vec![
        Arc::new(load::Load),
        Arc::new(filter_top_n::FilterTopN),
        Arc::new(split::Split),
        Arc::new(holdout::Holdout),
    ];
    Vocabulary {
        steps: steps
            .into_iter()
            .map(|step| (step.kind().to_owned(), step))
            .collect(),
        model_schema: json!({ "type": "object" }),
        program_schema: schema_of::<flowrun_lm::program::ProgramSpec>(),
        unkeyed_model_fields: vec![],
    }
}

/// The JSON Schema of a Rust type, for checking and for editors.
pub(crate) fn schema_of<T: JsonSchema>() -> Value {
    schemars::schema_for!(T).to_value()
}
