//! [`Shipment`]: what lies in a remote store for a job whose workers do not see its folder.
//!
//! Each end then has a job folder of its own, and the two are made alike by way of the store:
//!
//! | note of the job | written by | what |
//! |---|---|---|
//! | `order` | runner | what is to be done, and the artifacts that go in; once it is gone, nobody wants the work, or hears of it |
//! | `cancel` | runner | stop |
//! | `claimed` | other end | somebody works for it |
//! | `said/N` | other end | what was added to its messages and its log since `N - 1` |
//! | `alive` | other end | counts up while there is nothing to say |
//! | `saved` | other end | the artifact of what the step saved for its next attempt |
//! | `made` | other end | the artifact that came out; written before the response is said |
//!
//! Files go as objects of the store, by digest. No value of a variable is ever written there: the
//! order has names, and the worker has the values in its own environment.

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use flowrun_cache::{Artifact, ArtifactStore, Cache, Depot, DepotError};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::folder::AttemptFolder;
use super::patience::Patience;
use super::post::Request;
use crate::step::{StepError, StepErrorKind};

/// Version of the notes; both ends must have the same.
pub(super) const SHIPMENT_VERSION: u32 = 1;
/// What stands in the order's paths for the folder of the work, a cache folder, and the user's
/// cache folder: each end has its own.
pub(super) const PLACE: &str = "@place";
pub(super) const CACHE: &str = "@cache";
pub(super) const USER: &str = "@user";
/// A note that says all by being there: not every store keeps an empty one.
const MARK: &[u8] = b"\n";
/// Bytes of the first line of a note of what was said, at most.
const HEAD: usize = 256;

/// The notes of one job.
#[derive(Debug, Clone)]
pub(super) struct Shipment {
    depot: Arc<Depot>,
    id: String,
}

/// What is to be done.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Order {
    pub(super) version: u32,
    pub(super) request: Request,
    pub(super) inputs: Vec<Input>,
    /// What an earlier attempt saved.
    pub(super) saved: Option<Artifact>,
    /// Folders to be made, below the folder of the work.
    pub(super) folders: Vec<String>,
    /// Names of the variables that the step needs as secrets.
    pub(super) secrets: Vec<String>,
    /// Names of variables that the work gets where the worker has them.
    pub(super) handed: Vec<String>,
    /// The step's own: nobody waits for the result longer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) timeout: Option<Duration>,
}

/// An artifact that goes in.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Input {
    /// Where, below the folder of the work.
    pub(crate) path: String,
    /// What.
    pub(crate) artifact: Artifact,
}

/// What came out.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Made {
    version: u32,
    /// The folder of outputs.
    artifact: Artifact,
    /// Folders in it: an artifact has no empty ones.
    folders: Vec<String>,
}

/// What the other end said at a time.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Said {
    pub(super) beat: u64,
    pub(super) messages: Vec<u8>,
    pub(super) log: Vec<u8>,
}

/// The first line of [`Said`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    version: u32,
    beat: u64,
    messages: usize,
    log: usize,
}

impl Said {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let head = Head {
            version: SHIPMENT_VERSION,
            beat: self.beat,
            messages: self.messages.len(),
            log: self.log.len(),
        };
        let mut bytes = serde_json::to_vec(&head).unwrap_or_default();
        bytes.push(b'\n');
        bytes.extend_from_slice(&self.messages);
        bytes.extend_from_slice(&self.log);
        bytes
    }

    /// `None` when it is not whole, or of another version.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let end = bytes.iter().take(HEAD).position(|byte| *byte == b'\n')?;
        let head: Head = serde_json::from_slice(&bytes[..end]).ok()?;
        let rest = &bytes[end + 1..];
        let whole = head.messages.checked_add(head.log)? == rest.len();
        if !whole || head.version != SHIPMENT_VERSION {
            return None;
        }
        let (messages, log) = rest.split_at(head.messages);
        Some(Self {
            beat: head.beat,
            messages: messages.to_vec(),
            log: log.to_vec(),
        })
    }
}

