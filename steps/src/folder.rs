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
