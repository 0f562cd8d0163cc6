//! [`recall`]: whether everything that a run rested on still holds, and the run that
//! has nothing to do.

use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime};

use flowrun_cache::{ArtifactKind, ArtifactStore, Cache, CacheReader, Digest, FileStamp};

use super::{ENTRY, FilePremise, ObjectPremise, Premises, RunName, VERSION, environment, write};
use crate::event::RunEvent;
use crate::record::{next_run_id, timestamp};
use crate::run::{RunError, RunSummary};
use crate::step::World;
use crate::vocabulary::Vocabulary;

/// A run that has nothing to do.
pub struct Unchanged {
    head: Premises,
    bytes: Vec<u8>,
    started: Instant,
}

/// The run of this name has nothing to do; `None` when it has, or that cannot be told.
#[must_use]
pub fn recall(
    cache: &Cache,
    name: RunName,
    vocabulary: &Vocabulary,
    world: &World,
) -> Option<Unchanged> {
    let started = Instant::now();
    let bytes = std::fs::read(cache.dir().join(name.path())).ok()?;
    let (head, rest) = parse(&bytes)?;
    let (keys, rest) = rest.split_at_checked(head.keys)?;
    let (objects, rest) = rest.split_at_checked(head.objects)?;
    let (plan, events) = rest.split_at_checked(head.plan)?;
    if events.len() != head.events {
        return None;
    }
    let mut checker = Checker {
        cache,
        world,
        now: SystemTime::now(),
        renewed: false,
    };
    let files = checker.files(&head)?;
    let holds = checker.sources(&head)
        && checker.environment(&head)
        && checker.absent(&head)
        && observed(&head, vocabulary, world)
        && checker.results(keys);
    let table = holds.then(|| checker.objects(objects)).flatten()?;
    tracing::debug!("all premises of the last run hold");
    let head = Premises { files, ..head };
    if checker.renewed {
        // What had to be hashed this time need not be the next.
        write(cache, name, &head, &[keys, &table, plan, events]);
    }
    Some(Unchanged {
        head,
        bytes,
        started,
    })
}

/// The head, and what follows it; `None` when a byte is wrong.
fn parse(bytes: &[u8]) -> Option<(Premises, &[u8])> {
    let (sum, body) = bytes.split_at_checked(65)?;
    let sum = Digest::parse(std::str::from_utf8(sum.get(..64)?).ok()?)?;
    if sum != Digest::of_bytes(body) {
        return None;
    }
    let end = body.iter().position(|b| *b == b'\n')?;
    let head: Premises = serde_json::from_slice(body.get(..end)?).ok()?;
    (head.version == VERSION).then_some((head, body.get(end + 1..)?))
}

fn observed(head: &Premises, vocabulary: &Vocabulary, world: &World) -> bool {
    head.observed.iter().all(|one| {
        let step = vocabulary.steps.get(one.kind.as_str());
        let facts = step.and_then(|step| step.observe(&one.params, world).ok());
        facts.is_some_and(|facts| facts == one.facts)
    })
}

struct Checker<'a> {
    cache: &'a Cache,
    world: &'a World,
    now: SystemTime,
    /// Something was hashed, and its stamp may count from now on.
    renewed: bool,
}

