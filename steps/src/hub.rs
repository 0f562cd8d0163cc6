//! Files of the Hugging Face hub, through its own client and cache.

use std::path::PathBuf;

use flowrun_engine::step::{StepError, StepErrorKind, World};
use hf_hub::api::sync::ApiBuilder;
use hf_hub::{Cache, Repo, RepoType};

/// A file of a data set.
///
/// # Errors
/// Transient when it is not in the hub's cache and cannot be fetched.
pub fn dataset_file(
    repo: &str,
    revision: &str,
    file: &str,
    world: &World,
) -> Result<PathBuf, StepError> {
    fetch(
        Repo::with_revision(repo.into(), RepoType::Dataset, revision.into()),
        file,
        world,
    )
}

/// A file of a model.
///
/// # Errors
/// As [`dataset_file`].
pub fn model_file(
    repo: &str,
    revision: &str,
    file: &str,
    world: &World,
) -> Result<PathBuf, StepError> {
    fetch(
        Repo::with_revision(repo.into(), RepoType::Model, revision.into()),
        file,
        world,
    )
}

fn fetch(repo: Repo, file: &str, world: &World) -> Result<PathBuf, StepError> {
    let home = world.env.get("HF_HOME").map(PathBuf::from);
    let folder = home
        .unwrap_or_else(|| world.user_cache.join("huggingface"))
        .join("hub");
    let cache = Cache::new(folder);
    if let Some(path) = cache.repo(repo.clone()).get(file) {
        return Ok(path);
    }
    let name = format!("{}/{file}", repo.url());
    let unavailable = |why: String| {
        StepError::new(
            StepErrorKind::Transient,
            format!("`{name}` cannot be had: {why}"),
        )
        .help("for a gated repository, accept its licence and set HF_TOKEN")
    };
    if world.offline {
        return Err(unavailable(
            "it is not in the cache and `--offline` is set".to_owned(),
        ));
    }
    let mut builder = ApiBuilder::from_cache(cache)
        .with_progress(false)
        .with_retries(2);
    if let Some(token) = world.env.get("HF_TOKEN") {
        builder = builder.with_token(Some(token.clone()));
    }
    if let Some(endpoint) = world.env.get("HF_ENDPOINT") {
        builder = builder.with_endpoint(endpoint.clone());
    }
    let api = builder.build().map_err(|e| unavailable(e.to_string()))?;
    api.repo(repo)
        .get(file)
        .map_err(|e| unavailable(e.to_string()))
}
