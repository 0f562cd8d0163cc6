//! The command line. The only package that prints, reads the environment and exits.

mod address;
mod args;
mod commands;
mod completion;
mod exit;
mod graph;
mod hooks;
mod output;
mod param_docs;
mod recorded;
mod reporter;
mod serve;
mod settings;
mod surroundings;
mod tracking;

use std::io::Write;

use clap::CommandFactory;

use crate::args::{Args, Command, StepCommand};
use crate::exit::{Exit, Failure};

fn main() -> std::process::ExitCode {
    end_with_the_reader();
    clap_complete::CompleteEnv::with_factory(Args::command)
        .var(completion::VARIABLE)
        .complete();
    let args = Args::of_the_command_line();
    let level = if args.global.verbose {
        "flowrun=debug"
    } else {
        "warn"
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("FLOWRUN_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let exit = match dispatch(args) {
        Ok(exit) => exit,
        Err(failure) => failure.show(),
    };
    exit.into()
}

/// `flowrun runs | head -1`: when nobody reads on, there is nothing more to say. What else
/// keeps a stream from being written is told like any other failure.
#[allow(clippy::exit)]
fn end_with_the_reader() {
    let told = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let text = panic.payload().downcast_ref::<String>();
        match text.filter(|t| t.starts_with("failed printing to std")) {
            Some(text) if text.contains("stdout") && text.contains("Broken pipe") => {
                std::process::exit(Exit::Ok as i32)
            }
            Some(text) => {
                let stderr = std::io::stderr();
                // Standard error may be the stream that failed.
                let _ = writeln!(stderr.lock(), "error: {text}");
                std::process::exit(Exit::Internal as i32);
            }
            None => told(panic),
        }
    }));
}

fn dispatch(mut args: Args) -> Result<Exit, Failure> {
    let knows_no_project = matches!(
        args.command,
        Some(
            Command::Step(_)
                | Command::Schema { .. }
                | Command::Completions { .. }
                | Command::Man { .. }
        )
    );
    if !knows_no_project {
        settings::lay_under(&mut args.global)?;
    }
    let global = &args.global;
    match &args.command {
        None => commands::run::run(&args.run, global),
        Some(Command::Check(select)) => commands::check::check(select, global),
        Some(Command::Plan(args)) => commands::plan::plan(args, global),
        Some(Command::Why { step, select }) => commands::why::why(step, select, global),
        Some(Command::Graph(graph)) => commands::graph::graph(graph, global),
        Some(Command::Runs { limit }) => commands::runs::runs(*limit, global),
        Some(Command::Show { run, step }) => {
            commands::show::show(run.as_deref(), step.as_deref(), global)
        }
        Some(Command::Diff { old, new }) => {
            commands::diff::diff(old.as_deref(), new.as_deref(), global)
        }
        Some(Command::Open { run }) => commands::open::open(run.as_deref(), global),
        Some(Command::Lineage { artifact, run }) => {
            commands::lineage::lineage(artifact, run.as_deref(), global)
        }
        Some(Command::Cache(command)) => commands::cache::cache(command, global),
        Some(Command::Init(args)) => commands::init::init(args, global),
        Some(Command::Doctor(args)) => commands::doctor::doctor(args, global),
        Some(Command::Steps { kind }) => commands::steps::steps(kind.as_deref(), global),
        Some(Command::Schema {
            kind,
            events,
            definition,
        }) => commands::schema::schema(kind.as_deref(), *events, *definition),
        Some(Command::Step(StepCommand::Exec { job, through })) => match (job, through) {
            (Some(id), Some(url)) => commands::step::exec_through(url, id),
            (Some(folder), None) => commands::step::exec_job(folder),
            (None, _) => commands::step::exec(),
        },
        Some(Command::Bench { command }) => commands::bench::bench(command, global),
        Some(Command::Serve(args)) => serve::serve(args, global),
        Some(Command::Deploy(command)) => commands::deploy::deploy(command, global),
        Some(Command::Completions { shell }) => commands::completions::completions(*shell),
        Some(Command::Man { dir }) => commands::man::man(dir.as_deref()),
    }
}
