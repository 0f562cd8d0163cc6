//! Weights that a bundle names without holding them: those of a package or of the hub.
//!
//! A container can fetch nothing (it has no Python, no place to write, often no network): its files
//! hold them, laid out as the user's cache is. Invariant: a server whose cache is that folder finds
//! them as if it had fetched them itself, so that nothing in the bundle changes.

use std::path::Path;

use flowrun_engine::step::{StepError, World};

use super::{Content, Facts, File};
use crate::bundle::Bundle;
use crate::download::cache_path;
use crate::hub;
use crate::models::weights::{Found, WeightsRef};
use crate::models::{EncoderSpec, ModelSpec, encoder_spec};
use crate::program_file::ProgramFile;

/// The folder that is `XDG_CACHE_HOME` where the target runs.
const CACHE: &str = "cache";
/// This program's folder in it.
const OURS: &str = "flowrun";

impl Facts<'_> {
    /// Names of the weights that must be fetched where the bundle is served.
    pub(super) fn fetched(&self) -> Result<Vec<String>, StepError> {
        let named = named(self.bundle)?;
        Ok(named.iter().map(WeightsRef::name).collect())
    }

    /// The weights that the bundle names without holding them, in the folder `cache`.
    ///
    /// # Errors
    /// When they are not on this machine and cannot be fetched.
    pub(super) fn cached_weights(&self) -> Result<Vec<File>, StepError> {
        let world = World {
            root: self.bundle.folder.clone(),
            ..self.world.clone()
        };
        let there = World {
            user_cache: Path::new(CACHE).join(OURS),
            ..World::default()
        };
        let mut files: Vec<File> = Vec::new();
        for weights in named(self.bundle)? {
            let found = weights.locate(&world, &world.cancel);
            let found = found.map_err(|error| StepError {
                message: format!(
                    "the image must hold the weights `{}`: {}",
                    weights.name(),
                    error.message
                ),
                ..error
            })?;
            for file in as_fetched(&weights, &found, &there)? {
                if !files.contains(&file) {
                    files.push(file);
                }
            }
        }
        Ok(files)
    }
}

/// What is not in the bundle itself.
fn named(bundle: &Bundle) -> Result<Vec<WeightsRef>, StepError> {
    let mut all = Vec::new();
    if let Some(ModelSpec::Embedded(spec)) = &bundle.manifest.model {
        all.push(spec.weights.clone());
    }
    let embedders: Vec<&serde_json::Value> = match &bundle.program {
        ProgramFile::Prompt(saved) => {
            let neighbours = saved.neighbours.values();
            neighbours.map(|neighbours| &neighbours.embedder).collect()
        }
        ProgramFile::Classifier(fitted) => vec![&fitted.spec.embedder],
    };
    for embedder in embedders {
        let EncoderSpec {
            weights,
            tokenizer,
            config,
        } = encoder_spec(embedder)?;
        all.extend([weights, tokenizer].into_iter().chain(config));
    }
    all.retain(|weights| weights.pip.is_some() || weights.hf.is_some());
    Ok(all)
}

/// Where they lie once they were fetched into the cache of `there`.
fn as_fetched(weights: &WeightsRef, found: &Found, there: &World) -> Result<Vec<File>, StepError> {
    if let Some(sha256) = &weights.sha256
        && found.path.is_file()
    {
        return Ok(vec![File {
            path: cache_path(sha256, there),
            content: Content::CopyOf(found.path.clone()),
        }]);
    }
    // The hub's client keeps a file at REPOSITORY/snapshots/COMMIT/FILE, and the commit of a
    // revision at REPOSITORY/refs/REVISION.
    let kept = found.path.ancestors().find_map(|snapshot| {
        let snapshots = snapshot.parent()?;
        let repository = snapshots.parent()?;
        (snapshots.file_name()? == "snapshots").then_some((repository, snapshot))
    });
    let (repository, snapshot) = kept.ok_or_else(|| {
        StepError::invalid(format!(
            "the weights `{}` lie at `{}`, which is not as the hub's client keeps them",
            weights.name(),
            found.path.display()
        ))
        .help("copy them into the project, and name them with `file` alone")
    })?;
    let folder = hub::cache_folder(there).join(repository.file_name().unwrap_or_default());
    let inside = found.path.strip_prefix(repository).unwrap_or(snapshot);
    let revision = weights.revision.as_deref().unwrap_or("main");
    let commit = snapshot.file_name().unwrap_or_default().to_string_lossy();
    Ok(vec![
        File {
            path: folder.join(inside),
            content: Content::CopyOf(found.path.clone()),
        },
        File {
            path: folder.join("refs").join(revision),
            content: Content::Text(commit.into_owned()),
        },
    ])
}
