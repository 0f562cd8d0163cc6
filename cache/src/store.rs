//! [`ArtifactStore`]: files and folders by the digest of their bytes.
//!
//! Objects are written to a temporary name (or taken as they lie) and renamed, mode
//! 0444, and verified whenever they are read. Large ones are synced at once, small
//! ones in batches. A damaged object is moved to `quarantine/`.

use std::collections::HashMap;
use std::fs::{File, Metadata, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use crate::artifact::{Artifact, ArtifactKind, TREE_VERSION, TreeEntry, TreeObject};
use crate::digest::Digest;
use crate::durability::Unsynced;
use crate::error::CacheError;
use crate::record::folder;

/// How the text of every tree object begins: its fields are sorted.
const TREE_START: [u8; 12] = *b"{\"entries\":[";
/// Bytes moved at a time.
const CHUNK: usize = 1 << 16;
/// From this many bytes on, an object is synced by itself.
const LARGE: u64 = 1 << 20;

/// Files and folders by digest. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ArtifactStore {
    root: Arc<PathBuf>,
    /// Absent for readers.
    unsynced: Option<Arc<Unsynced>>,
}

impl ArtifactStore {
    pub(crate) fn new(root: PathBuf, unsynced: Option<Arc<Unsynced>>) -> Self {
        Self {
            root: Arc::new(root),
            unsynced,
        }
    }

    /// Where an object lies, or would lie.
    #[must_use]
    pub fn object_path(&self, digest: &Digest) -> PathBuf {
        let hex = digest.to_hex();
        self.root.join(&hex[..2]).join(&hex[2..])
    }

    /// Stores bytes as a file object.
    ///
    /// # Errors
    /// When the store cannot be written.
    pub fn put_bytes(&self, bytes: &[u8]) -> Result<Artifact, CacheError> {
        let digest = Digest::of_bytes(bytes);
        if !self.has_object(&digest, bytes.len() as u64) {
            self.write_object(&digest, &mut io::Cursor::new(bytes))?;
        }
        Ok(Artifact {
            digest,
            kind: ArtifactKind::File,
            size: bytes.len() as u64,
        })
    }

    /// Stores a file or a folder. Symbolic links are followed; an empty folder is kept as an empty tree.
    ///
    /// # Errors
    /// When something cannot be read or written.
    pub fn put_path(&self, path: &Path) -> Result<Artifact, CacheError> {
        address(path, &mut |path, meta| self.put_file(path, meta.len())).and_then(|found| {
            if let Some(tree) = &found.tree {
                self.put_bytes(tree.as_bytes())?;
            }
            Ok(found.artifact)
        })
    }

    /// As [`ArtifactStore::put_path`], for a file or folder that nobody needs any
    /// more: its files are moved, not copied, where that can be done.
    ///
    /// # Errors
    /// As [`ArtifactStore::put_path`].
    pub fn take_path(&self, path: &Path) -> Result<Artifact, CacheError> {
        address(path, &mut |path, meta| self.take_file(path, meta)).and_then(|found| {
            if let Some(tree) = &found.tree {
                self.put_bytes(tree.as_bytes())?;
            }
            Ok(found.artifact)
        })
    }

    /// The address that [`ArtifactStore::put_path`] would give; nothing is stored.
    ///
    /// # Errors
    /// When something cannot be read.
    pub fn address_of(path: &Path) -> Result<Artifact, CacheError> {
        let hash = &mut |path: &Path, _: &Metadata| {
            Digest::of_file(path).map_err(|e| CacheError::io(path, e))
        };
        address(path, hash).map(|found| found.artifact)
    }

    fn put_file(&self, path: &Path, size: u64) -> Result<Digest, CacheError> {
        let digest = Digest::of_file(path).map_err(|e| CacheError::io(path, e))?;
        if !self.has_object(&digest, size) {
            let mut file = File::open(path).map_err(|e| CacheError::io(path, e))?;
            self.write_object(&digest, &mut file)?;
        }
        Ok(digest)
    }