impl Shipment {
    pub(super) fn new(depot: &Arc<Depot>, id: &str) -> Self {
        Self {
            depot: Arc::clone(depot),
            id: id.to_owned(),
        }
    }

    fn note(&self, name: &str) -> String {
        format!("{}/{name}", self.id)
    }

    /// Sends what the work reads, then the order.
    pub(super) fn order(&self, cache: &Cache, order: &Order) -> Result<(), DepotError> {
        let inputs = order.inputs.iter().map(|input| &input.artifact);
        let all = inputs.chain(&order.saved).cloned().collect();
        self.depot.send(cache.store(), all)?;
        self.depot.write(&self.note("order"), json(order))
    }

    /// The order; `None` when nobody wants the work any more.
    pub(super) fn ordered(&self) -> Result<Option<Order>, StepError> {
        let Some(bytes) = self.depot.read(&self.note("order")).map_err(step_error)? else {
            return Ok(None);
        };
        let other = |what: String| {
            StepError::failed(format!("the order of the job {}: {what}", self.id))
                .help("use one version of flowrun everywhere")
        };
        let order: Order = parse(&bytes).map_err(other)?;
        match order.version {
            SHIPMENT_VERSION => Ok(Some(order)),
            version => Err(other(format!("it is of version {version}"))),
        }
    }

    /// The work is not wanted any more.
    pub(super) fn is_withdrawn(&self) -> Result<bool, DepotError> {
        Ok(self.depot.has(&self.note("cancel"))? || self.is_gone()?)
    }

    /// Nobody hears of the work any more.
    pub(super) fn is_gone(&self) -> Result<bool, DepotError> {
        self.depot.has(&self.note("order")).map(|there| !there)
    }

    /// Whoever has begun the work is to stop.
    pub(super) fn withdraw(&self) -> Result<(), DepotError> {
        self.depot.write(&self.note("cancel"), MARK.to_vec())
    }

    /// Takes the job for this process; false when another has it.
    pub(super) fn claim(&self) -> Result<bool, DepotError> {
        self.depot.create(&self.note("claimed"), MARK.to_vec())
    }

    /// Adds to what was said, as the note of this number.
    pub(super) fn say(&self, number: u64, said: &[u8]) -> Result<(), DepotError> {
        let note = self.note(&format!("said/{number:08}"));
        self.depot.write(&note, said.to_vec())
    }

    pub(super) fn show_life(&self, beat: u64) -> Result<(), DepotError> {
        let said = Said {
            beat,
            messages: Vec::new(),
            log: Vec::new(),
        };
        self.depot.write(&self.note("alive"), said.to_bytes())
    }

    /// What was said under this number; `None` when it was not yet.
    pub(super) fn said(&self, number: u64) -> Result<Option<Said>, DepotError> {
        let note = self.note(&format!("said/{number:08}"));
        Ok(self
            .depot
            .read(&note)?
            .and_then(|bytes| Said::parse(&bytes)))
    }

    /// The last count of one that has nothing to say.
    pub(super) fn last_beat(&self) -> Result<Option<u64>, DepotError> {
        let said = self.depot.read(&self.note("alive"))?;
        Ok(said.and_then(|bytes| Some(Said::parse(&bytes)?.beat)))
    }

