//! The step kinds that a pipeline may use.
