//! [`LongLineage`]: the lineage of what is made from more rows than memory is to hold. Some ten
//! thousand rows are held; the others lie in a scratch file, sorted run by run, and are merged as
//! they are written down.
//!
//! Invariant: what is written is what a [`Lineage`] of the same rows would be, byte for byte.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet};
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use serde::ser::{Error, Serialize, SerializeMap, SerializeStruct, Serializer};

use super::rows::{Entry, Rows, text_digest};
use super::{Lineage, Overlap, ScoredRow};

/// Rows that memory holds: a few MB, by ids of one data set.
const IN_MEMORY: usize = 1 << 16;

/// Makes the scratch file: an empty one, to be read and written.
pub type Scratch<'a> = &'a dyn Fn() -> io::Result<File>;

/// A lineage whose rows go by one after the other.
pub struct LongLineage<'a> {
    scratch: Scratch<'a>,
    /// Rows in memory from which on they go to the file.
    most: usize,
    /// The latest rows to train on.
    recent: Rows,
    /// How often one was added to them.
    held: usize,
    /// Those before them.
    runs: Option<Runs>,
    /// Ids and texts that are asked about in the end.
    watched: (HashSet<String>, HashSet<u64>),
    /// What else is known; of the rows to train on only those that are asked about.
    known: Lineage,
}

impl<'a> LongLineage<'a> {
    /// No rows yet; `scratch` is called once there are many.
    pub fn new(scratch: Scratch<'a>) -> Self {
        Self {
            scratch,
            most: IN_MEMORY,
            recent: Rows::default(),
            held: 0,
            runs: None,
            watched: (HashSet::new(), HashSet::new()),
            known: Lineage::default(),
        }
    }

    /// Rows that [`Self::overlap`] will be asked about, as (id, text); to be told before others
    /// are added.
    pub fn watch<'r>(&mut self, rows: impl IntoIterator<Item = (&'r str, &'r str)>) {
        for (id, text) in rows {
            self.watched.0.insert(id.to_owned());
            self.watched.1.insert(text_digest(text));
        }
    }

    /// Adds a row that something is made from.
    ///
    /// # Errors
    /// When the scratch file cannot be made or written.
    pub fn train(&mut self, id: &str, text: &str) -> io::Result<()> {
        let digest = text_digest(text);
        if self.watched.0.contains(id) || self.watched.1.contains(&digest) {
            self.known.trained.insert(id, digest);
        }
        self.recent.insert(id, digest);
        self.held += 1;
        if self.held > self.most {
            self.spill()?;
        }
        Ok(())
    }

    /// What is known besides the rows to train on.
    pub fn others(&mut self) -> &mut Lineage {
        &mut self.known
    }

    /// Which of these rows had a part in it; they are among those that were watched.
    pub fn overlap<'r>(&self, rows: impl IntoIterator<Item = ScoredRow<'r>>) -> Overlap {
        self.known.overlap(rows)
    }

    /// The whole, to be written.
    ///
    /// # Errors
    /// When the scratch file cannot be written.
    pub fn finish(mut self) -> io::Result<FinishedLineage> {
        if self.runs.is_some() {
            self.spill()?;
        }
        let trained = match self.runs {
            Some(runs) => Trained::Runs(runs),
            None => Trained::Rows(self.recent),
        };
        Ok(FinishedLineage {
            trained,
            known: self.known,
        })
    }

    fn spill(&mut self) -> io::Result<()> {
        let runs = match self.runs.take() {
            Some(runs) => runs,
            None => Runs {
                file: (self.scratch)()?,
                runs: Vec::new(),
            },
        };
        let runs = self.runs.insert(runs);
        runs.add(&self.recent)?;
        self.recent = Rows::default();
        self.held = 0;
        Ok(())
    }
}

/// A lineage that is written as a [`Lineage`] is.
pub struct FinishedLineage {
    trained: Trained,
    /// All but the rows to train on.
    known: Lineage,
}

enum Trained {
    Rows(Rows),
    /// At least one.
    Runs(Runs),
}

