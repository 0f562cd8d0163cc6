//! [`ActionCache`]: what an action made, by the key of what went into it.
//!
//! One small file a result, `actions/ab/<key>.json`: a line with the blake3 of
//! the body, then the body. A result is put only after its objects are in the
//! store, so a result that can be read is whole.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::artifact::Artifact;
use crate::digest::Digest;
use crate::durability::Unsynced;
use crate::error::CacheError;
use crate::record::{folder, is_unfinished, write_atomic};
use crate::remote::RemoteCache;
use crate::store::ArtifactStore;

/// Digest of everything that goes into an action.
pub type ActionKey = Digest;

/// Entries of a folder that are looked at for each result that is looked for.
const LISTED: usize = 4;
/// Version of [`ActionResult`]. Another one on disk is a miss.
pub const ACTION_VERSION: u32 = 1;
/// What is stored in place of [`ACTION_VERSION`] where an output is a program: programs of before do
/// not know that field, and take such a result for one of another version, not for a damaged one.
const PROGRAMS_VERSION: u32 = 2;

/// What an action made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActionResult {
    /// [`ACTION_VERSION`].
    pub version: u32,
    /// The key it is stored under.
    pub key: ActionKey,
    /// What was hashed into the key.
    pub manifest: Value,
    /// Outputs by name.
    pub outputs: BTreeMap<String, OutputRecord>,
    /// Numbers and short facts that the action reported.
    pub metrics: BTreeMap<String, Value>,
    /// Milliseconds that the work took.
    pub took_ms: u64,
    /// UTC, RFC 3339; sorts as text.
    pub finished_at: String,
    /// Who asked, for people and for [`ActionCache::recent`]; not part of the key.
    pub label: String,
}

/// The label of a part of a step's work that is a result of its own: its kind and the step.
#[must_use]
pub fn part_label(kind: &str, step: &str) -> String {
    format!("{kind} of `{step}`")
}

impl ActionResult {
    /// The step that first asked for it, where it is a part of a step's work ([`part_label`]).
    #[must_use]
    pub fn part_of(&self) -> Option<&str> {
        let (kind, step) = self.label.split_once(" of `")?;
        let is_part = self.outputs.is_empty() && self.manifest["kind"] == kind;
        step.strip_suffix('`').filter(|_| is_part)
    }

    /// Digests of its outputs and inputs; the members of trees are not among them.
    pub(crate) fn digests(&self) -> impl Iterator<Item = Digest> {
        let outputs = self.outputs.values().flat_map(|o| o.value.artifacts());
        let inputs = self.manifest["inputs"].as_object().into_iter().flatten();
        let inputs = inputs
            .flat_map(|(_, list)| list.as_array().into_iter().flatten())
            .filter_map(|input| Digest::parse(input["digest"].as_str()?));
        outputs.map(|artifact| artifact.digest).chain(inputs)
    }
}

/// One output.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OutputRecord {
    /// The caller's type name.
    #[serde(rename = "type")]
    pub ty: String,
    /// The artifact or artifacts.
    pub value: OutputValue,
}

/// One artifact or a list of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OutputValue {
    /// One artifact.
    One(Artifact),
    /// Labelled artifacts in order.
    List(Vec<ListItem>),
}

/// One artifact of a list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListItem {
    /// Its name within the list.
    pub label: String,
    /// The artifact.
    pub artifact: Artifact,
}

impl OutputValue {
    /// Digest of the artifact, or of the list's record.
    #[must_use]
    pub fn digest(&self) -> Digest {
        match self {
            Self::One(artifact) => artifact.digest,
            Self::List(items) => Digest::of_record("list", items),
        }
    }

    /// All artifacts in order.
    pub fn artifacts(&self) -> impl Iterator<Item = &Artifact> {
        let (one, list) = match self {
            Self::One(artifact) => (Some(artifact), [].as_slice()),
            Self::List(items) => (None, items.as_slice()),
        };
        one.into_iter()
            .chain(list.iter().map(|item| &item.artifact))
    }
}

/// Results by key. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ActionCache {
    root: Arc<PathBuf>,
    warnings: Arc<Mutex<Vec<String>>>,
    /// Absent for readers.
    unsynced: Option<Arc<Unsynced>>,
    /// Asked for what is not here, and sent what is put.
    remote: Option<(Arc<RemoteCache>, ArtifactStore)>,
}

impl ActionCache {
    pub(crate) fn new(
        root: PathBuf,
        warnings: Arc<Mutex<Vec<String>>>,
        unsynced: Option<Arc<Unsynced>>,
    ) -> Self {
        Self {
            root: Arc::new(root),
            warnings,
            unsynced,
            remote: None,
        }
    }

