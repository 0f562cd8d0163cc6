//! [`Rows`]: row ids with the digests of their texts, for millions of rows: about 24 bytes each,
//! because ids of one data set (`banking77:train:17`) differ in their number alone.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};
use serde::ser::{Serialize, SerializeMap, Serializer};
use sha2::{Digest, Sha256};

/// A row: what stands before the number of its id, the number, the digest of its text.
pub(super) type Entry<'a> = (&'a str, Option<u64>, u64);

/// Row id → digest of its text. On disk a map of texts, the digest in hex.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Rows {
    /// By what stands before the number; then by the number.
    numbered: BTreeMap<String, BTreeMap<u64, u64>>,
    /// Ids that end otherwise.
    named: BTreeMap<String, u64>,
}

impl Rows {
    /// Adds rows, as (id, text).
    pub(super) fn add<'a>(&mut self, rows: impl IntoIterator<Item = (&'a str, &'a str)>) {
        for (id, text) in rows {
            self.insert(id, text_digest(text));
        }
    }

    /// Adds a row whose text has this digest.
    pub(super) fn insert(&mut self, id: &str, digest: u64) {
        match parts(id) {
            None => {
                self.named.insert(id.to_owned(), digest);
            }
            Some((start, number)) => match self.numbered.get_mut(start) {
                Some(numbers) => {
                    numbers.insert(number, digest);
                }
                None => {
                    let numbers = BTreeMap::from([(number, digest)]);
                    self.numbered.insert(start.to_owned(), numbers);
                }
            },
        }
    }

    /// Adds the other's rows.
    pub(super) fn merge(&mut self, other: &Self) {
        for (start, numbers) in &other.numbered {
            let own = self.numbered.entry(start.clone()).or_default();
            own.extend(numbers);
        }
        let named = other.named.iter();
        (self.named).extend(named.map(|(id, digest)| (id.clone(), *digest)));
    }

    pub(super) fn contains(&self, id: &str) -> bool {
        match parts(id) {
            None => self.named.contains_key(id),
            Some((start, number)) => {
                (self.numbered.get(start)).is_some_and(|numbers| numbers.contains_key(&number))
            }
        }
    }

    /// All rows, in the order in which they are written.
    pub(super) fn entries(&self) -> impl Iterator<Item = Entry<'_>> {
        let numbered = (self.numbered.iter()).flat_map(|(start, numbers)| {
            let start = start.as_str();
            let numbers = numbers.iter();
            numbers.map(move |(number, digest)| (start, Some(*number), *digest))
        });
        let named = self.named.iter();
        numbered.chain(named.map(|(id, digest)| (id.as_str(), None, *digest)))
    }

    /// Digests of the texts.
    pub(super) fn texts(&self) -> impl Iterator<Item = u64> {
        let numbered = self.numbered.values().flat_map(BTreeMap::values);
        numbered.chain(self.named.values()).copied()
    }

    pub(super) fn len(&self) -> usize {
        let numbered: usize = self.numbered.values().map(BTreeMap::len).sum();
        numbered + self.named.len()
    }

    /// How many rows of each set there are: by what stands before their numbers, without the
    /// colon; rows that have none are a set of the name "".
    pub(super) fn sets(&self) -> impl Iterator<Item = (&str, usize)> {
        let numbered = self.numbered.iter();
        let numbered = numbered.map(|(start, rows)| (start.trim_end_matches(':'), rows.len()));
        let named = Some(("", self.named.len())).filter(|(_, count)| *count > 0);
        numbered.chain(named)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// An id's number and what stands before it; none where it would not be spelt the same again.
fn parts(id: &str) -> Option<(&str, u64)> {
    let digits = id.bytes().rev().take_while(u8::is_ascii_digit).count();
    let (start, digits) = id.split_at(id.len() - digits);
    let spelt_otherwise = digits.len() > 1 && digits.starts_with('0');
    let number = digits.parse().ok().filter(|_| !spelt_otherwise)?;
    Some((start, number))
}

/// Equal for texts that differ in case and spaces only: the first 8 bytes of a SHA-256.
pub(super) fn text_digest(text: &str) -> u64 {
    let words: Vec<&str> = text.split_whitespace().collect();
    let digest = Sha256::digest(words.join(" ").to_lowercase());
    digest[..8]
        .iter()
        .fold(0, |all, byte| all << 8 | u64::from(*byte))
}

impl Serialize for Rows {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.len()))?;
        for (start, numbers) in &self.numbered {
            for (number, digest) in numbers {
                map.serialize_entry(&format!("{start}{number}"), &format!("{digest:016x}"))?;
            }
        }
        for (id, digest) in &self.named {
            map.serialize_entry(id, &format!("{digest:016x}"))?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Rows {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = Rows;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("row ids with the digests of their texts")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Rows, A::Error> {
                let mut rows = Rows::default();
                while let Some((id, hex)) = map.next_entry::<String, String>()? {
                    let digest = u64::from_str_radix(&hex, 16).map_err(A::Error::custom)?;
                    rows.insert(&id, digest);
                }
                Ok(rows)
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_id_comes_back_as_it_was() {
        let ids = [
            "d:train:0",
            "d:train:10",
            "d:train:9",
            "d:train:007",
            "",
            "7",
            "x",
            "ü9",
            "d:99999999999999999999",
            "a\"b:1",
        ];
        let mut rows = Rows::default();
        rows.add(ids.map(|id| (id, "Some  text")));
        assert_eq!(rows.len(), ids.len());
        assert!(ids.iter().all(|id| rows.contains(id)));
        assert!(
            ["d:train:1", "d:train:00", "d:train:", "y"]
                .iter()
                .all(|id| !rows.contains(id))
        );
        let text = serde_json::to_string(&rows).unwrap();
        let plain: BTreeMap<String, String> = serde_json::from_str(&text).unwrap();
        assert!(ids.iter().all(|id| plain.contains_key(*id)));
        assert_eq!(serde_json::from_str::<Rows>(&text).unwrap(), rows);
        assert!(serde_json::from_str::<Rows>("{\"a\": \"no hex\"}").is_err());
        assert!(rows.texts().all(|text| text == text_digest("some text")));
    }
}
