//! [`Way`]: how the files of an attempt reach the workers: they lie in a folder that both sides
//! see, or go through a remote store. What is said of paths and variables differs with it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use flowrun_cache::{Cache, Depot};

use super::folder::AttemptFolder;
use super::patience::Patience;
use super::post::Request;
use super::remote::{Errand, Remote};
use super::shipment::{self, Order, SHIPMENT_VERSION, Shipment};
use crate::step::StepError;

/// A remote store through which files go, and the cache here that they come from.
pub(crate) struct Way {
    pub(crate) depot: Arc<Depot>,
    pub(crate) cache: Arc<Cache>,
    /// Variables of this process that open the store.
    pub(crate) variables: Vec<String>,
}

impl Way {
    pub(super) fn shipment(&self, id: &str) -> Shipment {
        Shipment::new(&self.depot, id)
    }
}

/// What workers see of an attempt: its folder, or nothing; and the variables that they need then.
pub(super) struct Sight {
    pub(super) folder: Option<PathBuf>,
    pub(super) variables: Vec<String>,
}

impl Remote {
    /// Into the folder that the workers see.
    pub(super) fn place(&self, errand: &Errand<'_>, attempt: &AttemptFolder) -> io::Result<()> {
        let (from, to) = (errand.place, attempt.place());
        link_all(&from.join("in"), &to.join("in"))?;
        // Folders that outputs of a command lie in.
        link_all(&from.join("out"), &to.join("out"))?;
        let there = |path: &Path| {
            let path = match path.strip_prefix(from) {
                Ok(inner) => to.join(inner),
                Err(_) => path.to_owned(),
            };
            let path = std::path::absolute(&path).unwrap_or(path);
            self.settings.there(&path, &self.root)
        };
        attempt.write_environment(&errand.environment)?;
        attempt.write_request(&errand.request.clone().with_paths(&there))
    }

    /// Into the remote store. Of the variables only names go there.
    pub(super) fn ship(
        &self,
        errand: &Errand<'_>,
        attempt: &AttemptFolder,
        way: &Way,
        shipment: &Shipment,
    ) -> Result<(), StepError> {
        let io = |e: io::Error| StepError::io(attempt.path(), &e);
        let user = match &errand.request {
            Request::Step { request, .. } => Some(request.user_cache.clone()),
            Request::Command(_) => None,
        };
        let there = |path: &Path| {
            let below = |folder: &Path, sign: &str| {
                let rest = path.strip_prefix(folder).ok()?;
                Some(Path::new(sign).join(rest))
            };
            // The place lies in the cache folder.
            below(errand.place, shipment::PLACE)
                .or_else(|| below(way.cache.dir(), shipment::CACHE))
                .or_else(|| below(user.as_deref()?, shipment::USER))
                .unwrap_or_else(|| {
                    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
                    self.settings.there(&path, &self.root)
                })
        };
        let request = errand.request.clone().with_paths(&there);
        let out = shipment::folders(&errand.place.join("out")).map_err(io)?;
        let mut folders: Vec<String> = out.iter().map(|path| format!("out/{path}")).collect();
        folders.extend(list_folders(&errand.place.join("in")).map_err(io)?);
        let names = |variables: &BTreeMap<String, String>| {
            variables.keys().cloned().collect::<Vec<String>>()
        };
        let saved = match errand.saved.exists() {
            true => Some(way.cache.store().put_path(&errand.saved)),
            false => None,
        };
        let saved = saved.transpose();
        let saved = saved.map_err(|e| StepError::failed(e.to_string()))?;
        let order = Order {
            version: SHIPMENT_VERSION,
            request,
            inputs: errand.inputs.clone(),
            saved,
            folders,
            secrets: names(&errand.environment.secrets),
            handed: names(&errand.environment.handed),
            timeout: errand.timeout,
        };
        // What shows that there is a job, for whoever comes upon the folder.
        attempt.write_request(&order.request).map_err(io)?;
        let stop = || errand.cancel.is_cancelled();
        let patience = self.patience(&stop);
        patience.with(|| shipment.order(&way.cache, &order))
    }

    /// With a store that does not answer.
    pub(super) fn patience<'a>(&self, stop: &'a dyn Fn() -> bool) -> Patience<'a> {
        Patience {
            longest: Duration::from_secs(self.settings.patience),
            stop,
        }
    }

    /// Keeps here what the step saved there: the next attempt goes on from it, wherever it runs.
    pub(super) fn keep(&self, errand: &Errand<'_>, shipment: &Shipment) {
        let Some(way) = &self.way else {
            return;
        };
        let stop = || errand.cancel.is_cancelled();
        let patience = self.patience(&stop);
        if let Err(error) = shipment.keep(&way.cache, &errand.saved, patience) {
            let text = format!("what the step saved cannot be kept: {error}");
            errand.reporter.warning(&text);
        }
    }

    /// What the workers see of an attempt, and what they need beside it.
    pub(super) fn sight(&self, errand: &Errand<'_>, attempt: &AttemptFolder) -> Sight {
        let Some(way) = &self.way else {
            let path = attempt.path();
            let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
            return Sight {
                folder: Some(self.settings.there(&path, &self.root)),
                variables: Vec::new(),
            };
        };
        let environment = &errand.environment;
        let names = way.variables.iter();
        let names = names
            .chain(environment.secrets.keys())
            .chain(environment.handed.keys());
        let names: BTreeSet<String> = names.cloned().collect();
        Sight {
            folder: None,
            variables: names.into_iter().collect(),
        }
    }
}

/// Folders of lists of inputs, which may be empty: `in/<port>`.
fn list_folders(inputs: &Path) -> io::Result<Vec<String>> {
    let entries = match std::fs::read_dir(inputs) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut all = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir()
            && let Some(name) = entry.file_name().to_str()
        {
            all.push(format!("in/{name}"));
        }
    }
    Ok(all)
}

/// Hard links to everything below `from`, where the file system has them.
pub(super) fn link_all(from: &Path, to: &Path) -> io::Result<()> {
    let entries = match std::fs::read_dir(from) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    std::fs::create_dir_all(to)?;
    for entry in entries {
        let entry = entry?;
        let (path, dest) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type()?;
        if kind.is_dir() {
            link_all(&path, &dest)?;
        } else if std::fs::hard_link(&path, &dest).is_err() {
            match kind.is_symlink() {
                true => std::os::unix::fs::symlink(std::fs::read_link(&path)?, &dest)?,
                false => std::fs::copy(&path, &dest).map(|_| ())?,
            }
        }
    }
    Ok(())
}
