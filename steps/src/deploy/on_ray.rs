//! [`Place`]: what was deployed on a Ray cluster from this project, and the way back.
//!
//! `deployed/<name>/ray/<application>/` holds a version's files as they went to the cluster,
//! `deployed/<name>/ray/current.json` says which one took the route over last, and which one had it
//! before: those two are kept. A cluster forgets a package that no replica uses, so the way back
//! lies here. What is served now, the cluster is asked.
//!
//! Invariant: both versions of a record were served on the cluster that it names.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use flowrun_engine::step::{Cancel, StepError, World};
use serde::{Deserialize, Serialize};

use super::ray::{self, ClusterSpec};
use super::server::{Endpoint, health};
use super::versions::{BUNDLE, CURRENT};
use super::{digest, smoke, versions};
use crate::bundle::Bundle;
use crate::folder;
use crate::rows::{read_json, write_json};

const FOLDER: &str = "ray";

/// What was deployed last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Current {
    /// Where.
    pub ray: ClusterSpec,
    /// What.
    pub release: Release,
    /// What was served there before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<Release>,
}

/// A version that took the route over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Release {
    /// Its application's name at Ray.
    pub application: String,
    /// Digest of its bundle.
    pub bundle: String,
    /// Its files.
    pub folder: PathBuf,
    /// Seconds since 1970 when it was deployed.
    pub since: u64,
}

impl Release {
    /// The folder of its bundle.
    #[must_use]
    pub fn bundle_folder(&self) -> PathBuf {
        self.folder.join(BUNDLE)
    }
}

/// What the cluster and the server on it say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct State {
    /// Ray runs it, and its server answers as this bundle.
    pub up: bool,
    /// Ray's word for its state; none where Ray does not know it or is not reached.
    pub status: Option<String>,
    /// Where it answers.
    pub url: Option<String>,
    /// Since when it is served, RFC 3339.
    pub since: String,
    /// Why it is not up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// Where one name's versions lie.
pub struct Place {
    folder: PathBuf,
}

impl Place {
    /// The place of `name` in the folder where deployed bundles lie.
    #[must_use]
    pub fn new(deployed: &Path, name: &str) -> Self {
        Self {
            folder: deployed.join(name).join(FOLDER),
        }
    }

    /// The names of what was deployed.
    #[must_use]
    pub fn names(deployed: &Path) -> Vec<String> {
        versions::names(deployed, |name| Self::new(deployed, name).folder)
    }

    /// What was deployed last.
    #[must_use]
    pub fn current(&self) -> Option<Current> {
        read_json(&self.folder.join(CURRENT)).ok()
    }

    /// What was deployed last, when that was on this cluster.
    #[must_use]
    pub(super) fn current_on(&self, ray: &ClusterSpec) -> Option<Current> {
        self.current().filter(|current| current.ray.is_same(ray))
    }

    /// Keeps the rendered `files` of a version; gives their folder.
    ///
    /// # Errors
    /// When they cannot be copied.
    pub(super) fn keep(&self, files: &Path, application: &str) -> Result<PathBuf, StepError> {
        let kept = self.folder.join(application);
        // A copy that is not what goes to the cluster is made anew.
        if kept.is_dir() && digest(&kept)? != digest(files)? {
            std::fs::remove_dir_all(&kept).map_err(|e| StepError::io(&kept, &e))?;
        }
        folder::copy_whole(files, &kept)?;
        Ok(kept)
    }

