//! An archive: runs with all that they need, in one file that moves them to another cache.
//!
//! A tar file, compressed with zstd. First [`HEADER`], then objects, then results, then the
//! runs' folders (less [`REPLACED`]): whatever is cut off leaves no result without its objects.
//! Everything is checked against its digest when it is read.

use std::collections::BTreeSet;
use std::fs::{File, Permissions};
use std::io::{BufReader, BufWriter, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::action::{self, ActionKey, ActionResult};
use crate::cache::{Cache, CacheReader};
use crate::digest::Digest;
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
/// Bytes of a small entry (a header, a result) that are read at most.
const SMALL: u64 = 256 << 20;

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

/// Writes runs with the results of `keys` and their objects to `file`.
///
/// # Errors
/// When the file cannot be written, or something cannot be read. A file that was there before
/// is then as it was.
pub fn export(
    cache: &CacheReader,
    runs: &[PathBuf],
    keys: &BTreeSet<ActionKey>,
    file: &Path,
) -> Result<Moved, ArchiveError> {
    let fail = |source| ArchiveError::Io {
        path: file.to_owned(),
        source,
    };
    let folder = file
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    // As any file of the user's, less what the umask takes; a temporary file would be private.
    let mode = Permissions::from_mode(0o666);
    let mut temp = tempfile::Builder::new()
        .permissions(mode)
        .tempfile_in(folder)
        .map_err(fail)?;
    let mut written = Moved::default();
    {
        let buffer = BufWriter::new(temp.as_file_mut());
        let mut zstd = zstd::Encoder::new(buffer, LEVEL).map_err(fail)?;
        zstd.include_checksum(true).map_err(fail)?;
        let mut tar = tar::Builder::new(zstd);
        write(cache, runs, keys, &mut tar, &mut written).map_err(fail)?;
        let zstd = tar.into_inner().map_err(fail)?;
        zstd.finish().and_then(|mut b| b.flush()).map_err(fail)?;
    }
    temp.as_file().sync_data().map_err(fail)?;
    temp.persist(file).map_err(|e| fail(e.error))?;
    Ok(written)
}

fn write(
    cache: &CacheReader,
    runs: &[PathBuf],
    keys: &BTreeSet<ActionKey>,
    tar: &mut tar::Builder<impl Write>,
    written: &mut Moved,
) -> std::io::Result<()> {
    written.runs = runs.iter().map(|dir| name_of(dir)).collect();
    let header = Header {
        version: VERSION,
        runs: written.runs.clone(),
    };
    append(tar, HEADER, &serde_json::to_vec(&header)?)?;
    let mut results: Vec<ActionResult> = Vec::new();
    let mut objects = BTreeSet::new();
    for result in keys.iter().filter_map(|key| cache.actions().get(key)) {
        let mut outputs = result.outputs.values().flat_map(|o| o.value.artifacts());
        // One that is not whole would be made again there too.
        if outputs.all(|artifact| cache.store().contains(artifact)) {
            for digest in result.digests() {
                objects.insert(digest);
                objects.extend(cache.store().members(&digest));
            }
            drop(outputs);
            results.push(result);
        }
    }
    for digest in objects {
        append_object(tar, cache, &digest, written)?;
    }
    written.results = results.len();
    for result in &results {
        let text = action::to_text(result);
        append(tar, &format!("actions/{}", result.key), text.as_bytes())?;
    }
    for dir in runs {
        append_folder(tar, dir, &format!("runs/{}", name_of(dir)), &[REPLACED])?;
    }
    Ok(())
}

/// Appends an object; an input that was never stored is left out.
fn append_object(
    tar: &mut tar::Builder<impl Write>,
    cache: &CacheReader,
    digest: &Digest,
    written: &mut Moved,
) -> std::io::Result<()> {
    let path = cache.store().object_path(digest);
    if !path.exists() {
        return Ok(());
    }
    if Digest::of_file(&path)? != *digest {
        let text = format!(
            "object {} is damaged; run `flowrun cache repair`",
            digest.short()
        );
        return Err(std::io::Error::other(text));
    }
    let mut source = File::open(&path)?;
    let size = source.metadata()?.len();
    tar.append_data(&mut entry(size), format!("objects/{digest}"), &mut source)?;
    written.objects += 1;
    written.bytes += size;
    Ok(())
}

/// Appends the files of a folder, but for the links in it, and for what has one of the names.
fn append_folder(
    tar: &mut tar::Builder<impl Write>,
    folder: &Path,
    name: &str,
    without: &[&str],
) -> std::io::Result<()> {
    let mut paths: Vec<PathBuf> = crate::record::folder(folder).collect();
    paths.retain(|path| !without.contains(&name_of(path).as_str()));
    paths.sort();
    for path in paths {
        let name = format!("{name}/{}", name_of(&path));
        let kind = path.symlink_metadata()?.file_type();
        if kind.is_dir() {
            append_folder(tar, &path, &name, &[])?;
        } else if kind.is_file() {
            // Read whole: a record may still be growing.
            append(tar, &name, &std::fs::read(&path)?)?;
        }
    }
    Ok(())
}

fn append(tar: &mut tar::Builder<impl Write>, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    tar.append_data(&mut entry(bytes.len() as u64), name, bytes)
}

/// Entries carry neither time nor owner: equal content makes an equal archive.
fn entry(size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_size(size);
    header.set_mode(0o644);
    header
}

fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// Reads an archive into the held cache. What the cache has already stays as it is.
///
/// # Errors
/// When the file is no archive, is damaged, or the cache cannot be written. What was read until
/// then is whole.
pub fn import(cache: &Cache, file: &Path) -> Result<Moved, ArchiveError> {
    let source = File::open(file).map_err(|source| ArchiveError::Io {
        path: file.to_owned(),
        source,
    })?;
    let mut import = Import {
        cache,
        file,
        read: Moved::default(),
        scratch: cache.scratch()?,
    };
    let zstd = zstd::Decoder::new(BufReader::new(source)).map_err(|e| import.damaged(&e))?;
    let mut tar = tar::Archive::new(zstd);
    import.entries(&mut tar)?;
    // The checksum stands at the very end, behind the last entry.
    let rest = std::io::copy(&mut tar.into_inner(), &mut std::io::sink());
    rest.map_err(|e| import.damaged(&e))?;
    import.adopt_runs()?;
    cache.sync()?;
    Ok(import.read)
}

struct Import<'a> {
    cache: &'a Cache,
    file: &'a Path,
    read: Moved,
    /// Where runs are unpacked, before each is moved to its place as a whole.
    scratch: crate::cache::Scratch,
}

