//! Stands where the embedded model was left out of the build: every use says so.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use flowrun_engine::step::StepError;
use flowrun_lm::classifier::Embedder;
use flowrun_lm::lm::Lm;
use serde_json::Value;

use super::{EmbeddedSpec, EncoderSpec, Host};
use crate::bench::Measured;
use crate::checkpoint::Checkpoint;

pub(crate) fn left_out() -> StepError {
    StepError::invalid("this flowrun was built without the embedded model")
        .help("build it with the feature `model`, or name a model with `provider: openai`")
}

/// Always an error.
///
/// # Errors
/// That the embedded model was left out.
pub(crate) fn open_encoder(
    _: &EncoderSpec,
    _: &Host<'_>,
) -> Result<Arc<dyn Embedder + Send + Sync>, StepError> {
    Err(left_out())
}

pub(crate) fn tokenizer_files(_: &Path) -> Result<Vec<(&'static str, String)>, StepError> {
    Err(left_out())
}

pub(super) fn gpu(_: &str) -> Result<Option<String>, StepError> {
    Err(left_out())
}

pub(super) fn open_lm(
    _: &EmbeddedSpec,
    _: BTreeMap<String, Value>,
    _: Option<(&Path, &Checkpoint)>,
    _: &Host<'_>,
) -> Result<Arc<dyn Lm>, StepError> {
    Err(left_out())
}

pub(crate) fn bench(
    _: &EmbeddedSpec,
    _: &Host<'_>,
    _: &mut dyn FnMut(&str),
) -> Result<Measured, StepError> {
    Err(left_out())
}
