//! [`CompletionCache`]: answers that were computed or paid for once.
//!
//! Append-only segments `completions/<n>.log`: a line per answer, with its own
//! blake3. Each process appends to a segment of its own; a line that is torn or
//! damaged is skipped, the rest stays. What other processes append meanwhile is
//! looked for when an answer is missing.

mod logs;
mod places;
mod shared;
mod table;

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;

use self::logs::Logs;
use self::places::{Place, Places};
use self::shared::Others;
use self::shared::forget_packs;
pub(crate) use self::shared::{known_packs, note_packs, of_remotes, packs_file};
use crate::digest::Digest;
use crate::error::CacheError;

/// Longest wait between two looks at the wish to stop.
pub(crate) const LOOK_EVERY: Duration = Duration::from_millis(50);

#[derive(Debug)]
struct State {
    index: Places,
    /// Where the answers lie. They are read when the first one is wanted, which most commands
    /// never come to.
    logs: Logs,
    /// The segment this process appends to, made at the first `put`, and its end.
    writer: Option<(usize, u64)>,
    /// Without a folder: the answers themselves.
    memory: HashMap<Digest, Value>,
}

impl State {
    /// No answers yet; the index is made in `folder` where it is large.
    fn new(folder: PathBuf, logs: Logs) -> Self {
        Self {
            index: Places::new(folder),
            logs,
            writer: None,
            memory: HashMap::new(),
        }
    }

    /// Reads what others wrote since the last look, unless that was just now; whether there was
    /// anything.
    fn look(&mut self, folder: &Path) -> bool {
        let own = self.writer.map(|(segment, _)| segment);
        self.logs.look(folder, own, &mut self.index)
    }

    /// The answer of a key, if the index knows its place and it is there still.
    fn answer(&mut self, key: &Digest) -> Option<Value> {
        let place = self.index.get(key)?;
        let file = self.logs.file(place.segment)?;
        let mut line = vec![0u8; place.len];
        file.seek(SeekFrom::Start(place.offset)).ok()?;
        file.read_exact(&mut line).ok()?;
        let (found, value) = parse_line(&line)?;
        (found == *key).then_some(value)
    }
}

/// Answers by key. Shared by threads.
#[derive(Debug)]
pub struct CompletionCache {
    folder: Option<PathBuf>,
    state: Mutex<State>,
    /// Keys whose answers somebody is asking for.
    asked: Mutex<HashSet<Digest>>,
    settled: Condvar,
    others: Others,
}

/// The right to ask for an answer: whoever wants it too waits until this is dropped.
#[derive(Debug)]
pub struct Claim<'a> {
    cache: &'a CompletionCache,
    key: Digest,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.cache.asked().remove(&self.key);
        self.cache.settled.notify_all();
    }
}

impl CompletionCache {
    /// A cache that is forgotten when dropped.
    #[must_use]
    pub fn in_memory() -> Self {
        Self {
            folder: None,
            state: Mutex::new(State::new(PathBuf::new(), Logs::default())),
            asked: Mutex::default(),
            settled: Condvar::new(),
            others: Others::default(),
        }
    }

    /// Opens the segments of a folder, which need not exist yet. They are read when the first
    /// answer is wanted.
    ///
    /// # Errors
    /// When a segment cannot be opened.
    pub fn open(folder: PathBuf) -> Result<Self, CacheError> {
        let logs = Logs::open(&folder)?;
        Ok(Self {
            state: Mutex::new(State::new(folder.clone(), logs)),
            folder: Some(folder),
            asked: Mutex::default(),
            settled: Condvar::new(),
            others: Others::default(),
        })
    }

    /// The folder, unless the answers are only in memory.
    #[must_use]
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// The answer stored under `key`, here or by a machine that shares its answers
    /// ([`CompletionCache::share`]). A line that was damaged since it was indexed is a miss. What
    /// other processes store meanwhile is seen, at the latest a moment after they did.
    #[must_use]
    pub fn get(&self, key: &Digest) -> Option<Value> {
        self.get_until(key, &|| false)
    }

