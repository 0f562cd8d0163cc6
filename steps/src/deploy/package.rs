//! [`Package`]: a folder as one zip file, named by what is in it, as Ray takes working folders.

use std::fs::File;
use std::path::{Path, PathBuf};

use flowrun_cache::ArtifactStore;
use flowrun_engine::step::StepError;
use zip::write::{SimpleFileOptions, ZipWriter};

/// Hex digits of a digest that Ray has in a package's name.
const HASH: usize = 16;

/// A zip file.
#[derive(Debug)]
pub(crate) struct Package {
    pub(crate) path: PathBuf,
    /// Its name at Ray: `_ray_pkg_<16 hex>.zip`.
    pub(crate) name: String,
}

impl Package {
    /// Packs what lies in `folder` under the names in `what` into `to`. Equal files give equal
    /// names.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub(crate) fn pack(folder: &Path, what: &[&str], to: &Path) -> Result<Self, StepError> {
        let file = File::create(to).map_err(|e| StepError::io(to, &e))?;
        let mut zip = ZipWriter::new(file);
        for name in what {
            add(&mut zip, &folder.join(name), name)?;
        }
        zip.finish().map_err(|e| wrong(to, &e))?;
        let digest = ArtifactStore::address_of(to).map_err(|e| StepError::failed(e.to_string()))?;
        let digest = digest.digest.to_hex();
        Ok(Self {
            path: to.to_owned(),
            name: format!("_ray_pkg_{}.zip", &digest[..HASH.min(digest.len())]),
        })
    }
}

/// In the order of their names; without times, so that equal files are equal packages.
fn add(zip: &mut ZipWriter<File>, path: &Path, name: &str) -> Result<(), StepError> {
    if path.is_dir() {
        let entries = std::fs::read_dir(path).map_err(|e| StepError::io(path, &e))?;
        let names = entries.map(|entry| entry.map(|entry| entry.file_name()));
        let names: Result<Vec<_>, _> = names.collect();
        let mut names = names.map_err(|e| StepError::io(path, &e))?;
        names.sort();
        for inside in names {
            let inside = inside.to_string_lossy();
            add(
                zip,
                &path.join(inside.as_ref()),
                &format!("{name}/{inside}"),
            )?;
        }
        return Ok(());
    }
    let options = SimpleFileOptions::default()
        .last_modified_time(zip::DateTime::default())
        .large_file(true);
    zip.start_file(name, options).map_err(|e| wrong(path, &e))?;
    let mut file = File::open(path).map_err(|e| StepError::io(path, &e))?;
    std::io::copy(&mut file, zip).map_err(|e| StepError::io(path, &e))?;
    Ok(())
}

fn wrong(path: &Path, error: &zip::result::ZipError) -> StepError {
    StepError::failed(format!("{}: {error}", path.display()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn equal_folders_are_equal_packages() {
        let dir = tempfile::tempdir().unwrap();
        let pack = |folder: &str, text: &str| {
            let folder = dir.path().join(folder);
            std::fs::create_dir_all(folder.join("bundle/sub")).unwrap();
            std::fs::write(folder.join("bundle/sub/b"), text).unwrap();
            std::fs::write(folder.join("app.py"), "x").unwrap();
            std::fs::write(folder.join("left-out"), folder.to_str().unwrap()).unwrap();
            Package::pack(&folder, &["app.py", "bundle"], &folder.join("p.zip")).unwrap()
        };
        let (one, same, other) = (pack("1", "a"), pack("2", "a"), pack("3", "b"));
        assert_eq!(one.name, same.name);
        assert_ne!(one.name, other.name);
        let file = File::open(one.path).unwrap();
        let zip = zip::ZipArchive::new(file).unwrap();
        let names: Vec<String> = zip.file_names().map(|n| n.unwrap().into_owned()).collect();
        assert_eq!(names, ["app.py", "bundle/sub/b"]);
    }
}