    /// Gets what the work reads, and places it; what an earlier attempt saved comes to `saved`.
    pub(super) fn fetch(
        &self,
        cache: &Cache,
        order: &Order,
        place: &Path,
        saved: Option<&Path>,
        patience: Patience<'_>,
    ) -> Result<(), StepError> {
        let get = |artifact: &Artifact| patience.with(|| self.depot.get(cache, artifact));
        if let (Some(artifact), Some(path)) = (&order.saved, saved) {
            get(artifact)?;
            copy(cache, artifact, path)?;
        }
        for folder in &order.folders {
            let folder = inside(place, folder)?;
            std::fs::create_dir_all(&folder).map_err(|e| StepError::io(&folder, &e))?;
        }
        for input in &order.inputs {
            let path = inside(place, &input.path)?;
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent).map_err(|e| StepError::io(parent, &e))?;
            }
            get(&input.artifact)?;
            let placed = cache.store().link_read_only(&input.artifact, &path);
            placed.map_err(|e| StepError::failed(e.to_string()))?;
        }
        Ok(())
    }

    /// Sends what the step saved for its next attempt.
    pub(super) fn save(&self, store: &ArtifactStore, saved: &Artifact) -> Result<(), DepotError> {
        self.depot.send(store, vec![saved.clone()])?;
        self.depot.write(&self.note("saved"), json(saved))
    }

    /// Brings what the step saved into a folder here, if it saved anything.
    pub(super) fn keep(
        &self,
        cache: &Cache,
        folder: &Path,
        patience: Patience<'_>,
    ) -> Result<(), StepError> {
        let Some(saved) = patience.with(|| self.depot.read(&self.note("saved")))? else {
            return Ok(());
        };
        let artifact: Artifact = parse(&saved).map_err(StepError::failed)?;
        patience.with(|| self.depot.get(cache, &artifact))?;
        copy(cache, &artifact, folder)
    }

    /// Sends what the work made, `out` of the attempt, and says so.
    pub(super) fn deliver(
        &self,
        cache: &Cache,
        attempt: &AttemptFolder,
        patience: Patience<'_>,
    ) -> Result<(), StepError> {
        let out = attempt.place().join("out");
        let folders = folders(&out).map_err(|e| StepError::io(&out, &e))?;
        let artifact = cache.store().take_path(&out);
        let made = Made {
            version: SHIPMENT_VERSION,
            artifact: artifact.map_err(|e| StepError::failed(e.to_string()))?,
            folders,
        };
        patience.with(|| {
            self.depot
                .send(cache.store(), vec![made.artifact.clone()])?;
            self.depot.write(&self.note("made"), json(&made))
        })
    }

    /// Gets what the work made into `out` of the attempt here.
    pub(super) fn bring(
        &self,
        cache: &Cache,
        attempt: &AttemptFolder,
        patience: Patience<'_>,
    ) -> Result<(), StepError> {
        let out = attempt.place().join("out");
        let lost = |what: &str| {
            let text = format!("the job {} ended well, but {what}", self.id);
            StepError::new(StepErrorKind::Transient, text)
        };
        let made = patience.with(|| self.depot.read(&self.note("made")))?;
        let made = made.ok_or_else(|| lost("what it made is not in the remote store"))?;
        let made: Made = parse(&made).map_err(|e| lost(&e))?;
        patience.with(|| self.depot.get(cache, &made.artifact))?;
        copy(cache, &made.artifact, &out)?;
        for folder in &made.folders {
            let folder = inside(&out, folder)?;
            std::fs::create_dir_all(&folder).map_err(|e| StepError::io(&folder, &e))?;
        }
        Ok(())
    }

    /// Removes the notes; whoever still works stops. The objects stay: others may have them too.
    pub(super) fn clear(&self) -> Result<(), DepotError> {
        // First of all, so that a kill leaves nothing to begin with.
        self.depot.remove(&self.note("order"))?;
        self.depot.clear(&self.id)
    }
}

/// As the failure of a step.
pub(super) fn step_error(error: DepotError) -> StepError {
    let kind = match error.passes() {
        true => StepErrorKind::Transient,
        false => StepErrorKind::Failed,
    };
    StepError::new(kind, error.to_string())
}

/// The folders below this one, as paths with `/`.
pub(super) fn folders(root: &Path) -> std::io::Result<Vec<String>> {
    let mut all = Vec::new();
    let mut left = vec![(root.to_owned(), String::new())];
    while let Some((folder, prefix)) = left.pop() {
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            // A name that is no text is refused where the files are stored.
            let name = entry.file_name();
            let Some(name) = name.to_str().filter(|_| entry.path().is_dir()) else {
                continue;
            };
            let path = format!("{prefix}{name}");
            // What a link names is followed where the files are stored, with its limits.
            if entry.file_type()?.is_dir() {
                left.push((entry.path(), format!("{path}/")));
            }
            all.push(path);
        }
    }
    all.sort();
    Ok(all)
}

