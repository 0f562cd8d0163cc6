//! `flowrun cache gc`.

use flowrun_cache::{Bounds, CacheReader, Garbage};
use flowrun_engine::retention::{Retention, collect, garbage};
use serde_json::json;

use crate::args::{GlobalArgs, RetentionArgs};
use crate::exit::{Exit, Failure};
use crate::output::{self, bytes, count};
use crate::surroundings::{hold_cache, wait};

/// What the flags ask to keep.
pub(crate) fn retention(args: &RetentionArgs) -> Retention {
    Retention {
        keep_runs: args.keep_runs,
        bounds: Bounds {
            max_size: args.max_size.0,
            max_age: args.max_age.0,
        },
    }
}

/// Removes what no kept run needs, as far as the bounds ask.
pub(super) fn gc(
    args: &RetentionArgs,
    dry_run: bool,
    global: &GlobalArgs,
) -> Result<Exit, Failure> {
    let kept = retention(args);
    let found = if dry_run {
        garbage(&CacheReader::open(&global.cache_dir), &kept)
    } else {
        collect(&hold_cache(global, wait(global))?, &kept)?
    };
    if global.json {
        return output::json(&json!({
            "dry_run": dry_run,
            "results": found.results(),
            "objects": found.objects(),
            "runs": found.runs(),
            "bytes": found.bytes,
            "left_bytes": found.left,
        }));
    }
    let mut text = match (found.is_empty(), dry_run) {
        (true, _) => format!("nothing to remove; the cache holds {}\n", bytes(found.left)),
        (false, true) => format!("would remove {}\n", removed(&found)),
        (false, false) => format!("removed {}\n", removed(&found)),
    };
    if kept
        .bounds
        .max_size
        .is_some_and(|max| found.left > max && max > 0)
    {
        text.push_str(&format!(
            "the rest is needed by the last {} of each pipeline; a lower `--keep-runs` lets more go\n",
            count(kept.keep_runs, "run")
        ));
    }
    output::print(&text)
}

/// What goes, in words.
pub(crate) fn removed(found: &Garbage) -> String {
    format!(
        "{} and {}, {}; {} left",
        count(found.results(), "result"),
        count(found.runs(), "run record"),
        bytes(found.bytes),
        bytes(found.left)
    )
}
