//! [`why`]: the reason that an action runs, in words. Planning, running and
//! `flowrun why` all ask here.

use crate::expansion::ActionRequest;
use crate::history::History;
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

/// Why an action runs, for example `param `lr`: 0.001 → 0.002`.
pub(crate) fn why(
    history: &History,
    request: &ActionRequest,
    keyed: &Keyed,
    cause: Cause,
) -> String {
    if request.node.cache == CachePolicy::Never {
        return "`cache: never`".to_owned();
    }
    if cause == Cause::Broken {
        return "an output is missing from the cache or damaged".to_owned();
    }
    let last = history.last(&request.id);
    if let Some((key, _)) = &last
        && *key == keyed.key
        && cause == Cause::Forced
    {
        return "asked to run again".to_owned();
    }
    match last {
        None => "never ran".to_owned(),
        Some((key, _)) if key == keyed.key => "its last run gave no result".to_owned(),
        Some((_, None)) => "its last result is no longer in the cache".to_owned(),
        Some((_, Some(last))) => diff(&last.manifest, &keyed.manifest.to_value()).join("; "),
    }
}
