//! [`Place`]: where a server reads an adapter from, and how it comes there: a folder that this
//! machine and the server both see, or a folder of an object store.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use flowrun_cache::{DepotError, Prefix};
use flowrun_engine::step::{Cancel, StepError};
use flowrun_lm::client::AdapterPlace;
use flowrun_lm::lm::LmError;

use super::Host;
use crate::checkpoint::{ADAPTER_CONFIG, ADAPTER_VALUES};
use crate::folder;

/// How URLs begin of the stores that Ray Serve LLM looks for adapters in.
pub(crate) const RAY_STORES: [&str; 4] = ["s3://", "gs://", "abfss://", "azure://"];

/// Where the adapter of one checkpoint lies.
pub(super) enum Place {
    /// In a folder.
    Folder {
        /// As this machine sees it.
        to: PathBuf,
        /// As the server sees it, where that is another path.
        seen_as: Option<PathBuf>,
        /// The server must be told.
        load: bool,
    },
    /// In an object store, which the server looks into itself.
    Store(Stored),
}

/// A folder of an object store.
pub(super) struct Stored {
    /// Of the folder that all adapters lie in.
    url: String,
    /// The adapter's folder there.
    name: String,
    /// Credentials and endpoints.
    env: BTreeMap<String, String>,
    cancel: Cancel,
}

impl Place {
    /// Where the adapter `name` of the entry of `model` is to lie. Nothing is put there yet.
    ///
    /// # Errors
    /// Invalid when the entry contradicts itself.
    pub(super) fn of(
        place: &AdapterPlace,
        model: &str,
        name: &str,
        host: &Host<'_>,
    ) -> Result<Self, StepError> {
        if let Some((what, help)) = contradiction(place) {
            return Err(StepError::invalid(format!("the entry of `{model}`: {what}")).help(help));
        }
        if let Some(url) = &place.url {
            return Ok(Self::Store(Stored {
                url: url.clone(),
                name: name.to_owned(),
                env: host.world.env.clone(),
                cancel: host.cancel.clone(),
            }));
        }
        // There is a folder, or the entry would contradict itself.
        let folder = place.folder.clone().unwrap_or_default();
        Ok(Self::Folder {
            to: host.world.root.join(folder).join(name),
            seen_as: place.seen_as.as_ref().map(|folder| folder.join(name)),
            load: place.load,
        })
    }

    /// How long a server may go on answering that an adapter is not there once it is: Ray Serve LLM
    /// remembers for 30 seconds that it found none in its store.
    pub(super) fn unseen_for(&self) -> Duration {
        match self {
            Self::Folder { .. } => Duration::ZERO,
            Self::Store(_) => Duration::from_secs(36),
        }
    }

    /// Has the adapter of the checkpoint in `from` lie there, whole. False when a store had it.
    pub(super) fn put(&self, from: &Path) -> Result<bool, LmError> {
        match self {
            Self::Folder { to, .. } => {
                let copied = folder::copy_whole(from, to);
                copied.map_err(|e| LmError::Barred(e.message))?;
                Ok(true)
            }
            Self::Store(stored) => stored.put(from),
        }
    }
}

impl Stored {
    fn put(&self, from: &Path) -> Result<bool, LmError> {
        let failed = |error: DepotError| {
            let text = format!("the adapter `{}` is not at its server: {error}", self.name);
            match error.passes() {
                true => LmError::Unavailable(text),
                false => LmError::Barred(text),
            }
        };
        let store = Prefix::open(&self.url, &self.env).map_err(failed)?;
        // A server that finds the one which is written last finds both.
        let files = [ADAPTER_VALUES, ADAPTER_CONFIG].map(|file| from.join(file));
        let stop = || self.cancel.is_cancelled();
        match store.put(&self.name, &files, &stop).map_err(failed)? {
            Some(written) => Ok(written > 0),
            None => Err(LmError::Cancelled),
        }
    }
}

