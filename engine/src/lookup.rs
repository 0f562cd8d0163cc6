//! [`Lookup`]: gives an action its key and finds its result. Planning and
//! running share it, so that what a plan says is what a run does.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::Metadata;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::expansion::{ActionRequest, Entry, kind_of};
use crate::manifest::{ActionManifest, InputKey, MANIFEST_VERSION, file_words};
use crate::pipeline::Action;
use crate::premises::{Memory, Observed, Stamps};
use crate::sandbox::locale;
use crate::step::{StepError, World};
use flowrun_cache::remote::Fetched;
use flowrun_cache::{
    ActionCache, ActionKey, ActionResult, Artifact, ArtifactKind, ArtifactStore, Cache, CacheError,
    CacheReader, Digest, RemoteCache, is_executable,
};

/// Version of how `run` steps are run. Raised when the same command may give other bytes.
const RUN_VERSION: u32 = 2;

/// Where keys and results come from.
pub(crate) struct Lookup {
    pub(crate) root: PathBuf,
    pub(crate) world: World,
    store: ArtifactStore,
    actions: ActionCache,
    /// The cache, when it is held: project files are then stored while they are hashed.
    held: Option<Arc<Cache>>,
    /// A cache shared with other machines, asked for what this one lacks.
    remote: Option<Arc<RemoteCache>>,
    /// Hears what keys rest on.
    pub(crate) memory: Option<Arc<Memory>>,
    /// What the last run knew of files; asked when the cache is not held.
    stamps: Stamps,
}

/// An action with its inputs' digests and its key.
pub(crate) struct Keyed {
    pub(crate) inputs: BTreeMap<String, Inputs>,
    pub(crate) manifest: ActionManifest,
    pub(crate) key: ActionKey,
    /// Its result is to stand in place of one that the remote cache may have.
    pub(crate) replaces: bool,
    /// The cache was asked, and had no result for the key.
    pub(crate) is_new: bool,
}

/// The artifacts of one port, with their labels.
pub(crate) struct Inputs {
    pub(crate) list: bool,
    pub(crate) entries: Vec<(Artifact, String)>,
}

/// What the cache has under a key.
pub(crate) enum Found {
    /// A result with all its objects.
    Whole(Box<ActionResult>),
    /// The same, which only the remote cache had. Its objects are here now, when the cache is held.
    Fetched(Box<ActionResult>),
    /// Nothing here, and in the remote cache something that cannot be used: why.
    Flawed(String),
    /// A result, but objects of it are missing or cut short.
    Broken,
    /// Nothing.
    Nothing,
}

impl Lookup {
    /// For a run.
    pub(crate) fn holding(
        root: &Path,
        world: World,
        cache: &Arc<Cache>,
        memory: Option<Arc<Memory>>,
        remote: Option<Arc<RemoteCache>>,
    ) -> Self {
        Self {
            root: root.to_owned(),
            world,
            store: cache.store().clone(),
            actions: cache.actions().clone(),
            held: Some(Arc::clone(cache)),
            remote,
            memory,
            stamps: Stamps::default(),
        }
    }

    /// For a plan: nothing is written, and a file that `stamps` tell of is not read.
    pub(crate) fn reading(
        root: &Path,
        world: World,
        cache: &CacheReader,
        remote: Option<Arc<RemoteCache>>,
        stamps: Stamps,
    ) -> Self {
        Self {
            root: root.to_owned(),
            world,
            store: cache.store().clone(),
            actions: cache.actions().clone(),
            held: None,
            remote,
            memory: None,
            stamps,
        }
    }

    /// The key of an action.
    ///
    /// # Errors
    /// When an input file cannot be read, or the world makes the step impossible.
    pub(crate) fn key(&self, request: &ActionRequest) -> Result<Keyed, StepError> {
        self.key_in(&self.world_of(request), request)
    }

