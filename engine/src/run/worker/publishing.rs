//! What a step made: from the store into the project tree.
//!
//! Invariant: the outputs of a step are published all or none, as far as a file system allows. They
//! are copied beside their places before the first takes its own; when one cannot, those before it
//! are taken back. What is killed in between is mended by the next run, which looks at all that is
//! published. What lies in the way and no step made is kept.

use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use flowrun_cache::{
    ActionKey, ActionResult, Artifact, ArtifactStore, CacheError, CacheReader, Digest, OutputValue,
    Placed, Staged, Staging,
};

use super::{Trouble, Worker, broken_or_failed, cache_error};
use crate::event::RunEvent;
use crate::expansion::ActionRequest;
use crate::places::published;
use crate::record::REPLACED;
use crate::step::{StepError, StepReporter};

/// Runs whose records are asked who made what lies where an output goes.
const RUNS: usize = 10;

impl Worker {
    /// Puts outputs into the project tree where they are missing or different: all of them, or
    /// none when one cannot be put or the run is asked to stop meanwhile.
    pub(super) fn publish(
        &self,
        request: &ActionRequest,
        result: &ActionResult,
    ) -> Result<(), Trouble> {
        let mut staging = Staging::new(self.cache.store());
        let mut staged = Vec::new();
        let places = published(&self.lookup.root, &request.publish, &result.outputs)?;
        for (artifact, dest) in &places {
            staged.extend(self.stage(&mut staging, request, artifact, dest)?);
        }
        self.put_all(request, staged)?;
        let report = result.outputs.values().find(|o| o.ty == "report");
        if let Some(OutputValue::One(artifact)) = report.map(|o| &o.value) {
            self.place(artifact, &self.run_dir.join("report.html"))?;
            if let Some(memory) = self.memory() {
                memory.report(artifact);
            }
        }
        Ok(())
    }

    /// An artifact beside its place in the project; nothing where it is there already.
    fn stage(
        &self,
        staging: &mut Staging<'_>,
        request: &ActionRequest,
        artifact: &Artifact,
        dest: &Path,
    ) -> Result<Option<Staged>, Trouble> {
        if self.cancel.is_cancelled() {
            return Err(StepError::cancelled().into());
        }
        self.claim(request, dest)?;
        if let Some(memory) = self.memory() {
            let inner = dest.strip_prefix(&self.lookup.root).unwrap_or(dest);
            memory.bytes(&request.node.name, inner, artifact);
        }
        // What is there is looked at each time: no record of an earlier run is trusted.
        if self.lookup.is_at(artifact, dest) {
            return Ok(None);
        }
        let staged = staging.add(artifact, dest, &|| self.cancel.is_cancelled());
        let staged = staged.map_err(|e| {
            let trouble = broken_or_failed(e, artifact);
            match trouble.broken {
                Some(_) => trouble,
                None => taken_back(&request.id, Vec::new(), trouble.error).into(),
            }
        })?;
        match staged {
            Some(staged) => Ok(Some(staged)),
            None => Err(StepError::cancelled().into()),
        }
    }

    /// Gives what was staged its places. What lies there is looked at before the first is touched.
    fn put_all(&self, request: &ActionRequest, staged: Vec<Staged>) -> Result<(), StepError> {
        let mut keep = Vec::with_capacity(staged.len());
        for one in &staged {
            keep.push(self.is_kept(one.dest())?);
        }
        let mut put: Vec<Put> = Vec::with_capacity(staged.len());
        for (one, keep) in staged.into_iter().zip(keep) {
            match self.put(one, keep) {
                Ok(done) => put.push(done),
                Err(error) => return Err(taken_back(&request.id, put, error)),
            }
        }
        for kept in put.iter().filter_map(|put| put.aside.as_ref()) {
            let inner = kept.from.strip_prefix(&self.lookup.root);
            self.reporter(&request.id).warning(&format!(
                "`{}` held what no step made; it was replaced, and is kept as `{}`",
                inner.unwrap_or(&kept.from).display(),
                kept.to.display()
            ));
        }
        Ok(())
    }

