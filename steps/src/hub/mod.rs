//! Files of the Hugging Face hub, in the cache that the hub's own clients share.
//!
//! | file | what |
//! |---|---|
//! | `settings` | the user's cache, token and endpoint |
//! | `client` | requests, and to whom the token goes |
//! | `refusal` | what the hub's refusals mean, and what to do |
//! | `transfer` | how a file gets into the cache |
//!
//! Everything that waits here ends with the world's cancel flag; what came by then stays.
//!
//! The names of places are those of the crate `hf-hub`, so that Python's client finds what lies
//! there, and the other way round. The requests are our own: the crate's (0.5) hide why the hub
//! refuses, have no time limits, and a download that was killed at its last byte stays stuck.
//!
//! Invariant: a branch or tag stands for one commit as long as this process lives: the one that a
//! step's key names ([`settle`]), else the first that was found. So a step reads what its key
//! names, on whatever machine it runs, though the branch may move meanwhile. The cache has a note
//! of the commit too, for when the hub does not answer.

mod client;
mod refusal;
mod settings;
mod transfer;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use flowrun_engine::step::{StepError, StepErrorKind, World};
use hf_hub::{Cache, CacheRepo, Repo};

pub use hf_hub::RepoType;

pub(crate) use settings::cache_folder;
pub use settings::has_token;

use crate::download::one_at_a_time;
use client::Client;
use refusal::Asked;
use settings::Settings;

/// Whether a revision is a commit, which never changes.
#[must_use]
pub fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Has `revision` stand for `commit` in this process from now on, whatever the hub and the cache
/// say of it. A commit stands for itself.
///
/// A process is one run or one step of it, and all keys of a run name one commit of a branch: it
/// was found once. Another one would change under a step what it is reading.
///
/// # Errors
/// Invalid when the names cannot be the hub's; failed when the revision stands for another commit
/// already, which it goes on doing.
pub fn settle(
    kind: RepoType,
    repo: &str,
    revision: &str,
    commit: &str,
    world: &World,
) -> Result<(), StepError> {
    let of = Repository::new(kind, repo, revision, world)?;
    if !is_commit(commit) {
        let text = format!("the step's key names no commit of `{repo}` at `{revision}`");
        return Err(StepError::invalid(text));
    }
    if is_commit(revision) {
        return Ok(());
    }
    let settled = of.settle(commit.to_owned());
    if settled == commit {
        return Ok(());
    }
    let text = format!(
        "the step's key names commit {commit} of `{repo}` at `{revision}`, and this process goes \
         by commit {settled}"
    );
    Err(StepError::failed(text).help(format!(
        "run again; `revision: {commit}` keeps to one commit for good"
    )))
}

/// The file of a repository that the cache holds with this sha256, and a commit that has it: where
/// the bytes are what is asked for, no branch need be looked up.
///
/// # Errors
/// Invalid when the names cannot be the hub's.
pub(crate) fn kept_with(
    kind: RepoType,
    repo: &str,
    file: &str,
    sha256: &str,
    world: &World,
) -> Result<Option<(String, PathBuf)>, StepError> {
    check_path(file, "file")?;
    let of = Repository::new(kind, repo, "main", world)?;
    let snapshots = std::fs::read_dir(of.folder().join("snapshots"));
    let commits = snapshots.into_iter().flatten().flatten();
    let place = |commit: std::fs::DirEntry| {
        let name = commit.file_name().to_string_lossy().into_owned();
        (name, commit.path().join(file))
    };
    let mut places: Vec<(String, PathBuf)> = commits.map(place).collect();
    places.sort();
    // The cache calls a large file by its sha256.
    let is_it = |(_, place): &(String, PathBuf)| {
        let real = std::fs::canonicalize(place);
        real.is_ok_and(|real| real.file_name().is_some_and(|name| name == sha256))
    };
    Ok(places.into_iter().find(is_it))
}

/// A repository of the hub at one commit.
#[derive(Debug)]
pub struct Snapshot {
    of: Repository,
    commit: String,
}

