//! [`Logs`]: the segments of a folder, as far as this process has read them. They grow while it works: jobs and other
//! processes append to segments of their own, and a look reads on where the last one ended.
//!
//! Invariant: of the bytes before [`Log::read`] each line is in the index, or was counted as damaged.

use std::collections::{HashMap, HashSet};
use std::fs::{File, Metadata};
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::checked;
use super::places::{Place, Places};
use crate::error::CacheError;

/// Shortest wait between two looks that nobody asked for.
const PAUSE: Duration = Duration::from_millis(100);
/// A look is followed by a wait of this many times what it took, so that looks cost little even where there are
/// thousands of segments.
const REST: u32 = 20;

/// The segments, by their number in this process.
#[derive(Debug, Default)]
pub(super) struct Logs {
    all: Vec<Log>,
    /// Numbers by device and inode, because a name may come to mean another file. Where one file was added twice, the
    /// later number.
    numbers: HashMap<(u64, u64), usize>,
    /// Those in which damaged lines were met.
    damaged: HashSet<PathBuf>,
    /// Damaged lines that nobody was told of yet.
    skipped: usize,
    /// All were read once.
    is_read: bool,
    /// No look is due before; none: one is.
    next: Option<Instant>,
}

#[derive(Debug)]
struct Log {
    path: PathBuf,
    file: File,
    /// Bytes whose lines were read; the end of a line.
    read: u64,
    /// Its length when it was looked at last.
    seen: u64,
}

/// What was found in a part of a segment.
struct Scanned {
    /// End of the last whole line.
    end: u64,
    good: usize,
    damaged: usize,
}

impl Logs {
    /// Opens the segments of a folder, which need not exist. Nothing is read yet.
    ///
    /// # Errors
    /// When a segment cannot be opened.
    pub(super) fn open(folder: &Path) -> Result<Self, CacheError> {
        let mut logs = Self::default();
        for path in segments_in(folder) {
            let failed = |e| CacheError::io(&path, e);
            let file = File::open(&path).map_err(failed)?;
            logs.add(path.clone(), file).map_err(failed)?;
        }
        Ok(logs)
    }

    /// Takes up a segment; its number. What was read of the same file before counts as read.
    pub(super) fn add(&mut self, path: PathBuf, file: File) -> std::io::Result<usize> {
        let id = id_of(&file.metadata()?);
        let before = self.numbers.get(&id).and_then(|at| self.all.get(*at));
        let (read, seen) = before.map_or((0, 0), |log| (log.read, log.seen));
        let number = self.all.len();
        self.all.push(Log {
            path,
            file,
            read,
            seen,
        });
        self.numbers.insert(id, number);
        Ok(number)
    }

    /// The file of a segment.
    pub(super) fn file(&mut self, number: usize) -> Option<&mut File> {
        self.all.get_mut(number).map(|log| &mut log.file)
    }

    /// This process appended so many bytes to a segment that was `length` long, and they are in the index.
    pub(super) fn appended(&mut self, number: usize, length: u64, bytes: u64) {
        if let Some(log) = self.all.get_mut(number)
            && log.read == length
        {
            log.read += bytes;
            log.seen = log.read;
        }
    }

    /// Reads the segments that were opened, once.
    pub(super) fn read(&mut self, index: &mut Places) {
        if std::mem::replace(&mut self.is_read, true) {
            return;
        }
        for number in 0..self.all.len() {
            let log = &mut self.all[number];
            // First: what is written meanwhile is new to the next look.
            log.seen = log.file.metadata().map_or(0, |found| found.len());
            let scanned = scan(&log.file, number, log.read, index);
            self.take(number, scanned);
        }
    }

    /// Reads what others wrote since the last look, unless that was just now; whether there was anything. `own` is the
    /// segment that this process alone writes.
    pub(super) fn look(&mut self, folder: &Path, own: Option<usize>, index: &mut Places) -> bool {
        let started = Instant::now();
        if self.next.is_some_and(|next| started < next) {
            return false;
        }
        let mut came = false;
        for path in segments_in(folder) {
            came |= self.look_into(path, own, index);
        }
        let rest = PAUSE.max(started.elapsed() * REST);
        self.next = Some(Instant::now() + rest);
        came
    }

    /// The next look is due at once.
    pub(super) fn expect(&mut self) {
        self.next = None;
    }

    fn look_into(&mut self, path: PathBuf, own: Option<usize>, index: &mut Places) -> bool {
        // Opened anew: that is when a network file system asks for what others wrote. What cannot be opened is
        // somebody's matter who opens the cache.
        let Ok(file) = File::open(&path) else {
            return false;
        };
        let Ok(found) = file.metadata() else {
            return false;
        };
        let number = match self.numbers.get(&id_of(&found)) {
            Some(number) if own == Some(*number) => return false,
            Some(number) => *number,
            None => {
                let added = file.try_clone().and_then(|file| self.add(path, file));
                let Ok(number) = added else {
                    return false;
                };
                number
            }
        };
        let log = &mut self.all[number];
        if std::mem::replace(&mut log.seen, found.len()) == found.len() {
            return false;
        }
        let scanned = scan(&file, number, log.read, index);
        self.take(number, scanned)
    }