impl Serialize for FinishedLineage {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Lineage {
            trained: _,
            selected,
            taught,
            unknown_teachers,
        } = &self.known;
        let trained = match &self.trained {
            Trained::Rows(rows) => !rows.is_empty(),
            Trained::Runs(_) => true,
        };
        let others = [
            !selected.is_empty(),
            !taught.is_empty(),
            !unknown_teachers.is_empty(),
        ];
        let fields = usize::from(trained) + others.iter().filter(|some| **some).count();
        let mut out = serializer.serialize_struct("Lineage", fields)?;
        match &self.trained {
            Trained::Rows(rows) if trained => out.serialize_field("trained", rows)?,
            Trained::Rows(_) => {}
            Trained::Runs(runs) => out.serialize_field("trained", runs)?,
        }
        let [is_selected, is_taught, has_unknown] = others;
        if is_selected {
            out.serialize_field("selected", selected)?;
        }
        if is_taught {
            out.serialize_field("taught", taught)?;
        }
        if has_unknown {
            out.serialize_field("unknown_teachers", unknown_teachers)?;
        }
        out.end()
    }
}

/// Rows in a file, run by run, each in the order in which rows are written.
struct Runs {
    file: File,
    runs: Vec<Run>,
}

struct Run {
    bytes: Range<u64>,
    rows: usize,
}

impl Runs {
    fn add(&mut self, rows: &Rows) -> io::Result<()> {
        let start = self.runs.last().map_or(0, |run| run.bytes.end);
        let mut end = start;
        let mut out = BufWriter::new(&self.file);
        for entry in rows.entries() {
            end += write_entry(&mut out, entry)?;
        }
        out.flush()?;
        self.runs.push(Run {
            bytes: start..end,
            rows: rows.len(),
        });
        Ok(())
    }
}

impl Serialize for Runs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut rows = Merge::of(self).map_err(S::Error::custom)?;
        let mut map = serializer.serialize_map(None)?;
        while let Some(((named, start, number), digest)) = rows.pop().map_err(S::Error::custom)? {
            let id = match named {
                true => start,
                false => format!("{start}{number}"),
            };
            map.serialize_entry(&id, &format!("{digest:016x}"))?;
        }
        map.end()
    }
}

/// What rows are sorted by: whether the id ends without a number, what stands before the number,
/// and the number.
type Key = (bool, String, u64);

/// Runs as one, in order; of equal ids the latest counts.
struct Merge<'a> {
    /// Each with the rows that are left of it.
    parts: Vec<(BufReader<Part<'a>>, usize)>,
    /// The next row of each part, with the part.
    heads: BinaryHeap<Reverse<(Key, usize, u64)>>,
}

impl<'a> Merge<'a> {
    fn of(runs: &'a Runs) -> io::Result<Self> {
        let part = |run: &Run| {
            let part = Part {
                file: &runs.file,
                bytes: run.bytes.clone(),
            };
            (BufReader::new(part), run.rows)
        };
        let mut merge = Self {
            parts: runs.runs.iter().map(part).collect(),
            heads: BinaryHeap::new(),
        };
        for part in 0..merge.parts.len() {
            merge.advance(part)?;
        }
        Ok(merge)
    }

    fn advance(&mut self, part: usize) -> io::Result<()> {
        let (reader, left) = &mut self.parts[part];
        if *left > 0 {
            *left -= 1;
            let (key, digest) = read_entry(reader)?;
            self.heads.push(Reverse((key, part, digest)));
        }
        Ok(())
    }

    /// The next row.
    fn pop(&mut self) -> io::Result<Option<(Key, u64)>> {
        let Some(Reverse((key, part, mut digest))) = self.heads.pop() else {
            return Ok(None);
        };
        self.advance(part)?;
        // Of one id they come in the order of the runs.
        while self
            .heads
            .peek()
            .is_some_and(|Reverse((next, ..))| *next == key)
        {
            let Some(Reverse((_, part, latest))) = self.heads.pop() else {
                break;
            };
            digest = latest;
            self.advance(part)?;
        }
        Ok(Some((key, digest)))
    }
}

/// A part of a file, read without moving its cursor.
struct Part<'a> {
    file: &'a File,
    bytes: Range<u64>,
}

impl Read for Part<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.bytes.end - self.bytes.start).unwrap_or(usize::MAX);
        let room = buffer.len().min(left);
        let read = self.file.read_at(&mut buffer[..room], self.bytes.start)?;
        self.bytes.start += read as u64;
        Ok(read)
    }
}