impl Snapshot {
    /// The repository as `revision` (a branch, a tag or a commit) stands now. A commit is not asked
    /// for. When the hub does not answer, the commit that the cache has for the revision is taken,
    /// with a warning.
    ///
    /// # Errors
    /// Invalid when the hub has no such revision, or not for this user; transient when the hub
    /// cannot be asked and the cache does not know the revision.
    pub fn newest(
        kind: RepoType,
        repo: &str,
        revision: &str,
        world: &World,
    ) -> Result<Self, StepError> {
        let of = Repository::new(kind, repo, revision, world)?;
        let commit = of.newest()?;
        Ok(Self { of, commit })
    }

    /// The repository as [`Snapshot::newest`] last saw it on this machine; asks when it never did.
    ///
    /// # Errors
    /// As [`Snapshot::newest`].
    pub fn known(
        kind: RepoType,
        repo: &str,
        revision: &str,
        world: &World,
    ) -> Result<Self, StepError> {
        let of = Repository::new(kind, repo, revision, world)?;
        let commit = match of.settled().or_else(|| of.kept()) {
            Some(commit) => commit,
            None => of.newest()?,
        };
        Ok(Self { of, commit })
    }

    /// The commit, 40 hex digits.
    #[must_use]
    pub fn commit(&self) -> &str {
        &self.commit
    }

    /// The folder of the files that were fetched.
    #[must_use]
    pub fn folder(&self) -> PathBuf {
        self.of.cache().pointer_path(&self.commit)
    }

    /// A file, from the cache if it is there. What an interrupted download left is used.
    ///
    /// # Errors
    /// Transient when it is not in the cache and the hub cannot be reached; invalid when the hub
    /// has no such file, or not for this user; unseen when the world is only looked at.
    pub fn file(&self, file: &str) -> Result<PathBuf, StepError> {
        check_path(file, "file")?;
        let place = self.folder().join(file);
        if place.is_file() {
            return Ok(place);
        }
        if let Some(why) = self.of.settings.offline {
            return Err(self.missing(file, why));
        }
        if self.of.settings.look_only {
            return Err(StepError::unseen(&self.of.name));
        }
        let _one = one_at_a_time(&self.of.settings.cancel)?;
        if place.is_file() {
            return Ok(place);
        }
        let asked = self.of.asked(Some(file));
        transfer::fetch(
            &Client::new(&self.of.settings),
            &self.url(file),
            &asked,
            &self.of.folder(),
            &place,
        )?;
        Ok(place)
    }

    /// A file that not every repository has; none where the hub says that this one has not, or a
    /// mirror of it answers 404 and no more. What the hub says is noted in the cache, where the hub's other clients note it too, since a commit never gets
    /// another file.
    ///
    /// # Errors
    /// As [`Snapshot::file`], but for the hub's word that there is no such file.
    pub fn optional_file(&self, file: &str) -> Result<Option<PathBuf>, StepError> {
        check_path(file, "file")?;
        let at_hand = self.folder().join(file).is_file();
        let note = self.of.folder().join(".no_exist");
        let note = note.join(&self.commit).join(file);
        if !at_hand && note.is_file() {
            return Ok(None);
        }
        let settings = &self.of.settings;
        if !at_hand && settings.offline.is_none() && !settings.look_only {
            let asked = self.of.asked(Some(file));
            let answer = Client::new(settings).head(&self.url(file));
            let answer = answer.map_err(|e| refusal::no_answer(&asked, e))?;
            if refusal::is_of_absent_file(&answer) {
                // Without the note it is asked again.
                let folder = note.parent().unwrap_or(Path::new("."));
                let _ = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&note, ""));
                return Ok(None);
            }
            // Of a mirror it is not known whether it will have the file later, so it is not noted.
            if refusal::is_bare_absence(&answer) {
                return Ok(None);
            }
        }
        self.file(file).map(Some)
    }

    /// Whether asking the hub is forbidden.
    #[must_use]
    pub fn is_offline(&self) -> bool {
        self.of.settings.offline.is_some()
    }

    fn url(&self, file: &str) -> String {
        format!(
            "{}/{}/resolve/{}/{}",
            self.of.settings.endpoint,
            self.of.repo.url(),
            self.commit,
            encoded(file, b'/')
        )
    }

    fn missing(&self, file: &str, why: &str) -> StepError {
        let at = match self.of.revision == self.commit {
            true => String::new(),
            false => format!(" (commit {})", self.commit),
        };
        StepError::new(
            StepErrorKind::Transient,
            format!(
                "{}{at} is not in the hub's cache `{}`, and {why} forbids fetching it",
                self.of.asked(Some(file)),
                self.of.settings.cache.display()
            ),
        )
        .help(self.of.how_to_fetch(Some(file)))
    }
}

