//! [`lay_under`]: the settings of a project, from the file `.flowrun.yaml`. What the command line
//! or the environment says goes before it.
//!
//! It holds what everybody who works on a project shares, and no secrets. Results of a remote are
//! believed, so only a file counts that belongs to the user (or to root): anybody may leave one in
//! a folder above, such as `/tmp`.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
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
    tracing::debug!("the remote cache is the one of {}", file.display());
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
        // There is none, or a folder above that is not for this user.
        let Ok(link) = file.symlink_metadata() else {
            continue;
        };
        match own_text(&file, link.uid()) {
            Ok(Ok(text)) => return Ok(Some((file, text))),
            Ok(Err(owner)) => warn(&file, owner),
            // A link to nothing.
            Err(_) if file.metadata().is_err() => {}
            Err(e) => {
                let text = format!("error: {}: {e}\n", file.display());
                return Err(Failure::new(Exit::Invalid, text));
            }
        }
    }
    Ok(None)
}

/// The text of a file, or whose it is when it is not to be believed; `link` is the owner of its
/// name, which may be a link. The one of another user is not even opened: it may be a pipe.
fn own_text(file: &Path, link: u32) -> std::io::Result<Result<String, u32>> {
    if !is_believed(link) {
        return Ok(Err(link));
    }
    let owner = file.metadata()?.uid();
    if !is_believed(owner) {
        return Ok(Err(owner));
    }
    let mut open = File::open(file)?;
    // It may be another file by now.
    let owner = open.metadata()?.uid();
    if !is_believed(owner) {
        return Ok(Err(owner));
    }
    let mut text = String::new();
    open.read_to_string(&mut text)?;
    Ok(Ok(text))
}

/// Whether what this user wrote counts.
fn is_believed(owner: u32) -> bool {
    owner == 0 || owner == nix::unistd::geteuid().as_raw()
}

#[allow(clippy::print_stderr)]
fn warn(file: &Path, owner: u32) {
    eprintln!(
        "warning: {file} is not used: it belongs to another user ({owner}); if you trust it, make it yours (`chown $(id -u) {file}`), or name the remote with `--remote` or FLOWRUN_REMOTE",
        file = file.display()
    );
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_user_and_of_root_count() {
        let own = nix::unistd::geteuid().as_raw();
        assert!(is_believed(own) && is_believed(0));
        assert!(!is_believed(own + 1));
    }

    #[test]
    #[allow(clippy::print_stderr)]
    fn a_file_of_another_user_is_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let below = dir.path().join("below");
        std::fs::create_dir(&below).unwrap();
        let (above, near) = (dir.path().join(NAME), below.join(NAME));
        std::fs::write(&above, "above").unwrap();
        std::os::unix::fs::symlink(dir.path().join("nothing"), &near).unwrap();
        let found = |from: &Path| find(from).map_err(|_| "a failure").unwrap();
        assert_eq!(found(&below), Some((above.clone(), "above".to_owned())));
        std::fs::remove_file(&near).unwrap();
        std::fs::write(&near, "near").unwrap();
        assert_eq!(found(&below), Some((near.clone(), "near".to_owned())));
        if !nix::unistd::geteuid().is_root() {
            eprintln!("only root can give a file away: the rest is left out");
            return;
        }
        std::os::unix::fs::chown(&near, Some(12345), None).unwrap();
        assert_eq!(found(&below), Some((above.clone(), "above".to_owned())));
        // A link to a file of one's own that another user made.
        let link = below.join("link");
        std::fs::rename(&near, below.join("other")).unwrap();
        std::os::unix::fs::symlink(&above, &link).unwrap();
        std::os::unix::fs::lchown(&link, Some(12345), None).unwrap();
        std::fs::rename(&link, &near).unwrap();
        let passed = own_text(&near, near.symlink_metadata().unwrap().uid()).unwrap();
        assert_eq!(passed, Err(12345));
    }
}
