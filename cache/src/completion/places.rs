//! [`Places`]: where each answer lies. Some ten thousand are held in memory, more in a file, so
//! that memory does not grow with what is kept.
//!
//! The file is no part of the cache: each process makes its own from the segments, and it is gone
//! with the process. Where none can be made (a cache that is only read), memory holds all.

use std::collections::HashMap;
use std::path::PathBuf;

use super::table::Table;
use crate::digest::Digest;

/// Answers whose places memory holds: about 8 MB.
const IN_MEMORY: usize = 1 << 16;

/// Where an answer lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Number of the segment, as this process counts them.
    pub(super) segment: usize,
    /// First byte of its line.
    pub(super) offset: u64,
    /// Bytes of its line.
    pub(super) len: usize,
}

/// Places by key. Invariant: what memory holds of a key is the latest.
#[derive(Debug)]
pub(super) struct Places {
    memory: HashMap<Digest, Place>,
    table: Option<Table>,
    /// Where the table's file is made.
    folder: PathBuf,
    /// Places in memory from which on they go to the table.
    most: usize,
}

impl Places {
    /// No places yet; the file is made in `folder`, once it is needed.
    pub(super) fn new(folder: PathBuf) -> Self {
        Self {
            memory: HashMap::new(),
            table: None,
            folder,
            most: IN_MEMORY,
        }
    }

    /// Moves places to the file as soon as there are more than these.
    #[cfg(test)]
    pub(super) fn spill_from(&mut self, most: usize) {
        self.most = most;
    }

    /// The place of a key. What cannot be read is not known.
    pub(super) fn get(&self, key: &Digest) -> Option<Place> {
        let in_memory = self.memory.get(key).copied();
        in_memory.or_else(|| self.table.as_ref()?.get(key).ok().flatten())
    }

    /// Sets the place of a key.
    pub(super) fn insert(&mut self, key: &Digest, place: Place) {
        let tabled = match &mut self.table {
            Some(table) if self.memory.is_empty() => table.insert(key, place),
            // It failed before: what it holds can be read still.
            Some(_) => Err(std::io::ErrorKind::StorageFull.into()),
            None => {
                self.memory.insert(*key, place);
                if self.memory.len() > self.most {
                    self.spill();
                }
                return;
            }
        };
        if let Err(why) = tabled {
            tracing::debug!("the place of an answer stays in memory: {why}");
            self.memory.insert(*key, place);
        }
    }

    /// Number of keys; one that is set anew after the file failed counts twice.
    pub(super) fn len(&self) -> usize {
        let tabled = self.table.as_ref().map_or(0, Table::len);
        self.memory.len() + usize::try_from(tabled).unwrap_or(usize::MAX)
    }

    /// Moves what memory holds to the file.
    fn spill(&mut self) {
        match self.tabled() {
            Ok(table) => {
                self.table = Some(table);
                self.memory = HashMap::new();
            }
            Err(why) => {
                let folder = self.folder.display();
                tracing::debug!("{folder}: the places of answers stay in memory: {why}");
                self.most = usize::MAX;
            }
        }
    }

    fn tabled(&self) -> std::io::Result<Table> {
        let mut table = Table::new(&self.folder, 2 * self.memory.len())?;
        for (key, place) in &self.memory {
            table.insert(key, *place)?;
        }
        Ok(table)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn place(i: usize) -> Place {
        Place {
            segment: 0,
            offset: i as u64,
            len: 1,
        }
    }

    fn key(i: usize) -> Digest {
        Digest::of_bytes(&i.to_le_bytes())
    }

    fn filled(folder: PathBuf, most: usize) -> Places {
        let mut places = Places::new(folder);
        places.spill_from(most);
        for i in 0..100 {
            places.insert(&key(i), place(i));
        }
        places
    }

    #[test]
    fn places_are_the_same_in_memory_and_in_the_file() {
        let dir = tempfile::tempdir().unwrap();
        for (most, in_memory) in [(10, 0), (99, 0), (100, 100)] {
            let mut places = filled(dir.path().to_owned(), most);
            assert_eq!(places.memory.len(), in_memory, "{most}");
            places.insert(&key(3), place(1000));
            assert_eq!(places.len(), 100);
            assert_eq!(places.get(&key(3)), Some(place(1000)));
            assert_eq!(places.get(&key(99)), Some(place(99)));
            assert_eq!(places.get(&key(100)), None);
        }
    }

    #[test]
    fn where_no_file_can_be_made_memory_holds_all() {
        let dir = tempfile::tempdir().unwrap();
        let places = filled(dir.path().join("not there"), 10);
        assert!(places.table.is_none());
        assert_eq!(places.len(), 100);
        assert!((0..100).all(|i| places.get(&key(i)) == Some(place(i))));
    }

    #[test]
    fn what_the_file_does_not_take_stays_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        let mut places = filled(dir.path().to_owned(), 10);
        // No slot holds so large a length.
        let long = Place {
            len: 1 << 40,
            ..place(7)
        };
        places.insert(&key(7), long);
        places.insert(&key(100), place(100));
        assert_eq!(places.memory.len(), 2);
        assert_eq!(places.get(&key(7)), Some(long));
        assert_eq!(places.get(&key(8)), Some(place(8)));
        assert_eq!(places.get(&key(100)), Some(place(100)));
    }
}
