//! End to end, through the real binary on real files.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

mod data;
mod deployed;
mod distil;
mod docs;
mod faults;
mod hostile;
mod killed;
mod project;
mod shell;
