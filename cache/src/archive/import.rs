//! Reads an archive: nothing in it is trusted.

use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::path::{Component, Path};

use super::{ArchiveError, HEADER, Header, Moved, VERSION};
use crate::action;
use crate::cache::Cache;
use crate::digest::Digest;
use crate::error::CacheError;

/// Bytes of a small entry (a header, a result) that are read at most.
const SMALL: u64 = 256 << 20;

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
