//! Runs in the cache, by what a user calls them.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use flowrun_cache::CacheReader;
use flowrun_engine::record::RunRecord;

use crate::args::GlobalArgs;
use crate::exit::{Exit, Failure};

/// The word for the newest run; `last~1` is the one before it.
const LAST: &str = "last";
/// Ids that a message names.
const NAMED: usize = 5;

/// The folder of a run: the newest without a name; else its id, the beginning or the end of it,
/// `last`, or `last~N`. What lies among the runs and tells of none is passed over by the latter.
pub(crate) fn find_dir(name: Option<&str>, global: &GlobalArgs) -> Result<PathBuf, Failure> {
    let runs = CacheReader::open(&global.cache_dir).runs();
    let name = name.unwrap_or(LAST);
    let found: Vec<&PathBuf> = match back(name) {
        Some(back) => {
            let told = runs.iter().filter(|dir| tells_of_a_run(dir));
            told.skip(back).take(1).collect()
        }
        None => matching(&runs, name),
    };
    match found.as_slice() {
        [one] => Ok((*one).clone()),
        [] => Err(none(name, &runs, global)),
        many => Err(Failure::usage(format!(
            "`{name}` may be {}; say more of the id",
            listed(many)
        ))),
    }
}

/// A run's folder and record.
pub(crate) fn find(
    name: Option<&str>,
    global: &GlobalArgs,
) -> Result<(PathBuf, RunRecord), Failure> {
    let dir = find_dir(name, global)?;
    let record = load(&dir)?;
    Ok((dir, record))
}

/// The record in a run's folder.
pub(crate) fn load(dir: &Path) -> Result<RunRecord, Failure> {
    RunRecord::load(dir).map_err(|e| {
        let text = format!("{}: the run's record cannot be read: {e}", dir.display());
        Failure::new(Exit::Cache, text)
    })
}

/// How many runs back `last` or `last~N` goes.
fn back(name: &str) -> Option<usize> {
    match name.strip_prefix(LAST)? {
        "" => Some(0),
        more => more.strip_prefix('~')?.parse().ok(),
    }
}

/// A record that is there and cannot be read may tell of one: another run is not named in its place.
fn tells_of_a_run(dir: &Path) -> bool {
    match RunRecord::load(dir) {
        Ok(run) => run.has_begun(),
        Err(e) => !matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory),
    }
}

fn matching<'a>(runs: &'a [PathBuf], name: &str) -> Vec<&'a PathBuf> {
    let id = |dir: &Path| {
        dir.file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    };
    let exact = runs.iter().find(|dir| id(dir) == name);
    match exact {
        Some(dir) => vec![dir],
        None if name.is_empty() => Vec::new(),
        None => runs
            .iter()
            .filter(|dir| id(dir).starts_with(name) || id(dir).ends_with(name))
            .collect(),
    }
}

fn none(name: &str, runs: &[PathBuf], global: &GlobalArgs) -> Failure {
    let place = global.cache_dir.display();
    if runs.is_empty() {
        return Failure::usage(format!("{place} holds no run yet"));
    }
    let runs: Vec<&PathBuf> = runs.iter().collect();
    Failure::usage(format!(
        "{place} holds no run `{name}`; the newest are {}",
        listed(&runs)
    ))
}

fn listed(runs: &[&PathBuf]) -> String {
    let ids: Vec<String> = runs
        .iter()
        .take(NAMED)
        .map(|dir| {
            dir.file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    let more = if runs.len() > NAMED { ", …" } else { "" };
    format!("{}{more}", ids.join(", "))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_read_is_not_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let run = |name: &str| dir.path().join(name);
        for name in ["none", "empty", "unreadable"] {
            std::fs::create_dir(run(name)).unwrap();
        }
        std::fs::write(run("file"), "").unwrap();
        std::fs::write(run("empty").join("events.jsonl"), "").unwrap();
        // Whoever runs the tests may read every file.
        std::fs::create_dir(run("unreadable").join("events.jsonl")).unwrap();
        for name in ["absent", "none", "file", "empty"] {
            assert!(!tells_of_a_run(&run(name)), "{name}");
        }
        assert!(tells_of_a_run(&run("unreadable")));
    }

    #[test]
    fn a_run_is_found_by_either_end_of_its_id() {
        let runs = [
            PathBuf::from("r/20260102-000000-bbbb"),
            PathBuf::from("r/20260101-000000-aaaa"),
        ];
        let found = |name| matching(&runs, name).len();
        assert_eq!(found("20260102"), 1);
        assert_eq!(found("aaaa"), 1);
        assert_eq!(found("2026"), 2);
        assert_eq!(found("20260101-000000-aaaa"), 1);
        assert_eq!((found(""), found("zzz")), (0, 0));
        assert_eq!(
            ["last", "last~3", "lasting"].map(back),
            [Some(0), Some(3), None]
        );
    }
}
