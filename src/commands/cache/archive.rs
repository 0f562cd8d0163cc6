//! `flowrun cache export` and `flowrun cache import`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use flowrun_cache::CacheReader;
use flowrun_cache::archive::{self, ArchiveError, Moved};
use flowrun_engine::retention::{keys_of, parts_of};

use crate::args::GlobalArgs;
use crate::exit::{Exit, Failure};
use crate::output::{self, bytes, count};
use crate::recorded;
use crate::surroundings::{hold_cache, wait};

/// Writes runs with all their results into one file, and what their searches worked out.
pub(super) fn export(file: &Path, runs: &[String], global: &GlobalArgs) -> Result<Exit, Failure> {
    let names: Vec<Option<&str>> = match runs {
        [] => vec![None],
        names => names.iter().map(|name| Some(name.as_str())).collect(),
    };
    let dirs = names
        .into_iter()
        .map(|name| recorded::find_dir(name, global))
        .collect::<Result<BTreeSet<PathBuf>, Failure>>()?;
    let dirs: Vec<PathBuf> = dirs.into_iter().collect();
    let mut keys: BTreeSet<_> = dirs.iter().flat_map(|dir| keys_of(dir)).collect();
    let reader = CacheReader::open(&global.cache_dir);
    keys.extend(parts_of(&reader, dirs.iter().map(PathBuf::as_path)));
    let moved = archive::export(&reader, &dirs, &keys, file).map_err(failure)?;
    told(&moved, "wrote", file, global)
}

/// Reads a file that `export` wrote.
pub(super) fn import(file: &Path, global: &GlobalArgs) -> Result<Exit, Failure> {
    let cache = hold_cache(global, wait(global))?;
    let moved = archive::import(&cache, file).map_err(failure)?;
    told(&moved, "read", file, global)
}

fn told(moved: &Moved, verb: &str, file: &Path, global: &GlobalArgs) -> Result<Exit, Failure> {
    if global.json {
        return output::json(moved);
    }
    output::print(&format!(
        "{verb} {}: run {}; {}, {}, {}\n",
        file.display(),
        moved.runs.join(", "),
        count(moved.results, "result"),
        count(moved.objects, "object"),
        bytes(moved.bytes)
    ))
}

fn failure(error: ArchiveError) -> Failure {
    match error {
        ArchiveError::Cache(error) => error.into(),
        ArchiveError::Io { .. } => Failure::new(Exit::Usage, error.to_string()),
        ArchiveError::Damaged { .. } => Failure::new(Exit::Invalid, format!("error: {error}\n")),
    }
}