/// Writes a row; how many bytes it takes.
fn write_entry(out: &mut impl Write, (start, number, digest): Entry<'_>) -> io::Result<u64> {
    let len = u32::try_from(start.len()).map_err(io::Error::other)?;
    out.write_all(&[u8::from(number.is_none())])?;
    out.write_all(&len.to_le_bytes())?;
    out.write_all(start.as_bytes())?;
    out.write_all(&number.unwrap_or_default().to_le_bytes())?;
    out.write_all(&digest.to_le_bytes())?;
    Ok(1 + 4 + u64::from(len) + 8 + 8)
}

fn read_entry(input: &mut impl Read) -> io::Result<(Key, u64)> {
    let mut head = [0u8; 5];
    input.read_exact(&mut head)?;
    let [named, len @ ..] = head;
    let mut start = vec![0u8; u32::from_le_bytes(len) as usize];
    input.read_exact(&mut start)?;
    let start = String::from_utf8(start).map_err(io::Error::other)?;
    let mut tail = [[0u8; 8]; 2];
    for bytes in &mut tail {
        input.read_exact(bytes)?;
    }
    let [number, digest] = tail.map(u64::from_le_bytes);
    Ok(((named != 0, start, number), digest))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Numbers of several data sets and of several lengths, ids without one, and some twice.
    fn rows() -> Vec<(String, String)> {
        let mut rows: Vec<(String, String)> = (0..300)
            .map(|i| (format!("d:train:{}", i * 7919 % 211), format!("text {i}")))
            .collect();
        rows.extend((0..50).map(|i| (format!("e{}:x", i * 31 % 40), format!("other {i}"))));
        for id in [
            "",
            "7",
            "d:train:007",
            "ü9",
            "d:99999999999999999999",
            "a\"b:1",
        ] {
            rows.push((id.to_owned(), "Some  text".to_owned()));
        }
        rows
    }

    fn plain(rows: &[(String, String)]) -> Lineage {
        let mut plain = Lineage::default();
        plain.train(rows.iter().map(|(id, text)| (id.as_str(), text.as_str())));
        plain
    }

    #[test]
    fn what_is_written_is_the_same_however_much_memory_holds() {
        let rows = rows();
        let mut teacher = Lineage::default();
        teacher.select([("t:1", "taught")]);
        let mut expected = plain(&rows);
        expected.learn_from(&teacher);
        expected.learn_from_unknown("ab12");
        let expected = serde_json::to_string_pretty(&expected).unwrap();
        for most in [1, 10, 64, IN_MEMORY] {
            let scratch = tempfile::tempfile;
            let mut long = LongLineage::new(&scratch);
            long.most = most;
            for (id, text) in &rows {
                long.train(id, text).unwrap();
            }
            assert!(long.recent.len() <= most);
            long.others().learn_from(&teacher);
            long.others().learn_from_unknown("ab12");
            let written = serde_json::to_string_pretty(&long.finish().unwrap()).unwrap();
            assert_eq!(written, expected, "{most}");
        }
    }

    #[test]
    fn nothing_is_written_as_nothing_and_a_scratch_file_that_cannot_be_made_is_an_error() {
        let none = || -> io::Result<File> { Err(io::ErrorKind::StorageFull.into()) };
        let mut long = LongLineage::new(&none);
        assert_eq!(
            serde_json::to_string_pretty(&LongLineage::new(&none).finish().unwrap()).unwrap(),
            serde_json::to_string_pretty(&Lineage::default()).unwrap()
        );
        long.most = 1;
        long.train("a", "x").unwrap();
        assert!(long.train("b", "y").is_err());
    }

    #[test]
    fn watched_rows_are_found_again() {
        let rows = rows();
        let asked = [
            ("d:train:5", "unseen"),
            ("f:test:0", "TEXT  299"),
            ("f:test:1", "new"),
        ];
        let scored = || {
            asked.map(|(id, text)| ScoredRow {
                id,
                text,
                by_teacher: false,
            })
        };
        let scratch = tempfile::tempfile;
        let mut long = LongLineage::new(&scratch);
        long.most = 10;
        long.watch(asked);
        for (id, text) in &rows {
            long.train(id, text).unwrap();
        }
        let found = long.overlap(scored());
        assert_eq!(found, plain(&rows).overlap(scored()));
        assert_eq!(found.trained, ["d:train:5"]);
        assert_eq!(found.same_text, ["f:test:0"]);
    }
}
