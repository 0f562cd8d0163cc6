//! Copies of files and folders.

use std::path::Path;

use flowrun_engine::step::StepError;

/// Copies a file, or a folder with all that is in it; makes the folders that `to` lies in.
///
/// # Errors
/// When something cannot be read or written; the message names it.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<(), StepError> {
    let make =
        |folder: &Path| std::fs::create_dir_all(folder).map_err(|e| StepError::io(folder, &e));
    if !from.is_dir() {
        make(to.parent().unwrap_or(to))?;
        std::fs::copy(from, to).map_err(|e| StepError::io(from, &e))?;
        return Ok(());
    }
    make(to)?;
    let entries = std::fs::read_dir(from).map_err(|e| StepError::io(from, &e))?;
    for entry in entries {
        let entry = entry.map_err(|e| StepError::io(from, &e))?;
        copy(&entry.path(), &to.join(entry.file_name()))?;
    }
    Ok(())
}

/// Copies a folder so that whoever looks sees all of it or nothing. One that is there stays.
///
/// # Errors
/// As [`copy`].
pub(crate) fn copy_whole(from: &Path, to: &Path) -> Result<(), StepError> {
    if to.is_dir() {
        return Ok(());
    }
    let parent = to.parent().unwrap_or(to);
    std::fs::create_dir_all(parent).map_err(|e| StepError::io(parent, &e))?;
    let part = tempfile::Builder::new()
        .prefix(".part-")
        .tempdir_in(parent)
        .map_err(|e| StepError::io(parent, &e))?;
    let whole = part.path().join("whole");
    copy(from, &whole)?;
    match std::fs::rename(&whole, to) {
        // Another was quicker.
        Err(_) if to.is_dir() => Ok(()),
        renamed => renamed.map_err(|e| StepError::io(to, &e)),
    }
}
