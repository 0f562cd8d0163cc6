//! Answers of other machines, by way of a remote cache: asked for once, when one is missing here, and
//! again after somebody may have sent more; and appended to a segment of their own, so that they are not sent back.
//!
//! | file beside the segments | holds |
//! |---|---|
//! | `remote-<id>.log` | the answers that came from this remote |
//! | `remote-<id>.packs` | the packs there whose answers are here, a digest a line |

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use super::places::Place;
use super::{CompletionCache, LOOK_EVERY, drop_damaged, parse_line};
use crate::digest::Digest;
use crate::error::CacheError;
use crate::remote::RemoteCache;

/// Bytes of packs after which what came of them is brought to the disk and noted.
const NOTE_EVERY: usize = 8 << 20;

/// Says that nobody waits any more.
type Stop = dyn Fn() -> bool + Send + Sync;

/// Who else may have answers.
#[derive(Default)]
pub(super) struct Others {
    source: OnceLock<Source>,
    asking: Mutex<Asking>,
    /// Tells when [`Others::asking`] changes.
    settled: Condvar,
}

struct Source {
    remote: Arc<RemoteCache>,
    stop: Box<Stop>,
}

/// Whether others were asked.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Asking {
    #[default]
    NotYet,
    UnderWay {
        /// Somebody may have sent more since it began.
        more: bool,
    },
    Done,
}

impl std::fmt::Debug for Others {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Others").finish_non_exhaustive()
    }
}

impl Others {
    /// The right to ask them; `None` once they were asked. Waits while another thread asks; an
    /// error when `stop` came first.
    fn turn(&self, stop: &dyn Fn() -> bool) -> Result<Option<Turn<'_>>, Stopped> {
        let mut asking = self.asking();
        loop {
            if *asking == Asking::Done {
                return Ok(None);
            }
            if stop() {
                return Err(Stopped);
            }
            if *asking == Asking::NotYet {
                *asking = Asking::UnderWay { more: false };
                return Ok(Some(Turn {
                    others: self,
                    ends: Asking::NotYet,
                }));
            }
            let woken = self.settled.wait_timeout(asking, LOOK_EVERY);
            asking = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// They may have more than they had.
    fn expect(&self) {
        let mut asking = self.asking();
        *asking = match *asking {
            Asking::UnderWay { .. } => Asking::UnderWay { more: true },
            Asking::NotYet | Asking::Done => Asking::NotYet,
        };
    }

    fn asking(&self) -> MutexGuard<'_, Asking> {
        self.asking.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Stopped;

/// The right to ask others. A thread that gives up leaves it to the next.
struct Turn<'a> {
    others: &'a Others,
    ends: Asking,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut asking = self.others.asking();
        *asking = match *asking {
            Asking::UnderWay { more: true } => Asking::NotYet,
            _ => self.ends,
        };
        drop(asking);
        self.others.settled.notify_all();
    }
}

impl CompletionCache {
    /// From now on answers that are missing here are looked for in the remote, and those that are
    /// put here are sent there from time to time. Nobody waits for them once `stop` says so.
    /// The first call counts.
    pub fn share(
        &self,
        remote: &Arc<RemoteCache>,
        stop: impl Fn() -> bool + Send + Sync + 'static,
    ) {
        let Some(folder) = &self.folder else {
            return;
        };
        let source = Source {
            remote: Arc::clone(remote),
            stop: Box::new(stop),
        };
        if self.others.source.set(source).is_ok() {
            remote.keep_sending_answers(folder);
        }
    }

    /// Somebody may have sent answers to the remote since it was asked: it is asked again when the
    /// next answer is missing.
    pub fn expect_from_remote(&self) {
        self.others.expect();
    }

