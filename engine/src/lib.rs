//! A pipeline file to a checked pipeline, a graph, a plan, a run and its record.
//!
//! Knows no step kind, no language model and no tensor: the vocabulary comes
//! from outside.

mod child;
pub mod dag;
pub mod diff;
pub mod estimate;
pub mod event;
mod expansion;
pub mod finding;
mod gates;
mod history;
pub mod hook;
pub mod language;
pub mod lineage;
mod lookup;
pub mod manifest;
pub mod pipeline;
mod places;
pub mod plan;
pub mod premises;
pub mod record;
pub mod retention;
pub mod run;
mod run_keys;
pub mod runner;
mod sandbox;
pub mod step;
#[cfg(test)]
mod testing;
pub mod tracking;
pub mod vocabulary;
mod warden;
mod why;

pub use language::{
    Diagnostic, Diagnostics, InProfile, LoadOptions, check_profiles, definition_schema, eval_bool,
    load_pipeline, parse_bytes, parse_duration, pipeline_schema, resolve_item, step_schema,
};
