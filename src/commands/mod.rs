//! One file a command.

pub(crate) mod bench;
pub(crate) mod cache;
pub(crate) mod check;
pub(crate) mod completions;
pub(crate) mod deploy;
pub(crate) mod diff;
pub(crate) mod doctor;
pub(crate) mod graph;
pub(crate) mod init;
pub(crate) mod lineage;
pub(crate) mod man;
pub(crate) mod open;
pub(crate) mod plan;
pub(crate) mod run;
pub(crate) mod runs;
pub(crate) mod schema;
pub(crate) mod show;
pub(crate) mod step;
pub(crate) mod steps;
pub(crate) mod why;