    /// Looks for answers elsewhere, unless that was done; false when there is nowhere to look, or `stop`
    /// came first. Other threads wait meanwhile.
    pub(super) fn ask_others(&self, stop: &dyn Fn() -> bool) -> bool {
        let Some(Source { remote, stop: all }) = self.others.source.get() else {
            return false;
        };
        let stop = || stop() || all();
        match self.others.turn(&stop) {
            Err(Stopped) => false,
            Ok(None) => true,
            Ok(Some(mut turn)) => {
                let (taken, whole) = self.take_until(remote, &stop);
                tracing::debug!("{taken} answers came from {}", remote.url());
                if whole {
                    turn.ends = Asking::Done;
                }
                whole
            }
        }
    }

    /// Takes the answers that the remote has and this cache has not; how many.
    pub fn take_from(&self, remote: &RemoteCache) -> usize {
        self.take_until(remote, &|| false).0
    }

    /// The same until `stop`; how many, and whether that was not.
    fn take_until(&self, remote: &RemoteCache, stop: &dyn Fn() -> bool) -> (usize, bool) {
        let Some(folder) = &self.folder else {
            return (0, true);
        };
        let mut taking = Taking {
            cache: self,
            folder,
            log: folder.join(format!("remote-{}.log", remote.id())),
            list: packs_file(folder, remote.id()),
            segment: None,
            unnoted: Vec::new(),
            bytes: 0,
            taken: 0,
        };
        let all = taking.mend().and_then(|()| {
            let known = known_packs(&taking.list);
            remote.answers(known, stop, &mut |pack, bytes| taking.take(pack, bytes))
        });
        // What came is kept, whatever happened then.
        let all = taking.note().and(all);
        if let Err(e) = &all {
            remote.cannot_keep(e);
        }
        (taking.taken, all.unwrap_or(true))
    }

    /// Appends the lines whose answers are not here.
    fn append(&self, segment: usize, log: &Path, bytes: &[u8]) -> Result<usize, CacheError> {
        let mut state = self.lock();
        let state = &mut *state;
        let file = state.logs.file(segment);
        let file = file.ok_or_else(|| CacheError::io(log, std::io::ErrorKind::NotFound.into()))?;
        let length = file.metadata().map_err(|e| CacheError::io(log, e))?.len();
        let (mut lines, mut places) = (Vec::new(), Vec::new());
        for line in bytes.split_inclusive(|b| *b == b'\n') {
            let Some((key, _)) = parse_line(line) else {
                continue;
            };
            if state.index.get(&key).is_some() {
                continue;
            }
            let place = Place {
                segment,
                offset: length + lines.len() as u64,
                len: line.len(),
            };
            places.push((key, place));
            lines.extend_from_slice(line);
        }
        file.write_all(&lines).map_err(|e| CacheError::io(log, e))?;
        state.logs.appended(segment, length, lines.len() as u64);
        let taken = places.len();
        for (key, place) in places {
            state.index.insert(&key, place);
        }
        Ok(taken)
    }
}

/// Answers on their way from a remote into its segment. A pack is noted only when its lines are on
/// the disk: else a power cut would lose them for good.
struct Taking<'a> {
    cache: &'a CompletionCache,
    folder: &'a Path,
    log: PathBuf,
    list: PathBuf,
    /// Its number, and the file again: to be synced while others read.
    segment: Option<(usize, File)>,
    /// Packs whose lines may not be on the disk yet.
    unnoted: Vec<Digest>,
    /// Their bytes.
    bytes: usize,
    taken: usize,
}

