//! [`Checkpoint`]: the `adapter` artifact: a folder that says which state of the student it is,
//! with the PEFT files of its adapter if it has one.

use std::path::Path;

use flowrun_engine::step::StepError;
use flowrun_lm::lineage::Lineage;
use serde::{Deserialize, Serialize};

use crate::rows::{read_json, write_json};

/// The file in the folder.
const FILE: &str = "checkpoint.json";

/// One state of the student.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Checkpoint {
    /// `base`, or `epochs-E-total-trained-steps-S`.
    pub name: String,
    /// Epochs trained.
    pub epoch: usize,
    /// Steps trained.
    pub step: usize,
    /// What was trained; the base model itself has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<Adapter>,
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
    /// Digest of the base model that it was trained on: on another one it means nothing.
    pub base: String,
}

impl Checkpoint {
    /// The student before any training.
    #[must_use]
    pub fn base() -> Self {
        Self {
            name: "base".to_owned(),
            epoch: 0,
            step: 0,
            adapter: None,
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
