//! Supervised fine-tuning of an adapter on rows of tokens.
//!
//! | file | holds |
//! |---|---|
//! | `row`, `config` | what the caller gives |
//! | `trainer`, `hooks`, `state` | the loop, what it reports, what it resumes from |
//! | `order`, `schedule`, `adamw` | which rows when, the learning rate, the update |
//! | `pack` | rows as one matrix without padding, common prefixes once |
//! | `budget` | how much is computed at once |
//! | `activated`, `past` | what comes before an activated adapter's invocation |
//! | `network`, `tape` | forward and backward of the model, and what lies between them |
//! | `linear`, `attention`, `head`, `norm`, `residual`, `rope` | its parts |
//! | `params`, `frozen` | trained and frozen values as plain slices |
//! | `on_gpu` | the same on a GPU, where one is asked for |
//!
//! The arithmetic is in `kernels/`. Knows no text and no prompt. Computes in f32, on the CPU in the
//! current rayon pool. Invariant:
//! equal inputs give an adapter of equal bytes on one kind of machine, also when the training
//! was interrupted and resumed.

mod activated;
mod adamw;
mod attention;
mod budget;
mod config;
mod frozen;
mod head;
mod hooks;
mod linear;
mod network;
mod norm;
#[cfg(feature = "cuda")]
mod on_gpu;
mod order;
mod pack;
mod params;
mod past;
#[cfg(test)]
mod reference;
mod residual;
mod rope;
mod row;
mod schedule;
mod state;
mod tape;
#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) mod tiny;
mod trainer;

pub use config::TrainConfig;
pub use hooks::{EpochStats, EvalStats, Hooks, StepStats};
pub use row::TrainRow;
pub use schedule::Schedule;
pub use state::TrainerState;
#[cfg(test)]
pub(crate) use trainer::gradients;
pub use trainer::{TrainOutcome, Trainer};
