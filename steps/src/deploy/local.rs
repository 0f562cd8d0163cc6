//! The target `local`: the bundle is copied into the project and served until it is stopped.
//!
//! `deployed/<name>/<digest>/bundle` is a deployed bundle, `deployed/<name>/current.json` says
//! which one is served where, and which one was before it: those two are kept. The old server goes
//! on until the new one answers in its place, on the same port if that is fixed.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use flowrun_engine::step::{Cancel, StepError, World};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::server::{Health, Life, Server, health};
use super::versions::{BUNDLE, CURRENT};
use super::{smoke, versions};
use crate::bundle::Bundle;
use crate::folder;
use crate::rows::{read_json, write_json};

/// Hex digits of a digest that name a folder.
const SHORT: usize = 16;
/// How long the old server may take to finish.
const DRAIN: Duration = Duration::from_secs(15);

/// What is served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Current {
    /// Its address.
    pub url: String,
    /// The server's process id.
    pub pid: u32,
    /// Digest of the bundle.
    pub bundle: String,
    /// The bundle's folder.
    pub folder: PathBuf,
    /// The port that was asked for; 0 for any.
    #[serde(default)]
    pub port: u16,
    /// What was served before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<Version>,
}

impl Current {
    /// The latest version that is another than `bundle`: to serve the same bundle again (after a
    /// crash, on another port) leaves the way back as it was.
    fn other_than(self, bundle: &str) -> Option<Version> {
        match self.bundle == bundle {
            true => self.previous,
            false => Some(Version {
                bundle: self.bundle,
                folder: self.folder,
            }),
        }
    }
}

/// A bundle that was deployed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Version {
    /// Its digest.
    pub bundle: String,
    /// Its folder.
    pub folder: PathBuf,
}

/// Where one name's bundles lie.
pub struct Place {
    folder: PathBuf,
}

impl Place {
    /// The place of `name` in the folder where deployed bundles lie.
    #[must_use]
    pub fn new(deployed: &Path, name: &str) -> Self {
        Self {
            folder: deployed.join(name),
        }
    }

    /// The names of what was deployed.
    #[must_use]
    pub fn names(deployed: &Path) -> Vec<String> {
        versions::names(deployed, |name| Self::new(deployed, name).folder)
    }

    /// What was deployed last, and whether it is still served. No state comes twice: a server
    /// that is gone is a state of its own, so deploying again is never taken from the cache.
    pub(super) fn observe(&self) -> Value {
        self.current().map_or(Value::Null, |current| {
            json!({
                "bundle": current.bundle, "pid": current.pid, "up": is_up(&current),
            })
        })
    }

    /// What was deployed last.
    #[must_use]
    pub fn current(&self) -> Option<Current> {
        read_json(&self.folder.join(CURRENT)).ok()
    }

    /// What is served now.
    fn serving(&self) -> Option<Current> {
        self.current().filter(is_up)
    }

    /// Serves the tested bundle in `from` instead of what was served before. A bundle that is
    /// being served already is left alone.
    ///
    /// # Errors
    /// Gate when the server does not come up; what was served before is served still.
    pub(super) fn deploy(
        &self,
        from: &Path,
        digest: &str,
        port: u16,
        world: &World,
        cancel: &Cancel,
    ) -> Result<Current, StepError> {
        if let Some(before) = self.serving()
            && before.bundle == digest
            && (port == 0 || before.url.ends_with(&format!(":{port}")))
        {
            return Ok(before);
        }
        let bundle = self
            .folder
            .join(&digest[..SHORT.min(digest.len())])
            .join(BUNDLE);
        // A copy that is not what was tested is made anew.
        if bundle.is_dir() && super::digest(&bundle)? != digest {
            std::fs::remove_dir_all(&bundle).map_err(|e| StepError::io(&bundle, &e))?;
        }
        if !bundle.is_dir() {
            place(from, &bundle)?;
        }
        let version = Version {
            bundle: digest.to_owned(),
            folder: bundle,
        };
        let current = self.switch(version, port, world, cancel)?;
        self.forget_old(&current);
        Ok(current)
    }

