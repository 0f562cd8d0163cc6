//! Deployed versions as they lie in a project: a folder for each, with its bundle, and beside them
//! [`CURRENT`], which says which one is served. Knows no target.

use std::path::{Path, PathBuf};

use flowrun_engine::step::StepError;

/// Says what is served.
pub(super) const CURRENT: &str = "current.json";
/// Where its bundle lies in the folder of a version.
pub(super) const BUNDLE: &str = "bundle";

/// The names of what was deployed. `folder_of` says where a name's versions lie.
pub(super) fn names(deployed: &Path, folder_of: impl Fn(&str) -> PathBuf) -> Vec<String> {
    let entries = std::fs::read_dir(deployed).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = names
        .filter(|name| folder_of(name).join(CURRENT).is_file())
        .collect();
    names.sort();
    names
}

/// Removes the versions in `folder` that nothing leads back to: all but those that are `kept`.
pub(super) fn forget_others(folder: &Path, kept: &[&Path]) {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    for path in entries.map(|entry| entry.path()) {
        if path.join(BUNDLE).is_dir() && !kept.contains(&path.as_path()) {
            // Left over, it only takes room.
            let _ = std::fs::remove_dir_all(&path);
        }
    }
}

/// There is no version to go back to in `folder`: why.
pub(super) fn no_way_back(folder: &Path, why: &str) -> StepError {
    StepError::invalid(format!("{}: {why}", folder.display()))
        .help("`flowrun deploy status` lists what is deployed")
}