impl Taking<'_> {
    /// Writes the segment anew when it is damaged: the packs are fetched again.
    fn mend(&self) -> Result<(), CacheError> {
        if self.cache.lock().logs.take_damaged(&self.log) {
            drop_damaged(&self.log)?;
            // The answers lie elsewhere in the new file.
            self.cache.expect_others();
        }
        Ok(())
    }

    fn take(&mut self, pack: Digest, bytes: &[u8]) -> Result<(), CacheError> {
        let number = match &self.segment {
            Some((number, _)) => *number,
            None => self.open()?,
        };
        self.taken += self.cache.append(number, &self.log, bytes)?;
        self.unnoted.push(pack);
        self.bytes += bytes.len();
        match self.bytes < NOTE_EVERY {
            true => Ok(()),
            false => self.note(),
        }
    }

    /// Opens the segment; its number.
    fn open(&mut self) -> Result<usize, CacheError> {
        let (folder, log) = (self.folder, &self.log);
        let failed = |e| CacheError::io(log, e);
        std::fs::create_dir_all(folder).map_err(|e| CacheError::io(folder, e))?;
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(log)
            .map_err(failed)?;
        drop_torn(&mut file).map_err(failed)?;
        // Its name is to be on the disk before the list is; not every file system can be asked to.
        let _ = File::open(folder).and_then(|folder| folder.sync_all());
        let again = file.try_clone().map_err(failed)?;
        let mut state = self.cache.lock();
        let number = state.logs.add(log.clone(), file).map_err(failed)?;
        drop(state);
        self.segment = Some((number, again));
        Ok(number)
    }

    /// Brings the segment to the disk and notes what is in it.
    fn note(&mut self) -> Result<(), CacheError> {
        let packs = std::mem::take(&mut self.unnoted);
        self.bytes = 0;
        if let (Some((_, file)), false) = (&self.segment, packs.is_empty()) {
            file.sync_data().map_err(|e| CacheError::io(&self.log, e))?;
            note_packs(&self.list, &packs)?;
        }
        Ok(())
    }
}

/// Cuts off the line that a killed process left unfinished.
fn drop_torn(file: &mut File) -> std::io::Result<()> {
    let length = file.metadata()?.len();
    if length == 0 {
        return Ok(());
    }
    let mut last = [0];
    file.seek(SeekFrom::Start(length - 1))?;
    file.read_exact(&mut last)?;
    if last == *b"\n" {
        return Ok(());
    }
    file.rewind()?;
    let mut whole = 0;
    let mut reader = BufReader::new(&*file);
    let mut line = Vec::new();
    loop {
        line.clear();
        let length = reader.read_until(b'\n', &mut line)?;
        if !line.ends_with(b"\n") {
            break;
        }
        whole += length as u64;
    }
    file.set_len(whole)
}

/// The list of the packs of a remote that need not be fetched.
pub(crate) fn packs_file(folder: &Path, remote: &str) -> PathBuf {
    folder.join(format!("remote-{remote}.packs"))
}

/// The packs in the list.
pub(crate) fn known_packs(list: &Path) -> BTreeSet<Digest> {
    // Without the list they are fetched again, which changes nothing.
    let text = std::fs::read_to_string(list).unwrap_or_default();
    text.lines().filter_map(Digest::parse).collect()
}

/// Notes that these packs' answers are here.
pub(crate) fn note_packs(list: &Path, packs: &[Digest]) -> Result<(), CacheError> {
    let lines: String = packs.iter().map(|pack| format!("{pack}\n")).collect();
    OpenOptions::new()
        .append(true)
        .create(true)
        .open(list)
        .and_then(|mut file| file.write_all(lines.as_bytes()))
        .map_err(|e| CacheError::io(list, e))
}

/// Forgets what is in a segment of a remote's answers, which is damaged or goes: then the packs
/// are fetched again. Of another segment there is no list.
pub(super) fn forget_packs(log: &Path) -> Result<(), CacheError> {
    let list = log.with_extension("packs");
    match std::fs::remove_file(&list) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(CacheError::io(&list, e)),
        _ => Ok(()),
    }
}

/// The segments of remotes' answers in a folder: what is in them can be had again.
pub(crate) fn of_remotes(folder: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    crate::record::folder(folder).filter(|path| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.starts_with("remote-") && name.ends_with(".log"))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn others_who_have_more_are_asked_again() {
        let others = Others::default();
        let turn = || others.turn(&|| false).ok().flatten();
        let mut first = turn().unwrap();
        first.ends = Asking::Done;
        drop(first);
        assert!(turn().is_none(), "they were asked");
        others.expect();
        let mut second = turn().unwrap();
        second.ends = Asking::Done;
        // What comes while they are asked may be missed.
        others.expect();
        drop(second);
        let mut third = turn().unwrap();
        third.ends = Asking::Done;
        drop(third);
        assert!(turn().is_none());
    }
}