    fn take_file(&self, path: &Path, meta: &Metadata) -> Result<Digest, CacheError> {
        let fail = |e| CacheError::io(path, e);
        let digest = Digest::of_file(path).map_err(fail)?;
        if self.has_object(&digest, meta.len()) {
            return Ok(digest);
        }
        let own = std::fs::symlink_metadata(path).map_err(fail)?;
        // What has another name is not ours alone: it could change under it.
        if !own.is_file() || own.nlink() > 1 {
            let mut file = File::open(path).map_err(fail)?;
            self.write_object(&digest, &mut file)?;
            return Ok(digest);
        }
        std::fs::set_permissions(path, Permissions::from_mode(0o444)).map_err(fail)?;
        if own.len() >= LARGE {
            File::open(path).and_then(|f| f.sync_data()).map_err(fail)?;
        }
        let object = self.object_path(&digest);
        let moved = std::fs::rename(path, &object).or_else(|_| {
            std::fs::create_dir_all(object.parent().unwrap_or(&self.root))?;
            std::fs::rename(path, &object)
        });
        if moved.is_err() {
            // Another file system.
            let mut file = File::open(path).map_err(fail)?;
            self.write_object(&digest, &mut file)?;
            return Ok(digest);
        }
        let now = std::fs::metadata(&object).map_err(|e| CacheError::io(&object, e))?;
        if Stamp::of(&now) != Stamp::of(meta) {
            // Set aside: what it holds is not what was hashed.
            let _ = self.quarantine(&digest);
            return Err(changed(path));
        }
        self.written(&object);
        Ok(digest)
    }

    fn written(&self, path: &Path) {
        if let Some(unsynced) = &self.unsynced {
            unsynced.add(path);
        }
    }

    /// An object of this length is there. A file cut short does not count.
    fn has_object(&self, digest: &Digest, size: u64) -> bool {
        std::fs::metadata(self.object_path(digest)).is_ok_and(|m| m.len() == size)
    }

    fn write_object(&self, digest: &Digest, source: &mut dyn Read) -> Result<(), CacheError> {
        let path = self.object_path(digest);
        let folder = path.parent().unwrap_or(&self.root);
        std::fs::create_dir_all(folder).map_err(|e| CacheError::io(folder, e))?;
        let mut temp =
            tempfile::NamedTempFile::new_in(folder).map_err(|e| CacheError::io(folder, e))?;
        let fail = |e: io::Error| CacheError::io(&path, e);
        let written = copy_hashed(source, temp.as_file_mut()).map_err(fail)?;
        if written != *digest {
            return Err(changed(&path));
        }
        temp.as_file()
            .set_permissions(Permissions::from_mode(0o444))
            .map_err(fail)?;
        if temp.as_file().metadata().map_err(fail)?.len() >= LARGE {
            temp.as_file().sync_data().map_err(fail)?;
        }
        temp.persist(&path)
            .map_err(|e| CacheError::io(&path, e.error))?;
        self.written(&path);
        Ok(())
    }

    /// Every object with its length, and what unfinished writes left among them.
    pub(crate) fn objects(&self) -> (HashMap<Digest, u64>, Vec<PathBuf>) {
        let (mut objects, mut leftovers) = (HashMap::new(), Vec::new());
        for sub in folder(&self.root) {
            let start = sub.file_name().unwrap_or_default().to_string_lossy();
            if start == "quarantine" {
                continue;
            }
            if !sub.is_dir() {
                leftovers.push(sub);
                continue;
            }
            for path in folder(&sub) {
                let rest = path.file_name().unwrap_or_default().to_string_lossy();
                match (Digest::parse(&format!("{start}{rest}")), path.metadata()) {
                    (Some(digest), Ok(meta)) => drop(objects.insert(digest, meta.len())),
                    (None, Ok(_)) => leftovers.push(path),
                    (_, Err(_)) => {}
                }
            }
        }
        (objects, leftovers)
    }