    /// Does `switch`, which serves `release` on `ray`, and writes down that it did. Gives what
    /// `switch` gives. What was deployed on another cluster is nothing to go back to on this one.
    ///
    /// # Errors
    /// Those of `switch`, and when nothing can be written: what was deployed before still is.
    pub(super) fn record<T>(
        &self,
        ray: &ClusterSpec,
        release: Release,
        switch: impl FnOnce() -> Result<T, StepError>,
    ) -> Result<(Current, T), StepError> {
        let before = self.current();
        let (since, previous) = match self.current_on(ray) {
            Some(before) if before.release.application == release.application => {
                (before.release.since, before.previous)
            }
            Some(before) => (release.since, Some(before.release)),
            None => (release.since, None),
        };
        let current = Current {
            ray: ray.clone(),
            release: Release { since, ..release },
            previous: previous.filter(|previous| previous.folder.is_dir()),
        };
        let path = self.folder.join(CURRENT);
        let new = path.with_extension("new");
        // A full disk is found while nothing has changed.
        write_json(&new, &current)?;
        let done = switch();
        let done = done.and_then(|done| {
            std::fs::rename(&new, &path).map_err(|e| StepError::io(&path, &e))?;
            Ok(done)
        });
        match done {
            Ok(done) => {
                self.forget_others(Some(&current));
                Ok((current, done))
            }
            Err(error) => {
                // What is left of it is in nobody's way.
                let _ = std::fs::remove_file(&new);
                self.forget_others(before.as_ref());
                Err(error)
            }
        }
    }

    /// Serves again what was served before, once it has answered its smoke rows on the cluster as
    /// well as it had to when it was admitted. Gives its address too.
    ///
    /// # Errors
    /// Invalid when there is nothing to go back to; gate when it does not come up or answer as
    /// evaluated; failed when the cluster cannot be reached: what is served now is served still.
    pub fn rollback(&self, world: &World, cancel: &Cancel) -> Result<(Current, String), StepError> {
        let nothing = |why: &str| versions::no_way_back(&self.folder, why);
        let current = self
            .current()
            .ok_or_else(|| nothing("nothing is deployed on Ray from here"))?;
        let previous = current
            .previous
            .ok_or_else(|| nothing("there is no earlier version"))?;
        let bundle = Bundle::open(&previous.bundle_folder())?;
        let rows = bundle.smoke_rows()?;
        let agreement = bundle.manifest.agreement;
        let scratch = tempfile::tempdir().map_err(|e| StepError::failed(e.to_string()))?;
        let package = scratch.path().join("package.zip");
        let version = ray::Version::pack(&previous.folder, &package)?;
        if version.application() != previous.application {
            let text = "the files of the earlier version are not those that were deployed";
            return Err(nothing(text));
        }
        let cluster = current.ray.open(world)?;
        let smoke = |endpoint: &Endpoint| {
            smoke::check(endpoint, &rows, agreement, cancel, &|_, _| {}).map(|_| ())
        };
        let release = Release {
            since: now(),
            ..previous
        };
        self.record(&current.ray, release, || {
            cluster.deploy(&version, world, cancel, &smoke)
        })
    }

    fn forget_others(&self, current: Option<&Current>) {
        let releases = current.into_iter().flat_map(|current| {
            let previous = current.previous.as_ref();
            [Some(&current.release), previous].into_iter().flatten()
        });
        let kept: Vec<&Path> = releases.map(|release| release.folder.as_path()).collect();
        versions::forget_others(&self.folder, &kept);
    }
}

impl Current {
    /// Asks the cluster, and the server on it.
    #[must_use]
    pub fn state(&self, world: &World) -> State {
        let mut state = State {
            up: false,
            status: None,
            url: None,
            since: text_of(self.release.since),
            why: None,
        };
        let application = &self.release.application;
        let looked = self.ray.open(world).and_then(|c| c.look(application));
        let look = match looked {
            Ok(look) => look,
            Err(error) => {
                state.why = Some(error.message);
                return state;
            }
        };
        state.status.clone_from(&look.status);
        if let Some(since) = look.since {
            state.since = text_of(since);
        }
        state.why = match look.status.as_deref() {
            Some("RUNNING") => look.url.as_deref().and_then(|url| self.complaint(url)),
            Some(status) => Some(format!("Ray says {status}: {}", look.why)),
            None => Some("Ray does not know it".to_owned()),
        };
        state.url = look.url;
        state.up = state.why.is_none();
        state
    }

