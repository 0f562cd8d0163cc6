//! `flowrun bench`: one file a thing to measure; `cost` and `oracle` are what they measure with.

mod cost;
mod engine;
mod model;
mod oracle;
mod rows;
mod serve;

use crate::args::{BenchCommand, GlobalArgs};
use crate::exit::{Exit, Failure};

/// Measures this machine.
pub(crate) fn bench(command: &BenchCommand, global: &GlobalArgs) -> Result<Exit, Failure> {
    match command {
        BenchCommand::Engine(args) => engine::engine(args, global.json),
        BenchCommand::Rows(args) => rows::rows(args, global),
        BenchCommand::Serve(args) => serve::serve(args, global),
        BenchCommand::Model { model } => model::model(model.as_deref(), global),
    }
}