    /// The members of an object that is a tree; none for one that is not. Nothing is verified.
    pub(crate) fn members(&self, digest: &Digest) -> Vec<Digest> {
        let path = self.object_path(digest);
        let mut start = [0u8; TREE_START.len()];
        let read = File::open(&path).and_then(|mut file| file.read_exact(&mut start));
        if read.is_err() || start != TREE_START {
            return Vec::new();
        }
        let bytes = std::fs::read(&path).unwrap_or_default();
        let tree = serde_json::from_slice::<TreeObject>(&bytes).ok();
        let entries = tree.into_iter().flat_map(|t| t.entries);
        entries.map(|entry| entry.digest).collect()
    }

    /// Hashes every object that was written since; the damaged ones are set aside. How many they were.
    pub(crate) fn verify_since(&self, since: SystemTime) -> usize {
        let folders = std::fs::read_dir(&*self.root)
            .into_iter()
            .flatten()
            .flatten();
        let files = folders.flat_map(|folder| {
            let name = folder.file_name();
            let files = std::fs::read_dir(folder.path()).into_iter().flatten();
            files.flatten().map(move |file| (name.clone(), file))
        });
        let mut damaged = 0;
        for (folder, file) in files {
            let hex = folder.to_string_lossy().into_owned() + &file.file_name().to_string_lossy();
            let recent = file.metadata().and_then(|m| m.modified());
            let recent = recent.map_or(true, |at| at >= since);
            if let Some(digest) = Digest::parse(&hex).filter(|_| recent) {
                damaged += usize::from(self.verify_object(&digest).is_err());
            }
        }
        damaged
    }

    /// The object, and for a tree all its members, are there with the right
    /// lengths. Nothing is hashed but the tree object itself.
    #[must_use]
    pub fn contains(&self, artifact: &Artifact) -> bool {
        match artifact.kind {
            ArtifactKind::File => self.has_object(&artifact.digest, artifact.size),
            ArtifactKind::Tree => self
                .tree(&artifact.digest)
                .is_ok_and(|t| t.entries.iter().all(|e| self.has_object(&e.digest, e.size))),
        }
    }

    /// The bytes of an object, verified.
    ///
    /// # Errors
    /// [`CacheError::Missing`], or [`CacheError::Damaged`] once, after which it is missing.
    pub fn read(&self, digest: &Digest) -> Result<Vec<u8>, CacheError> {
        let path = self.object_path(digest);
        let bytes = std::fs::read(&path).map_err(|e| self.lookup_error(digest, &path, e))?;
        if Digest::of_bytes(&bytes) == *digest {
            Ok(bytes)
        } else {
            Err(self.quarantine(digest))
        }
    }

    /// Hashes the object, and for a tree all its members.
    ///
    /// # Errors
    /// As [`ArtifactStore::read`].
    pub fn verify(&self, artifact: &Artifact) -> Result<(), CacheError> {
        match artifact.kind {
            ArtifactKind::File => self.verify_object(&artifact.digest),
            ArtifactKind::Tree => self
                .tree(&artifact.digest)?
                .entries
                .iter()
                .try_for_each(|entry| self.verify_object(&entry.digest)),
        }
    }

    /// The objects of an artifact: the file, or the tree and its members.
    ///
    /// # Errors
    /// As [`ArtifactStore::read`], for the tree itself.
    pub fn parts(&self, artifact: &Artifact) -> Result<Vec<Digest>, CacheError> {
        let mut all = vec![artifact.digest];
        if artifact.kind == ArtifactKind::Tree {
            all.extend(self.objects_of(artifact)?);
        }
        Ok(all)
    }

    /// Hashes one object.
    ///
    /// # Errors
    /// As [`ArtifactStore::read`].
    pub fn verify_object(&self, digest: &Digest) -> Result<(), CacheError> {
        let path = self.object_path(digest);
        let actual = Digest::of_file(&path).map_err(|e| self.lookup_error(digest, &path, e))?;
        if actual == *digest {
            Ok(())
        } else {
            Err(self.quarantine(digest))
        }
    }