/// A repository, and which of its states is meant.
#[derive(Debug)]
struct Repository {
    settings: Settings,
    /// With the user's revision.
    repo: Repo,
    kind: RepoType,
    name: String,
    revision: String,
}

impl Repository {
    fn new(kind: RepoType, repo: &str, revision: &str, world: &World) -> Result<Self, StepError> {
        check_name(repo)?;
        check_path(revision, "revision")?;
        Ok(Self {
            settings: Settings::of(world)?,
            repo: Repo::with_revision(repo.to_owned(), kind, revision.to_owned()),
            kind,
            name: repo.to_owned(),
            revision: revision.to_owned(),
        })
    }

    fn cache(&self) -> CacheRepo {
        Cache::new(self.settings.cache.clone()).repo(self.repo.clone())
    }

    /// Its folder in the cache.
    fn folder(&self) -> PathBuf {
        self.settings.cache.join(self.repo.folder_name())
    }

    fn asked<'a>(&'a self, file: Option<&'a str>) -> Asked<'a> {
        Asked {
            url: self.repo.url(),
            revision: &self.revision,
            file,
            settings: &self.settings,
        }
    }

    fn newest(&self) -> Result<String, StepError> {
        if let Some(commit) = self.settled() {
            return Ok(commit);
        }
        let kept = self.kept();
        if let Some(why) = self.settings.offline {
            let kept = kept.ok_or_else(|| self.unknown(why))?;
            return Ok(self.settle(kept));
        }
        if self.settings.look_only {
            return kept.ok_or_else(|| StepError::unseen(&self.name));
        }
        match (self.ask(), kept) {
            (Ok(commit), _) => {
                let commit = self.settle(commit);
                self.keep(&commit)?;
                Ok(commit)
            }
            (Err(error), Some(commit)) if error.kind == StepErrorKind::Transient => {
                tracing::warn!("{}; going on with commit {commit}", error.message);
                Ok(self.settle(commit))
            }
            (Err(error), _) => Err(error),
        }
    }

    /// What this process goes by: a commit itself, the one that a key names, or the one that it
    /// found first.
    fn settled(&self) -> Option<String> {
        if is_commit(&self.revision) {
            return Some(self.revision.clone());
        }
        let found = SETTLED.lock().unwrap_or_else(PoisonError::into_inner);
        found.get(&self.key()).cloned()
    }

    /// The commit that was found, unless there is one already.
    fn settle(&self, commit: String) -> String {
        let mut found = SETTLED.lock().unwrap_or_else(PoisonError::into_inner);
        found.entry(self.key()).or_insert(commit).clone()
    }

    fn key(&self) -> (String, PathBuf) {
        let endpoint = self.settings.endpoint.clone();
        (endpoint, self.note())
    }

    /// Where the cache says for which commit the revision stands.
    fn note(&self) -> PathBuf {
        self.folder().join("refs").join(&self.revision)
    }