    /// The same; those who share their answers are waited for no longer than until `stop`.
    #[must_use]
    pub fn get_until(&self, key: &Digest, stop: &dyn Fn() -> bool) -> Option<Value> {
        self.stored(key)
            .or_else(|| self.ask_others(stop).then(|| self.stored(key)).flatten())
    }

    fn stored(&self, key: &Digest) -> Option<Value> {
        let mut state = self.lock();
        let Some(folder) = &self.folder else {
            return state.memory.get(key).cloned();
        };
        let found = state.answer(key);
        // Under one lock: else another thread's look would make this one's look seem needless.
        if found.is_some() || !state.look(folder) {
            return found;
        }
        state.answer(key)
    }

    /// Another process that stores its answers in the folder has ended: the next answer that is
    /// missing is looked for there at once, however recent the last look was.
    pub fn expect_others(&self) {
        self.lock_unread().logs.expect();
    }

    /// Stores an answer. It is in the system's hands when this returns: a killed
    /// process does not lose it; a power cut may, until [`CompletionCache::sync`].
    ///
    /// # Errors
    /// When the segment cannot be written.
    pub fn put(&self, key: &Digest, value: &Value) -> Result<(), CacheError> {
        let mut state = self.lock();
        let Some(folder) = &self.folder else {
            state.memory.insert(*key, value.clone());
            return Ok(());
        };
        let (segment, offset) = match state.writer {
            Some(writer) => writer,
            None => {
                let (path, file) = new_segment(folder)?;
                let added = state.logs.add(path, file);
                (added.map_err(|e| CacheError::io(folder, e))?, 0)
            }
        };
        let line = format_line(key, value);
        let written = match state.logs.file(segment) {
            Some(file) => file
                .seek(SeekFrom::Start(offset))
                .and_then(|_| file.write_all(line.as_bytes())),
            None => Err(std::io::ErrorKind::NotFound.into()),
        };
        if let Err(error) = written {
            // The next put overwrites the torn line.
            state.writer = Some((segment, offset));
            return Err(CacheError::io(folder, error));
        }
        let len = line.len();
        let place = Place {
            segment,
            offset,
            len,
        };
        state.index.insert(key, place);
        state.writer = Some((segment, offset + line.len() as u64));
        Ok(())
    }

