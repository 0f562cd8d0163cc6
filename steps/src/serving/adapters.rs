//! [`Adapters`]: the base model, and the adapters over it that were asked for.
//!
//! An adapter is a folder with PEFT's two files, inside one of the allowed folders; its id is
//! `base:folder`. It is loaded when it is first asked for, and again when one of the two changed on
//! disk. Invariant: nothing outside of the allowed folders is ever read, whatever a caller names
//! and wherever links lead.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use flowrun_engine::step::StepError;
use flowrun_model::{
    BaseModel, GenerateOptions, Generator, LoraAdapter, ModelError, TemplateArguments,
};

use super::{ModelEntry, ModelsError};
use crate::checkpoint::Checkpoint;
use crate::models::embedded::failed;

/// PEFT's files.
const FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];
/// Bytes of an adapter at most: far more than one of a small model has.
const LARGEST: u64 = 1 << 30;
/// Names that callers may give at once.
const NAMES: usize = 1000;

/// A model in memory. It stays while someone holds it.
#[derive(Clone)]
pub struct Loaded {
    pub(super) generator: Arc<Generator>,
    /// What its chat template is told where a request says nothing else.
    pub(super) told: Arc<TemplateArguments>,
}

/// The models of one base.
pub(super) struct Adapters {
    base: Arc<BaseModel>,
    base_id: String,
    /// The base model alone, told what its entry says.
    alone: Loaded,
    pinned: Option<(String, Loaded)>,
    folders: Vec<PathBuf>,
    keep: usize,
    options: GenerateOptions,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Names given by callers, and the folders they stand for.
    named: BTreeMap<String, PathBuf>,
    /// Most recently used last.
    loaded: Vec<Entry>,
}

impl State {
    /// Whether `name` may be given: it is known already, or fewer than `most` are. Names whose
    /// adapter is gone from disk give way.
    fn room_for(&mut self, name: &str, most: usize) -> Result<(), ModelsError> {
        if self.named.len() < most || self.named.contains_key(name) {
            return Ok(());
        }
        let there = |folder: &PathBuf| FILES.iter().all(|file| folder.join(file).is_file());
        self.named.retain(|_, folder| there(folder));
        match self.named.len() < most {
            true => Ok(()),
            false => Err(ModelsError::Full(most)),
        }
    }

    /// Puts an adapter in the place of what was loaded from its folder; at most `keep` stay.
    fn remember(&mut self, entry: Entry, keep: usize) {
        self.loaded.retain(|other| other.folder != entry.folder);
        self.loaded.push(entry);
        while self.loaded.len() > keep {
            self.loaded.remove(0);
        }
    }
}

struct Entry {
    folder: PathBuf,
    stamp: Stamp,
    model: Loaded,
}

/// Sizes and times of PEFT's two files: other ones are another adapter.
type Stamp = [(u64, Option<SystemTime>); 2];

impl Adapters {
    /// The base model `base_id`, whose entry says `told`.
    pub(super) fn new(
        base: Arc<BaseModel>,
        (base_id, told): (String, TemplateArguments),
        pinned: Option<(String, PathBuf)>,
        folders: &[PathBuf],
        keep: usize,
        options: GenerateOptions,
    ) -> Result<Self, StepError> {
        let alone = Generator::new(Arc::clone(&base), None, options).map_err(failed)?;
        let alone = Loaded {
            generator: Arc::new(alone),
            told: Arc::new(told),
        };
        let real =
            |folder: &PathBuf| std::fs::canonicalize(folder).map_err(|e| StepError::io(folder, &e));
        let mut adapters = Self {
            base,
            base_id,
            alone,
            pinned: None,
            folders: folders.iter().map(real).collect::<Result<_, _>>()?,
            keep: keep.max(1),
            options,
            state: Mutex::default(),
        };
        if let Some((id, folder)) = pinned {
            // The entry is this checkpoint's own.
            if let Ok(checkpoint) = Checkpoint::load(&folder) {
                let entry = (*adapters.alone.told).clone();
                checkpoint.told(entry, &adapters.base_id)?;
            }
            let model = adapters
                .read(&folder)
                .map_err(|e| StepError::invalid(e.to_string()))?;
            adapters.pinned = Some((id, model));
        }
        Ok(adapters)
    }

    pub(super) fn base_id(&self) -> &str {
        &self.base_id
    }

