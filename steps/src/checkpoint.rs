//! [`Checkpoint`]: the `adapter` artifact: a folder that says which state of the student it is,
//! with the PEFT files of its adapter if it has one.

use std::path::Path;

use flowrun_cache::Digest;
use flowrun_engine::step::StepError;
use flowrun_lm::lineage::Lineage;
use serde::{Deserialize, Serialize};

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
    /// Version of this format.
    #[serde(default, skip_serializing_if = "FormatVersion::is_first")]
    pub version: FormatVersion<1>,
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

    /// A checkpoint whose adapter's files lie in `folder`; the rows that it was trained on are
    /// not known.
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
            lineage: None,
        })
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
