//! The embedded model: weights, tokenizer, the models of Llama's family, LoRA, training and
//! generation.
//!
//! Knows no workflow and no prompting program. Computes on the CPU, training in f32, generation in
//! f32 or on 8-bit weights; with the feature `cuda` and where it is asked for ([`Device`]) both on
//! an NVIDIA GPU, in f32.

mod architecture;
mod base_model;
pub mod bench;
mod chat_template;
mod config;
mod device;
mod embed;
mod error;
mod generate;
mod gguf_header;
#[cfg(feature = "cuda")]
mod gpu;
mod kernels;
mod llama;
pub mod lora;
#[cfg(test)]
mod parity;
mod profile;
#[cfg(test)]
#[path = "../../tests/end_to_end/support/required.rs"]
mod required;
#[cfg(test)]
mod tiny;
mod tokenizer;
pub mod train;
mod weights;

pub use base_model::BaseModel;
pub use chat_template::{ChatMessage, ChatTemplate, TemplateArguments};
pub use config::{
    Activation, LayerParts, Llama3RopeScaling, LlamaConfig, LocalAttention, RopeScaling,
};
pub use device::Device;
pub use embed::SentenceEncoder;
pub use error::ModelError;
pub use generate::{
    Answer, Ask, Batch, ChoiceSet, Finish, GenerateOptions, GenerateRequest, Generated, Generator,
    Piece, Said, TokenProb,
};
pub use llama::Precision;
pub use lora::{LayerNames, LoraAdapter, LoraConfig, LoraPair};
pub use tokenizer::{Tokenizer, files_of_gguf};
pub use weights::{HeadNorms, LayerWeights, LlamaWeights, PostNorms, QkvBias};
