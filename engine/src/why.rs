//! [`why`]: the reason that an action runs, in words. Planning, running and
//! `flowrun why` all ask here.

use flowrun_cache::{ActionKey, Removal, Remover};

use crate::expansion::ActionRequest;
use crate::history::{Earlier, History};
use crate::lookup::Keyed;
use crate::manifest::diff;
use crate::pipeline::CachePolicy;
use crate::record::timestamp;

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

/// What no result is taken for.
const NEVER_REUSED: &str = "`cache: never`";
/// No record tells of it.
const NEVER_RAN: &str = "never ran";
/// The user wants it, and nothing else asks for it.
const ASKED: &str = "asked to run again";
/// Nobody knows why a result is gone.
const LOST: &str = "its last result is no longer in the cache";

/// `its last result was removed from the cache by `flowrun cache gc` at …`.
fn told(removal: &Removal) -> String {
    let by = match removal.by {
        Remover::Collection => "by `flowrun cache gc`",
        Remover::Run => "for its bounds, when a run ended,",
        Remover::Repair => "by `flowrun cache repair`",
    };
    let at = timestamp(removal.at);
    format!("its last result was removed from the cache {by} at {at}")
}

/// Why an action runs whatever its key is, when that cannot be known; `None` when it may not run.
pub(crate) fn why_anyway(
    history: &History,
    request: &ActionRequest,
    forced: bool,
) -> Option<Reason> {
    if request.node.cache == CachePolicy::Never {
        return Some(Reason::plain(NEVER_REUSED));
    }
    let ran = || history.last(&request.id).is_some();
    forced.then(|| Reason::plain(if ran() { ASKED } else { NEVER_RAN }))
}

/// Why an action runs, compared with the nearest earlier run that gave a result.
pub(crate) fn why(
    history: &History,
    request: &ActionRequest,
    keyed: &Keyed,
    cause: Cause,
) -> Reason {
    if request.node.cache == CachePolicy::Never {
        return Reason::plain(NEVER_REUSED);
    }
    if cause == Cause::Broken {
        return Reason::plain("an output is missing from the cache or damaged");
    }
    let gone = |key: &ActionKey| {
        let removal = history.removal(key);
        removal.map(|removal| Reason::plain(&told(&removal)))
    };
    let Some(last) = history.last(&request.id) else {
        // Its runs' records may be gone too.
        return gone(&keyed.key).unwrap_or_else(|| Reason::plain(NEVER_RAN));
    };
    let lost = || gone(&last.key).unwrap_or_else(|| Reason::plain(LOST));
    if last.key == keyed.key {
        return match (cause, last.had_result) {
            (Cause::Forced, _) => Reason::plain(ASKED),
            (_, true) => lost(),
            (_, false) => Reason::plain("its last run gave no result"),
        };
    }
    match history.nearest(&request.id) {
        None => lost(),
        Some((earlier, _)) if earlier.key == keyed.key => Reason::plain(ASKED),
        Some((Earlier { run, .. }, result)) => Reason {
            lines: diff(&result.manifest, &keyed.manifest.to_value()),
            against: run,
        },
    }
}
