//! What the shell may put in place of a word: steps, runs, step kinds. Asked by the scripts of
//! `flowrun completions`, at each press of the tab key; whatever fails offers nothing.

use std::path::{Path, PathBuf};

use flowrun_cache::CacheReader;
use flowrun_engine::language::project_root;
use flowrun_engine::{LoadOptions, load_pipeline};

use crate::surroundings::find_pipeline;

/// The environment variable by which a script asks.
pub(crate) const VARIABLE: &str = "FLOWRUN_COMPLETE";

/// Steps of the pipeline that a command without a file would take.
pub(crate) fn steps() -> Vec<String> {
    let Ok(file) = find_pipeline(&cache_dir()) else {
        return Vec::new();
    };
    let options = LoadOptions {
        env: std::env::vars().collect(),
        root: Some(project_root(&file)),
        ..LoadOptions::default()
    };
    let pipeline = load_pipeline(&file, &flowrun_steps::registry(), &options);
    let steps = pipeline.into_iter().flat_map(|p| p.steps);
    steps.map(|step| step.name).collect()
}

/// Runs, newest first.
pub(crate) fn runs() -> Vec<String> {
    let runs = CacheReader::open(&cache_dir()).runs();
    let names = runs.iter().filter_map(|dir| dir.file_name());
    names
        .map(|name| name.to_string_lossy().into_owned())
        .collect()
}

/// Step kinds.
pub(crate) fn kinds() -> Vec<String> {
    flowrun_steps::registry().steps.into_keys().collect()
}

/// The cache folder without its flag, which cannot be seen from here.
fn cache_dir() -> PathBuf {
    let named = std::env::var_os("FLOWRUN_CACHE_DIR").map(PathBuf::from);
    named.unwrap_or_else(|| Path::new(".flowrun").to_owned())
}
