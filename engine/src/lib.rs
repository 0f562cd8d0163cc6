//! A checked pipeline to a graph, a run and its record.
//!
//! Knows no step kind, no language model and no tensor: the vocabulary comes
//! from outside.

pub mod dag;
pub mod event;
pub mod manifest;
pub mod pipeline;
pub mod record;
pub mod run;
mod sandbox;
pub mod step;
pub mod vocabulary;