    /// The key of an action whose step kind sees this world.
    ///
    /// # Errors
    /// As [`Lookup::key`].
    pub(crate) fn key_in(
        &self,
        world: &World,
        request: &ActionRequest,
    ) -> Result<Keyed, StepError> {
        let node = &request.node;
        let inputs = self.inputs(request)?;
        let (kind_version, observed, sees_labels) = match &node.action {
            Action::Uses(step) => {
                let facts = step.observe(&request.params, world)?;
                if let Some(memory) = &self.memory {
                    // The next run would look without the step's variables.
                    if !request.env.is_empty() {
                        memory.spoil();
                    }
                    memory.observed(Observed {
                        kind: step.kind().to_owned(),
                        params: request.params.clone(),
                        facts: facts.clone(),
                    });
                }
                (step.version(), facts, true)
            }
            Action::Run(_) => (RUN_VERSION, BTreeMap::new(), false),
        };
        let key_of = |inputs: &Inputs| {
            let seen = sees_labels || inputs.list;
            let entries = inputs.entries.iter();
            entries
                .map(|(artifact, label)| InputKey {
                    digest: artifact.digest,
                    label: seen.then(|| label.clone()),
                    folder: artifact.kind == ArtifactKind::Tree,
                    executable: artifact.executable,
                })
                .collect()
        };
        let manifest = ActionManifest {
            version: MANIFEST_VERSION,
            kind: kind_of(node).to_owned(),
            kind_version,
            params: request.key_params.clone(),
            inputs: inputs
                .iter()
                .map(|(port, inputs)| (port.clone(), key_of(inputs)))
                .collect(),
            observed,
            env: self.env_of(request),
            command: request.command.clone(),
            files: self.named_files(&node.name, request.command.as_deref())?,
            out_paths: node.out_paths.clone(),
        };
        Ok(Keyed {
            inputs,
            key: manifest.key(),
            manifest,
            replaces: false,
            is_new: false,
        })
    }

