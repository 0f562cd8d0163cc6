//! The cache's own lock: a `flock` that the system releases when its holder
//! ends, and a note of who holds it, for the message. Whether it holds for other
//! machines that see the folder depends on its file system: [`crate::filesystem`].

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::error::CacheError;

/// What to do when another process holds the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockWait {
    /// Wait until it is free.
    Wait,
    /// Fail at once.
    NoWait,
}

#[derive(Serialize, Deserialize)]
struct Holder {
    pid: u32,
    command: String,
    /// Its machine.
    #[serde(default)]
    host: String,
}

/// Held until dropped.
#[derive(Debug)]
pub(crate) struct Lock(#[allow(dead_code, reason = "holds the flock")] File);

/// Takes the lock. `on_wait` hears who holds it before a wait begins.
pub(crate) fn lock(
    path: &Path,
    wait: LockWait,
    command: &str,
    on_wait: Option<&dyn Fn(&str)>,
) -> Result<Lock, CacheError> {
    let fail = |e| CacheError::io(path, e);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(fail)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::Error(error)) => return Err(unlockable(path, error)),
        Err(TryLockError::WouldBlock) => {
            let holder = describe(&mut file);
            if wait == LockWait::NoWait {
                return Err(CacheError::Locked { holder });
            }
            if let Some(on_wait) = on_wait {
                on_wait(&holder);
            }
            file.lock().map_err(|e| unlockable(path, e))?;
        }
    }
    let holder = Holder {
        pid: std::process::id(),
        command: command.into(),
        host: host(),
    };
    let note = serde_json::to_vec(&holder).unwrap_or_default();
    file.set_len(0)
        .and_then(|()| file.seek(SeekFrom::Start(0)))
        .and_then(|_| file.write_all(&note))
        .map_err(fail)?;
    Ok(Lock(file))
}

/// The name of this machine; empty where the system does not tell.
fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname");
    name.unwrap_or_default().trim().to_owned()
}

fn unlockable(path: &Path, source: std::io::Error) -> CacheError {
    let none = [Errno::ENOSYS, Errno::EOPNOTSUPP, Errno::ENOLCK];
    let code = source.raw_os_error();
    match none.into_iter().any(|errno| code == Some(errno as i32)) {
        true => CacheError::Unlockable {
            path: path.to_owned(),
            source,
        },
        false => CacheError::io(path, source),
    }
}

fn describe(file: &mut File) -> String {
    let mut text = String::new();
    let read = file
        .seek(SeekFrom::Start(0))
        .and_then(|_| file.read_to_string(&mut text));
    match read
        .ok()
        .and_then(|_| serde_json::from_str::<Holder>(&text).ok())
    {
        Some(holder) if holder.host.is_empty() || holder.host == host() => {
            format!("process {} (`{}`)", holder.pid, holder.command)
        }
        Some(holder) => format!(
            "process {} of {} (`{}`)",
            holder.pid, holder.host, holder.command
        ),
        None => "another process".into(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_holder_of_another_machine_is_named_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let note = |text: &str| {
            let path = dir.path().join("note");
            std::fs::write(&path, text).unwrap();
            describe(&mut File::open(path).unwrap())
        };
        let other = note(r#"{"pid": 7, "command": "c", "host": "no such machine"}"#);
        assert_eq!(other, "process 7 of no such machine (`c`)");
        let older = note(r#"{"pid": 7, "command": "c"}"#);
        assert_eq!(older, "process 7 (`c`)");
    }

    #[test]
    fn a_file_system_without_locks_is_told_from_one_that_fails() {
        let error = |code: Errno| {
            let source = std::io::Error::from_raw_os_error(code as i32);
            unlockable(Path::new("/c/lock"), source)
        };
        for code in [Errno::ENOSYS, Errno::EOPNOTSUPP, Errno::ENOLCK] {
            let error = error(code);
            assert!(matches!(error, CacheError::Unlockable { .. }), "{error}");
        }
        assert!(matches!(error(Errno::EIO), CacheError::Io { .. }));
    }

    #[test]
    fn a_second_holder_fails_or_waits_and_hears_of_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let first = lock(&path, LockWait::NoWait, "flowrun a.yaml", None).unwrap();
        let error = lock(&path, LockWait::NoWait, "b", None)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("flowrun a.yaml") && error.contains("process"),
            "{error}"
        );
        let (heard, hears) = mpsc::channel();
        let waiter = std::thread::spawn({
            let path = path.clone();
            move || {
                let tell = |who: &str| heard.send(who.to_owned()).unwrap();
                lock(&path, LockWait::Wait, "b", Some(&tell)).map(drop)
            }
        });
        assert!(hears.recv().unwrap().contains("flowrun a.yaml"));
        drop(first);
        waiter.join().unwrap().unwrap();
    }
}
