//! Gates (`expect:`): what the metrics of a result must be before it is published. Planning and
//! running share it.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::expansion::Expressions;
use crate::pipeline::StepNode;
use crate::step::{StepError, StepErrorKind};

/// Whether a result of the step with these metrics may be published.
///
/// # Errors
/// With the kind [`StepErrorKind::Gate`] when a gate is not met; invalid when one cannot be evaluated.
pub(crate) fn check(
    node: &StepNode,
    metrics: &BTreeMap<String, Value>,
    expressions: &Expressions,
) -> Result<(), StepError> {
    if node.expect.is_empty() {
        return Ok(());
    }
    let context = Value::Object(metrics.clone().into_iter().collect());
    for gate in &node.expect {
        let met = (expressions.eval_bool)(gate, &context)
            .map_err(|e| StepError::invalid(format!("`expect: {gate}`: {e}")))?;
        if !met {
            let text = format!("the gate `{gate}` was not met: the metrics are {context}");
            return Err(StepError::new(StepErrorKind::Gate, text));
        }
    }
    Ok(())
}