    /// Copies the artifact to `dest`, verified while it is copied. What was at `dest` is replaced.
    ///
    /// # Errors
    /// As [`ArtifactStore::read`], or when `dest` cannot be written; `dest` is then as it was.
    pub fn materialize(&self, artifact: &Artifact, dest: &Path) -> Result<(), CacheError> {
        let folder = dest
            .parent()
            .filter(|p| !p.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).map_err(|e| CacheError::io(folder, e))?;
        let staging = tempfile::Builder::new()
            .prefix(".flowrun-")
            .tempdir_in(folder)
            .map_err(|e| CacheError::io(folder, e))?;
        let staged = staging.path().join("new");
        self.place(artifact, &staged, Placement::Copy)?;
        // A folder cannot be renamed over a folder: the old one steps aside first.
        if dest.is_dir() {
            let old = staging.path().join("old");
            std::fs::rename(dest, &old).map_err(|e| CacheError::io(dest, e))?;
        } else if artifact.kind == ArtifactKind::Tree && dest.exists() {
            std::fs::remove_file(dest).map_err(|e| CacheError::io(dest, e))?;
        }
        std::fs::rename(&staged, dest).map_err(|e| CacheError::io(dest, e))
    }

    /// Places the artifact at `dest` for reading only: hard links where the
    /// file system allows, else copies. Verified first; [`Lent::check`] tells
    /// whether whoever had it left it as it was.
    ///
    /// # Errors
    /// As [`ArtifactStore::materialize`].
    pub fn link_read_only(&self, artifact: &Artifact, dest: &Path) -> Result<Lent, CacheError> {
        // Stamped before it is verified: a change meanwhile shows in one or the other.
        let stamps = self
            .objects_of(artifact)?
            .into_iter()
            .map(|digest| Ok((digest, self.stamp(&digest)?)))
            .collect::<Result<_, CacheError>>()?;
        self.verify(artifact)?;
        self.place(artifact, dest, Placement::Link)?;
        Ok(Lent { stamps })
    }

    /// The file objects that an artifact consists of.
    fn objects_of(&self, artifact: &Artifact) -> Result<Vec<Digest>, CacheError> {
        Ok(match artifact.kind {
            ArtifactKind::File => vec![artifact.digest],
            ArtifactKind::Tree => {
                let entries = self.tree(&artifact.digest)?.entries;
                entries.into_iter().map(|entry| entry.digest).collect()
            }
        })
    }

    fn stamp(&self, digest: &Digest) -> Result<Stamp, CacheError> {
        let path = self.object_path(digest);
        let meta = std::fs::metadata(&path).map_err(|e| self.lookup_error(digest, &path, e))?;
        Ok(Stamp::of(&meta))
    }

    fn place(&self, artifact: &Artifact, dest: &Path, how: Placement) -> Result<(), CacheError> {
        match artifact.kind {
            ArtifactKind::File => self.place_file(&artifact.digest, dest, false, how),
            ArtifactKind::Tree => {
                std::fs::create_dir_all(dest).map_err(|e| CacheError::io(dest, e))?;
                for entry in self.tree(&artifact.digest)?.entries {
                    let path = dest.join(&entry.path);
                    if let Some(folder) = path.parent() {
                        std::fs::create_dir_all(folder).map_err(|e| CacheError::io(folder, e))?;
                    }
                    self.place_file(&entry.digest, &path, entry.executable, how)?;
                }
                Ok(())
            }
        }
    }

    fn place_file(
        &self,
        digest: &Digest,
        dest: &Path,
        executable: bool,
        how: Placement,
    ) -> Result<(), CacheError> {
        let object = self.object_path(digest);
        // An object has one mode for all its links, so an executable is copied.
        if matches!(how, Placement::Link)
            && !executable
            && std::fs::hard_link(&object, dest).is_ok()
        {
            return Ok(());
        }
        let mut source = File::open(&object).map_err(|e| self.lookup_error(digest, &object, e))?;
        let mut file = File::create(dest).map_err(|e| CacheError::io(dest, e))?;
        let copied = copy_hashed(&mut source, &mut file).map_err(|e| CacheError::io(dest, e))?;
        if copied != *digest {
            return Err(self.quarantine(digest));
        }
        let mode = if executable { 0o755 } else { 0o644 };
        std::fs::set_permissions(dest, Permissions::from_mode(mode))
            .map_err(|e| CacheError::io(dest, e))
    }