    fn kept(&self) -> Option<String> {
        let text = std::fs::read_to_string(self.note()).ok()?;
        Some(text.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    fn keep(&self, commit: &str) -> Result<(), StepError> {
        if self.kept().as_deref() == Some(commit) {
            return Ok(());
        }
        let note = self.note();
        let folder = note.parent().unwrap_or(Path::new("."));
        let write = || -> std::io::Result<()> {
            std::fs::create_dir_all(folder)?;
            let temp = folder.join(format!(".flowrun-{}", std::process::id()));
            std::fs::write(&temp, commit)?;
            std::fs::rename(&temp, &note)
        };
        write().map_err(|e| {
            StepError::io(&note, &e)
                .help("the hub's cache must be writable; HF_HUB_CACHE names another one")
        })
    }

    /// Asks the hub for the commit.
    fn ask(&self) -> Result<String, StepError> {
        let kind = match self.kind {
            RepoType::Model => "models",
            RepoType::Dataset => "datasets",
            RepoType::Space => "spaces",
        };
        let url = format!(
            "{}/api/{kind}/{}/revision/{}?expand%5B%5D=sha",
            self.settings.endpoint,
            self.name,
            encoded(&self.revision, 0)
        );
        let asked = self.asked(None);
        let client = Client::new(&self.settings);
        let answer = client.get(&url, 0);
        let answer = answer.map_err(|e| refusal::no_answer(&asked, e))?;
        if !answer.status().is_success() {
            return Err(refusal::explained(&asked, &answer));
        }
        let text = client.text(answer);
        let text = text.map_err(|e| refusal::no_answer(&asked, e))?;
        let info: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        match info["sha"].as_str() {
            Some(commit) if is_commit(commit) => Ok(commit.to_owned()),
            _ => Err(StepError::failed(format!(
                "`{}` does not answer as the hub does: it names no commit of {asked}",
                self.settings.endpoint
            ))
            .help("look at HF_ENDPOINT")),
        }
    }

    fn unknown(&self, why: &str) -> StepError {
        StepError::new(
            StepErrorKind::Transient,
            format!(
                "the hub's cache `{}` does not know the commit of {}, and {why} forbids asking",
                self.settings.cache.display(),
                self.asked(None)
            ),
        )
        .help(self.how_to_fetch(None))
    }

    fn how_to_fetch(&self, file: Option<&str>) -> String {
        let kind = match self.kind {
            RepoType::Model => "",
            RepoType::Dataset => " --repo-type dataset",
            RepoType::Space => " --repo-type space",
        };
        let file = file.map_or(String::new(), |file| format!(" {file}"));
        format!(
            "run once with the network, or `hf download{kind} {}{file} --revision {}`",
            self.name, self.revision
        )
    }
}

/// The commits of revisions that are no commits, by endpoint and place in the cache.
static SETTLED: Mutex<BTreeMap<(String, PathBuf), String>> = Mutex::new(BTreeMap::new());

/// Names of repositories become paths and URLs.
fn check_name(repo: &str) -> Result<(), StepError> {
    let is_part = |part: &str| {
        let fits = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
        !part.is_empty() && !part.starts_with('.') && !part.contains("..") && part.bytes().all(fits)
    };
    if repo.split('/').all(is_part) && repo.split('/').count() <= 2 {
        return Ok(());
    }
    Err(
        StepError::invalid(format!("`{repo}` names no repository of the hub"))
            .help("a name is `owner/name`, of letters, digits, `-`, `_` and `.`"),
    )
}

/// A path that stays where it belongs, whoever named it (an index of weights is the hub's).
fn check_path(path: &str, what: &str) -> Result<(), StepError> {
    let mut parts = Path::new(path).components();
    let stays = parts.all(|part| matches!(part, Component::Normal(_)));
    if stays && !path.is_empty() && !path.bytes().any(|b| b.is_ascii_control()) {
        return Ok(());
    }
    Err(StepError::invalid(format!(
        "`{}` is no {what} of a repository of the hub",
        path.escape_debug()
    ))
    .help("a path within the repository, without `..`"))
}

/// Text in a URL; `kept` stays as it is, too.
fn encoded(text: &str, kept: u8) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) || byte == kept {
            true => out.push(char::from(byte)),
            false => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}
