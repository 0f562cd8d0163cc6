//! `flowrun cache push` and `flowrun cache pull`.

use std::io::Write;

use flowrun_cache::RemoteCache;
use serde_json::json;

use crate::args::GlobalArgs;
use crate::exit::{Exit, Failure};
use crate::output::{self, bytes, count};
use crate::surroundings::{hold_cache, open_remote, wait};

/// Sends every result and kept answer that the remote cache lacks.
pub(super) fn push(global: &GlobalArgs) -> Result<Exit, Failure> {
    let remote = open(global)?;
    if remote.is_read_only() {
        return Err(Failure::usage("`--remote-read-only` sends nothing"));
    }
    let cache = hold_cache(global, wait(global))?;
    let all = remote.push(&cache);
    remote.push_answers(&cache.completions());
    let sent = remote.flush(&|| false, &mut |now| {
        if console::user_attended_stderr() && !global.quiet {
            say(&format!(
                "{} of {} objects, {} of {}",
                now.objects,
                now.of_objects,
                bytes(now.bytes),
                bytes(now.of_bytes)
            ));
        }
    });
    usable(&remote)?;
    for text in remote.take_warnings() {
        say(&format!("warning: {text}"));
    }
    if global.json {
        return output::json(&sent);
    }
    let others = match sent.results as usize == all {
        true => "",
        false => "; the others were there",
    };
    output::print(&format!(
        "sent {} of {} ({}, {}) to {}{others}\n",
        sent.results,
        count(all, "result"),
        count(sent.objects as usize, "object"),
        bytes(sent.bytes),
        remote.url()
    ))
}

/// Gets every result that is not here.
pub(super) fn pull(global: &GlobalArgs) -> Result<Exit, Failure> {
    let remote = open(global)?;
    let cache = hold_cache(global, wait(global))?;
    let pulled = remote.pull(&cache);
    let answers = pulled
        .is_ok()
        .then(|| cache.completions().take_from(&remote));
    let answers = answers.unwrap_or_default();
    cache.sync()?;
    let (fetched, flawed) = pulled.map_err(|why| unusable(&remote, &why))?;
    for text in remote.take_warnings() {
        say(&format!("warning: {text}"));
    }
    usable(&remote)?;
    if global.json {
        return output::json(&json!({
            "results": fetched, "flawed": flawed, "answers": answers,
        }));
    }
    let flawed = match flawed {
        0 => String::new(),
        n => format!("; {} could not be used", count(n, "other")),
    };
    let answers = match answers {
        0 => String::new(),
        n => format!(" and {}", count(n, "kept answer")),
    };
    output::print(&format!(
        "got {}{answers} from {}{flawed}\n",
        count(fetched, "result"),
        remote.url()
    ))
}

fn open(global: &GlobalArgs) -> Result<RemoteCache, Failure> {
    match open_remote(global) {
        Some(Ok(remote)) => Ok(remote),
        Some(Err(error)) => Err(Failure::usage(error.to_string())),
        None => Err(Failure::usage(
            "name the remote cache with `--remote` or FLOWRUN_REMOTE; `--offline` uses folders only",
        )),
    }
}

/// An error once the remote refused.
fn usable(remote: &RemoteCache) -> Result<(), Failure> {
    match remote.trouble() {
        Some(why) => Err(unusable(remote, &why)),
        None => Ok(()),
    }
}

fn unusable(remote: &RemoteCache, why: &str) -> Failure {
    Failure::new(
        Exit::Cache,
        format!("the remote cache {} cannot be used: {why}", remote.url()),
    )
}

/// A line on stderr, which may be gone: then there is nobody to tell.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
