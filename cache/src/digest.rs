//! [`Digest`]: the blake3 hash of bytes or of a typed record.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

/// Bytes of a file that are read before a large buffer is taken for the rest.
const SMALL: usize = 1 << 12;

/// A blake3 hash (32 bytes); text form is 64 lower-case hex characters.
#[derive(Copy, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

impl Digest {
    /// Hash of bytes.
    #[must_use]
    pub fn of_bytes(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// Hash of bytes that lie in several pieces.
    #[must_use]
    pub fn of_parts(parts: &[&[u8]]) -> Self {
        let mut hasher = blake3::Hasher::new();
        for part in parts {
            hasher.update(part);
        }
        Self(*hasher.finalize().as_bytes())
    }

    /// Hash of a file's bytes.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn of_file(path: &Path) -> io::Result<Self> {
        let mut file = File::open(path)?;
        // Most outputs of small steps fit, and need no large buffer.
        let mut start = [0; SMALL];
        let mut filled = 0;
        while filled < SMALL {
            match file.read(&mut start[filled..]) {
                Ok(0) => return Ok(Self::of_bytes(&start[..filled])),
                Ok(bytes) => filled += bytes,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(&start).update_reader(file)?;
        Ok(Self(*hasher.finalize().as_bytes()))
    }

    /// Hash of a record: its type, a newline, its canonical JSON. The type in
    /// front keeps records of different types from ever sharing a digest.
    #[must_use]
    pub fn of_record(record_type: &str, record: &impl Serialize) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(record_type.as_bytes());
        hasher.update(b"\n");
        hasher.update(canonical_json(record).as_bytes());
        Self(*hasher.finalize().as_bytes())
    }

    /// Reads the text form.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let bytes = text.as_bytes();
        if bytes.len() != 64 || bytes.iter().any(u8::is_ascii_uppercase) {
            return None;
        }
        blake3::Hash::from_hex(bytes)
            .ok()
            .map(|h| Self(*h.as_bytes()))
    }

    /// The 32 bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// A digest of these bytes; `None` unless there are 32.
    #[must_use]
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// The text form.
    #[must_use]
    pub fn to_hex(&self) -> String {
        blake3::Hash::from_bytes(self.0).to_hex().to_string()
    }

    /// The first 12 characters of the text form, for people.
    #[must_use]
    pub fn short(&self) -> String {
        self.to_hex()[..12].to_owned()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({})", self.short())
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.to_hex())
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text)
            .ok_or_else(|| serde::de::Error::custom(format!("`{text}` is not a digest")))
    }
}

/// JSON with sorted keys and no spaces: equal values give equal text.
///
/// Lists keep their order. A value that JSON cannot hold (a map whose keys are
/// not text) becomes an `{"unserialisable": …}` record with the reason.
#[must_use]
pub fn canonical_json(record: &impl Serialize) -> String {
    let value = serde_json::to_value(record)
        .unwrap_or_else(|error| serde_json::json!({ "unserialisable": error.to_string() }));
    let mut out = Vec::new();
    write_canonical(&value, &mut out);
    String::from_utf8(out).expect("JSON is text")
}

fn write_canonical(value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::Array(items) => {
            out.push(b'[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push(b',');
                }
                write_canonical(item, out);
            }
            out.push(b']');
        }
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_by(|a, b| a.0.cmp(b.0));
            out.push(b'{');
            for (i, (key, item)) in entries.into_iter().enumerate() {
                if i > 0 {
                    out.push(b',');
                }
                write_json(key, out);
                out.push(b':');
                write_canonical(item, out);
            }
            out.push(b'}');
        }
        scalar => write_json(scalar, out),
    }
}

fn write_json(scalar: &impl Serialize, out: &mut Vec<u8>) {
    serde_json::to_writer(out, scalar).expect("memory takes every byte");
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn text_form_round_trips_and_rejects_others() {
        let digest = Digest::of_bytes(b"x");
        assert_eq!(Digest::parse(&digest.to_hex()), Some(digest));
        assert_eq!(Digest::parse(&digest.to_hex().to_uppercase()), None);
        assert_eq!(Digest::parse("abc"), None);
    }

    #[test]
    fn the_record_type_is_part_of_the_hash() {
        assert_ne!(Digest::of_record("a", &1), Digest::of_record("b", &1));
    }

    proptest! {
        #[test]
        fn keys_ignore_map_order(entries in proptest::collection::hash_map("[a-z]{1,6}", 0i64..99, 0..12)) {
            let forward: std::collections::BTreeMap<_, _> = entries.iter().collect();
            prop_assert_eq!(canonical_json(&entries), canonical_json(&forward));
        }
    }
}
