//! A file system that is small, full or read-only.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::required::skip;

/// A small file system of its own; none without the right to mount.
pub(crate) struct Mount(PathBuf);

impl Mount {
    pub(crate) fn tmpfs(at: &Path, options: &str) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "flowrun-test"])
            .arg(at)
            .stderr(Stdio::null())
            .status();
        let mounted = status.is_ok_and(|s| s.success());
        if !mounted {
            skip("mount", "there is no right to mount a file system here");
        }
        mounted.then(|| Self(at.to_owned()))
    }

    pub(crate) fn remount(&self, options: &str) {
        let status = Command::new("mount")
            .args(["-o", &format!("remount,{options}")])
            .arg(&self.0)
            .status();
        assert!(status.unwrap().success());
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
