//! [`Table`]: a hash table of places in a file that has no name and ends with the process.
//!
//! The file is pages of 128 slots. A key's page is told by its first bits; what does not fit there
//! lies in the next one. Slots fill from the front of a page and are never freed, so a search ends
//! at the first free one. Memory holds no slot: the system's file cache does, while it has room.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::places::Place;
use crate::digest::Digest;

/// Bytes of a key that are kept: who reads an answer compares the whole key.
const KEY: usize = 16;
/// Key, offset (8 bytes), segment (4), length (4); a length of 0 is a free slot. It comes last, so
/// that a slot that was not written whole is free.
const SLOT: usize = 32;
/// Slots of a page.
const SLOTS: usize = 128;
const PAGE: usize = SLOT * SLOTS;

/// A hash table in a file.
#[derive(Debug)]
pub(super) struct Table {
    /// Where the file lies.
    folder: PathBuf,
    file: File,
    /// 2 to this power is the number of pages; at least 1.
    bits: u32,
    used: u64,
}

/// Entries of which a table of so many pages takes no more: at three quarters few pages are full.
fn room(bits: u32) -> u64 {
    ((SLOTS as u64) << bits) / 4 * 3
}

impl Table {
    /// An empty table with room for `entries`; it grows beyond that.
    pub(super) fn new(folder: &Path, entries: usize) -> io::Result<Self> {
        let mut bits = 1;
        while room(bits) < entries as u64 {
            bits += 1;
        }
        Self::of_bits(folder, bits)
    }

    fn of_bits(folder: &Path, bits: u32) -> io::Result<Self> {
        let file = tempfile::tempfile_in(folder)?;
        file.set_len((PAGE as u64) << bits)?;
        Ok(Self {
            folder: folder.to_owned(),
            file,
            bits,
            used: 0,
        })
    }

    /// Number of keys.
    pub(super) fn len(&self) -> u64 {
        self.used
    }

    /// The place of a key.
    pub(super) fn get(&self, key: &Digest) -> io::Result<Option<Place>> {
        let (_, found) = self.find(key_of(key.as_bytes()))?;
        Ok(found)
    }

    /// Sets the place of a key. When it fails, what was there before is there still.
    pub(super) fn insert(&mut self, key: &Digest, place: Place) -> io::Result<()> {
        let slot = slot_of(key_of(key.as_bytes()), place)?;
        if self.used >= room(self.bits) {
            *self = self.grown()?;
        }
        self.write(&slot)
    }

    fn write(&mut self, slot: &[u8]) -> io::Result<()> {
        let (at, old) = self.find(key_of(slot))?;
        self.file.write_all_at(slot, at)?;
        self.used += u64::from(old.is_none());
        Ok(())
    }

    /// The page that a key belongs to.
    fn home(&self, key: &[u8]) -> u64 {
        let first = key.iter().take(8);
        let first = first.fold(0u64, |all, byte| all << 8 | u64::from(*byte));
        first >> (u64::BITS - self.bits)
    }

    /// Where the key's slot begins, or the one that it would get, and the place in it.
    fn find(&self, key: &[u8]) -> io::Result<(u64, Option<Place>)> {
        let pages = 1u64 << self.bits;
        let mut page = self.home(key);
        let mut bytes = [0u8; PAGE];
        for _ in 0..pages {
            let start = page * PAGE as u64;
            self.file.read_exact_at(&mut bytes, start)?;
            for (number, slot) in bytes.chunks_exact(SLOT).enumerate() {
                let at = start + (number * SLOT) as u64;
                let Some(place) = place_in(slot) else {
                    return Ok((at, None));
                };
                if key_of(slot) == key {
                    return Ok((at, Some(place)));
                }
            }
            page = (page + 1) % pages;
        }
        Err(io::Error::other("the table of answers is full"))
    }

