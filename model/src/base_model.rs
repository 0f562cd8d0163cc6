//! One loaded base model: weights, tokenizer and chat template, shared by trainer and generator.

use std::path::Path;

use crate::chat_template::ChatTemplate;
use crate::error::ModelError;
use crate::tokenizer::Tokenizer;
use crate::weights::{GgufModel, LlamaWeights, SafetensorsModel};

/// A base model, frozen. Share it behind an `Arc`; adapters ride on top of it.
#[derive(Debug)]
pub struct BaseModel {
    /// The weights, dense f32.
    pub weights: LlamaWeights,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat template.
    pub chat: ChatTemplate,
    /// A digest of the weights, given by the caller; names the model in records and adapters.
    pub id: String,
}

impl BaseModel {
    /// Loads a `.gguf` file, or a folder with `config.json`, `*.safetensors`, `tokenizer.json`
    /// and `tokenizer_config.json`. `id` is the caller's digest of it.
    ///
    /// A model without a chat template gets ChatML.
    ///
    /// # Errors
    /// [`ModelError::Io`] or [`ModelError::Format`] naming the file and what it lacks.
    pub fn load(path: &Path, id: &str) -> Result<Self, ModelError> {
        let id = id.to_owned();
        if path.is_dir() {
            let SafetensorsModel {
                weights,
                tokenizer,
                chat,
            } = SafetensorsModel::load(path)?;
            return Ok(Self {
                weights,
                tokenizer,
                chat,
                id,
            });
        }
        let GgufModel {
            weights,
            tokenizer,
            chat,
        } = GgufModel::load(path)?;
        Ok(Self {
            weights,
            tokenizer,
            chat,
            id,
        })
    }
}
