//! Adapters that vLLM does not load. `check` says so of what a pipeline trains; this is for
//! adapters that come from elsewhere, and for bundles that are rendered by hand.
//!
//! Source: vLLM 0.32, `PEFTHelper`.

use flowrun_engine::step::StepError;
use serde_json::Value;

use super::Facts;
use crate::checkpoint::ADAPTER_CONFIG;
use crate::rows::read_json;

/// Settings of PEFT that vLLM refuses unless they are off, and what they are.
const REFUSED: [(&str, &str); 4] = [
    ("alora_invocation_tokens", "an activated adapter"),
    ("use_dora", "DoRA"),
    ("modules_to_save", "whole modules beside the adapter"),
    ("layer_replication", "repeated layers"),
];

impl Facts<'_> {
    /// The adapter, where there is one, is plain LoRA.
    ///
    /// # Errors
    /// Invalid, naming the setting, when it is more.
    pub(super) fn check_plain(&self, target: &str) -> Result<(), StepError> {
        let Some(folder) = self.bundle.adapter()? else {
            return Ok(());
        };
        let config: Value = read_json(&folder.join(ADAPTER_CONFIG))?;
        let refused = REFUSED.iter().find(|(setting, _)| is_on(&config[*setting]));
        let bias = config["bias"].as_str().filter(|bias| *bias != "none");
        let what = match (refused, bias) {
            (Some((setting, what)), _) => format!("`{setting}` ({what})"),
            (None, Some(bias)) => format!("`bias: {bias}` (trained biases)"),
            (None, None) => return Ok(()),
        };
        Err(StepError::invalid(format!(
            "`{target}` runs vLLM, which does not load this adapter: its {ADAPTER_CONFIG} has {what}"
        ))
        .help("train plain LoRA for it, or choose another target"))
    }
}

fn is_on(setting: &Value) -> bool {
    match setting {
        Value::Null => false,
        Value::Bool(on) => *on,
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        Value::Number(_) | Value::String(_) => true,
    }
}