impl Checker<'_> {
    fn sources(&self, head: &Premises) -> bool {
        let same = |(path, digest): &(PathBuf, Digest)| {
            Digest::of_file(path).is_ok_and(|found| found == *digest)
        };
        !head.sources.is_empty() && head.sources.iter().all(same)
    }

    fn environment(&self, head: &Premises) -> bool {
        let there = |name: &String| self.world.env.contains_key(name);
        head.secrets.iter().all(there) && environment(self.world, &head.secrets) == head.environment
    }

    fn absent(&self, head: &Premises) -> bool {
        head.absent
            .iter()
            .all(|name| !head.root.join(name).is_file())
    }

    fn files(&mut self, head: &Premises) -> Option<Vec<FilePremise>> {
        let files = head.files.iter();
        files.map(|file| self.file(&head.root, file)).collect()
    }

    fn file(&mut self, root: &Path, file: &FilePremise) -> Option<FilePremise> {
        let path = root.join(&file.path);
        if file.artifact.kind == ArtifactKind::Tree {
            let same = ArtifactStore::address_of(&path).is_ok_and(|a| a == file.artifact);
            return same.then(|| file.clone());
        }
        let stamp = FileStamp::of(&std::fs::metadata(&path).ok()?);
        if file.stamp == Some(stamp) {
            return Some(file.clone());
        }
        let same = Digest::of_file(&path).is_ok_and(|d| d == file.artifact.digest);
        let settled = stamp.is_settled(self.now)
            && std::fs::metadata(&path).is_ok_and(|m| FileStamp::of(&m) == stamp);
        self.renewed |= settled;
        same.then(|| FilePremise {
            stamp: settled.then_some(stamp),
            ..file.clone()
        })
    }

    fn results(&self, keys: &[u8]) -> bool {
        let is_there = |key: &[u8]| {
            let key = Digest::from_slice(key);
            key.is_some_and(|key| self.cache.actions().path(&key).exists())
        };
        keys.chunks(32).all(is_there)
    }

    /// The table with the stamps as they are now; `None` when an object is missing or damaged.
    fn objects(&mut self, table: &[u8]) -> Option<Vec<u8>> {
        let mut now = Vec::with_capacity(table.len());
        for entry in table.chunks(ENTRY) {
            self.object(&ObjectPremise::read(entry)?)?.write(&mut now);
        }
        Some(now)
    }

    fn object(&mut self, object: &ObjectPremise) -> Option<ObjectPremise> {
        let path = self.cache.store().object_path(&object.digest);
        let stamp = FileStamp::of(&std::fs::metadata(&path).ok()?);
        if stamp.size != object.stamp.size {
            return None;
        }
        if object.trusted && stamp == object.stamp {
            return Some(*object);
        }
        self.cache.store().verify_object(&object.digest).ok()?;
        let trusted = stamp.is_settled(self.now)
            && std::fs::metadata(&path).is_ok_and(|m| FileStamp::of(&m) == stamp);
        self.renewed |= trusted;
        Some(ObjectPremise {
            stamp,
            trusted,
            ..*object
        })
    }
}

impl Unchanged {
    /// The events of the steps, one JSON object a line.
    #[must_use]
    pub fn step_events(&self) -> &[u8] {
        &self.bytes[self.bytes.len() - self.head.events..]
    }

    fn plan(&self) -> &[u8] {
        let end = self.bytes.len() - self.head.events;
        &self.bytes[end - self.head.plan..end]
    }

    /// Writes the run's record. `tell` hears the first and the last event.
    ///
    /// # Errors
    /// When the record cannot be written.
    pub fn run(
        &self,
        cache: &Cache,
        mut tell: impl FnMut(&RunEvent),
    ) -> Result<RunSummary, RunError> {
        let now = SystemTime::now();
        let earlier = CacheReader::open(cache.dir()).runs();
        let newest = earlier.first().and_then(|dir| dir.file_name()?.to_str());
        let run_id = next_run_id(now, newest);
        let run_dir = cache.new_run_dir(&run_id)?;
        let head = &self.head;
        if let Some(report) = &head.report {
            let place = run_dir.join("report.html");
            cache.store().materialize(report, &place)?;
        }
        let first = RunEvent::RunStarted {
            run: run_id.clone(),
            pipeline: head.pipeline.clone(),
            steps: head.steps,
            at: timestamp(now),
        };
        let last = RunEvent::RunFinished {
            ok: true,
            ran: 0,
            cached: head.cached,
            failed: 0,
            skipped: head.skipped,
            run_dir: run_dir.display().to_string(),
            took_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
        };
        let written = self.write(&run_dir, &run_id, &first, &last);
        written.map_err(|source| RunError::Record {
            path: run_dir.clone(),
            source,
        })?;
        tell(&first);
        tell(&last);
        Ok(RunSummary {
            run_id,
            run_dir,
            ok: true,
            ran: 0,
            cached: head.cached,
            failed: 0,
            skipped: head.skipped,
            interrupted: false,
            gate_failed: false,
            first_error: None,
            steps: Vec::new(),
        })
    }

    fn write(
        &self,
        run_dir: &Path,
        run_id: &str,
        first: &RunEvent,
        last: &RunEvent,
    ) -> std::io::Result<()> {
        use std::io::Write;
        let plan = String::from_utf8_lossy(self.plan());
        // The run's own id stands once, at the beginning.
        let (before, after) = plan.split_once(PLACEHOLDER).unwrap_or((&plan, ""));
        let mut file = std::fs::File::create(run_dir.join("plan.json"))?;
        for part in [before, run_id, after] {
            file.write_all(part.as_bytes())?;
        }
        let mut file = std::fs::File::create(run_dir.join("events.jsonl"))?;
        let line = |event| {
            serde_json::to_vec(event).map(|mut l| {
                l.push(b'\n');
                l
            })
        };
        file.write_all(&line(first)?)?;
        file.write_all(self.step_events())?;
        file.write_all(&line(last)?)
    }
}

/// Stands for the run's id in the remembered plan.
pub(super) const PLACEHOLDER: &str = "<the id of the run>";