    /// A tree object. Paths that would leave the folder make it damaged.
    fn tree(&self, digest: &Digest) -> Result<TreeObject, CacheError> {
        let bytes = self.read(digest)?;
        serde_json::from_slice::<TreeObject>(&bytes)
            .ok()
            .filter(|t| {
                t.version == TREE_VERSION && t.entries.iter().all(|e| stays_inside(&e.path))
            })
            .ok_or(CacheError::Missing { digest: *digest })
    }

    fn lookup_error(&self, digest: &Digest, path: &Path, error: io::Error) -> CacheError {
        if error.kind() == io::ErrorKind::NotFound {
            CacheError::Missing { digest: *digest }
        } else {
            CacheError::io(path, error)
        }
    }

    /// Moves a damaged object away.
    pub(crate) fn set_aside(&self, digest: &Digest) {
        drop(self.quarantine(digest));
    }

    fn quarantine(&self, digest: &Digest) -> CacheError {
        let from = self.object_path(digest);
        let path = self.root.join("quarantine").join(digest.to_hex());
        let moved = std::fs::create_dir_all(self.root.join("quarantine"))
            .and_then(|()| std::fs::rename(&from, &path));
        // In a cache that cannot be written the object stays, and is refused again next time.
        let path = if moved.is_ok() { path } else { from };
        CacheError::Damaged {
            digest: *digest,
            path,
        }
    }
}

/// What a write to an object changes, and another link to it does not.
#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    size: u64,
    mtime: (i64, i64),
}

impl Stamp {
    fn of(meta: &Metadata) -> Self {
        Self {
            inode: meta.ino(),
            size: meta.len(),
            mtime: (meta.mtime(), meta.mtime_nsec()),
        }
    }
}

fn changed(path: &Path) -> CacheError {
    CacheError::Unstorable {
        path: path.to_owned(),
        reason: "the file changed while it was stored",
    }
}

/// Objects that were lent to somebody as hard links, which root can write through.
#[derive(Debug)]
pub struct Lent {
    stamps: Vec<(Digest, Stamp)>,
}

impl Lent {
    /// Verifies what was written to meanwhile.
    ///
    /// # Errors
    /// [`CacheError::Damaged`] or [`CacheError::Missing`].
    pub fn check(&self, store: &ArtifactStore) -> Result<(), CacheError> {
        for (digest, stamp) in &self.stamps {
            let now = store.stamp(digest)?;
            if now.inode != stamp.inode {
                // What was lent was set aside meanwhile, and made anew.
                return Err(CacheError::Missing { digest: *digest });
            }
            if now != *stamp {
                store.verify_object(digest)?;
            }
        }
        Ok(())
    }
}

/// Gives a file its digest.
type DigestFile<'a> = &'a mut dyn FnMut(&Path, &Metadata) -> Result<Digest, CacheError>;

struct Address {
    artifact: Artifact,
    /// The tree object's text.
    tree: Option<String>,
}

fn address(path: &Path, digest: DigestFile<'_>) -> Result<Address, CacheError> {
    let meta = std::fs::metadata(path).map_err(|e| CacheError::io(path, e))?;
    if !meta.is_dir() {
        let artifact = Artifact {
            digest: digest(path, &meta)?,
            kind: ArtifactKind::File,
            size: meta.len(),
        };
        return Ok(Address {
            artifact,
            tree: None,
        });
    }
    let mut entries = Vec::new();
    walk_tree(path, "", &mut entries, digest)?;
    entries.sort_by(|a, b| a.path.cmp(&b.path));
    let size = entries.iter().map(|e| e.size).sum();
    let tree = crate::canonical_json(&TreeObject {
        record: "tree".into(),
        version: TREE_VERSION,
        entries,
    });
    let artifact = Artifact {
        digest: Digest::of_bytes(tree.as_bytes()),
        kind: ArtifactKind::Tree,
        size,
    };
    Ok(Address {
        artifact,
        tree: Some(tree),
    })
}

