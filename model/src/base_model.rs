//! One loaded base model: weights, tokenizer and chat template, shared by trainer and generator.

use std::path::Path;
use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor};

use crate::chat_template::ChatTemplate;
use crate::error::ModelError;
use crate::generate::Starts;
use crate::kernels::int8;
use crate::llama::Int8Weights;
use crate::lora::{LayerNames, Module};
use crate::tokenizer::Tokenizer;
use crate::weights::{GgufModel, Keep, LlamaWeights, SafetensorsModel, keep_dense};

/// A base model, frozen. Share it behind an `Arc`; adapters ride on top of it.
#[derive(Debug)]
pub struct BaseModel {
    /// The weights, dense f32; of a model that answers only, the matrices that were rounded are
    /// empty here.
    pub weights: LlamaWeights,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat template.
    pub chat: ChatTemplate,
    /// A digest of the weights, given by the caller; names the model in records and adapters.
    pub id: String,
    /// What the files of its adapters call its layers, where nothing else is said: as they are named
    /// where `transformers` loads the model.
    pub layer_names: LayerNames,
    /// The weights rounded to 8 bits, once a generator asked for them.
    int8: OnceLock<Option<Int8Weights>>,
    /// Some matrices are rounded only.
    answers_only: bool,
    /// What prompts began with.
    pub(crate) starts: Starts,
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
            layer_names: LayerNames::Text,
            int8: OnceLock::new(),
            answers_only: false,
            starts: Starts::default(),
            #[cfg(feature = "cuda")]
            on_gpu: std::sync::Mutex::default(),
        }
    }

    /// Whether some matrices are there in 8 bits only: see [`BaseModel::load_to_answer`].
    pub fn answers_only(&self) -> bool {
        self.answers_only
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
        Self::load_keeping(path, id, &mut keep_dense)
    }

    /// As [`BaseModel::load`], for generators that compute in 8 bits: each matrix is rounded as soon
    /// as it is read, and its f32 values are let go, which are four bytes of each weight of the
    /// layers and of a head that is not the embedding. The answers are the same to the bit. Where
    /// 8 bits are not faster everything is kept.
    ///
    /// # Errors
    /// As [`BaseModel::load`].
    pub fn load_to_answer(path: &Path, id: &str) -> Result<Self, ModelError> {
        if !int8::is_fast() {
            return Self::load(path, id);
        }
        let mut rounded = Int8Weights::default();
        let mut dropped = false;
        let mut keep = |layer: usize, module: Module, matrix: Tensor| -> Result<Tensor, String> {
            let took = rounded.take(layer, module, &matrix);
            match took.map_err(|e| e.to_string())? {
                true => {
                    dropped = true;
                    nothing().map_err(|e| e.to_string())
                }
                false => Ok(matrix),
            }
        };
        let mut base = Self::load_keeping(path, id, &mut keep)?;
        let took = rounded.take_head(&base.weights.head)?;
        if took && !base.weights.config.tied_head {
            base.weights.head = nothing()?;
            dropped = true;
        }
        base.int8 = OnceLock::from(Some(rounded));
        base.answers_only = dropped;
        Ok(base)
    }

    fn load_keeping(path: &Path, id: &str, keep: &mut Keep<'_>) -> Result<Self, ModelError> {
        if path.is_dir() {
            let SafetensorsModel {
                weights,
                tokenizer,
                chat,
            } = SafetensorsModel::load(path, keep)?;
            return Ok(Self::new(weights, tokenizer, chat, id));
        }
        let GgufModel {
            weights,
            tokenizer,
            chat,
            layer_names,
        } = GgufModel::load(path, keep)?;
        let base = Self::new(weights, tokenizer, chat, id);
        Ok(Self {
            layer_names,
            ..base
        })
    }
}

/// What stands in the place of a matrix that is kept rounded.
fn nothing() -> candle_core::Result<Tensor> {
    Tensor::zeros(0usize, DType::F32, &Device::Cpu)
}
