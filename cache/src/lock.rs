//! The cache's own lock: a `flock` that the system releases when its holder
//! ends, and a note of who holds it, for the message.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

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
        Err(TryLockError::Error(error)) => return Err(fail(error)),
        Err(TryLockError::WouldBlock) => {
            let holder = describe(&mut file);
            if wait == LockWait::NoWait {
                return Err(CacheError::Locked { holder });
            }
            if let Some(on_wait) = on_wait {
                on_wait(&holder);
            }
            file.lock().map_err(fail)?;
        }
    }
    let holder = Holder {
        pid: std::process::id(),
        command: command.into(),
    };
    let note = serde_json::to_vec(&holder).unwrap_or_default();
    file.set_len(0)
        .and_then(|()| file.seek(SeekFrom::Start(0)))
        .and_then(|_| file.write_all(&note))
        .map_err(fail)?;
    Ok(Lock(file))
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
        Some(holder) => format!("process {} (`{}`)", holder.pid, holder.command),
        None => "another process".into(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::sync::mpsc;

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