    /// Gives one its place; when it cannot have it, what lies there is as it was.
    fn put(&self, staged: Staged, keep: bool) -> Result<Put, StepError> {
        let aside = if keep {
            Some(self.put_aside(staged.dest())?)
        } else {
            None
        };
        match staged.put() {
            Ok(placed) => Ok(Put { placed, aside }),
            Err(error) => {
                let error = cache_error(error);
                let lost = aside.and_then(|aside| aside.undo().err());
                Err(match lost {
                    None => error,
                    Some(lost) => StepError {
                        message: format!("{}; {}", error.message, lost.message),
                        ..lost
                    },
                })
            }
        }
    }

    fn place(&self, artifact: &Artifact, dest: &Path) -> Result<(), Trouble> {
        let placed = self.cache.store().materialize(artifact, dest);
        placed.map_err(|e| broken_or_failed(e, artifact))
    }

    /// What lies at `dest` was made by no step, as far as is known: the user may have nothing else
    /// of it.
    fn is_kept(&self, dest: &Path) -> Result<bool, StepError> {
        let at = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let (place, cache) = (at(dest), at(self.cache.dir()));
        if cache.starts_with(&place) || place.starts_with(&cache) {
            let text = format!(
                "`{}` is not published: the cache lies there",
                dest.display()
            );
            return Err(StepError::invalid(text).help("publish to another path"));
        }
        if !dest.exists() {
            // A link that leads nowhere is somebody's too.
            return Ok(dest.is_symlink());
        }
        let there = ArtifactStore::address_of(dest).map_err(|e| not_kept(dest, &e))?;
        Ok(!self.is_output(&there.digest))
    }

    /// Keeps what lies at `dest` with the run's record.
    fn put_aside(&self, dest: &Path) -> Result<Aside, StepError> {
        let store = self.cache.store();
        let inner = dest.strip_prefix(&self.lookup.root).unwrap_or(dest);
        let to = self.run_dir.join(REPLACED).join(inner);
        let folder = to.parent().unwrap_or(&self.run_dir);
        std::fs::create_dir_all(folder).map_err(|e| StepError::io(folder, &e))?;
        // Links and all modes stay, unless the cache is on another file system.
        let moved = std::fs::rename(dest, &to).is_ok();
        if !moved && dest.is_symlink() && !dest.exists() {
            // Of a link that leads nowhere there is nothing else to keep.
            let kept = std::fs::read_link(dest);
            kept.and_then(|target| std::os::unix::fs::symlink(target, &to))
                .map_err(|e| StepError::io(&to, &e))?;
        } else if !moved {
            let kept = store.put_path(dest).map_err(|e| not_kept(dest, &e))?;
            store
                .materialize(&kept, &to)
                .map_err(|e| not_kept(dest, &e))?;
        }
        let from = dest.to_owned();
        Ok(Aside { from, to, moved })
    }

    /// A result that is in the cache, or was until this run, has an output of these bytes, or the
    /// record of a recent run tells of one.
    fn is_output(&self, digest: &Digest) -> bool {
        let outputs = || {
            let all = self.cache.actions().all();
            all.flat_map(|result| digests(&result)).collect()
        };
        let overwritten = || {
            let overwritten = self.overwritten.lock();
            let overwritten = overwritten.unwrap_or_else(PoisonError::into_inner);
            overwritten.contains(digest)
        };
        self.known_outputs.get_or_init(outputs).contains(digest)
            || overwritten()
            || is_recorded(self.cache.dir(), digest)
    }

    /// A result of this key is about to be overwritten: what it made may lie in the project.
    pub(super) fn remember_outputs(&self, key: &ActionKey) {
        let Some(result) = self.cache.actions().get(key) else {
            return;
        };
        let overwritten = self.overwritten.lock();
        let mut overwritten = overwritten.unwrap_or_else(PoisonError::into_inner);
        overwritten.extend(digests(&result));
    }