fn walk_tree(
    folder: &Path,
    prefix: &str,
    entries: &mut Vec<TreeEntry>,
    digest: DigestFile<'_>,
) -> Result<(), CacheError> {
    for entry in std::fs::read_dir(folder).map_err(|e| CacheError::io(folder, e))? {
        let path = entry.map_err(|e| CacheError::io(folder, e))?.path();
        let name =
            path.file_name()
                .and_then(|n| n.to_str())
                .ok_or_else(|| CacheError::Unstorable {
                    path: path.clone(),
                    reason: "its name is not Unicode",
                })?;
        let relative = format!("{prefix}{name}");
        let meta = std::fs::metadata(&path).map_err(|e| CacheError::io(&path, e))?;
        if meta.is_dir() {
            walk_tree(&path, &format!("{relative}/"), entries, digest)?;
        } else {
            entries.push(TreeEntry {
                path: relative,
                digest: digest(&path, &meta)?,
                size: meta.len(),
                executable: meta.permissions().mode() & 0o100 != 0,
            });
        }
    }
    Ok(())
}

#[derive(Clone, Copy)]
enum Placement {
    Copy,
    Link,
}

fn stays_inside(path: &str) -> bool {
    !path.is_empty()
        && Path::new(path)
            .components()
            .all(|c| matches!(c, Component::Normal(_)))
}

