//! `flowrun bench`: one file a thing to measure.

mod engine;
mod model;
mod serve;

use crate::args::{BenchCommand, GlobalArgs};
use crate::exit::{Exit, Failure};

/// Measures this machine.
pub(crate) fn bench(command: &BenchCommand, global: &GlobalArgs) -> Result<Exit, Failure> {
    match command {
        BenchCommand::Engine(args) => engine::engine(args, global.json),
        BenchCommand::Serve(args) => serve::serve(args, global),
        BenchCommand::Model { model } => model::model(model.as_deref(), global),
    }
}
