//! [`Checkpoint`]: the `adapter` artifact: a folder that says which state of the student it is,
//! with the PEFT files of its adapter if it has one.

use std::collections::BTreeMap;
use std::path::Path;

use flowrun_cache::Digest;
use flowrun_engine::step::StepError;
use flowrun_lm::lineage::Lineage;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::format_version::FormatVersion;
use crate::rows::{read_json, write_json};

/// The file in the folder.
const FILE: &str = "checkpoint.json";
/// PEFT's file of an adapter's values.
pub(crate) const ADAPTER_VALUES: &str = "adapter_model.safetensors";
/// PEFT's file of an adapter's shape.
pub(crate) const ADAPTER_CONFIG: &str = "adapter_config.json";
/// Digits of a digest that tell checkpoints apart.
const UNIQUE: usize = 12;

/// One state of the student.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Checkpoint {
    /// Version of this format: 2 came with `chat_template_kwargs`.
    #[serde(default, skip_serializing_if = "FormatVersion::is_first")]
    pub version: FormatVersion<2>,
    /// `base`, or `epochs-E-total-trained-steps-S`.
    pub name: String,
    /// Epochs trained, the one under way counted.
    pub epoch: usize,
    /// Steps trained.
    pub step: usize,
    /// What was trained; the base model itself has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<Adapter>,
    /// The id of the model at the provider that trained it and keeps it; there are no files then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hosted: Option<String>,
    /// What the chat template was told in training besides the messages, by name; empty where that
    /// was nothing. Not known when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat_template_kwargs: Option<BTreeMap<String, Value>>,
    /// The rows that it was trained on; not known when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lineage: Option<Lineage>,
}

/// The adapter beside the file, and what it belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adapter {
    /// Digest of its values.
    pub digest: String,
    /// The base model that it was trained on; on another one it means nothing. Its digest, or
    /// its name at its server where it is known by that alone.
    pub base: String,
}

/// What to do about an entry that tells the chat template something else than the training did.
pub(crate) const TOLD_OTHERWISE: &str = "leave `chat_template_kwargs` out of the entry, as a \
                                         checkpoint says what it was trained with; or train with \
                                         what the entry says";

/// What a training told the chat template, in words.
pub(crate) fn trained_with(told: &BTreeMap<String, Value>) -> String {
    match told.is_empty() {
        true => "without `chat_template_kwargs`".to_owned(),
        false => format!("with `chat_template_kwargs: {}`", json!(told)),
    }
}

impl Checkpoint {
    /// The student before any training.
    #[must_use]
    pub fn base() -> Self {
        Self {
            version: FormatVersion,
            name: "base".to_owned(),
            epoch: 0,
            step: 0,
            adapter: None,
            hosted: None,
            chat_template_kwargs: None,
            lineage: Some(Lineage::default()),
        }
    }

    /// The model id in scores and at the server: `base`, or `base:<name>`.
    #[must_use]
    pub fn model_id(&self) -> String {
        match self.step {
            0 => self.name.clone(),
            _ => format!("base:{}", self.name),
        }
    }

    /// The name of a checkpoint: `epochs-E-total-trained-steps-S`.
    #[must_use]
    pub fn name_of(epoch: usize, step: usize) -> String {
        format!("epochs-{epoch}-total-trained-steps-{step}")
    }

    /// A checkpoint whose adapter's files lie in `folder`; the rows that it was trained on, and what
    /// its chat template was told, are not known.
    ///
    /// # Errors
    /// When the adapter's values cannot be read.
    pub(crate) fn of_adapter(
        folder: &Path,
        epoch: usize,
        step: usize,
        base: &str,
    ) -> Result<Self, StepError> {
        let values = folder.join(ADAPTER_VALUES);
        let digest = Digest::of_file(&values).map_err(|e| StepError::io(&values, &e))?;
        Ok(Self {
            version: FormatVersion,
            name: Self::name_of(epoch, step),
            epoch,
            step,
            adapter: Some(Adapter {
                digest: digest.to_hex(),
                base: base.to_owned(),
            }),
            hosted: None,
            chat_template_kwargs: None,
            lineage: None,
        })
    }

    /// What the chat template is told when this checkpoint answers: what it was told in training,
    /// or, where that is not known, `entry`: what the entry of the model `name` says.
    ///
    /// # Errors
    /// Invalid when both are known and are not the same.
    pub fn told(
        &self,
        entry: BTreeMap<String, Value>,
        name: &str,
    ) -> Result<BTreeMap<String, Value>, StepError> {
        match &self.chat_template_kwargs {
            None => Ok(entry),
            Some(trained) if entry.is_empty() || *trained == entry => Ok(trained.clone()),
            Some(trained) => Err(StepError::invalid(format!(
                "the checkpoint `{}` was trained {}, and the entry of `{name}` says \
                 `chat_template_kwargs: {}`",
                self.name,
                trained_with(trained),
                json!(entry)
            ))
            .help(TOLD_OTHERWISE)),
        }
    }

    /// A name that no other values have: the checkpoint's own, with the beginning of the digest.
    #[must_use]
    pub(crate) fn unique_name(&self) -> String {
        let digest = self.adapter.as_ref().map(|adapter| &adapter.digest);
        let digest = digest.and_then(|digest| digest.get(..UNIQUE));
        digest.map_or_else(
            || self.name.clone(),
            |digest| format!("{}-{digest}", self.name),
        )
    }

    /// Reads the folder's file.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn load(folder: &Path) -> Result<Self, StepError> {
        read_json(&folder.join(FILE))
    }

    /// Writes the folder's file; makes the folder.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, folder: &Path) -> Result<(), StepError> {
        std::fs::create_dir_all(folder).map_err(|e| StepError::io(folder, &e))?;
        write_json(&folder.join(FILE), self)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn told(value: Value) -> BTreeMap<String, Value> {
        serde_json::from_value(value).unwrap()
    }

    fn trained(value: Value) -> Checkpoint {
        Checkpoint {
            name: "epochs-1-total-trained-steps-8".to_owned(),
            chat_template_kwargs: serde_json::from_value(value).unwrap(),
            ..Checkpoint::base()
        }
    }

    #[test]
    fn a_checkpoint_is_asked_as_it_was_trained() {
        let quick = || json!({"enable_thinking": false});
        for (in_training, entry, expected) in [
            (quick(), json!({}), quick()),
            (quick(), quick(), quick()),
            (json!({}), json!({}), json!({})),
            // The base model, what another program trained, and what was made before.
            (Value::Null, json!({}), json!({})),
            (Value::Null, quick(), quick()),
        ] {
            let found = trained(in_training).told(told(entry), "m").unwrap();
            assert_eq!(found, told(expected));
        }
    }

    #[test]
    fn an_entry_that_says_something_else_is_refused_with_both() {
        let error = |in_training: Value| {
            let entry = told(json!({"enable_thinking": true}));
            trained(in_training).told(entry, "qwen").unwrap_err()
        };
        let quick = error(json!({"enable_thinking": false}));
        assert_eq!(
            quick.message,
            "the checkpoint `epochs-1-total-trained-steps-8` was trained with \
             `chat_template_kwargs: {\"enable_thinking\":false}`, and the entry of `qwen` says \
             `chat_template_kwargs: {\"enable_thinking\":true}`"
        );
        assert!(quick.help.is_some());
        let plain = error(json!({})).message;
        assert!(
            plain.contains("was trained without `chat_template_kwargs`, and"),
            "{plain}"
        );
    }
}
