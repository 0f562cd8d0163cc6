//! [`why`]: the reason that an action runs, in words. Planning, running and
//! `flowrun why` all ask here.

use crate::expansion::ActionRequest;
use crate::history::{Earlier, History};
use crate::lookup::Keyed;
use crate::manifest::diff;
use crate::pipeline::CachePolicy;

/// What is known before the history is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    /// The cache has no result under the key.
    NoResult,
    /// It has one, but objects of it are missing or damaged.
    Broken,
    /// The user asked.
    Forced,
}

/// Why an action runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Reason {
    /// One line for each thing that changed: `param `lr`: 0.001 → 0.002`.
    pub(crate) lines: Vec<String>,
    /// The run that it was compared with, where it was compared.
    pub(crate) against: Option<String>,
}

impl Reason {
    fn plain(text: &str) -> Self {
        Self {
            lines: vec![text.to_owned()],
            against: None,
        }
    }

    /// All on one line.
    pub(crate) fn text(&self) -> String {
        self.lines.join("; ")
    }
}

/// Why an action runs, compared with the nearest earlier run that gave a result.
pub(crate) fn why(
    history: &History,
    request: &ActionRequest,
    keyed: &Keyed,
    cause: Cause,
) -> Reason {
    if request.node.cache == CachePolicy::Never {
        return Reason::plain("`cache: never`");
    }
    if cause == Cause::Broken {
        return Reason::plain("an output is missing from the cache or damaged");
    }
    let Some(last) = history.last(&request.id) else {
        return Reason::plain("never ran");
    };
    if last.key == keyed.key {
        let asked = cause == Cause::Forced;
        return Reason::plain(if asked {
            "asked to run again"
        } else {
            "its last run gave no result"
        });
    }
    match history.nearest(&request.id) {
        None => Reason::plain("its last result is no longer in the cache"),
        Some((earlier, _)) if earlier.key == keyed.key => Reason::plain("asked to run again"),
        Some((Earlier { run, .. }, result)) => Reason {
            lines: diff(&result.manifest, &keyed.manifest.to_value()),
            against: run,
        },
    }
}
