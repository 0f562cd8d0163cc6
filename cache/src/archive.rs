//! An archive: runs with all that they need, in one file that moves them to another cache.
//!
//! A tar file, compressed with zstd. First [`HEADER`], then objects, then results, then the
//! runs' folders (less [`REPLACED`]): whatever is cut off leaves no result without its objects.
//! Everything is checked against its digest when it is read.

mod export;
mod import;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use self::export::export;
pub use self::import::import;
use crate::error::CacheError;

/// Version of the archive's layout.
const VERSION: u32 = 1;
/// Folder of a run with what published outputs replaced: files of the user's that nobody else has,
/// and that are no part of what a run made.
pub const REPLACED: &str = "replaced";
/// The first entry.
const HEADER: &str = "flowrun-archive.json";
/// zstd's level: its default.
const LEVEL: i32 = 3;

#[derive(Serialize, Deserialize)]
struct Header {
    version: u32,
    runs: Vec<String>,
}

/// What an archive held.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Moved {
    /// Ids of the runs.
    pub runs: Vec<String>,
    /// Results.
    pub results: usize,
    /// Objects.
    pub objects: usize,
    /// Bytes of the objects.
    pub bytes: u64,
}

/// Why an archive could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is no archive, or is damaged.
    #[error("{}: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The cache.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::fs::File;
    use std::path::Path;

    use super::export::append;
    use super::*;
    use crate::OpenOptions;
    use crate::action::{ACTION_VERSION, ActionKey, ActionResult, OutputRecord, OutputValue};
    use crate::cache::{Cache, CacheReader};
    use crate::digest::Digest;

    const RUN: &str = "20260101-000000-aaaa";

    fn open(dir: &Path) -> Cache {
        Cache::open(dir, &OpenOptions::no_wait("test")).unwrap()
    }

    /// A cache with one run, one result and a folder as its output.
    fn filled(dir: &Path) -> (Cache, ActionKey) {
        let cache = open(&dir.join("from"));
        let folder = dir.join("folder");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("member"), "member").unwrap();
        let tree = cache.store().put_path(&folder).unwrap();
        let input = cache.store().put_bytes(b"input").unwrap();
        let key = Digest::of_bytes(b"key");
        let output = OutputRecord {
            ty: "file".into(),
            value: OutputValue::One(tree),
        };
        let result = ActionResult {
            version: ACTION_VERSION,
            key,
            manifest: serde_json::json!({ "inputs": { "x": [{ "digest": input.digest }] } }),
            outputs: BTreeMap::from([("out".to_owned(), output)]),
            metrics: BTreeMap::new(),
            took_ms: 1,
            finished_at: String::new(),
            label: "p s".into(),
        };
        cache.actions().put(&result).unwrap();
        let run = cache.new_run_dir(RUN).unwrap();
        std::fs::write(run.join("events.jsonl"), "{}\n").unwrap();
        std::fs::write(run.join("logs/s.log"), "log\n").unwrap();
        (cache, key)
    }

    fn exported(dir: &Path) -> (PathBuf, ActionKey, Moved) {
        let (cache, key) = filled(dir);
        let reader = CacheReader::open(cache.dir());
        let file = dir.join("moved.tar.zst");
        let written = export(&reader, &reader.runs(), &BTreeSet::from([key]), &file).unwrap();
        (file, key, written)
    }

    #[test]
    fn a_run_moves_with_its_results_and_objects() {
        let dir = tempfile::tempdir().unwrap();
        let (file, key, written) = exported(dir.path());
        assert_eq!((written.results, written.objects), (1, 3));
        let to = open(&dir.path().join("to"));
        assert_eq!(import(&to, &file).unwrap(), written);
        let result = to.actions().get(&key).unwrap();
        let artifacts = result.outputs["out"].value.artifacts();
        artifacts.for_each(|artifact| to.store().verify(artifact).unwrap());
        let log = to.dir().join("runs").join(RUN).join("logs/s.log");
        assert_eq!(std::fs::read_to_string(log).unwrap(), "log\n");
        assert_eq!(import(&to, &file).unwrap(), written, "twice does no harm");
    }

    #[test]
    fn what_a_run_replaced_and_links_stay_behind() {
        let dir = tempfile::tempdir().unwrap();
        let (cache, key) = filled(dir.path());
        let run = cache.dir().join("runs").join(RUN);
        std::fs::create_dir_all(run.join(REPLACED).join("results")).unwrap();
        std::fs::write(run.join(REPLACED).join("results/notes"), "mine").unwrap();
        let nowhere = Path::new("nowhere");
        std::os::unix::fs::symlink(nowhere, run.join(REPLACED).join("results/link")).unwrap();
        std::os::unix::fs::symlink(nowhere, run.join("logs/link")).unwrap();
        let reader = CacheReader::open(cache.dir());
        let file = dir.path().join("moved.tar.zst");
        export(&reader, &reader.runs(), &BTreeSet::from([key]), &file).unwrap();
        let to = open(&dir.path().join("to"));
        import(&to, &file).unwrap();
        let run = to.dir().join("runs").join(RUN);
        assert!(run.join("logs/s.log").is_file() && !run.join("logs/link").is_symlink());
        assert!(!run.join(REPLACED).exists());
    }

    #[test]
    fn a_cut_or_changed_archive_is_refused_and_what_was_read_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let (file, key, _) = exported(dir.path());
        let bytes = std::fs::read(&file).unwrap();
        for at in (0..bytes.len()).step_by(7) {
            let mut flipped = bytes.clone();
            flipped[at] ^= 0x10;
            for (name, bad) in [("cut", &bytes[..at]), ("flipped", &flipped)] {
                let to_dir = dir.path().join(format!("{name}{at}"));
                std::fs::write(&file, bad).unwrap();
                let to = open(&to_dir);
                let imported = import(&to, &file);
                if name == "cut" {
                    assert!(imported.is_err(), "cut at {at}");
                }
                let found = crate::verify::verify(&CacheReader::open(&to_dir));
                assert_eq!(found.damage, [], "{name} at {at}");
                if imported.is_ok() {
                    assert!(to.actions().get(&key).is_some(), "{name} at {at}");
                }
            }
        }
    }

    #[test]
    fn an_archive_never_writes_outside_the_cache() {
        let dir = tempfile::tempdir().unwrap();
        let to = open(&dir.path().join("to"));
        let header = |runs: &[&str]| serde_json::json!({ "version": VERSION, "runs": runs });
        for (run, entry) in [
            ("r", "runs/r/../../../evil"),
            ("..", "runs/../evil"),
            ("r", "objects/../../evil"),
            ("r", "runs/other/evil"),
        ] {
            let file = dir.path().join("evil.tar.zst");
            let zstd = zstd::Encoder::new(File::create(&file).unwrap(), LEVEL).unwrap();
            let mut tar = tar::Builder::new(zstd);
            append(&mut tar, HEADER, header(&[run]).to_string().as_bytes()).unwrap();
            let mut raw = super::export::entry(1);
            // The tar crate refuses to write such a name itself.
            raw.as_gnu_mut().unwrap().name[..entry.len()].copy_from_slice(entry.as_bytes());
            raw.set_cksum();
            tar.append(&raw, &b"x"[..]).unwrap();
            tar.into_inner().unwrap().finish().unwrap();
            let refused = import(&to, &file).unwrap_err();
            assert!(matches!(refused, ArchiveError::Damaged { .. }), "{entry}");
            assert!(!dir.path().join("evil").exists() && !to.dir().join("evil").exists());
        }
    }
}