fn copy_hashed(source: &mut dyn Read, dest: &mut File) -> io::Result<Digest> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0u8; CHUNK];
    loop {
        let n = source.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        hasher.update(&buffer[..n]);
        dest.write_all(&buffer[..n])?;
    }
    Digest::parse(&hasher.finalize().to_hex())
        .ok_or_else(|| io::Error::other("blake3 gave no hexadecimal text"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, ArtifactStore) {
        let dir = tempfile::tempdir().unwrap();
        let store = ArtifactStore::new(dir.path().join("objects"), None);
        (dir, store)
    }

    fn damage(path: &Path, bytes: &[u8]) {
        std::fs::set_permissions(path, Permissions::from_mode(0o644)).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    #[test]
    fn a_folder_round_trips_with_its_modes() {
        let (dir, store) = store();
        let source = dir.path().join("source");
        std::fs::create_dir_all(source.join("sub")).unwrap();
        std::fs::write(source.join("a"), "1").unwrap();
        std::fs::write(source.join("sub/run.sh"), "2").unwrap();
        std::fs::set_permissions(source.join("sub/run.sh"), Permissions::from_mode(0o755)).unwrap();
        let address = ArtifactStore::address_of(&source).unwrap();
        assert!(!store.contains(&address));
        let tree = store.put_path(&source).unwrap();
        assert_eq!(address, tree);
        assert_eq!((tree.kind, tree.size), (ArtifactKind::Tree, 2));
        assert!(store.contains(&tree));
        for link in [false, true] {
            let dest = dir.path().join(format!("dest{link}"));
            if link {
                store.link_read_only(&tree, &dest).unwrap();
            } else {
                store.materialize(&tree, &dest).unwrap();
                std::fs::write(dest.join("stray"), "x").unwrap();
                store.materialize(&tree, &dest).unwrap();
                assert!(!dest.join("stray").exists());
            }
            assert_eq!(
                std::fs::read_to_string(dest.join("sub/run.sh")).unwrap(),
                "2"
            );
            assert_eq!(store.put_path(&dest).unwrap(), tree);
        }
    }

    #[test]
    fn damage_at_every_byte_is_refused_and_set_aside() {
        let (dir, store) = store();
        let bytes = b"some bytes";
        for at in 0..bytes.len() {
            let artifact = store.put_bytes(bytes).unwrap();
            let mut bad = bytes.to_vec();
            bad[at] ^= 1;
            damage(&store.object_path(&artifact.digest), &bad);
            let error = store
                .materialize(&artifact, &dir.path().join("dest"))
                .unwrap_err();
            assert!(matches!(error, CacheError::Damaged { .. }));
            assert!(!dir.path().join("dest").exists());
            assert!(!store.contains(&artifact));
            let again = store.read(&artifact.digest).unwrap_err();
            assert!(matches!(again, CacheError::Missing { .. }));
        }
    }

    #[test]
    fn what_is_taken_is_moved_and_what_has_another_name_is_copied() {
        let (dir, store) = store();
        let place = |name: &str| dir.path().join(name);
        std::fs::create_dir_all(place("tree/sub")).unwrap();
        for (name, text) in [
            ("tree/a", "1"),
            ("tree/sub/b", "2"),
            ("own", "3"),
            ("two", "4"),
        ] {
            std::fs::write(place(name), text).unwrap();
        }
        std::fs::hard_link(place("two"), place("names")).unwrap();
        std::os::unix::fs::symlink(place("two"), place("link")).unwrap();
        let expected = ArtifactStore::address_of(&place("tree")).unwrap();
        assert_eq!(store.take_path(&place("tree")).unwrap(), expected);
        let own = store.take_path(&place("own")).unwrap();
        assert!(!place("own").exists() && !place("tree/a").exists());
        assert_eq!(store.read(&own.digest).unwrap(), b"3");
        store.verify(&expected).unwrap();
        for name in ["link", "two"] {
            let taken = store.take_path(&place(name)).unwrap();
            std::fs::write(place("names"), "5").unwrap();
            assert_eq!(store.read(&taken.digest).unwrap(), b"4");
            std::fs::write(place("names"), "4").unwrap();
        }
    }

    #[test]
    fn what_a_power_cut_spoilt_is_found() {
        let (_dir, store) = store();
        let (old, new) = (
            store.put_bytes(b"old").unwrap(),
            store.put_bytes(b"new").unwrap(),
        );
        let hour = std::time::Duration::from_secs(3600);
        let path = store.object_path(&old.digest);
        std::fs::File::open(&path)
            .unwrap()
            .set_modified(SystemTime::now() - 2 * hour)
            .unwrap();
        damage(&store.object_path(&new.digest), b"\0\0\0");
        assert!(store.contains(&new), "the length alone says nothing");
        assert_eq!(store.verify_since(SystemTime::now() - hour), 1);
        assert!(!store.contains(&new) && store.contains(&old));
    }

    #[test]
    fn a_write_through_a_link_is_noticed_and_another_link_is_not() {
        let (dir, store) = store();
        let artifact = store.put_bytes(b"0123456789").unwrap();
        let lend = |name: &str| store.link_read_only(&artifact, &dir.path().join(name));
        let first = lend("first").unwrap();
        lend("second").unwrap();
        first.check(&store).unwrap();
        let path = dir.path().join("first");
        std::fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        std::fs::write(&path, b"0123456780").unwrap();
        let second = lend("third").unwrap_err();
        assert!(matches!(second, CacheError::Damaged { .. }), "{second}");
        assert!(!store.contains(&artifact));
        // Made anew: whoever had the old one still had something else.
        store.put_bytes(b"0123456789").unwrap();
        assert!(first.check(&store).is_err());
        lend("fourth").unwrap().check(&store).unwrap();
    }

    #[test]
    fn a_truncated_object_is_not_contained_and_is_written_anew() {
        let (_dir, store) = store();
        let artifact = store.put_bytes(b"0123456789").unwrap();
        damage(&store.object_path(&artifact.digest), b"01234");
        assert!(!store.contains(&artifact));
        store.put_bytes(b"0123456789").unwrap();
        assert_eq!(store.read(&artifact.digest).unwrap(), b"0123456789");
    }

    #[test]
    fn a_tree_that_points_outside_is_refused() {
        let (dir, store) = store();
        let file = store.put_bytes(b"x").unwrap();
        for path in ["../evil", "/etc/evil", "a/../../evil", ""] {
            let entry = TreeEntry {
                path: path.into(),
                digest: file.digest,
                size: 1,
                executable: false,
            };
            let tree = TreeObject {
                record: "tree".into(),
                version: TREE_VERSION,
                entries: vec![entry],
            };
            let object = store
                .put_bytes(crate::canonical_json(&tree).as_bytes())
                .unwrap();
            let artifact = Artifact {
                kind: ArtifactKind::Tree,
                ..object
            };
            assert!(
                store
                    .materialize(&artifact, &dir.path().join("out"))
                    .is_err(),
                "{path}"
            );
        }
    }
}
