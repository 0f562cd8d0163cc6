//! What lies in folders.

use std::path::{Path, PathBuf};
use std::process::Command;

/// All files below a folder, sorted. What goes meanwhile is left out.
pub(crate) fn below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => files.extend(below(&entry.path())),
            Ok(kind) if kind.is_file() => files.push(entry.path()),
            _ => {}
        }
    }
    files.sort();
    files
}

/// The files below a folder that hold a text.
pub(crate) fn holding(folder: &Path, text: &str) -> Vec<String> {
    let grep = Command::new("grep")
        .args(["-rlF", "--devices=skip", "-e", text])
        .arg(folder)
        .output()
        .unwrap();
    let files = String::from_utf8(grep.stdout).unwrap();
    files.lines().map(str::to_owned).collect()
}
