//! [`Vocabulary`]: the step kinds, and the shape of `models:` and `programs:`,
//! that a pipeline may use. The engine gets it from outside and knows none of
//! the kinds itself.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;

use crate::finding::WholeCheck;
use crate::runner::JobKind;
use crate::step::Step;

/// What a pipeline may name.
#[derive(Clone, Default)]
pub struct Vocabulary {
    /// Kind to implementation.
    pub steps: BTreeMap<String, Arc<dyn Step>>,
    /// JSON Schema of one entry of `models:`.
    pub model_schema: Value,
    /// JSON Schema of one entry of `programs:`.
    pub program_schema: Value,
    /// Top-level fields of a model entry that say where and how to reach the
    /// model but not what it answers (`base_url`, `api_key_env`, `concurrency`):
    /// left out of action keys.
    pub unkeyed_model_fields: Vec<String>,
    /// Job systems that `runners:` may name.
    pub runners: BTreeMap<String, Arc<dyn JobKind>>,
    /// What must hold between the steps of a pipeline, besides what the engine itself knows.
    pub checks: Vec<WholeCheck>,
}
