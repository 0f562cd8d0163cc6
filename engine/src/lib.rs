//! A pipeline file to a checked pipeline, a graph, a run and its record.
//!
//! Knows no step kind, no language model and no tensor: the vocabulary comes
//! from outside.

pub mod dag;
pub mod event;
pub mod language;
pub mod manifest;
pub mod pipeline;
pub mod record;
pub mod run;
mod sandbox;
pub mod step;
pub mod vocabulary;

pub use language::{
    Diagnostic, Diagnostics, LoadOptions, eval_bool, load_pipeline, pipeline_schema, resolve_item,
    run_context, step_schema,
};
