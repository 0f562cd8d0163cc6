//! Answers of other machines, by way of a remote cache: asked for once, when one is missing here,
//! and appended to a segment of their own, so that they are not sent back.
//!
//! | file beside the segments | holds |
//! |---|---|
//! | `remote-<id>.log` | the answers that came from this remote |
//! | `remote-<id>.packs` | the packs there whose answers are here, a digest a line |

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use super::places::Place;
use super::{CompletionCache, parse_line};
use crate::digest::Digest;
use crate::error::CacheError;
use crate::remote::RemoteCache;

/// Who else may have answers.
#[derive(Debug, Default)]
pub(super) struct Others {
    remote: OnceLock<Arc<RemoteCache>>,
    asked: OnceLock<()>,
}

impl CompletionCache {
    /// From now on answers that are missing here are looked for in the remote, and those that are
    /// put here are sent there from time to time.
    pub fn share(&self, remote: &Arc<RemoteCache>) {
        if let Some(folder) = &self.folder
            && self.others.remote.set(Arc::clone(remote)).is_ok()
        {
            remote.keep_sending_answers(folder);
        }
    }

    /// Looks for answers elsewhere, the first time; false when there is nowhere to look. Other
    /// threads wait meanwhile.
    pub(super) fn ask_others(&self) -> bool {
        let Some(remote) = self.others.remote.get() else {
            return false;
        };
        self.others.asked.get_or_init(|| {
            let taken = self.take_from(remote);
            tracing::debug!("{taken} answers came from {}", remote.url());
        });
        true
    }

    /// Takes the answers that the remote has and this cache has not; how many.
    pub fn take_from(&self, remote: &RemoteCache) -> usize {
        let Some(folder) = &self.folder else {
            return 0;
        };
        let list = packs_file(folder, remote.id());
        let log = folder.join(format!("remote-{}.log", remote.id()));
        let (mut segment, mut taken) = (None, 0);
        remote.answers(known_packs(&list), &mut |pack, bytes| {
            let place = match segment {
                Some(place) => place,
                None => *segment.insert(self.open_segment(folder, &log)?),
            };
            taken += self.take(place, &log, bytes)?;
            note_pack(&list, &pack)
        });
        taken
    }

    fn open_segment(&self, folder: &Path, log: &Path) -> Result<usize, CacheError> {
        std::fs::create_dir_all(folder).map_err(|e| CacheError::io(folder, e))?;
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(log)
            .map_err(|e| CacheError::io(log, e))?;
        drop_torn(&mut file).map_err(|e| CacheError::io(log, e))?;
        let mut state = self.lock();
        state.segments.push(file);
        Ok(state.segments.len() - 1)
    }

    /// Appends the lines whose answers are not here.
    fn take(&self, segment: usize, log: &Path, bytes: &[u8]) -> Result<usize, CacheError> {
        let mut state = self.lock();
        let state = &mut *state;
        let file = &mut state.segments[segment];
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
        let taken = places.len();
        for (key, place) in places {
            state.index.insert(&key, place);
        }
        Ok(taken)
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

fn known_packs(list: &Path) -> BTreeSet<Digest> {
    // Without the list they are fetched again, which changes nothing.
    let text = std::fs::read_to_string(list).unwrap_or_default();
    text.lines().filter_map(Digest::parse).collect()
}

/// Notes that a pack's answers are here.
pub(crate) fn note_pack(list: &Path, pack: &Digest) -> Result<(), CacheError> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .open(list)
        .and_then(|mut file| file.write_all(format!("{pack}\n").as_bytes()))
        .map_err(|e| CacheError::io(list, e))
}