    /// The world as a step kind sees it: with the variables that its step declares.
    pub(crate) fn world_of(&self, request: &ActionRequest) -> Cow<'_, World> {
        if request.env.is_empty() {
            return Cow::Borrowed(&self.world);
        }
        let mut world = self.world.clone();
        world.env.extend(request.env.clone());
        Cow::Owned(world)
    }

    /// What is declared, and for a command the locale: it decides how programs sort and print.
    fn env_of(&self, request: &ActionRequest) -> BTreeMap<String, String> {
        let mut env = match &request.node.action {
            Action::Run(_) => locale(&self.world.env),
            Action::Uses(_) => BTreeMap::new(),
        };
        env.extend(request.env.clone());
        env
    }

    /// What the cache has for the action, or else the remote one. Nothing that is here is hashed
    /// but tree objects.
    pub(crate) fn find(&self, request: &ActionRequest, key: &ActionKey) -> Found {
        match self.find_here(request, key) {
            Found::Nothing => self.find_there(request, key),
            Found::Broken => match self.find_there(request, key) {
                Found::Nothing | Found::Flawed(_) => Found::Broken,
                found => found,
            },
            found => found,
        }
    }

    fn find_there(&self, request: &ActionRequest, key: &ActionKey) -> Found {
        let Some(remote) = &self.remote else {
            return Found::Nothing;
        };
        let complete = |result: &ActionResult| is_complete(request, result);
        let fetched = match &self.held {
            Some(cache) => remote.fetch(cache, key, &complete),
            // A plan needs to know what there is, not to have it.
            None => remote
                .peek(key)
                .filter(complete)
                .map_or(Fetched::Nothing, |result| Fetched::Whole(Box::new(result))),
        };
        match fetched {
            Fetched::Whole(result) => Found::Fetched(result),
            Fetched::Flawed(why) => Found::Flawed(why),
            Fetched::Nothing => Found::Nothing,
        }
    }

    fn find_here(&self, request: &ActionRequest, key: &ActionKey) -> Found {
        let Some(result) = self.actions.get(key) else {
            return Found::Nothing;
        };
        let mut artifacts = result.outputs.values().flat_map(|o| o.value.artifacts());
        let whole = is_complete(request, &result)
            && artifacts.all(|artifact| self.store.contains(artifact));
        drop(artifacts);
        if whole {
            Found::Whole(Box::new(result))
        } else {
            Found::Broken
        }
    }

    fn inputs(&self, request: &ActionRequest) -> Result<BTreeMap<String, Inputs>, StepError> {
        let mut all = BTreeMap::new();
        for (port, given) in &request.inputs {
            let mut entries = Vec::with_capacity(given.entries.len());
            for entry in &given.entries {
                entries.push(match entry {
                    Entry::Artifact { artifact, label } => (artifact.clone(), label.clone()),
                    Entry::File(path) => {
                        let artifact = self.file(path).map_err(|e| {
                            let id = &request.id;
                            StepError::invalid(format!("input `{port}` of `{id}`: {e}"))
                        })?;
                        if let Some(memory) = &self.memory {
                            memory.file(&request.node.name, path, &artifact);
                        }
                        (artifact, port.clone())
                    }
                });
            }
            let list = given.list;
            all.insert(port.clone(), Inputs { list, entries });
        }
        Ok(all)
    }

    /// The address of a project file or folder, stored when the cache is held.
    fn file(&self, path: &Path) -> Result<Artifact, CacheError> {
        let path = self.root.join(path);
        let fail = |e| CacheError::outside(&path, e);
        let meta = std::fs::metadata(&path).map_err(fail)?;
        if meta.is_file() {
            let known = Artifact::of_file(self.digest(&path).map_err(fail)?, &meta);
            if self.held.is_none() || self.store.contains(&known) {
                return Ok(known);
            }
        }
        match self.held {
            Some(_) => self.store.put_project_path(&path),
            None => self.store.address_in_project(&path),
        }
    }

    fn named_files(
        &self,
        step: &str,
        command: Option<&str>,
    ) -> Result<BTreeMap<String, Digest>, StepError> {
        let mut files = BTreeMap::new();
        for word in file_words(command.unwrap_or_default()) {
            let path = self.root.join(word);
            let meta = std::fs::metadata(&path).ok().filter(Metadata::is_file);
            if let Some(meta) = meta {
                let digest = self.digest(&path).map_err(|e| StepError::io(&path, &e))?;
                files.insert(word.to_owned(), digest);
                if let Some(memory) = &self.memory {
                    // The key does not tell whether it is a program.
                    let artifact = Artifact {
                        executable: false,
                        ..Artifact::of_file(digest, &meta)
                    };
                    memory.bytes(step, Path::new(word), &artifact);
                }
            } else if let Some(memory) = &self.memory {
                memory.absent(word);
            }
        }
        Ok(files)
    }

    fn digest(&self, path: &Path) -> std::io::Result<Digest> {
        match &self.held {
            Some(cache) => cache.index().file_digest(path),
            None => match self.stamps.digest(path, &std::fs::metadata(path)?) {
                Some(digest) => Ok(digest),
                None => Digest::of_file(path),
            },
        }
    }

    /// What lies at `path` is this artifact, byte for byte. A file that is no program may be one there:
    /// whoever made it one may want to run it.
    pub(crate) fn is_at(&self, artifact: &Artifact, path: &Path) -> bool {
        let fits = |meta: Metadata| {
            let is_lost = artifact.executable && !is_executable(&meta);
            meta.is_file() && meta.len() == artifact.size && !is_lost
        };
        match artifact.kind {
            ArtifactKind::File => {
                std::fs::symlink_metadata(path).is_ok_and(fits)
                    && self.digest(path).is_ok_and(|d| d == artifact.digest)
            }
            ArtifactKind::Tree => {
                path.is_dir() && ArtifactStore::address_of(path).is_ok_and(|a| a == *artifact)
            }
        }
    }
}

/// The result has every output that the step must have.
fn is_complete(request: &ActionRequest, result: &ActionResult) -> bool {
    let mut ports = request.node.outputs.iter();
    ports.all(|port| port.optional || result.outputs.contains_key(&port.name))
}
