//! What DSPy itself did, compared with what this crate does: prompts byte for byte, answers read,
//! searches call by call, scores, metrics, Python's random numbers, saved programs.
//!
//! The recordings are not part of the source tree. `DSPY_GOLDEN_DIR` names their folder, else
//! `../shared/dspy-golden` beside the workspace is looked at; the recordings that need banking77
//! find `train.csv` through `FLOWRUN_BANKING77`, beside them, or beside the workspace. What is not there is skipped, and
//! said to be.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr)]

mod banking77;
mod fake_lm;
mod prompts;
mod recording;
mod scores;
mod search;
