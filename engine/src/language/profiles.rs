//! The profiles of a pipeline file, each tried by itself: mistakes that are there only with it.
//!
//! Invariant: what is wrong with the file without a profile is not told again.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::diagnostic::Diagnostic;
use super::node::Node;
use super::source_map::SourceMap;
use super::{LoadOptions, load, load_pipeline, variants};
use crate::finding::Severity;
use crate::vocabulary::Vocabulary;

/// Files with more profiles than this have none of them tried over another.
const FEW: usize = 16;
/// What a profile says of params that the file has not, or has of another type. No profile beneath
/// it can change that.
const CERTAIN: [&str; 2] = ["unknown-param", "param-type"];
/// A variable may be set only where the profile is used.
const NOT_SET: &str = "missing-secret";

/// Something that is wrong, or may be, with one profile laid over the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InProfile {
    /// The profile's name.
    pub profile: String,
    /// What it is; the message names the profile. An error only where it is one with any other
    /// profile beneath this one too.
    pub found: Diagnostic,
}

/// Tries each profile of a file by itself, in place of those of `options`; `plain` is what was
/// found without one. Variables that are not set are not missed. The errors of a profile that
/// has none over one other profile of the file are left out: it is made for that.
#[must_use]
pub fn check_profiles(
    file: &Path,
    vocabulary: &Vocabulary,
    options: &LoadOptions,
    plain: &[Diagnostic],
) -> Vec<InProfile> {
    let names = names(file, vocabulary);
    let known: HashSet<_> = plain.iter().map(mark).collect();
    let tried = |profiles: &[&String]| -> Vec<Diagnostic> {
        let options = LoadOptions {
            profiles: profiles.iter().map(|name| (*name).clone()).collect(),
            ..options.clone()
        };
        let found = match load_pipeline(file, vocabulary, &options) {
            Ok(pipeline) => pipeline.warnings.errors,
            Err(found) => found.errors,
        };
        let new = |found: &Diagnostic| found.code != NOT_SET && !known.contains(&mark(found));
        found.into_iter().filter(new).collect()
    };
    let mut all = Vec::new();
    for name in &names {
        let mut found = tried(&[name]);
        let may_lie_over =
            |other: &String| other != name && !tried(&[other, name]).iter().any(depends);
        if names.len() <= FEW && found.iter().any(depends) && names.iter().any(may_lie_over) {
            found.retain(|found| !depends(found));
        }
        all.extend(found.into_iter().map(|found| named(name, found)));
    }
    all
}

/// The names of the profiles, in the order of the file; none when it cannot be read.
fn names(file: &Path, vocabulary: &Vocabulary) -> Vec<String> {
    let mut map = SourceMap::default();
    let tree = load::load(&mut map, file, &variants(vocabulary));
    let names = |tree: &Node| -> Vec<String> {
        let entries = tree.entries("profiles");
        entries.map(|(name, _)| name.clone()).collect()
    };
    tree.as_ref().map(names).unwrap_or_default()
}

/// What tells one mistake from another.
fn mark(found: &Diagnostic) -> (Severity, PathBuf, usize, &'static str, String) {
    let (file, message) = (found.file.clone(), found.message.clone());
    (found.severity, file, found.offset, found.code, message)
}

/// It is an error with any profile beneath.
fn is_certain(found: &Diagnostic) -> bool {
    found.severity == Severity::Error && CERTAIN.contains(&found.code)
}

/// It is an error by itself, and may be none with a profile beneath.
fn depends(found: &Diagnostic) -> bool {
    found.severity == Severity::Error && !CERTAIN.contains(&found.code)
}

fn named(profile: &str, found: Diagnostic) -> InProfile {
    let (severity, alone) = match is_certain(&found) {
        true => (Severity::Error, ""),
        false => (Severity::Warning, " alone"),
    };
    InProfile {
        profile: profile.to_owned(),
        found: Diagnostic {
            severity,
            message: format!("profile `{profile}`{alone}: {}", found.message),
            ..found
        },
    }
}