    /// The same results, and those of a remote cache that have no outputs: parts of a step's work
    /// that are worth an action of their own. What is put goes there too.
    #[must_use]
    pub fn shared_through(&self, remote: &Arc<RemoteCache>, store: &ArtifactStore) -> Self {
        Self {
            remote: Some((Arc::clone(remote), store.clone())),
            ..self.clone()
        }
    }

    /// The results in a folder, for a process that does work for the one that holds the cache.
    #[must_use]
    pub fn open(root: PathBuf) -> Self {
        Self::new(root, Arc::default(), None)
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.root
    }

    /// Where the result of a key lies, or would lie.
    #[must_use]
    pub fn path(&self, key: &ActionKey) -> PathBuf {
        let hex = key.to_hex();
        self.root
            .join(&hex[..2])
            .join(format!("{}.json", &hex[2..]))
    }

    /// Each of these keys has a result here. Nothing is read.
    #[must_use]
    pub fn has_all(&self, mut keys: Vec<ActionKey>) -> bool {
        keys.sort_unstable();
        let one_folder = |a: &ActionKey, b: &ActionKey| a.as_bytes()[0] == b.as_bytes()[0];
        keys.chunk_by(one_folder).all(|keys| self.folder_has(keys))
    }

    /// The folder of these sorted keys has a result for each. To list it costs less than to ask for
    /// one file after the other, unless much else lies there: what the start of the list does not
    /// hold is asked for.
    fn folder_has(&self, keys: &[ActionKey]) -> bool {
        let path = self.path(&keys[0]);
        let mut met = vec![false; keys.len()];
        let mut hex = keys[0].to_hex();
        let listed = path.parent().map(std::fs::read_dir);
        let listed = listed.and_then(Result::ok).into_iter().flatten().flatten();
        for entry in listed.take(LISTED * keys.len()) {
            let name = entry.file_name();
            let Some(rest) = name.to_str().and_then(|name| name.strip_suffix(".json")) else {
                continue;
            };
            hex.truncate(2);
            hex.push_str(rest);
            let place = Digest::parse(&hex).and_then(|key| keys.binary_search(&key).ok());
            if let Some(place) = place
                && entry.file_type().is_ok_and(|kind| kind.is_file())
            {
                met[place] = true;
            }
        }
        let mut all = met.into_iter().zip(keys);
        all.all(|(met, key)| met || self.path(key).exists())
    }

    /// The key of the result that [`ActionCache::path`] puts there.
    pub(crate) fn key_at(&self, path: &Path) -> Option<ActionKey> {
        let inner = path.strip_prefix(self.root.as_path()).ok()?;
        let folder = inner.parent()?.to_str()?;
        let name = inner.file_stem()?.to_str()?;
        Digest::parse(&format!("{folder}{name}"))
    }

    /// The result of `key`; `None` when there is none, or it is of another version, or damaged: then
    /// whoever holds the cache sets the file aside and keeps a warning.
    #[must_use]
    pub fn get(&self, key: &ActionKey) -> Option<ActionResult> {
        self.get_here(key).or_else(|| {
            let (remote, _) = self.remote.as_ref()?;
            let result = remote.part(key)?;
            // It is asked for again next time where it cannot be kept.
            self.put_here(&result)
                .unwrap_or_else(|e| tracing::debug!("{e}"));
            Some(result)
        })
    }

    fn get_here(&self, key: &ActionKey) -> Option<ActionResult> {
        let path = self.path(key);
        let text = std::fs::read(&path).ok()?;
        match parse(&text) {
            Parsed::Good(result) if result.key == *key => Some(*result),
            Parsed::OtherVersion(_) => None,
            Parsed::Good(_) | Parsed::Damaged => {
                // A reader holds nothing: what it read may have been replaced by now.
                if self.unsynced.is_some() {
                    self.set_aside(&path);
                }
                None
            }
        }
    }

    /// Stores a result. A kill does not lose it once this returned.
    ///
    /// # Errors
    /// When the cache cannot be written.
    pub fn put(&self, result: &ActionResult) -> Result<(), CacheError> {
        self.put_here(result)?;
        if let Some((remote, store)) = &self.remote {
            remote.send(store, result, false);
        }
        Ok(())
    }

    fn put_here(&self, result: &ActionResult) -> Result<(), CacheError> {
        let path = self.path(&result.key);
        let text = to_text(result);
        write_atomic(&path, text.as_bytes())?;
        if let Some(unsynced) = &self.unsynced {
            unsynced.add(&path, text.len() as u64);
        }
        Ok(())
    }

