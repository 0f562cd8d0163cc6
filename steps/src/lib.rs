//! The step kinds that a pipeline may use.
//!
//! One file a kind, and [`registry`], the visible list of them. Joins the
//! program layer and the embedded model; knows no command line.

pub mod answer;
pub mod bench;
mod bootstrap;
pub mod bundle;
pub mod checkpoint;
mod concat;
mod convert_to_messages;
mod dashboard;
pub mod deploy;
pub mod download;
mod estimate;
mod evaluate;
mod explain;
mod filter_top_n;
pub mod finetune;
mod fit_classifier;
mod folder;
pub mod format_version;
mod holdout;
pub mod hub;
pub mod leakage;
pub mod load;
mod load_dspy;
mod merge_scores;
pub mod models;
mod optimize;
pub mod program_file;
pub mod report;
#[cfg(test)]
#[path = "../../tests/end_to_end/support/required.rs"]
mod required;
pub mod rows;
pub mod runners;
mod save_dspy;
pub mod scores;
pub mod select;
mod servable;
pub mod serving;
pub mod shard;
mod split;
pub mod stand_in;
pub mod table;
mod waiting;

use std::sync::Arc;

use flowrun_engine::step::Step;
use flowrun_engine::vocabulary::Vocabulary;
use schemars::JsonSchema;
use serde_json::Value;

/// Every step kind, and the shape of `models:` and `programs:`.
#[must_use]
pub fn registry() -> Vocabulary {
    let steps: Vec<Arc<dyn Step>> = vec![
        Arc::new(load::Load),
        Arc::new(filter_top_n::FilterTopN),
        Arc::new(split::Split),
        Arc::new(shard::Shard),
        Arc::new(concat::Concat),
        Arc::new(bootstrap::Bootstrap),
        Arc::new(fit_classifier::FitClassifier),
        Arc::new(holdout::Holdout),
        Arc::new(explain::Explain),
        Arc::new(convert_to_messages::ConvertToMessages),
        Arc::new(finetune::Finetune),
        Arc::new(optimize::Optimize),
        Arc::new(load_dspy::LoadDspy),
        Arc::new(save_dspy::SaveDspy),
        Arc::new(evaluate::Evaluate),
        Arc::new(merge_scores::MergeScores),
        Arc::new(select::Select),
        Arc::new(report::ReportStep),
        Arc::new(deploy::Deploy),
    ];
    Vocabulary {
        steps: steps
            .into_iter()
            .map(|step| (step.kind().to_owned(), step))
            .collect(),
        model_schema: schema_of::<models::ModelSpec>(),
        program_schema: schema_of::<flowrun_lm::program::ProgramSpec>(),
        unkeyed_model_fields: models::UNKEYED.map(str::to_owned).to_vec(),
        runners: runners::registry(),
        checks: vec![servable::check, bootstrap::check],
    }
}

/// The JSON Schema of a Rust type, for checking and for editors.
pub(crate) fn schema_of<T: JsonSchema>() -> Value {
    schemars::schema_for!(T).to_value()
}