    /// Takes a place of the project for an action: a path that names an item is known only now.
    fn claim(&self, request: &ActionRequest, dest: &Path) -> Result<(), StepError> {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let above = dest.ancestors().find_map(|p| places.get_key_value(p));
        let next = places.range(dest.to_owned()..).next();
        let below = next.filter(|(path, _)| path.starts_with(dest));
        let (shown, id) = (dest.display(), &request.id);
        if let Some((path, by)) = above.or(below) {
            let other = path.display();
            if by != id {
                let text = format!(
                    "`{shown}` cannot take the output of `{id}`: `{by}` published to `{other}` in this run"
                );
                return Err(StepError::invalid(text)
                    .help("name the item in the path, for example `results/${{ item.x }}.json`"));
            }
            if path != dest {
                let text = format!(
                    "`{id}` publishes to `{shown}` and to `{other}`, one of which lies in the other"
                );
                return Err(StepError::invalid(text).help(
                    "what is published takes its whole place: give each output a path of its own",
                ));
            }
        }
        places.insert(dest.to_owned(), id.clone());
        Ok(())
    }
}

/// An output in its place.
struct Put {
    placed: Placed,
    aside: Option<Aside>,
}

impl Put {
    fn undo(self) -> Result<(), StepError> {
        self.placed.undo().map_err(cache_error)?;
        self.aside.map_or(Ok(()), Aside::undo)
    }
}

/// What lay where an output is published, kept with the run's record.
struct Aside {
    from: PathBuf,
    to: PathBuf,
    /// Else it was copied.
    moved: bool,
}

impl Aside {
    /// Nothing takes its place.
    fn undo(self) -> Result<(), StepError> {
        let Self { from, to, moved } = self;
        if moved {
            std::fs::rename(&to, &from).map_err(|e| {
                let (from, to) = (from.display(), to.display());
                let text =
                    format!("what lay at `{from}` is in `{to}`, and cannot be put back: {e}");
                StepError::failed(text).help("move it back")
            })?;
        } else {
            // It lies where it was; a second copy does no harm.
            let _ = std::fs::remove_dir_all(&to).or_else(|_| std::fs::remove_file(&to));
        }
        // A record that keeps nothing is removed in its time: up to the first folder with more in it.
        let mut folders = to.ancestors().skip(1);
        while folders
            .next()
            .is_some_and(|f| std::fs::remove_dir(f).is_ok())
        {}
        Ok(())
    }
}

/// Takes back what was put before an output that cannot be; the error, with what is left of it.
fn taken_back(id: &str, put: Vec<Put>, error: StepError) -> StepError {
    let mut lost = Vec::new();
    let some = !put.is_empty();
    for one in put.into_iter().rev() {
        let dest = one.placed.dest().display().to_string();
        if let Err(why) = one.undo() {
            lost.push(format!("`{dest}` could not be put back ({})", why.message));
        }
    }
    let state = match (lost.is_empty(), some) {
        (true, false) => "nothing was published".to_owned(),
        (true, true) => {
            "the outputs that were published before it were taken back: all is as it was".to_owned()
        }
        (false, _) => format!("{}; the next run publishes all of them", lost.join(", ")),
    };
    let why = error.message;
    StepError {
        message: format!("an output of `{id}` cannot be published: {why}; {state}"),
        help: error
            .help
            .or_else(|| Some("make room there, or publish to another path, and run again".into())),
        ..error
    }
}

fn not_kept(dest: &Path, error: &CacheError) -> StepError {
    let text = format!("what lies at `{}` cannot be kept: {error}", dest.display());
    StepError::failed(text).help("move it away; nothing was put in its place")
}

fn digests(result: &ActionResult) -> Vec<Digest> {
    let artifacts = result.outputs.values().flat_map(|o| o.value.artifacts());
    artifacts.map(|artifact| artifact.digest).collect()
}

/// A step of a recent run ended with an output of these bytes, by the run's record.
fn is_recorded(cache: &Path, digest: &Digest) -> bool {
    let hex = digest.to_hex();
    let told = |run: PathBuf| {
        let events = std::fs::read_to_string(run.join("events.jsonl")).unwrap_or_default();
        let mut lines = events.lines().filter(|line| line.contains(&hex));
        lines.any(|line| match serde_json::from_str(line) {
            Ok(RunEvent::StepFinished { outputs, .. }) => outputs.values().any(|o| o.digest == hex),
            _ => false,
        })
    };
    let runs = CacheReader::open(cache).runs();
    runs.into_iter().take(RUNS).any(told)
}
