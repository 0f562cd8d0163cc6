//! YAML to DAG to plan to run to record.

pub mod event;
pub mod pipeline;
pub mod step;
pub mod vocabulary;
