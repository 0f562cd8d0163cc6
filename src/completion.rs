//! What the shell may put in place of a word: steps, runs, step kinds. Asked by the scripts of
//! `flowrun completions`, at each press of the tab key; whatever fails offers nothing.

use std::path::{Path, PathBuf};

use flowrun_cache::CacheReader;
use flowrun_engine::language::project_root;
use flowrun_engine::{LoadOptions, load_pipeline};

use crate::surroundings::{environment, find_pipeline};

/// The environment variable by which a script asks.
pub(crate) const VARIABLE: &str = "FLOWRUN_COMPLETE";

/// Steps of the pipeline that the command line names, or that it would take without a file.
pub(crate) fn steps() -> Vec<String> {
    let words = words();
    let Some(file) = named_pipeline(&words).or_else(|| find_pipeline(&cache_dir(&words)).ok())
    else {
        return Vec::new();
    };
    let options = LoadOptions {
        env: environment(),
        root: Some(project_root(&file)),
        profiles: values(&words, "--profile"),
        ..LoadOptions::default()
    };
    let pipeline = load_pipeline(&file, &flowrun_steps::registry(), &options);
    let steps = pipeline.into_iter().flat_map(|p| p.steps);
    steps.map(|step| step.name.clone()).collect()
}

/// Runs, newest first.
pub(crate) fn runs() -> Vec<String> {
    let runs = CacheReader::open(&cache_dir(&words())).runs();
    let names = runs.iter().filter_map(|dir| dir.file_name());
    names
        .map(|name| name.to_string_lossy().into_owned())
        .collect()
}

/// Step kinds.
pub(crate) fn kinds() -> Vec<String> {
    flowrun_steps::registry().steps.into_keys().collect()
}

/// The words of the line that is completed: the script passes them after `--`.
fn words() -> Vec<String> {
    let words = std::env::args_os().skip_while(|word| word != "--");
    // The program itself is one of them.
    let words = words.skip(2);
    words.map(|w| w.to_string_lossy().into_owned()).collect()
}

/// The first word that is a pipeline's file.
fn named_pipeline(words: &[String]) -> Option<PathBuf> {
    let files = words.iter().map(Path::new);
    let mut pipelines = files.filter(|file| {
        let is_yaml = file.extension().is_some_and(|e| e == "yaml" || e == "yml");
        is_yaml && file.is_file()
    });
    pipelines.next().map(Path::to_owned)
}

/// The values of an option, written `--name value` or `--name=value`.
fn values(words: &[String], name: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        match word.strip_prefix(name).map(|rest| rest.strip_prefix('=')) {
            Some(Some(value)) => found.push(value.to_owned()),
            Some(None) if word == name => found.extend(words.next().cloned()),
            _ => {}
        }
    }
    found
}

fn cache_dir(words: &[String]) -> PathBuf {
    let named = values(words, "--cache-dir").pop().map(PathBuf::from);
    let named = named.or_else(|| std::env::var_os("FLOWRUN_CACHE_DIR").map(PathBuf::from));
    named.unwrap_or_else(|| Path::new(".flowrun").to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_found_in_both_spellings() {
        let line = "run --profile=a --profiles x --profile b --profile";
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        assert_eq!(values(&words, "--profile"), ["a", "b"]);
    }
}
