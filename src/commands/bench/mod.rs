//! `flowrun bench`: one file a thing to measure.

mod model;

use crate::args::{BenchCommand, GlobalArgs};
use crate::exit::{Exit, Failure};

/// Measures this machine.
pub(crate) fn bench(command: &BenchCommand, global: &GlobalArgs) -> Result<Exit, Failure> {
    match command {
        BenchCommand::Model { model } => model::model(model.as_deref(), global),
    }
}