    /// Notes what was found behind what was read of a segment; whether there were answers.
    fn take(&mut self, number: usize, scanned: std::io::Result<Scanned>) -> bool {
        let log = &mut self.all[number];
        match scanned {
            Ok(scanned) => {
                log.read = scanned.end;
                self.skipped += scanned.damaged;
                if scanned.damaged > 0 {
                    self.damaged.insert(log.path.clone());
                }
                scanned.good > 0
            }
            Err(why) => {
                // What is behind it is lost as well, so it will be asked for again.
                tracing::warn!("{} cannot be read to its end: {why}", log.path.display());
                self.skipped += 1;
                false
            }
        }
    }

    /// Whether damaged lines were met in a segment since this was asked last.
    pub(super) fn take_damaged(&mut self, path: &Path) -> bool {
        self.damaged.remove(path)
    }

    /// Damaged lines that were skipped since this was asked last.
    pub(super) fn take_skipped(&mut self) -> usize {
        std::mem::take(&mut self.skipped)
    }
}

/// The segments of a folder, in order.
fn segments_in(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let mut paths: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "log"))
        .collect();
    paths.sort();
    paths
}

fn id_of(found: &Metadata) -> (u64, u64) {
    (found.dev(), found.ino())
}

/// Puts the answers of a segment into the index, from a line's beginning to the last whole line.
fn scan(
    mut file: &File,
    number: usize,
    start: u64,
    index: &mut Places,
) -> std::io::Result<Scanned> {
    file.seek(SeekFrom::Start(start))?;
    let mut reader = BufReader::new(file);
    let mut line = Vec::new();
    let mut scanned = Scanned {
        end: start,
        good: 0,
        damaged: 0,
    };
    loop {
        line.clear();
        let len = reader.read_until(b'\n', &mut line)?;
        // The last line may be unfinished: it is being written, or its process was killed.
        if !line.ends_with(b"\n") {
            return Ok(scanned);
        }
        match checked(&line) {
            Some((key, _)) => {
                let place = Place {
                    segment: number,
                    offset: scanned.end,
                    len,
                };
                index.insert(&key, place);
                scanned.good += 1;
            }
            None => scanned.damaged += 1,
        }
        scanned.end += len as u64;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::super::format_line;
    use super::*;
    use crate::digest::Digest;

    fn line(i: u8) -> String {
        format_line(&Digest::of_bytes(&[i]), &json!(i))
    }

    fn knows(index: &Places, i: u8) -> bool {
        index.get(&Digest::of_bytes(&[i])).is_some()
    }

    #[test]
    fn a_look_reads_on_and_rests_unless_it_is_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, mut index) = (dir.path(), Places::new(dir.path().to_owned()));
        std::fs::write(folder.join("000000.log"), line(0)).unwrap();
        let mut logs = Logs::open(folder).unwrap();
        logs.read(&mut index);
        assert!(knows(&index, 0));
        assert!(!logs.look(folder, None, &mut index), "nothing is new");
        // Both grow: one that was read, and a new one.
        std::fs::write(folder.join("000000.log"), line(0) + &line(1)).unwrap();
        std::fs::write(folder.join("000001.log"), line(2)).unwrap();
        logs.next = Some(Instant::now() + Duration::from_secs(3600));
        assert!(!logs.look(folder, None, &mut index), "it rests");
        logs.expect();
        assert!(logs.look(folder, None, &mut index));
        assert!(knows(&index, 1) && knows(&index, 2));
        assert_eq!((logs.all.len(), logs.all[0].read), (2, logs.all[0].seen));
        // A damaged line is told of once; what follows it is read.
        let text = format!("{}damaged\n{}", line(2), line(3));
        std::fs::write(folder.join("000001.log"), text).unwrap();
        for came in [true, false] {
            logs.expect();
            assert_eq!(logs.look(folder, None, &mut index), came);
        }
        assert!(knows(&index, 3));
        assert_eq!([logs.take_skipped(), logs.take_skipped()], [1, 0]);
        assert!(logs.take_damaged(&folder.join("000001.log")));
    }

    #[test]
    fn a_name_that_means_another_file_is_read_from_its_beginning() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, mut index) = (dir.path(), Places::new(dir.path().to_owned()));
        let path = folder.join("000000.log");
        std::fs::write(&path, line(0)).unwrap();
        let mut logs = Logs::open(folder).unwrap();
        logs.read(&mut index);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, line(1)).unwrap();
        assert!(logs.look(folder, None, &mut index));
        assert!(knows(&index, 0) && knows(&index, 1));
    }

    #[test]
    fn what_this_process_writes_is_not_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, mut index) = (dir.path(), Places::new(dir.path().to_owned()));
        std::fs::write(folder.join("000000.log"), line(0)).unwrap();
        let mut logs = Logs::open(folder).unwrap();
        assert!(!logs.look(folder, Some(0), &mut index));
        assert!(!knows(&index, 0));
        // One that others append to as well: what they wrote before is read.
        let long = line(0).len() as u64;
        logs.appended(0, long, 1);
        assert_eq!(logs.all[0].read, 0);
        logs.expect();
        assert!(logs.look(folder, None, &mut index));
        logs.appended(0, long, 1);
        assert_eq!((logs.all[0].read, logs.all[0].seen), (long + 1, long + 1));
    }
}