    /// The right to ask for the answer of `key`; `None` while another thread has it.
    #[must_use]
    pub fn claim(&self, key: &Digest) -> Option<Claim<'_>> {
        let claimed = self.asked().insert(*key);
        claimed.then(|| Claim {
            cache: self,
            key: *key,
        })
    }

    /// Waits until no thread has the right to ask for `key`; false when `stop` came first.
    pub fn wait(&self, key: &Digest, stop: &dyn Fn() -> bool) -> bool {
        let mut asked = self.asked();
        while asked.contains(key) {
            if stop() {
                return false;
            }
            let woken = self.settled.wait_timeout(asked, LOOK_EVERY);
            asked = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn asked(&self) -> MutexGuard<'_, HashSet<Digest>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of answers.
    #[must_use]
    pub fn len(&self) -> usize {
        let state = self.lock();
        state.index.len().max(state.memory.len())
    }

    /// No answers.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Damaged lines that were skipped since the last call.
    #[must_use]
    pub fn take_skipped(&self) -> usize {
        self.lock_unread().logs.take_skipped()
    }

    /// Waits until this process's answers are on the disk.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn sync(&self) -> Result<(), CacheError> {
        let mut state = self.lock_unread();
        if let (Some(folder), Some((segment, _))) = (&self.folder, state.writer)
            && let Some(file) = state.logs.file(segment)
        {
            file.sync_data().map_err(|e| CacheError::io(folder, e))?;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        let mut guard = self.lock_unread();
        let state = &mut *guard;
        state.logs.read(&mut state.index);
        guard
    }

    fn lock_unread(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Creates the first segment whose number is free.
fn new_segment(folder: &Path) -> Result<(PathBuf, File), CacheError> {
    std::fs::create_dir_all(folder).map_err(|e| CacheError::io(folder, e))?;
    let mut number = 0u64;
    loop {
        let path = folder.join(format!("{number:06}.log"));
        match OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
        {
            Ok(file) => return Ok((path, file)),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => number += 1,
            Err(e) => return Err(CacheError::io(&path, e)),
        }
    }
}

/// A segment, read line by line.
pub(crate) struct Segment {
    pub(crate) path: PathBuf,
    pub(crate) good: usize,
    /// Damaged lines; one that is just being written, or was torn by a kill, is none.
    pub(crate) bad: usize,
}

/// Reads all segments of a folder.
pub(crate) fn check(folder: &Path) -> Vec<Segment> {
    let mut segments: Vec<Segment> = crate::record::folder(folder)
        .filter(|path| path.extension().is_some_and(|e| e == "log"))
        .filter_map(|path| count(path).ok())
        .collect();
    segments.sort_by(|a, b| a.path.cmp(&b.path));
    segments
}

/// Counts the lines of a segment, one after the other.
fn count(path: PathBuf) -> std::io::Result<Segment> {
    let mut reader = BufReader::new(File::open(&path)?);
    let (mut good, mut bad) = (0, 0);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 {
        if parse_line(&line).is_some() {
            good += 1;
        } else {
            bad += usize::from(line.ends_with(b"\n"));
        }
        line.clear();
    }
    Ok(Segment { path, good, bad })
}

/// Writes a segment anew without its damaged lines. Those of a remote can be had again.
pub(crate) fn drop_damaged(path: &Path) -> Result<(), CacheError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let copied = || -> std::io::Result<tempfile::NamedTempFile> {
        let mut reader = BufReader::new(File::open(path)?);
        let mut out = BufWriter::new(tempfile::NamedTempFile::new_in(folder)?);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line)? > 0 {
            if parse_line(&line).is_some() {
                out.write_all(&line)?;
            }
            line.clear();
        }
        out.into_inner()
            .map_err(std::io::IntoInnerError::into_error)
    };
    let failed = |e: std::io::Error| CacheError::io(path, e);
    let good = copied().map_err(failed)?;
    // First: a kill in between costs one more look.
    forget_packs(path)?;
    good.persist(path).map_err(|e| failed(e.error))?;
    Ok(())
}

/// `<blake3 of the rest> <key> <JSON>\n`; JSON text never holds a raw newline.
fn format_line(key: &Digest, value: &Value) -> String {
    let body = format!("{key} {value}");
    format!("{} {body}\n", Digest::of_bytes(body.as_bytes()))
}

/// The key of a line and its JSON, if the line is as it was written.
fn checked(line: &[u8]) -> Option<(Digest, &str)> {
    let text = std::str::from_utf8(line).ok()?.strip_suffix('\n')?;
    let (sum, body) = text.split_once(' ')?;
    if Digest::parse(sum)? != Digest::of_bytes(body.as_bytes()) {
        return None;
    }
    let (key, json) = body.split_once(' ')?;
    Some((Digest::parse(key)?, json))
}

pub(crate) fn parse_line(line: &[u8]) -> Option<(Digest, Value)> {
    let (key, json) = checked(line)?;
    Some((key, serde_json::from_str(json).ok()?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    fn key(i: usize) -> Digest {
        Digest::of_bytes(&i.to_le_bytes())
    }

    #[test]
    fn a_cut_at_any_byte_loses_only_the_lines_behind_it() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("completions");
        let cache = CompletionCache::open(folder.clone()).unwrap();
        for i in 0..3 {
            cache
                .put(&key(i), &json!({ "text": format!("line\n{i}") }))
                .unwrap();
        }
        let path = folder.join("000000.log");
        let bytes = std::fs::read(&path).unwrap();
        let line = bytes.len() / 3;
        for cut in 0..=bytes.len() {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            let cache = CompletionCache::open(folder.clone()).unwrap();
            assert_eq!(cache.len(), cut / line, "cut at {cut}");
            for i in 0..cut / line {
                assert_eq!(cache.get(&key(i)).unwrap()["text"], format!("line\n{i}"));
            }
        }
    }

    #[test]
    fn answers_are_found_where_the_index_is_in_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("completions");
        let one = CompletionCache::open(folder.clone()).unwrap();
        one.lock().index.spill_from(10);
        for i in 0..100 {
            one.put(&key(i), &json!(i)).unwrap();
        }
        one.put(&key(3), &json!("again")).unwrap();
        // Another process reads the same segments and writes its own.
        let two = CompletionCache::open(folder.clone()).unwrap();
        two.put(&key(100), &json!(100)).unwrap();
        let three = CompletionCache::open(folder).unwrap();
        for (cache, len) in [(&one, 100), (&two, 101), (&three, 101)] {
            assert_eq!(cache.len(), len);
            assert_eq!(cache.get(&key(3)), Some(json!("again")));
            assert_eq!(cache.get(&key(99)), Some(json!(99)));
            // The first finds it when it is missing.
            assert_eq!(cache.get(&key(100)), Some(json!(100)));
            assert_eq!((cache.get(&key(101)), cache.len()), (None, 101));
        }
    }

    #[test]
    fn what_another_process_writes_meanwhile_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("completions");
        let one = CompletionCache::open(folder.clone()).unwrap();
        assert_eq!(one.get(&key(0)), None, "there is no folder yet");
        one.put(&key(0), &json!(0)).unwrap();
        let two = CompletionCache::open(folder.clone()).unwrap();
        for i in 1..4 {
            // A segment that was not there before; then it grows.
            two.put(&key(i), &json!(i)).unwrap();
            one.expect_others();
            assert_eq!(one.get(&key(i)), Some(json!(i)));
        }
        // A line that is not whole yet is no damage, and read once it is.
        let line = format_line(&key(4), &json!(4));
        let path = folder.join("000001.log");
        let (first, rest) = line.split_at(30);
        for (part, answer) in [(first, None), (rest, Some(json!(4)))] {
            let mut file = OpenOptions::new().append(true).open(&path).unwrap();
            file.write_all(part.as_bytes()).unwrap();
            one.expect_others();
            assert_eq!(one.get(&key(4)), answer);
        }
        assert_eq!((one.len(), one.take_skipped()), (5, 0));
        // What it writes itself goes behind its own lines.
        one.put(&key(5), &json!(5)).unwrap();
        let three = CompletionCache::open(folder).unwrap();
        assert!((0..6).all(|i| three.get(&key(i)) == Some(json!(i))));
        assert_eq!(three.take_skipped(), 0);
    }

    #[test]
    fn a_flipped_byte_loses_one_line_and_later_runs_add_segments() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("completions");
        let first = CompletionCache::open(folder.clone()).unwrap();
        first.put(&key(0), &json!(0)).unwrap();
        first.put(&key(1), &json!(1)).unwrap();
        let path = folder.join("000000.log");
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[70] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(first.get(&key(0)), None);
        let second = CompletionCache::open(folder.clone()).unwrap();
        assert_eq!(
            (second.get(&key(0)), second.get(&key(1))),
            (None, Some(json!(1)))
        );
        assert_eq!([second.take_skipped(), second.take_skipped()], [1, 0]);
        second.put(&key(0), &json!("new")).unwrap();
        let third = CompletionCache::open(folder).unwrap();
        assert_eq!((third.get(&key(0)), third.len()), (Some(json!("new")), 2));
    }
}