    /// Serves again what was served before, once it has answered its smoke rows as well as it had
    /// to when it was admitted.
    ///
    /// # Errors
    /// Invalid when there is nothing to go back to; gate when it does not answer as evaluated:
    /// what is served now is served still.
    pub fn rollback(&self, world: &World, cancel: &Cancel) -> Result<Current, StepError> {
        let nothing = |why: &str| versions::no_way_back(&self.folder, why);
        let current = self
            .current()
            .ok_or_else(|| nothing("nothing is deployed here"))?;
        let previous = current
            .previous
            .ok_or_else(|| nothing("there is no earlier version"))?;
        let bundle = Bundle::open(&previous.folder)?;
        let scratch = tempfile::tempdir().map_err(|e| StepError::failed(e.to_string()))?;
        let life = Life::OfThisStep;
        let server = Server::start(&previous.folder, 0, scratch.path(), life, world, cancel)?;
        let rows = bundle.smoke_rows()?;
        let agreement = bundle.manifest.agreement;
        smoke::check(&server.endpoint, &rows, agreement, cancel, &|_, _| {})?;
        server.stop();
        self.switch(previous, current.port, world, cancel)
    }

    /// Starts a server of `version`, and stops the one before it.
    fn switch(
        &self,
        version: Version,
        port: u16,
        world: &World,
        cancel: &Cancel,
    ) -> Result<Current, StepError> {
        let before = self.current();
        let serving = before.clone().filter(is_up);
        let logs = version.folder.parent().unwrap_or(&version.folder);
        let server = Server::start(&version.folder, port, logs, Life::OnItsOwn, world, cancel)?;
        let previous = before.and_then(|before| before.other_than(&version.bundle));
        let current = Current {
            url: server.endpoint.url.clone(),
            pid: server.pid(),
            bundle: version.bundle,
            folder: version.folder,
            port,
            previous: previous.filter(|previous| previous.folder.is_dir()),
        };
        if let Err(error) = self.remember(&current) {
            // Nobody would find it again.
            server.stop();
            return Err(error);
        }
        if let Some(before) = serving {
            stop(&before);
        }
        Ok(current)
    }

    /// A reader sees the old state or the new one.
    fn remember(&self, current: &Current) -> Result<(), StepError> {
        let path = self.folder.join(CURRENT);
        let new = path.with_extension("new");
        write_json(&new, current)?;
        std::fs::rename(&new, &path).map_err(|e| StepError::io(&path, &e))
    }

    fn forget_old(&self, current: &Current) {
        let previous = current.previous.as_ref().map(|previous| &previous.folder);
        let kept: Vec<&Path> = [Some(&current.folder), previous]
            .into_iter()
            .flatten()
            .filter_map(|bundle| bundle.parent())
            .collect();
        versions::forget_others(&self.folder, &kept);
    }
}

/// By the word of the server itself: another process may have its port or its id by now.
#[must_use]
pub fn is_up(current: &Current) -> bool {
    let said = health(&current.url);
    said.is_some_and(|Health { bundle, pid }| {
        bundle.as_ref() == Some(&current.bundle) && pid == current.pid
    })
}

/// Copies a bundle; a half-made copy never has the name of a whole one.
fn place(from: &Path, to: &Path) -> Result<(), StepError> {
    let folder = to.parent().unwrap_or(to);
    std::fs::create_dir_all(folder).map_err(|e| StepError::io(folder, &e))?;
    let scratch = tempfile::tempdir_in(folder).map_err(|e| StepError::io(folder, &e))?;
    let whole = scratch.path().join(BUNDLE);
    folder::copy(from, &whole)?;
    std::fs::rename(&whole, to).map_err(|e| StepError::io(to, &e))
}

/// Asks a server to finish, and waits until it did. Only a process that said itself that it is
/// the server gets here.
fn stop(current: &Current) {
    let Ok(pid) = i32::try_from(current.pid) else {
        return;
    };
    let pid = Pid::from_raw(pid);
    // It may have ended since.
    let _ = kill(pid, Signal::SIGTERM);
    let deadline = Instant::now() + DRAIN;
    while Instant::now() < deadline && kill(pid, None).is_ok() {
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_bundle_again_is_no_version_to_go_back_to() {
        let version = |bundle: &str| Version {
            bundle: bundle.to_owned(),
            folder: bundle.into(),
        };
        let current = |bundle: &str, previous: Option<Version>| Current {
            url: "http://127.0.0.1:1".to_owned(),
            pid: 1,
            bundle: bundle.to_owned(),
            folder: bundle.into(),
            port: 0,
            previous,
        };
        assert_eq!(current("a", None).other_than("a"), None);
        assert_eq!(current("a", None).other_than("b"), Some(version("a")));
        let both = current("b", Some(version("a")));
        assert_eq!(both.clone().other_than("b"), Some(version("a")));
        assert_eq!(both.clone().other_than("a"), Some(version("b")));
        assert_eq!(both.other_than("c"), Some(version("b")));
    }
}