    /// The model that is meant, from memory or from disk.
    pub(super) fn get(&self, id: &str) -> Result<Loaded, ModelsError> {
        if id == self.base_id {
            return Ok(self.alone.clone());
        }
        if let Some((pinned, model)) = &self.pinned
            && pinned == id
        {
            return Ok(model.clone());
        }
        let folder = self.find(id)?;
        let stamp = stamp(&folder)?;
        let mut state = self.state();
        if let Some(at) = state.loaded.iter().position(|e| e.folder == folder) {
            let entry = state.loaded.remove(at);
            if entry.stamp == stamp {
                let model = entry.model.clone();
                state.loaded.push(entry);
                return Ok(model);
            }
        }
        drop(state);
        let model = self.read(&folder)?;
        let entry = Entry {
            folder,
            stamp,
            model: model.clone(),
        };
        self.state().remember(entry, self.keep);
        Ok(model)
    }

    /// All models, the base first.
    pub(super) fn list(&self) -> Vec<ModelEntry> {
        let entry = |id: String, loaded| ModelEntry {
            id,
            parent: Some(self.base_id.clone()),
            loaded,
        };
        let mut ids: BTreeMap<String, PathBuf> = self.state().named.clone();
        for folder in &self.folders {
            let inside = std::fs::read_dir(folder).into_iter().flatten().flatten();
            for path in inside.map(|entry| entry.path()) {
                if let Some(name) = path.file_name().and_then(|name| name.to_str())
                    && FILES.iter().all(|file| path.join(file).is_file())
                {
                    ids.entry(format!("{}:{name}", self.base_id))
                        .or_insert(path);
                }
            }
        }
        let state = self.state();
        let is_loaded = |folder: &Path| state.loaded.iter().any(|entry| entry.folder == folder);
        let mut list = vec![ModelEntry {
            id: self.base_id.clone(),
            parent: None,
            loaded: true,
        }];
        if let Some((id, _)) = &self.pinned {
            ids.remove(id);
            list.push(entry(id.clone(), true));
        }
        list.extend(ids.into_iter().map(|(id, folder)| {
            let loaded = is_loaded(&folder);
            entry(id, loaded)
        }));
        list
    }

    /// Adapters from folders that are in memory.
    pub(super) fn in_memory(&self) -> usize {
        self.state().loaded.len()
    }

    /// Gives the adapter in `path` a name, and loads it, whatever was loaded from there or under
    /// that name before.
    pub(super) fn name(&self, name: &str, path: &Path, again: bool) -> Result<(), ModelsError> {
        if name.is_empty() || name.len() > 200 || name.chars().any(char::is_control) {
            let text = "`lora_name` has 1 to 200 characters, none of them a control character";
            return Err(ModelsError::Forbidden(text.to_owned()));
        }
        let folder = self.allowed(path)?;
        let stays = name == self.base_id || self.is_pinned(name);
        if stays || (!again && self.find(name).is_ok()) {
            return Err(ModelsError::Taken(name.to_owned()));
        }
        // Before a large file is read for nothing.
        self.state().room_for(name, NAMES)?;
        let entry = Entry {
            stamp: stamp(&folder)?,
            model: self.read(&folder)?,
            folder: folder.clone(),
        };
        let mut state = self.state();
        state.room_for(name, NAMES)?;
        if let Some(before) = state.named.insert(name.to_owned(), folder) {
            state.loaded.retain(|entry| entry.folder != before);
        }
        state.remember(entry, self.keep);
        Ok(())
    }

    /// Takes a name back, and its adapter out of memory. One that lies in an allowed folder is
    /// loaded again when someone asks for it by its own id.
    pub(super) fn forget(&self, name: &str) -> Result<(), ModelsError> {
        // Apart, so that the lock is not held while looking further.
        let named = self.state().named.remove(name);
        let folder = match named {
            Some(folder) => folder,
            None => self.find(name)?,
        };
        self.state().loaded.retain(|entry| entry.folder != folder);
        Ok(())
    }

    fn is_pinned(&self, id: &str) -> bool {
        self.pinned.as_ref().is_some_and(|(pinned, _)| pinned == id)
    }

    /// The folder that an id stands for.
    fn find(&self, id: &str) -> Result<PathBuf, ModelsError> {
        if let Some(folder) = self.state().named.get(id) {
            return Ok(folder.clone());
        }
        let unknown = || ModelsError::Unknown(id.to_owned());
        let own = id.strip_prefix(&self.base_id);
        let name = own
            .and_then(|rest| rest.strip_prefix(':'))
            .ok_or_else(unknown)?;
        let mut parts = Path::new(name).components();
        let (Some(Component::Normal(_)), None) = (parts.next(), parts.next()) else {
            return Err(unknown());
        };
        let there = |folder: &PathBuf| self.allowed(&folder.join(name)).ok();
        self.folders.iter().find_map(there).ok_or_else(unknown)
    }