impl Import<'_> {
    fn damaged(&self, reason: &dyn std::fmt::Display) -> ArchiveError {
        ArchiveError::Damaged {
            path: self.file.to_owned(),
            reason: format!(
                "it is not an archive that `cache export` wrote, or it is damaged: {reason}"
            ),
        }
    }

    fn entries(&mut self, tar: &mut tar::Archive<impl Read>) -> Result<(), ArchiveError> {
        let mut entries = tar.entries().map_err(|e| self.damaged(&e))?;
        let mut first = entries
            .next()
            .ok_or_else(|| self.damaged(&"it is empty"))?
            .map_err(|e| self.damaged(&e))?;
        self.header(&mut first)?;
        for entry in entries {
            let mut entry = entry.map_err(|e| self.damaged(&e))?;
            let path = entry.path().map_err(|e| self.damaged(&e))?.into_owned();
            self.entry(&path, &mut entry)?;
        }
        Ok(())
    }

    fn header(&mut self, entry: &mut tar::Entry<'_, impl Read>) -> Result<(), ArchiveError> {
        let is_header = entry.path().is_ok_and(|p| *p == *Path::new(HEADER));
        let bytes = self.small(entry)?;
        let header = is_header.then(|| serde_json::from_slice::<Header>(&bytes).ok());
        match header.flatten() {
            Some(header) if header.version == VERSION => self.read.runs = header.runs,
            Some(header) => {
                let text = format!(
                    "its version {} is not known to this flowrun",
                    header.version
                );
                return Err(self.damaged(&text));
            }
            None => return Err(self.damaged(&"it does not begin with a header")),
        }
        let is_name = |run: &String| {
            let mut parts = Path::new(run).components();
            matches!(
                (parts.next(), parts.next()),
                (Some(Component::Normal(_)), None)
            )
        };
        match self.read.runs.iter().all(is_name) {
            true => Ok(()),
            false => Err(self.damaged(&"a run has no plain name")),
        }
    }

    fn entry(&mut self, path: &Path, entry: &mut impl Read) -> Result<(), ArchiveError> {
        let parts: Option<Vec<&str>> = path
            .components()
            .map(|part| match part {
                Component::Normal(name) => name.to_str(),
                _ => None,
            })
            .collect();
        match parts.as_deref() {
            Some(["objects", digest]) => self.object(digest, entry),
            Some(["actions", _]) => self.result(entry),
            Some(["runs", run, _, ..]) if self.read.runs.iter().any(|r| r == run) => {
                let dest = self.scratch.path().join(path);
                self.unpack(&dest, entry)
            }
            _ => Err(self.damaged(&format!("`{}` does not belong there", path.display()))),
        }
    }

    fn object(&mut self, digest: &str, entry: &mut impl Read) -> Result<(), ArchiveError> {
        let digest =
            Digest::parse(digest).ok_or_else(|| self.damaged(&"an object has no digest"))?;
        let temp = self.scratch.path().join("object");
        self.unpack(&temp, entry)?;
        let artifact = self.cache.store().put_path(&temp)?;
        if artifact.digest != digest {
            // It stays as an object of its own that nothing refers to, for `cache gc` to remove.
            return Err(self.damaged(&format!("object {} has other bytes", digest.short())));
        }
        self.read.objects += 1;
        self.read.bytes += artifact.size;
        Ok(())
    }

    fn result(&mut self, entry: &mut impl Read) -> Result<(), ArchiveError> {
        let text = self.small(entry)?;
        let result =
            action::from_text(&text).ok_or_else(|| self.damaged(&"a result cannot be read"))?;
        let whole = result.outputs.values().flat_map(|o| o.value.artifacts());
        if !whole.into_iter().all(|a| self.cache.store().contains(a)) {
            return Err(self.damaged(&format!("the result of `{}` lacks an object", result.label)));
        }
        if self.cache.actions().get(&result.key).is_none() {
            self.cache.actions().put(&result)?;
        }
        self.read.results += 1;
        Ok(())
    }

    fn small(&self, entry: &mut impl Read) -> Result<Vec<u8>, ArchiveError> {
        let mut bytes = Vec::new();
        let mut bounded = entry.take(SMALL);
        bounded
            .read_to_end(&mut bytes)
            .map_err(|e| self.damaged(&e))?;
        Ok(bytes)
    }

    fn unpack(&self, dest: &Path, entry: &mut impl Read) -> Result<(), ArchiveError> {
        let folder = dest.parent().unwrap_or(dest);
        std::fs::create_dir_all(folder).map_err(|e| CacheError::io(folder, e))?;
        let mut file = File::create(dest).map_err(|e| CacheError::io(dest, e))?;
        let mut buffer = vec![0u8; 1 << 16];
        loop {
            // What cannot be read is the archive's fault, what cannot be written the cache's.
            let n = entry.read(&mut buffer).map_err(|e| self.damaged(&e))?;
            if n == 0 {
                return Ok(());
            }
            file.write_all(&buffer[..n])
                .map_err(|e| CacheError::io(dest, e))?;
        }
    }

    fn adopt_runs(&self) -> Result<(), ArchiveError> {
        let runs = self.cache.dir().join("runs");
        std::fs::create_dir_all(&runs).map_err(|e| CacheError::io(&runs, e))?;
        for run in &self.read.runs {
            let (from, to) = (self.scratch.path().join("runs").join(run), runs.join(run));
            if from.is_dir() && !to.exists() {
                std::fs::rename(&from, &to).map_err(|e| CacheError::io(&to, e))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::action::{ACTION_VERSION, OutputRecord, OutputValue};
    use crate::{LockWait, OpenOptions};

    const RUN: &str = "20260101-000000-aaaa";

    fn open(dir: &Path) -> Cache {
        let options = OpenOptions {
            wait: LockWait::NoWait,
            command: "test".into(),
            on_wait: None,
        };
        Cache::open(dir, &options).unwrap()
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
            let mut raw = super::entry(1);
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