    /// Every readable result, in no order.
    pub fn all(&self) -> impl Iterator<Item = ActionResult> {
        self.files("json")
            .filter_map(|path| from_text(&std::fs::read(path).ok()?))
    }

    /// Files of this extension, in no order.
    fn files(&self, extension: &'static str) -> impl Iterator<Item = PathBuf> {
        self.entries()
            .filter(move |path| path.extension().is_some_and(|e| e == extension))
    }

    fn entries(&self) -> impl Iterator<Item = PathBuf> + use<> {
        folder(&self.root).flat_map(|sub| folder(&sub))
    }

    /// Damaged results that were set aside.
    pub(crate) fn set_aside_files(&self) -> impl Iterator<Item = PathBuf> {
        self.files("bad")
    }

    /// What is being written, or what killed processes had begun to write.
    pub(crate) fn unfinished(&self) -> impl Iterator<Item = PathBuf> {
        self.entries().filter(|path| is_unfinished(path))
    }

    /// Files that cannot be read as results.
    pub(crate) fn damaged(&self) -> Vec<PathBuf> {
        let mut damaged: Vec<PathBuf> = self
            .files("json")
            .filter(|path| match std::fs::read(path) {
                Ok(text) => matches!(parse(&text), Parsed::Damaged),
                Err(e) => e.kind() != std::io::ErrorKind::NotFound,
            })
            .collect();
        damaged.sort();
        damaged
    }

    pub(crate) fn set_aside(&self, path: &Path) {
        let bad = path.with_extension("bad");
        // When it cannot be moved it is refused again next time.
        let _ = std::fs::rename(path, &bad);
        self.warnings
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(format!(
                "a cached result was damaged and set aside: {}",
                bad.display()
            ));
    }
}

/// What a file of a result holds.
pub(crate) enum Parsed {
    /// A result.
    Good(Box<ActionResult>),
    /// One of another program's version, 0 where none is said.
    OtherVersion(u64),
    /// Neither.
    Damaged,
}

/// A result as it is stored.
pub(crate) fn to_text(result: &ActionResult) -> String {
    // Its maps have names for keys, so it is always JSON.
    let body = serde_json::to_string(&*stored(result)).unwrap_or_default();
    let mut text = Digest::of_bytes(body.as_bytes()).to_hex();
    text.reserve_exact(body.len() + 2);
    text.push('\n');
    text.push_str(&body);
    text.push('\n');
    text
}

/// The result with the version that it is stored with.
fn stored(result: &ActionResult) -> Cow<'_, ActionResult> {
    let outputs = result.outputs.values();
    let mut artifacts = outputs.flat_map(|output| output.value.artifacts());
    if result.version != ACTION_VERSION || !artifacts.any(|artifact| artifact.executable) {
        return Cow::Borrowed(result);
    }
    Cow::Owned(ActionResult {
        version: PROGRAMS_VERSION,
        ..result.clone()
    })
}

/// A stored result, if it is whole and of this version.
pub(crate) fn from_text(text: &[u8]) -> Option<ActionResult> {
    match parse(text) {
        Parsed::Good(result) => Some(*result),
        Parsed::OtherVersion(_) | Parsed::Damaged => None,
    }
}