    /// The real place of an adapter, if it is one that may be read.
    fn allowed(&self, path: &Path) -> Result<PathBuf, ModelsError> {
        // One answer whether it is missing or elsewhere: callers learn nothing of this machine.
        let outside = || {
            ModelsError::Forbidden(format!(
                "`{}` is no adapter in a folder that this server may load adapters from",
                path.display()
            ))
        };
        let inside = |path: &Path| {
            let real = std::fs::canonicalize(path).ok()?;
            self.folders
                .iter()
                .any(|folder| real.starts_with(folder) && real != *folder)
                .then_some(real)
        };
        let folder = inside(path).ok_or_else(outside)?;
        // The files may be links too.
        match FILES
            .iter()
            .all(|file| inside(&folder.join(file)).is_some())
        {
            true => Ok(folder),
            false => Err(outside()),
        }
    }

    fn read(&self, folder: &Path) -> Result<Loaded, ModelsError> {
        let unusable = |why: String| ModelsError::Unusable(why);
        let [_, (bytes, _)] = stamp(folder)?;
        if bytes > LARGEST {
            return Err(unusable(format!(
                "the adapter has {bytes} bytes, at most {LARGEST} are allowed"
            )));
        }
        let checkpoint = Checkpoint::load(folder).ok();
        let of = checkpoint.as_ref().and_then(|c| c.adapter.as_ref());
        if let Some(adapter) = of
            && ![&self.base.id, &self.base_id].contains(&&adapter.base)
        {
            return Err(unusable(format!(
                "the checkpoint was trained on another model than `{}`",
                self.base_id
            )));
        }
        let adapter = LoraAdapter::load(folder, &self.base.weights.config)
            .map_err(|e| unusable(without_folder(&e.to_string(), folder)))?;
        let generator = Generator::new(Arc::clone(&self.base), Some(&adapter), self.options)
            .map_err(|e| match e {
                ModelError::NoDevice(_) => ModelsError::NoRoom(e.to_string()),
                ModelError::Device(_) => ModelsError::Down(e.to_string()),
                e => unusable(e.to_string()),
            })?;
        Ok(Loaded {
            generator: Arc::new(generator),
            told: self.told(checkpoint.and_then(|c| c.chat_template_kwargs), folder),
        })
    }

    /// What the chat template is told when the adapter in `folder` answers: what it was told when
    /// that was trained, else what the base model's entry says. The base has one entry, and its
    /// adapters may have been trained in several ways, so what one knows of itself wins.
    fn told(&self, trained: Option<TemplateArguments>, folder: &Path) -> Arc<TemplateArguments> {
        let entry = &self.alone.told;
        let Some(trained) = trained.filter(|trained| *trained != **entry) else {
            return Arc::clone(entry);
        };
        if !entry.is_empty() {
            tracing::warn!(
                "the adapter in {} was trained with `chat_template_kwargs: {}`: it is told that, and \
                 not {}",
                folder.display(),
                serde_json::json!(trained),
                serde_json::json!(**entry)
            );
        }
        Arc::new(trained)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Callers need not know where the server keeps its files.
fn without_folder(message: &str, folder: &Path) -> String {
    message.replace(&format!("{}/", folder.display()), "")
}

fn stamp(folder: &Path) -> Result<Stamp, ModelsError> {
    let of = |file: &str| -> Result<_, ModelsError> {
        let about = std::fs::metadata(folder.join(file));
        let about = about.map_err(|e| ModelsError::Unusable(format!("`{file}`: {e}")))?;
        Ok((about.len(), about.modified().ok()))
    };
    let [config, weights] = FILES;
    Ok([of(config)?, of(weights)?])
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_are_bounded_and_those_of_adapters_that_are_gone_give_way() {
        let dir = tempfile::tempdir().unwrap();
        let mut state = State::default();
        for name in ["a", "b"] {
            let folder = dir.path().join(name);
            std::fs::create_dir_all(&folder).unwrap();
            for file in FILES {
                std::fs::write(folder.join(file), "x").unwrap();
            }
            state.room_for(name, 2).unwrap();
            state.named.insert(name.to_owned(), folder);
        }
        assert_eq!(state.room_for("c", 2), Err(ModelsError::Full(2)));
        assert_eq!(state.room_for("a", 2), Ok(()), "it has its place");
        std::fs::remove_dir_all(dir.path().join("b")).unwrap();
        assert_eq!(state.room_for("c", 2), Ok(()));
        assert_eq!(state.named.keys().collect::<Vec<_>>(), ["a"]);
    }
}