    /// The same entries in twice the pages. What belongs to a page belongs to one of two
    /// neighbours then, so the files are read and written from front to back.
    fn grown(&self) -> io::Result<Self> {
        let mut next = Self::of_bits(&self.folder, self.bits + 1)?;
        // What did not fit into its own page: few, as a table has room.
        let mut displaced: Vec<u8> = Vec::new();
        let mut bytes = [0u8; PAGE];
        for page in 0..1u64 << self.bits {
            self.file.read_exact_at(&mut bytes, page * PAGE as u64)?;
            let mut halves = [[0u8; PAGE]; 2];
            let mut filled = [0; 2];
            let slots = bytes.chunks_exact(SLOT);
            for slot in slots.take_while(|slot| place_in(slot).is_some()) {
                let home = next.home(key_of(slot));
                if home / 2 != page {
                    displaced.extend_from_slice(slot);
                    continue;
                }
                let half = usize::from(home % 2 == 1);
                halves[half][filled[half]..][..SLOT].copy_from_slice(slot);
                filled[half] += SLOT;
                next.used += 1;
            }
            next.file
                .write_all_at(halves.as_flattened(), 2 * page * PAGE as u64)?;
        }
        for slot in displaced.chunks_exact(SLOT) {
            next.write(slot)?;
        }
        Ok(next)
    }
}

/// The part of a digest, or of a slot, that is compared.
fn key_of(bytes: &[u8]) -> &[u8] {
    &bytes[..KEY]
}

/// The bytes of a slot.
fn slot_of(key: &[u8], place: Place) -> io::Result<[u8; SLOT]> {
    let small = |n: usize| u32::try_from(n).map_err(io::Error::other);
    let (segment, len) = (small(place.segment)?, small(place.len)?);
    let mut slot = [0u8; SLOT];
    slot[..KEY].copy_from_slice(key);
    slot[16..24].copy_from_slice(&place.offset.to_le_bytes());
    slot[24..28].copy_from_slice(&segment.to_le_bytes());
    slot[28..].copy_from_slice(&len.to_le_bytes());
    Ok(slot)
}

/// What a slot holds; `None` when it is free.
fn place_in(slot: &[u8]) -> Option<Place> {
    let number = |bytes: &[u8]| {
        let bytes = bytes.iter().rev();
        bytes.fold(0u64, |all, byte| all << 8 | u64::from(*byte))
    };
    let len = number(&slot[28..]);
    (len > 0).then(|| Place {
        segment: number(&slot[24..28]) as usize,
        offset: number(&slot[16..24]),
        len: len as usize,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn place(i: usize) -> Place {
        Place {
            segment: i % 3,
            offset: i as u64 * 1_000_003,
            len: 1 + i,
        }
    }

    fn key(i: usize) -> Digest {
        Digest::of_bytes(&i.to_le_bytes())
    }

    #[test]
    fn all_that_was_put_in_is_found_while_it_grows() {
        let dir = tempfile::tempdir().unwrap();
        let mut table = Table::new(dir.path(), 0).unwrap();
        for i in 0..5_000 {
            table.insert(&key(i), place(i)).unwrap();
        }
        assert!(table.bits >= 6, "{}", table.bits);
        // The last one counts.
        table.insert(&key(7), place(99)).unwrap();
        assert_eq!(table.len(), 5_000);
        for i in 0..5_000 {
            let expected = if i == 7 { place(99) } else { place(i) };
            assert_eq!(table.get(&key(i)).unwrap(), Some(expected), "{i}");
        }
        assert_eq!(table.get(&key(5_000)).unwrap(), None);
        // No file is left to be found.
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn keys_of_one_page_go_on_in_the_next_and_around_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let mut table = Table::new(dir.path(), 0).unwrap();
        let crowded = |i: u8| {
            let mut bytes = [255u8; 32];
            bytes[8] = i;
            Digest::from_slice(&bytes).unwrap()
        };
        // All belong to the last page, which takes 128; when it grows, to the last one again.
        for i in 0..=250 {
            table.insert(&crowded(i), place(usize::from(i))).unwrap();
        }
        assert_eq!(table.len(), 251);
        for i in 0..=250 {
            let found = table.get(&crowded(i)).unwrap();
            assert_eq!(found, Some(place(usize::from(i))), "{i}");
        }
        assert_eq!(table.get(&crowded(251)).unwrap(), None);
    }

    #[test]
    fn a_slot_that_was_not_written_whole_is_free() {
        let whole = slot_of(&[9; KEY], place(5)).unwrap();
        assert_eq!(place_in(&whole), Some(place(5)));
        for cut in 0..=28 {
            let mut torn = [0u8; SLOT];
            torn[..cut].copy_from_slice(&whole[..cut]);
            assert_eq!(place_in(&torn), None, "{cut}");
        }
        let long = Place {
            len: 1 << 40,
            ..place(0)
        };
        assert!(slot_of(&[9; KEY], long).is_err());
    }
}
