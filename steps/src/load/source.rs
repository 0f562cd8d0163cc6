//! [`SourceSpec`]: where a file of rows is, and the file itself once it is at hand.

use std::path::PathBuf;

use flowrun_engine::step::{StepError, World};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::download;
use crate::hub::{self, RepoType, Snapshot};
use crate::table::Format;

/// Where one file is: exactly one of `file`, `url` and `hf`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct SourceSpec {
    /// A file of the project.
    #[serde(default)]
    file: Option<PathBuf>,
    /// A URL. It is looked up by `sha256` in `--distdir` and in the user's cache first.
    #[serde(default)]
    url: Option<String>,
    /// sha256 of the file, lower-case hex. Needed with `url`.
    #[serde(default)]
    #[schemars(regex(pattern = "^[0-9a-f]{64}$"))]
    pub(super) sha256: Option<String>,
    /// A data set on the Hugging Face hub.
    #[serde(default)]
    hf: Option<HubFile>,
    /// Format; by the ending of the name when left out.
    #[serde(default)]
    format: Option<Format>,
}

/// A file of a data set on the Hugging Face hub.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct HubFile {
    /// `owner/name`.
    repo: String,
    /// Path in the repository.
    file: String,
    /// Branch, tag or commit. The hub is asked for which commit a branch or tag stands, and the
    /// rows are loaded again when it moved; a commit is not asked for.
    #[serde(default = "main_branch")]
    revision: String,
}

fn main_branch() -> String {
    "main".to_owned()
}

/// A file that is at hand.
pub(super) struct Located {
    pub(super) path: PathBuf,
    pub(super) format: Format,
    /// What names its content, where that is known without reading it: a declared sha256, or
    /// repository, commit and path on the hub.
    content: Option<String>,
    pub(super) origin: String,
}

impl Located {
    pub(super) fn digest(&self) -> Result<String, StepError> {
        match &self.content {
            Some(content) => Ok(content.clone()),
            None => download::sha256_of(&self.path).map_err(|e| StepError::io(&self.path, &e)),
        }
    }
}

impl SourceSpec {
    /// The file whose content `observed` names.
    pub(super) fn locate_observed(
        &self,
        name: &str,
        observed: &Value,
        world: &World,
    ) -> Result<Located, StepError> {
        let observed = observed.as_str().unwrap_or_default();
        if let (Some(hub), None) = (&self.hf, &self.sha256) {
            // `REPOSITORY@COMMIT/FILE`
            let at = observed.strip_prefix(hub.repo.as_str());
            let at = at.and_then(|rest| rest.strip_prefix('@'));
            let commit = at.and_then(|at| at.split('/').next());
            let commit = commit.unwrap_or_default();
            hub::settle(RepoType::Dataset, &hub.repo, &hub.revision, commit, world)?;
        }
        let located = self.locate(name, world)?;
        match &located.content {
            Some(content) if content != observed => Err(StepError::failed(format!(
                "`{name}` is `{content}` here, and `{observed}` where the run is"
            ))),
            _ => Ok(located),
        }
    }

    pub(super) fn locate(&self, name: &str, world: &World) -> Result<Located, StepError> {
        let (path, content, origin) = match (&self.file, &self.url, &self.hf) {
            (Some(file), None, None) => {
                let path = world.root.join(file);
                if !path.is_file() {
                    return Err(StepError::invalid(format!(
                        "`{name}`: there is no file {}",
                        path.display()
                    )));
                }
                (path, None, file.display().to_string())
            }
            (None, Some(url), None) => {
                let Some(sha256) = &self.sha256 else {
                    return Err(
                        StepError::invalid(format!("`{name}`: `url` needs `sha256`"))
                            .help("the digest makes sure that every run sees the same bytes"),
                    );
                };
                (
                    download::fetch(url, sha256, world)?,
                    Some(sha256.clone()),
                    url.clone(),
                )
            }
            (None, None, Some(hub)) => {
                let kind = RepoType::Dataset;
                let kept = match &self.sha256 {
                    Some(sha256) => hub::kept_with(kind, &hub.repo, &hub.file, sha256, world)?,
                    None => None,
                };
                let (commit, path) = match kept {
                    Some(kept) => kept,
                    None => {
                        let newest = Snapshot::newest(kind, &hub.repo, &hub.revision, world)?;
                        (newest.commit().to_owned(), newest.file(&hub.file)?)
                    }
                };
                let origin = format!("{}@{commit}/{}", hub.repo, hub.file);
                (path, Some(origin.clone()), origin)
            }
            _ => {
                return Err(StepError::invalid(format!(
                    "`{name}` needs exactly one of `file`, `url` and `hf`"
                )));
            }
        };
        // What comes from a URL was checked on its way.
        if let (Some(declared), None) = (&self.sha256, &self.url) {
            download::check_content(&path, declared, &origin, &world.cancel)?;
        }
        let format = self.format.unwrap_or_else(|| Format::of_name(&origin));
        Ok(Located {
            path,
            format,
            content: self.sha256.clone().or(content),
            origin,
        })
    }
}
