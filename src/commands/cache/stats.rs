//! `flowrun cache stats`.

use std::time::Duration;

use flowrun_cache::{Bounds, CacheReader, RemoteCache, Share, Survey};
use flowrun_engine::retention::{Retention, garbage};
use serde::Serialize;

use super::gc::retention;
use crate::args::{GlobalArgs, RetentionArgs};
use crate::exit::{Exit, Failure};
use crate::output::{self, bytes};
use crate::surroundings::remote;

#[derive(Serialize)]
struct Stats {
    #[serde(flatten)]
    survey: Survey,
    total: Share,
    /// Bytes that no kept run needs.
    spare_bytes: u64,
    keep_runs: usize,
    remote: Option<RemoteStats>,
    max_size: Option<u64>,
    max_age_s: Option<u64>,
}

/// The remote cache, without asking it.
#[derive(Serialize)]
struct RemoteStats {
    url: String,
    read_only: bool,
    /// Results that are still to be sent.
    waiting: usize,
}

impl RemoteStats {
    fn of(remote: &RemoteCache) -> Self {
        Self {
            url: remote.url().to_owned(),
            read_only: remote.is_read_only(),
            waiting: remote.waiting(),
        }
    }
}

/// Shows what the cache holds.
pub(super) fn stats(args: &RetentionArgs, global: &GlobalArgs) -> Result<Exit, Failure> {
    let reader = CacheReader::open(&global.cache_dir);
    let survey = Survey::of(reader.dir());
    let kept = retention(args);
    let everything = Retention {
        bounds: Bounds {
            max_size: None,
            max_age: Some(Duration::ZERO),
        },
        ..kept
    };
    let stats = Stats {
        remote: remote(global)?.as_deref().map(RemoteStats::of),
        total: survey.total(),
        survey,
        spare_bytes: garbage(&reader, &everything).bytes,
        keep_runs: kept.keep_runs,
        max_size: kept.bounds.max_size,
        max_age_s: kept.bounds.max_age.map(|age| age.as_secs()),
    };
    if global.json {
        return output::json(&stats);
    }
    output::print(&text(&stats, &global.cache_dir.display().to_string()))
}

fn text(stats: &Stats, place: &str) -> String {
    let survey = &stats.survey;
    let rows = [
        (
            "objects",
            survey.objects,
            "files and folders that steps made or read",
        ),
        ("results", survey.results, "what each action made"),
        (
            "completions",
            survey.completions,
            "answers of language models; own ones are never removed",
        ),
        ("runs", survey.runs, "records, logs, reports"),
        ("partial", survey.partial, "what unfinished steps saved"),
        ("index", survey.index, "built anew when it is lost"),
        ("quarantine", survey.quarantine, "damaged objects"),
        ("other", survey.other, ""),
    ];
    let mut out = format!("{place}\n");
    for (name, share, about) in rows {
        if share.files > 0 {
            let line = format!(
                "  {name:12} {:>8} files {:>10}  {about}",
                share.files,
                bytes(share.bytes)
            );
            out.push_str(&format!("{}\n", line.trim_end()));
        }
    }
    let bound = stats.max_size.map(|max| format!(" of {}", bytes(max)));
    out.push_str(&format!(
        "  {:12} {:>8} files {:>10}{}\n",
        "all",
        stats.total.files,
        bytes(stats.total.bytes),
        bound.unwrap_or_default()
    ));
    out.push_str(&format!(
        "the last {} of each pipeline need all but {}\n",
        output::count(stats.keep_runs, "run"),
        bytes(stats.spare_bytes)
    ));
    if let Some(remote) = &stats.remote {
        let how = match (remote.read_only, remote.waiting) {
            (true, _) => "; nothing is sent there".to_owned(),
            (false, 0) => String::new(),
            (false, n) => format!("; {} to be sent", output::count(n, "result")),
        };
        out.push_str(&format!("remote {}{how}\n", remote.url));
    }
    out
}
