//! The embedded model: weights, tokenizer, Llama, LoRA, training and generation.
//!
//! Knows no workflow and no prompting program. Everything computes in f32 on the CPU.

mod base_model;
mod chat_template;
mod config;
mod embed;
mod error;
mod generate;
mod kernels;
mod llama;
pub mod lora;
#[cfg(test)]
mod tiny;
mod tokenizer;
pub mod train;
mod weights;

pub use base_model::BaseModel;
pub use chat_template::{ChatMessage, ChatTemplate};
pub use config::{Llama3RopeScaling, LlamaConfig};
pub use embed::SentenceEncoder;
pub use error::ModelError;
pub use generate::{
    Answer, ChoiceSet, Finish, GenerateOptions, GenerateRequest, Generated, Generator,
};
pub use lora::{LoraAdapter, LoraConfig, LoraPair};
pub use tokenizer::Tokenizer;
pub use weights::{LayerWeights, LlamaWeights};
