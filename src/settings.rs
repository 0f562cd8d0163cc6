//! [`lay_under`]: the settings of a project, from the file `.flowrun.yaml`. What the command line
//! or the environment says goes before it.
//!
//! It holds what everybody who works on a project shares, and no secrets.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::args::GlobalArgs;
use crate::exit::{Exit, Failure};

/// Its name, in the folder where flowrun is called or the nearest above that has one.
const NAME: &str = ".flowrun.yaml";
/// The variable that says more than the file about sending.
const READ_ONLY: &str = "FLOWRUN_REMOTE_READ_ONLY";

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    #[serde(default)]
    remote: Option<RemoteSettings>,
}

/// The cache that is shared with other machines.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RemoteSettings {
    /// As `--remote` has it; a folder is relative to the file.
    url: String,
    /// Nothing is sent, unless `FLOWRUN_REMOTE_READ_ONLY=0`.
    #[serde(default)]
    read_only: bool,
}

/// Lays the settings under the options.
///
/// # Errors
/// When the file cannot be read, or says what is not known.
pub(crate) fn lay_under(global: &mut GlobalArgs) -> Result<(), Failure> {
    // Also an empty one: that is how to do without.
    if global.remote.is_some() {
        return Ok(());
    }
    let Ok(here) = std::env::current_dir() else {
        return Ok(());
    };
    let Some((file, text)) = find(&here)? else {
        return Ok(());
    };
    let settings: Option<Settings> = serde_yaml::from_str(&text).map_err(|e| {
        Failure::new(
            Exit::Invalid,
            format!(
                "error: {}: {e}\n  help: it may hold `remote: {{ url: s3://bucket/path, read_only: true }}`\n",
                file.display()
            ),
        )
    })?;
    let Some(remote) = settings.and_then(|settings| settings.remote) else {
        return Ok(());
    };
    let folder = file.parent().unwrap_or(Path::new("."));
    global.remote = Some(match remote.url.is_empty() || remote.url.contains("://") {
        true => remote.url,
        false => folder.join(remote.url).display().to_string(),
    });
    if std::env::var_os(READ_ONLY).is_none() {
        global.remote_read_only |= remote.read_only;
    }
    Ok(())
}

fn find(from: &Path) -> Result<Option<(PathBuf, String)>, Failure> {
    for folder in from.ancestors() {
        let file = folder.join(NAME);
        match std::fs::read_to_string(&file) {
            Ok(text) => return Ok(Some((file, text))),
            // There is none, or a folder above that is not for this user.
            Err(_) if file.metadata().is_err() => {}
            Err(e) => {
                let text = format!("error: {}: {e}\n", file.display());
                return Err(Failure::new(Exit::Invalid, text));
            }
        }
    }
    Ok(None)
}
