//! Exit codes, and failures with the code they lead to.

use std::io::Write;

use flowrun_cache::CacheError;
use flowrun_engine::run::RunError;
use flowrun_engine::step::{StepError, StepErrorKind};
use flowrun_engine::{Diagnostic, Diagnostics};
use serde_json::{Value, json};

/// How the program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// All is well.
    Ok = 0,
    /// A fault of flowrun, or of the machine.
    Internal = 1,
    /// The command line is wrong (clap uses the same code).
    Usage = 2,
    /// The pipeline or its input is wrong.
    Invalid = 3,
    /// A step failed.
    StepFailed = 4,
    /// A gate was not met.
    Gate = 5,
    /// The cache cannot be used.
    Cache = 6,
    /// Stopped by the user.
    Interrupted = 130,
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Why a command could not do its work.
#[derive(Debug)]
pub(crate) struct Failure {
    exit: Exit,
    text: String,
    locked: bool,
}

impl Failure {
    pub(crate) fn new(exit: Exit, text: impl Into<String>) -> Self {
        Self {
            exit,
            text: text.into(),
            locked: false,
        }
    }

    /// The code that it leads to.
    pub(crate) fn exit(&self) -> Exit {
        self.exit
    }

    /// Another process holds the cache.
    pub(crate) fn is_locked(&self) -> bool {
        self.locked
    }

    pub(crate) fn usage(text: impl Into<String>) -> Self {
        Self::new(Exit::Usage, text)
    }

    /// Prints the failure on stderr and gives its exit code.
    pub(crate) fn show(&self) -> Exit {
        let title = console::style("error").for_stderr().red().bold();
        let mut stderr = std::io::stderr().lock();
        // When nobody reads it, the exit code still tells.
        let _ = match self.exit {
            Exit::Invalid => write!(stderr, "{}", self.text),
            _ => writeln!(stderr, "{title}: {}", self.text),
        };
        self.exit
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl From<CacheError> for Failure {
    fn from(error: CacheError) -> Self {
        Self {
            locked: matches!(error, CacheError::Locked { .. }),
            ..Self::new(Exit::Cache, error.to_string())
        }
    }
}

impl From<RunError> for Failure {
    fn from(error: RunError) -> Self {
        let exit = match &error {
            RunError::Cache(_) | RunError::Record { .. } => Exit::Cache,
            RunError::NoStep { .. } => Exit::Usage,
        };
        Self::new(exit, error.to_string())
    }
}

/// A mistake in a pipeline, or what may be one, with its place.
pub(crate) fn for_programs(found: &Diagnostic) -> Value {
    json!({
        "file": found.file,
        "line": found.line,
        "column": found.column,
        "code": found.code,
        "message": found.message,
        "help": found.help,
    })
}

impl From<Diagnostics> for Failure {
    fn from(found: Diagnostics) -> Self {
        let n = found.errors.len();
        let count = if n == 1 {
            "1 error".to_owned()
        } else {
            format!("{n} errors")
        };
        let text = format!("{found}\n{count}; nothing was run\n");
        Self::new(Exit::Invalid, text)
    }
}

impl From<StepError> for Failure {
    fn from(error: StepError) -> Self {
        let exit = match error.kind {
            StepErrorKind::Invalid => Exit::Invalid,
            StepErrorKind::Gate => Exit::Gate,
            StepErrorKind::Cancelled => Exit::Interrupted,
            _ => Exit::Internal,
        };
        let help = error.help.map(|help| format!("\n  help: {help}"));
        let text = format!("{}{}", error.message, help.unwrap_or_default());
        match exit {
            // Shown as it is.
            Exit::Invalid => Self::new(exit, format!("error: {text}\n")),
            _ => Self::new(exit, text),
        }
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::new(Exit::Internal, error.to_string())
    }
}
