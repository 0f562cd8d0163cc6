//! Prompting programs: signatures, adapters, programs, metrics, evaluation, optimizers, and the
//! language-model client.

pub mod adapter;
pub mod calibration;
pub mod classifier;
pub mod client;
pub mod evaluate;
pub mod example;
pub mod field_type;
pub mod lineage;
mod literal;
pub mod lm;
pub mod messages;
pub mod metric;
pub mod optimize;
pub mod program;
pub mod python_random;
pub mod python_text;
pub mod signature;
pub mod stats;
#[cfg(test)]
mod testing;
pub mod value;