/// What an entry says that cannot be, and what to do about it.
pub(crate) fn contradiction(place: &AdapterPlace) -> Option<(String, &'static str)> {
    let url = match (&place.folder, &place.url) {
        (Some(_), None) => return None,
        (None, Some(url)) => url,
        _ => {
            return Some((
                "`adapters` needs `folder` or `url`, and not both".to_owned(),
                "a server reads adapters from a folder, or from an object store",
            ));
        }
    };
    if let Err(why) = Prefix::check(url) {
        return Some((
            format!("`adapters.url`: {why}"),
            "write `s3://bucket/path`, `gs://bucket/path`, `az://container/path` or `file:///folder`; credentials come from environment variables",
        ));
    }
    let field = match place {
        AdapterPlace { load: true, .. } => "load",
        AdapterPlace {
            seen_as: Some(_), ..
        } => "seen_as",
        _ => return None,
    };
    Some((
        format!("`adapters.{field}` goes with `folder`, not with `url`"),
        "leave it out: a server looks into an object store itself",
    ))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use flowrun_engine::step::World;
    use serde_json::{Value, json};

    use super::*;

    fn place(entry: &Value) -> AdapterPlace {
        serde_json::from_value(entry.clone()).unwrap()
    }

    #[test]
    fn an_entry_names_a_folder_or_a_store() {
        for good in [
            json!({"folder": "a", "load": true, "seen_as": "/mnt/a"}),
            json!({"url": "s3://bucket/adapters"}),
            json!({"url": "file:///adapters", "server": "vllm", "max_rank": 16}),
        ] {
            assert_eq!(contradiction(&place(&good)), None, "{good}");
        }
        for (bad, words) in [
            (json!({}), "`folder` or `url`"),
            (json!({"folder": "a", "url": "s3://b/a"}), "not both"),
            (json!({"url": "s3://b/a", "load": true}), "`adapters.load`"),
            (
                json!({"url": "s3://b/a", "seen_as": "/a"}),
                "`adapters.seen_as`",
            ),
            (json!({"url": "https://h/a"}), "no such kind of store"),
            (json!({"url": "s3://AK:SK@b/a"}), "environment variables"),
        ] {
            let (what, _) = contradiction(&place(&bad)).unwrap();
            assert!(what.contains(words), "{bad}: {what}");
        }
    }

    #[test]
    fn an_adapter_is_put_below_the_url_with_its_two_files_alone() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("checkpoint");
        std::fs::create_dir_all(&from).unwrap();
        for file in [ADAPTER_VALUES, ADAPTER_CONFIG, "checkpoint.json"] {
            std::fs::write(from.join(file), file).unwrap();
        }
        let (world, cancel) = (World::default(), Cancel::default());
        let host = Host {
            world: &world,
            cancel: &cancel,
            completions: None,
            step: None,
        };
        let to = dir.path().join("bucket/adapters");
        let entry = json!({ "url": format!("file://{}", to.display()) });
        let there = Place::of(&place(&entry), "m", "one", &host).unwrap();
        assert!(!to.exists(), "it is not put before it is wanted");
        assert!(there.put(&from).unwrap());
        assert!(!there.put(&from).unwrap(), "it is there");
        let inside = |folder: &Path| {
            let names = std::fs::read_dir(folder).unwrap();
            let mut names: Vec<_> = names.map(|e| e.unwrap().file_name()).collect();
            names.sort();
            names
        };
        assert_eq!(inside(&to), ["one"]);
        assert_eq!(inside(&to.join("one")), [ADAPTER_CONFIG, ADAPTER_VALUES]);

        std::fs::remove_file(from.join(ADAPTER_VALUES)).unwrap();
        let error = there.put(&from).unwrap_err();
        assert!(matches!(error, LmError::Barred(_)), "{error}");
        assert!(error.to_string().contains(ADAPTER_VALUES), "{error}");
    }
}
