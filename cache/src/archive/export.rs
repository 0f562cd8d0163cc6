//! Writes an archive. Knows no runs but as folders.

use std::collections::BTreeSet;
use std::fs::{File, Permissions};
use std::io::{BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::{ArchiveError, HEADER, Header, LEVEL, Moved, REPLACED, VERSION};
use crate::action::{self, ActionKey, ActionResult};
use crate::cache::CacheReader;
use crate::digest::Digest;

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

pub(super) fn append(
    tar: &mut tar::Builder<impl Write>,
    name: &str,
    bytes: &[u8],
) -> std::io::Result<()> {
    tar.append_data(&mut entry(bytes.len() as u64), name, bytes)
}

/// Entries carry neither time nor owner: equal content makes an equal archive.
pub(super) fn entry(size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_size(size);
    header.set_mode(0o644);
    header
}

fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}
