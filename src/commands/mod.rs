//! One file a command.

pub(crate) mod check;
pub(crate) mod completions;
pub(crate) mod graph;
pub(crate) mod plan;
pub(crate) mod run;
pub(crate) mod runs;
pub(crate) mod steps;
