//! Programs that a machine may lack.

use std::path::PathBuf;

use crate::skip::skip;

/// The program that an environment variable names. Where it names none, that the test is skipped
/// is said on stderr.
pub(crate) fn named(variable: &str, what: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).filter(|path| !path.is_empty());
    if path.is_none() {
        skip(&format!("{variable} names no {what}"));
    }
    path.map(PathBuf::from)
}