/// A copy that may be written to, in place of what is there.
fn copy(cache: &Cache, artifact: &Artifact, path: &Path) -> Result<(), StepError> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(|e| StepError::io(parent, &e))?;
    }
    let placed = cache.store().materialize(artifact, path);
    placed.map_err(|e| StepError::failed(e.to_string()))
}

/// A path below a folder, as the store names it: what lies there may be of somebody else.
fn inside(folder: &Path, path: &str) -> Result<PathBuf, StepError> {
    let below = Path::new(path);
    let is_plain = below
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    match is_plain && !path.is_empty() {
        true => Ok(folder.join(below)),
        false => Err(StepError::failed(format!(
            "the remote store names a path outside of the job's folder: `{path}`"
        ))),
    }
}

fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_default()
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    serde_json::from_slice(bytes).map_err(|e| format!("it cannot be read ({e})"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;

    use flowrun_cache::{OpenOptions, RemoteOptions};

    use super::*;

    fn cache(dir: &Path) -> Cache {
        Cache::open(dir, &OpenOptions::no_wait("test")).unwrap()
    }

    #[test]
    fn what_a_step_saved_comes_to_its_next_attempt_and_may_be_written_to() {
        let dir = tempfile::tempdir().unwrap();
        let (here, there) = (cache(&dir.path().join("a")), cache(&dir.path().join("b")));
        let options = RemoteOptions {
            url: format!("file://{}", dir.path().join("store").display()),
            read_only: false,
            env: BTreeMap::new(),
        };
        let depot = Arc::new(Depot::open(&options, here.dir()).unwrap());
        let shipment = Shipment::new(&depot, "id");
        let (saved, kept) = (dir.path().join("saved"), dir.path().join("deep/kept"));
        let patience = Patience {
            longest: Duration::ZERO,
            stop: &|| false,
        };
        let keep = || shipment.keep(&here, &kept, patience);
        keep().unwrap();
        assert!(!kept.exists(), "nothing was saved");
        for text in ["first", "second"] {
            std::fs::create_dir_all(saved.join("inner")).unwrap();
            std::fs::write(saved.join("inner/state"), text).unwrap();
            let artifact = there.store().put_path(&saved).unwrap();
            shipment.save(there.store(), &artifact).unwrap();
            keep().unwrap();
            assert!(!kept.join("left over").exists(), "it is as it was saved");
            let state = kept.join("inner/state");
            assert_eq!(std::fs::read_to_string(&state).unwrap(), text);
            std::fs::write(&state, "goes on").unwrap();
            std::fs::write(kept.join("left over"), "").unwrap();
        }
        shipment.clear().unwrap();
        keep().unwrap();
        let state = std::fs::read_to_string(kept.join("inner/state")).unwrap();
        assert_eq!(state, "goes on", "what is here stays");
    }

    #[test]
    fn what_was_said_is_read_as_it_was_written_or_not_at_all() {
        let said = Said {
            beat: 7,
            messages: b"{\"log\":\"a\"}\n".to_vec(),
            log: vec![0xff, b'\n', 0],
        };
        let bytes = said.to_bytes();
        assert_eq!(Said::parse(&bytes), Some(said));
        for end in 0..bytes.len() {
            assert_eq!(Said::parse(&bytes[..end]), None, "{end}");
        }
        let mut other = bytes.clone();
        other[bytes.iter().position(|byte| *byte == b'1').unwrap()] = b'2';
        assert_eq!(Said::parse(&other), None, "of another version");
    }

    #[test]
    fn a_path_stays_in_its_folder() {
        let folder = Path::new("/f");
        assert_eq!(inside(folder, "in/a").unwrap(), Path::new("/f/in/a"));
        for path in ["", "/etc/x", "../x", "in/../../x"] {
            assert!(inside(folder, path).is_err(), "{path}");
        }
    }

    #[test]
    fn empty_folders_are_told() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("a/b")).unwrap();
        std::fs::write(dir.path().join("a/file"), "").unwrap();
        assert_eq!(folders(dir.path()).unwrap(), ["a", "a/b"]);
    }
}
