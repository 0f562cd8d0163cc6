//! Programs that a machine may lack.

use std::path::PathBuf;

/// The program that an environment variable names. Where it names none, that the test is skipped
/// is said on stderr.
#[allow(clippy::print_stderr)]
pub(crate) fn named(variable: &str, what: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).filter(|path| !path.is_empty());
    if path.is_none() {
        eprintln!("skipped: {variable} names no {what}");
    }
    path.map(PathBuf::from)
}