pub(crate) fn parse(text: &[u8]) -> Parsed {
    let body = std::str::from_utf8(text).ok().and_then(|text| {
        let (digest, body) = text.strip_suffix('\n')?.split_once('\n')?;
        (Digest::parse(digest)? == Digest::of_bytes(body.as_bytes())).then_some(body)
    });
    let Some(value) = body.and_then(|b| serde_json::from_str::<Value>(b).ok()) else {
        return Parsed::Damaged;
    };
    let version = value.get("version").and_then(Value::as_u64);
    if ![ACTION_VERSION, PROGRAMS_VERSION]
        .map(|known| Some(u64::from(known)))
        .contains(&version)
    {
        return Parsed::OtherVersion(version.unwrap_or_default());
    }
    let Ok(result) = serde_json::from_value::<ActionResult>(value) else {
        return Parsed::Damaged;
    };
    Parsed::Good(Box::new(ActionResult {
        version: ACTION_VERSION,
        ..result
    }))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn result(label: &str, at: &str) -> ActionResult {
        ActionResult {
            version: ACTION_VERSION,
            key: Digest::of_bytes(at.as_bytes()),
            manifest: serde_json::json!({ "kind": "k" }),
            outputs: BTreeMap::new(),
            metrics: BTreeMap::new(),
            took_ms: 1,
            finished_at: at.into(),
            label: label.into(),
        }
    }

    fn cache(dir: &Path) -> ActionCache {
        let unsynced = Some(Arc::new(Unsynced::new(dir)));
        ActionCache::new(dir.to_owned(), Arc::default(), unsynced)
    }

    #[test]
    fn all_results_are_there_or_not() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path());
        let keys = |numbers: std::ops::Range<u16>| -> Vec<ActionKey> {
            let mut key = [7; 32];
            let numbers = numbers.map(|number| {
                key[1..3].copy_from_slice(&number.to_be_bytes());
                key[0] = 7 + u8::from(number & 3 == 0);
                Digest::from_slice(&key).unwrap()
            });
            numbers.collect()
        };
        assert!(cache.has_all(Vec::new()));
        assert!(!cache.has_all(keys(0..1)));
        for key in keys(0..500) {
            cache
                .put(&ActionResult {
                    key,
                    ..result("l", "2026")
                })
                .unwrap();
        }
        // All, few among many, and each but one.
        assert!(cache.has_all(keys(0..500)));
        assert!(
            keys(0..500)
                .into_iter()
                .all(|key| cache.has_all(vec![key, key]))
        );
        assert!(!cache.has_all(keys(1..501)));
        let gone = keys(250..251)[0];
        std::fs::remove_file(cache.path(&gone)).unwrap();
        std::fs::write(cache.path(&gone).with_extension("bad"), "").unwrap();
        assert!(!cache.has_all(keys(0..500)) && !cache.has_all(vec![gone]));
        assert!(cache.has_all(keys(251..500)));
    }

    #[test]
    fn any_truncation_or_flip_is_a_miss() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path());
        let good = result("l", "2026");
        cache.put(&good).unwrap();
        let path = cache.path(&good.key);
        let bytes = std::fs::read(&path).unwrap();
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 0x20;
            for bad in [&bytes[..at], &flipped] {
                std::fs::write(&path, bad).unwrap();
                let _ = std::fs::remove_file(path.with_extension("bad"));
                assert_eq!(cache.get(&good.key), None, "at {at}");
            }
        }
        cache.put(&good).unwrap();
        assert_eq!(cache.get(&good.key), Some(good));
        assert!(!cache.warnings.lock().unwrap().is_empty());
    }

    #[test]
    fn a_reader_leaves_damage_where_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path());
        let good = result("l", "2026");
        let path = cache.path(&good.key);
        cache.put(&good).unwrap();
        std::fs::write(&path, "damaged").unwrap();
        assert_eq!(
            ActionCache::open(dir.path().to_owned()).get(&good.key),
            None
        );
        assert!(path.exists() && !path.with_extension("bad").exists());
        assert_eq!(cache.get(&good.key), None);
        assert!(!path.exists() && path.with_extension("bad").exists());
    }

    #[test]
    fn a_part_names_its_step_and_nothing_else_is_one() {
        let part = |label: &str| result(label, "2026");
        assert_eq!(part(&part_label("k", "s[a]")).part_of(), Some("s[a]"));
        for other in ["p s", "other of `s`", "k of `s", "k of s"] {
            assert_eq!(part(other).part_of(), None, "{other}");
        }
        let mut step = part(&part_label("k", "s"));
        let output = OutputRecord {
            ty: "file".into(),
            value: OutputValue::List(Vec::new()),
        };
        step.outputs.insert("out".into(), output);
        assert_eq!(step.part_of(), None);
    }

    #[test]
    fn another_version_is_a_miss_and_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path());
        let mut newer = result("l", "2026");
        newer.version = PROGRAMS_VERSION + 1;
        cache.put(&newer).unwrap();
        assert_eq!(cache.get(&newer.key), None);
        assert!(cache.path(&newer.key).exists());
    }

    #[test]
    fn a_result_with_a_program_is_of_another_version_to_those_that_know_none() {
        let with = |executable: bool| {
            let mut result = result("l", "2026");
            let artifact = Artifact {
                digest: Digest::of_bytes(b"x"),
                kind: crate::ArtifactKind::File,
                size: 1,
                executable,
            };
            let output = OutputRecord {
                ty: "file".into(),
                value: OutputValue::One(artifact),
            };
            result.outputs.insert("out".into(), output);
            result
        };
        for (executable, version) in [(false, ACTION_VERSION), (true, PROGRAMS_VERSION)] {
            let result = with(executable);
            let text = to_text(&result);
            assert!(text.contains(&format!(r#""version":{version},"#)), "{text}");
            assert_eq!(from_text(text.as_bytes()), Some(result));
        }
        // As they were stored for a while.
        let body = crate::canonical_json(&with(true));
        let text = format!("{}\n{body}\n", Digest::of_bytes(body.as_bytes()));
        assert_eq!(from_text(text.as_bytes()), Some(with(true)));
    }
}
