//! The target `local`: the bundle is copied into the project and served until it is stopped.
//!
//! `deployed/<name>/<digest>/bundle` is a deployed bundle, `deployed/<name>/current.json` says
//! which one is served where. The old server goes on until the new one answered the smoke test.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use flowrun_engine::step::{StepContext, StepError, World};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Params;
use super::server::{Health, Life, Server, health};
use crate::folder;
use crate::rows::{read_json, write_json};

const CURRENT: &str = "current.json";
/// Hex digits of a digest that name a folder.
const SHORT: usize = 16;
/// How long the old server may take to finish.
const DRAIN: Duration = Duration::from_secs(15);

/// What is served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Current {
    /// Its address.
    pub(super) url: String,
    /// The server's process id.
    pub(super) pid: u32,
    /// Digest of the bundle.
    pub(super) bundle: String,
    /// The bundle's folder.
    pub(super) folder: PathBuf,
}

/// Where one name's bundles lie.
pub(super) struct Place {
    folder: PathBuf,
}

impl Place {
    pub(super) fn of(params: &Params, world: &World) -> Self {
        Self {
            folder: world.root.join(&params.folder).join(&params.name),
        }
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

    fn current(&self) -> Option<Current> {
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
    /// Gate when the server does not come up: what was served before is then served again.
    pub(super) fn deploy(
        &self,
        from: &Path,
        digest: &str,
        port: u16,
        ctx: &StepContext,
    ) -> Result<Current, StepError> {
        let before = self.serving();
        if let Some(before) = &before
            && before.bundle == digest
            && (port == 0 || before.url.ends_with(&format!(":{port}")))
        {
            return Ok(before.clone());
        }
        let version = self.folder.join(&digest[..SHORT.min(digest.len())]);
        let bundle = version.join("bundle");
        if !bundle.is_dir() {
            place(from, &bundle)?;
        }
        let start = |bundle: &Path, port: u16| {
            let logs = bundle.parent().unwrap_or(bundle);
            Server::start(bundle, port, logs, Life::OnItsOwn, &ctx.world, &ctx.cancel)
        };
        // A port of its own is free only once the old server is gone.
        let at_once = port == 0;
        if let (Some(before), false) = (&before, at_once) {
            stop(before);
        }
        let server = match start(&bundle, port) {
            Ok(server) => server,
            Err(error) => {
                if let (Some(before), false) = (&before, at_once) {
                    let again = start(&before.folder, port)?;
                    self.remember(again, &before.bundle, &before.folder)?;
                }
                return Err(error);
            }
        };
        let current = self.remember(server, digest, &bundle)?;
        if let (Some(before), true) = (&before, at_once) {
            stop(before);
        }
        Ok(current)
    }

    fn remember(&self, server: Server, digest: &str, bundle: &Path) -> Result<Current, StepError> {
        let current = Current {
            url: server.url.clone(),
            pid: server.pid(),
            bundle: digest.to_owned(),
            folder: bundle.to_owned(),
        };
        let path = self.folder.join(CURRENT);
        let new = path.with_extension("new");
        let written = write_json(&new, &current)
            .and_then(|()| std::fs::rename(&new, &path).map_err(|e| StepError::io(&path, &e)));
        match written {
            Ok(()) => Ok(current),
            Err(error) => {
                // Nobody would find it again.
                server.stop();
                Err(error)
            }
        }
    }
}

/// By the word of the server itself: another process may have its port or its id by now.
fn is_up(current: &Current) -> bool {
    let said = health(&current.url);
    said.is_some_and(|Health { bundle, pid }| bundle == current.bundle && pid == current.pid)
}

/// Copies a bundle; a half-made copy never has the name of a whole one.
fn place(from: &Path, to: &Path) -> Result<(), StepError> {
    let folder = to.parent().unwrap_or(to);
    std::fs::create_dir_all(folder).map_err(|e| StepError::io(folder, &e))?;
    let scratch = tempfile::tempdir_in(folder).map_err(|e| StepError::io(folder, &e))?;
    let whole = scratch.path().join("bundle");
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
