//! [`Logs`]: the segments of a folder, as far as this process has read them. They grow while it works: jobs and other
//! processes append to segments of their own, and a look reads on where the last one ended.
//!
//! Invariant: of the bytes before [`Log::read`] each line is in the index, or was counted as damaged.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::{File, Metadata};
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use super::checked;
use super::places::{Place, Places};
use crate::digest::Digest;
use crate::error::CacheError;

/// Shortest wait between two looks that nobody asked for.
const PAUSE: Duration = Duration::from_millis(100);
/// A look is followed by a wait of this many times what it took, so that looks cost little even where there are
/// thousands of segments.
const REST: u32 = 20;
/// Segments that are held open to be read. There may be thousands, one for each job, and a process
/// may have about a thousand files open.
const OPEN: usize = 128;

/// What tells a file from another one of the same name: device, inode, and when it was made, where the file system
/// knows that, because an inode may be used again.
type Id = (u64, u64, Option<SystemTime>);

/// The segments, by their number in this process.
#[derive(Debug, Default)]
pub(super) struct Logs {
    all: Vec<Log>,
    /// Numbers by file, because a name may come to mean another one. Where one was added twice, the later number.
    numbers: HashMap<Id, usize>,
    /// Those that were opened to be read, the oldest first.
    open: VecDeque<usize>,
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
    id: Id,
    /// While it is open; always, where it was handed over.
    file: Option<File>,
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
            let found = File::open(&path).and_then(|file| file.metadata());
            let id = id_of(&found.map_err(failed)?);
            logs.push(path.clone(), id, None);
        }
        Ok(logs)
    }

    /// Takes up a segment with a file that stays open; its number.
    pub(super) fn add(&mut self, path: PathBuf, file: File) -> std::io::Result<usize> {
        let id = id_of(&file.metadata()?);
        Ok(self.push(path, id, Some(file)))
    }

    /// What was read of the same file before counts as read.
    fn push(&mut self, path: PathBuf, id: Id, file: Option<File>) -> usize {
        let before = self.numbers.get(&id).and_then(|at| self.all.get(*at));
        let (read, seen) = before.map_or((0, 0), |log| (log.read, log.seen));
        let number = self.all.len();
        self.all.push(Log {
            path,
            id,
            file,
            read,
            seen,
        });
        self.numbers.insert(id, number);
        number
    }

    /// The file of a segment; none when it is gone, or its name means another one.
    pub(super) fn file(&mut self, number: usize) -> Option<&mut File> {
        let log = self.all.get_mut(number)?;
        if log.file.is_none() {
            log.file = Some(log.opened()?);
            self.open.push_back(number);
            self.close_oldest();
        }
        self.all.get_mut(number)?.file.as_mut()
    }

    fn close_oldest(&mut self) {
        if self.open.len() > OPEN
            && let Some(oldest) = self.open.pop_front()
            && let Some(log) = self.all.get_mut(oldest)
        {
            log.file = None;
        }
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
            // The next look finds what has its name now.
            let Some(file) = log.opened() else {
                continue;
            };
            // First: what is written meanwhile is new to the next look.
            log.seen = file.metadata().map_or(0, |found| found.len());
            let scanned = scan(&file, number, log.read, index, &mut |_, _| false);
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
        let id = id_of(&found);
        let number = match self.numbers.get(&id).copied() {
            Some(number) if own == Some(number) => return false,
            Some(number) => number,
            None => self.push(path, id, None),
        };
        let log = &mut self.all[number];
        if std::mem::replace(&mut log.seen, found.len()) == found.len() {
            return false;
        }
        let start = log.read;
        let mut earlier = Earlier {
            all: &self.all,
            last: None,
        };
        // An answer that this process may have told stays what it is.
        let stays = &mut |key: &Digest, index: &Places| {
            let there = index.get(key);
            there.is_some_and(|place| earlier.holds(key, place))
        };
        let scanned = scan(&file, number, start, index, stays);
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

impl Log {
    /// The file, opened anew, if its name still means it.
    fn opened(&self) -> Option<File> {
        let file = File::open(&self.path).ok()?;
        let found = file.metadata().ok()?;
        (id_of(&found) == self.id).then_some(file)
    }
}

/// Segments that were read before, opened anew one at a time.
struct Earlier<'a> {
    all: &'a [Log],
    /// The number of the last one, and its file, if it is there still.
    last: Option<(usize, Option<File>)>,
}

impl Earlier<'_> {
    /// The answer of `key` is still in its place.
    fn holds(&mut self, key: &Digest, place: Place) -> bool {
        if self.last.as_ref().map(|(number, _)| *number) != Some(place.segment) {
            let file = self.all.get(place.segment).and_then(Log::opened);
            self.last = Some((place.segment, file));
        }
        let Some((_, Some(file))) = &self.last else {
            return false;
        };
        let mut line = vec![0; place.len];
        file.read_exact_at(&mut line, place.offset).is_ok()
            && checked(&line).is_some_and(|(found, _)| found == *key)
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

fn id_of(found: &Metadata) -> Id {
    (found.dev(), found.ino(), found.created().ok())
}

/// Puts the answers of a segment into the index, from a line's beginning to the last whole line; but those
/// whose places there are to stay.
fn scan(
    mut file: &File,
    number: usize,
    start: u64,
    index: &mut Places,
    stays: &mut dyn FnMut(&Digest, &Places) -> bool,
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
                if !stays(&key, index) {
                    index.insert(&key, place);
                }
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
        std::fs::write(folder.join("new"), line(1)).unwrap();
        std::fs::rename(folder.join("new"), &path).unwrap();
        assert!(logs.look(folder, None, &mut index));
        assert!(knows(&index, 0) && knows(&index, 1));
        assert!(logs.file(0).is_none() && logs.file(1).is_some());
    }

    #[test]
    fn an_answer_stays_what_it_is_while_it_can_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, mut index) = (dir.path(), Places::new(dir.path().to_owned()));
        let key = Digest::of_bytes(&[0]);
        let write = |name: &str, lines: String| std::fs::write(folder.join(name), lines).unwrap();
        write("000000.log", line(0));
        let mut logs = Logs::open(folder).unwrap();
        logs.read(&mut index);
        // Another process was asked the same at the same time.
        write("000001.log", format_line(&key, &json!("other")) + &line(1));
        assert!(logs.look(folder, None, &mut index));
        assert_eq!(index.get(&key).unwrap().segment, 0);
        assert!(knows(&index, 1));
        write("000000.log", "damaged\n".to_owned());
        write("000002.log", format_line(&key, &json!("new")));
        logs.expect();
        assert!(logs.look(folder, None, &mut index));
        assert_eq!(index.get(&key).unwrap().segment, 2);
    }

    #[test]
    fn few_of_many_segments_are_open_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, mut index) = (dir.path(), Places::new(dir.path().to_owned()));
        let many = OPEN + 20;
        for i in 0..many {
            std::fs::write(folder.join(format!("{i:06}.log")), line(0)).unwrap();
        }
        let mut logs = Logs::open(folder).unwrap();
        logs.read(&mut index);
        let own = std::fs::File::create(folder.join("own.log")).unwrap();
        let own = logs.add(folder.join("own.log"), own).unwrap();
        assert!((0..many).all(|number| logs.file(number).is_some()));
        let is_open = |log: &&Log| log.file.is_some();
        assert_eq!(logs.all.iter().filter(is_open).count(), OPEN + 1);
        assert!(
            logs.all[own].file.is_some(),
            "what is written to stays open"
        );
        // Those that were closed are opened again.
        assert!(logs.file(0).is_some());
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
