//! `flowrun bench model`.

use std::path::Path;

use flowrun_engine::step::{Cancel, StepErrorKind};
use flowrun_steps::bench::bench_model;
use flowrun_steps::models::Host;

use crate::args::GlobalArgs;
use crate::exit::{Exit, Failure};
use crate::surroundings;

/// Measures the embedded model.
#[allow(clippy::print_stdout, clippy::print_stderr)]
pub(crate) fn model(file: Option<&Path>, global: &GlobalArgs) -> Result<Exit, Failure> {
    let world = surroundings::world(Path::new("."), global)?;
    let cancel = Cancel::default();
    let host = Host {
        world: &world,
        cancel: &cancel,
        completions: None,
        step: None,
    };
    let mut progress = |what: &str| {
        if !global.quiet && !global.json {
            eprintln!("measuring: {what}");
        }
    };
    let measured = bench_model(file.map(Path::to_path_buf), &host, &mut progress);
    let measured = measured.map_err(|error| {
        let exit = match error.kind {
            StepErrorKind::Invalid => Exit::Usage,
            _ => Exit::Internal,
        };
        let help = error
            .help
            .map_or_else(String::new, |help| format!("; {help}"));
        Failure::new(exit, format!("{}{help}", error.message))
    })?;
    match global.json {
        true => println!("{}", measured.json),
        false => print!("{}", measured.text),
    }
    Ok(Exit::Ok)
}
