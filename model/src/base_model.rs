//! One loaded base model: weights, tokenizer and chat template, shared by trainer and generator.

use std::path::Path;
use std::sync::OnceLock;

use crate::chat_template::ChatTemplate;
use crate::error::ModelError;
use crate::llama::Int8Weights;
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
    /// The weights rounded to 8 bits, once a generator asked for them.
    int8: OnceLock<Option<Int8Weights>>,
    /// The weights on a GPU, once something was asked for there.
    #[cfg(feature = "cuda")]
    on_gpu: std::sync::Mutex<Option<std::sync::Arc<crate::gpu::GpuModel>>>,
}

impl BaseModel {
    /// Puts the parts together.
    pub fn new(weights: LlamaWeights, tokenizer: Tokenizer, chat: ChatTemplate, id: &str) -> Self {
        Self {
            weights,
            tokenizer,
            chat,
            id: id.to_owned(),
            int8: OnceLock::new(),
            #[cfg(feature = "cuda")]
            on_gpu: std::sync::Mutex::default(),
        }
    }

    /// The weights on `gpu`, which all that computes there share.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_gpu(
        &self,
        gpu: &crate::gpu::Gpu,
    ) -> Result<std::sync::Arc<crate::gpu::GpuModel>, ModelError> {
        use std::sync::{Arc, PoisonError};
        // Held while copying: whoever else wants them waits.
        let mut held = self.on_gpu.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(model) = held.as_ref().filter(|model| model.gpu == *gpu) {
            return Ok(Arc::clone(model));
        }
        let model = Arc::new(crate::gpu::GpuModel::new(gpu, &self.weights)?);
        *held = Some(Arc::clone(&model));
        Ok(model)
    }

    /// The weights rounded to 8 bits; `None` where that would not be faster.
    pub(crate) fn int8(&self) -> Result<Option<&Int8Weights>, ModelError> {
        if self.int8.get().is_none() {
            // Two callers at once do the work twice, with one result.
            let _ = self.int8.set(Int8Weights::new(&self.weights)?);
        }
        Ok(self.int8.get().and_then(Option::as_ref))
    }

    /// Loads a `.gguf` file, or a folder with `config.json`, `*.safetensors`, `tokenizer.json`
    /// and `tokenizer_config.json`. `id` is the caller's digest of it.
    ///
    /// A model without a chat template gets ChatML.
    ///
    /// # Errors
    /// [`ModelError::Io`] or [`ModelError::Format`] naming the file and what it lacks.
    pub fn load(path: &Path, id: &str) -> Result<Self, ModelError> {
        if path.is_dir() {
            let SafetensorsModel {
                weights,
                tokenizer,
                chat,
            } = SafetensorsModel::load(path)?;
            return Ok(Self::new(weights, tokenizer, chat, id));
        }
        let GgufModel {
            weights,
            tokenizer,
            chat,
        } = GgufModel::load(path)?;
        Ok(Self::new(weights, tokenizer, chat, id))
    }
}
