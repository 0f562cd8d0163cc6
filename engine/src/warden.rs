//! [`Warden`]: ends the commands of a run that was itself killed.
//!
//! Nothing can act when it is killed with SIGKILL. So before the first command a shell is
//! started that waits for a pipe which this process alone holds open. When the pipe closes
//! without a word, this process was killed: the shell kills the process groups that a table
//! names, and whatever works in a folder of the cache, which finds a command that was not
//! entered yet. The table is a file of places of one length: a command costs two small
//! writes to it, and wakes nobody.
//!
//! Knows no step. Invariant: a group stands in the table from just after its start until
//! just before its leader is reaped, so the number in it is never another's.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use flowrun_cache::{Cache, Scratch};

use crate::child::start;

/// What the shell does: `$1` is the table, `$2` the folder in which commands work. It looks
/// several times: a command may be between its start and its folder.
const SCRIPT: &str = r#"
exec 3< "$1"
read -r word && exit
while read -r group <&3; do
    case $group in [1-9]*) kill -s KILL -- "-$group" ;; esac
done
for round in 1 2 3; do
    for process in /proc/[1-9]*; do
        case $(readlink "$process/cwd") in
        "$2"/*) kill -s KILL -- "-${process#/proc/}" "${process#/proc/}" ;;
        esac
    done
    sleep 0.2
done
"#;
/// Bytes of a place in the table, with its line's end.
const PLACE: usize = 12;

/// Ends what still runs when this process is killed.
#[derive(Debug)]
pub(crate) struct Warden {
    home: Home,
    state: Mutex<State>,
}

/// Where the table lies, in a folder beside those in which commands work.
#[derive(Debug)]
enum Home {
    Cache(Arc<Cache>),
    Folder(PathBuf),
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Asleep,
    Awake(Watch),
    /// It could not be started: commands outlive a killed run.
    Missing,
}

#[derive(Debug)]
struct Watch {
    table: File,
    /// Places that were used and are free.
    free: Vec<u64>,
    places: u64,
    shell: Child,
    /// Holds the table, where nothing else does.
    _scratch: Option<Scratch>,
}

/// A process group is watched until this is dropped.
#[derive(Debug)]
pub(crate) struct Guarded<'a> {
    warden: &'a Warden,
    place: Option<u64>,
}

impl Warden {
    /// Its table lies in this cache.
    pub(crate) fn new(cache: &Arc<Cache>) -> Self {
        Self {
            home: Home::Cache(Arc::clone(cache)),
            state: Mutex::default(),
        }
    }

    /// Its table lies in this folder, which is there, and so do those in which commands work.
    pub(crate) fn within(folder: &Path) -> Self {
        Self {
            home: Home::Folder(folder.to_owned()),
            state: Mutex::default(),
        }
    }

    /// To be called before a process is started that is to be guarded.
    pub(crate) fn wake(&self) {
        let mut state = self.lock();
        if matches!(*state, State::Asleep) {
            *state = Watch::start(&self.home).map_or_else(
                |error| {
                    tracing::warn!("commands would outlive a killed run: {error}");
                    State::Missing
                },
                State::Awake,
            );
        }
    }

    /// Begins to watch a process group that was just started. To be dropped before its
    /// leader is reaped.
    pub(crate) fn guard(&self, group: u32) -> Guarded<'_> {
        let mut state = self.lock();
        let place = match &mut *state {
            State::Awake(watch) => watch.add(group),
            State::Asleep | State::Missing => None,
        };
        Guarded {
            warden: self,
            place,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Guarded<'_> {
    fn drop(&mut self) {
        if let (Some(place), State::Awake(watch)) = (self.place, &mut *self.warden.lock()) {
            watch.write(place, "");
            watch.free.push(place);
        }
    }
}

impl Watch {
    fn start(home: &Home) -> io::Result<Self> {
        let (place, scratch) = match home {
            Home::Cache(cache) => {
                let scratch = cache.scratch().map_err(io::Error::other)?;
                (scratch.path().to_owned(), Some(scratch))
            }
            Home::Folder(folder) => {
                let place = folder.join("warden");
                std::fs::create_dir_all(&place)?;
                (place, None)
            }
        };
        let place = place.canonicalize()?;
        let path = place.join("groups");
        let table = File::create(&path)?;
        let shell = start(
            Command::new("/bin/sh")
                .args(["-c", SCRIPT, "flowrun-warden"])
                .arg(&path)
                .arg(place.parent().unwrap_or(&place))
                .env_clear()
                .env("PATH", "/usr/bin:/bin")
                .current_dir("/")
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                // What a terminal sends to this process's group is not for it.
                .process_group(0),
        )?;
        Ok(Self {
            table,
            free: Vec::new(),
            places: 0,
            shell,
            _scratch: scratch,
        })
    }

    fn add(&mut self, group: u32) -> Option<u64> {
        let place = self.free.pop().unwrap_or_else(|| {
            self.places += 1;
            self.places - 1
        });
        self.write(place, &group.to_string()).then_some(place)
    }

    fn write(&self, place: u64, text: &str) -> bool {
        let line = format!("{text:<0$}\n", PLACE - 1);
        let at = place * PLACE as u64;
        // A disk that is full fails the step by itself.
        self.table.write_all_at(line.as_bytes(), at).is_ok()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(mut stdin) = self.shell.stdin.take() {
            // If it does not hear this, it looks for processes that are not there.
            let _ = stdin.write_all(b"over\n");
        }
        // It is ours and there: there is nothing to tell.
        let _ = self.shell.wait();
    }
}