    /// What is wrong with the server at `url`.
    fn complaint(&self, url: &str) -> Option<String> {
        match health(url) {
            None => Some(format!("{url} does not answer as `flowrun serve` does")),
            Some(health) if health.bundle.as_ref() != Some(&self.release.bundle) => {
                let other = health.bundle.unwrap_or_else(|| "no bundle".to_owned());
                Some(format!("{url} serves {other} in its place"))
            }
            Some(_) => None,
        }
    }
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

fn text_of(since: u64) -> String {
    // What a damaged record or a strange cluster says is no time at all.
    let time = UNIX_EPOCH.checked_add(Duration::from_secs(since.min(LATEST)));
    humantime::format_rfc3339_seconds(time.unwrap_or(UNIX_EPOCH)).to_string()
}

/// The end of the year 9999, the last that RFC 3339 has a text for.
const LATEST: u64 = 253_402_300_799;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn release(place: &Place, application: &str) -> Release {
        let folder = place.folder.join(application);
        std::fs::create_dir_all(folder.join(BUNDLE)).unwrap();
        Release {
            application: application.to_owned(),
            bundle: application.to_owned(),
            folder,
            since: now(),
        }
    }

    fn cluster() -> ClusterSpec {
        cluster_at("http://127.0.0.1:9")
    }

    fn cluster_at(dashboard: &str) -> ClusterSpec {
        serde_json::from_value(serde_json::json!({ "dashboard": dashboard })).unwrap()
    }

    #[test]
    fn what_another_cluster_served_is_nothing_to_go_back_to() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::new(dir.path(), "intents");
        let record = |dashboard: &str, release: Release| {
            let done = place.record(&cluster_at(dashboard), release, || Ok(()));
            done.unwrap().0
        };
        let long_ago = Release {
            since: 1,
            ..release(&place, "a")
        };
        record("http://one:8265", long_ago);
        // The same version there is a new one.
        let moved = record("http://two:8265", release(&place, "a"));
        assert!(moved.release.since > 1);
        let moved = record("http://one:8265", release(&place, "b"));
        assert_eq!(moved.previous, None);
        let error = place.rollback(&World::default(), &Cancel::default());
        let error = error.map(|_| ()).unwrap_err();
        assert!(
            error.message.contains("no earlier version"),
            "{}",
            error.message
        );
        // An address with a slash at its end is the same.
        let next = record("http://one:8265/", release(&place, "c"));
        assert_eq!(next.previous.unwrap().application, "b");
        assert!(place.current_on(&cluster_at("http://one:8265")).is_some());
        assert_eq!(place.current_on(&cluster_at("http://two:8265")), None);
    }

    #[test]
    fn two_versions_are_kept_and_one_that_fails_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::new(dir.path(), "intents");
        let record = |name: &str| {
            let done = place.record(&cluster(), release(&place, name), || Ok(()));
            done.unwrap().0
        };
        assert_eq!(record("a").previous, None);
        assert_eq!(record("b").previous.unwrap().application, "a");
        let current = record("b");
        assert_eq!(current.previous.as_ref().unwrap().application, "a");
        let failed = place.record(&cluster(), release(&place, "c"), || {
            Err::<(), _>(StepError::failed("no"))
        });
        assert!(failed.is_err());
        assert_eq!(place.current(), Some(current));
        assert!(!place.folder.join("c").exists());
        assert!(!place.folder.join("current.new").exists());
        assert_eq!(record("d").previous.unwrap().application, "b");
        assert!(!place.folder.join("a").exists());
        assert_eq!(Place::names(dir.path()), ["intents"]);
    }

    #[test]
    fn a_cluster_that_is_not_reached_is_told_of() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::new(dir.path(), "intents");
        let done = place.record(&cluster(), release(&place, "a"), || Ok(()));
        let state = done.unwrap().0.state(&World::default());
        assert!(!state.up && state.status.is_none(), "{state:?}");
        assert!(state.why.unwrap().contains("127.0.0.1:9"));
        assert_eq!(text_of(u64::MAX), "9999-12-31T23:59:59Z");
    }
}
