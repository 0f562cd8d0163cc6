//! [`recall`]: whether everything that a run rested on still holds, and the run that
//! has nothing to do.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime};

use flowrun_cache::{Artifact, ArtifactKind, Cache, CacheReader, Digest, FileStamp};

use super::{
    Changed, ENTRY, FilePremise, KEY, ObjectPremise, Premises, Remembered, RunName, environment,
    write,
};
use crate::event::RunEvent;
use crate::hook::Hook;
use crate::record::{discard, next_run_id, timestamp};
use crate::run::{RunError, RunSummary};
use crate::step::World;
use crate::tracking::Tracking;
use crate::vocabulary::Vocabulary;

/// A run that has nothing to do.
pub struct Unchanged {
    remembered: Remembered,
    started: Instant,
}

/// What is known of a run before its pipeline is read.
pub enum Recalled {
    /// It has nothing to do.
    Unchanged(Box<Unchanged>),
    /// Some files changed, and nothing else.
    Changed(Box<Changed>),
}

/// What is known of the run of this name; `None` when it is to be an ordinary one.
#[must_use]
pub fn recall(
    cache: &Cache,
    name: RunName,
    vocabulary: &Vocabulary,
    world: &World,
) -> Option<Recalled> {
    let started = Instant::now();
    let bytes = std::fs::read(cache.dir().join(name.path())).ok()?;
    let mut remembered = Remembered::parse(name, bytes)?;
    let mut checker = Checker {
        cache,
        world,
        now: SystemTime::now(),
        renewed: false,
        changed: BTreeSet::new(),
    };
    let head = &remembered.head;
    let files = checker.files(head)?;
    let holds = checker.sources(head)
        && checker.environment(head)
        && checker.absent(head)
        && observed(head, vocabulary, world)
        && checker.results(remembered.keys());
    let table = holds
        .then(|| checker.objects(remembered.objects()))
        .flatten()?;
    remembered.head.files = files;
    if !checker.changed.is_empty() {
        tracing::debug!("only files changed since the last run");
        let changed = Changed::read(cache, remembered, table, checker.changed, vocabulary);
        return changed.map(Box::new).map(Recalled::Changed);
    }
    tracing::debug!("all premises of the last run hold");
    if checker.renewed {
        // What had to be hashed this time need not be the next.
        let old = &remembered;
        let sections = [
            old.table(),
            old.keys(),
            old.took(),
            &table,
            old.plan(),
            old.events(),
        ];
        write(cache, name, &old.head, &sections);
    }
    let unchanged = Unchanged {
        remembered,
        started,
    };
    Some(Recalled::Unchanged(Box::new(unchanged)))
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
    /// The steps of files that hold something else now.
    changed: BTreeSet<usize>,
}

impl Checker<'_> {
    fn sources(&self, head: &Premises) -> bool {
        let same = |(path, digest): &(PathBuf, Digest)| {
            Digest::of_file(path).is_ok_and(|found| found == *digest)
        };
        !head.sources.is_empty() && head.sources.iter().all(same)
    }

    fn environment(&self, head: &Premises) -> bool {
        // As the check of a pipeline has it.
        let there = |name: &String| self.world.env.get(name).is_some_and(|v| !v.is_empty());
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

    /// The file with its stamp as it is now; `None` when it is gone.
    fn file(&mut self, root: &Path, file: &FilePremise) -> Option<FilePremise> {
        let path = root.join(&file.path);
        if file.held.kind() == ArtifactKind::Tree {
            let now = self.cache.store().address_in_project(&path).ok()?;
            self.compare(file, file.held.is(&now));
            return Some(file.clone());
        }
        let meta = std::fs::metadata(&path).ok()?;
        let stamp = FileStamp::of(&meta);
        if file.stamp == Some(stamp) {
            return Some(file.clone());
        }
        if !meta.is_file() {
            return None;
        }
        let now = Artifact::of_file(Digest::of_file(&path).ok()?, &meta);
        let same = file.held.is(&now);
        self.compare(file, same);
        let settled = stamp.is_settled(self.now)
            && std::fs::metadata(&path).is_ok_and(|m| FileStamp::of(&m) == stamp);
        self.renewed |= same && settled;
        Some(FilePremise {
            stamp: (same && settled).then_some(stamp),
            ..file.clone()
        })
    }

    fn compare(&mut self, file: &FilePremise, same: bool) {
        if !same {
            self.changed.extend(&file.steps);
        }
    }

    fn results(&self, keys: &[u8]) -> bool {
        let keys: Option<Vec<Digest>> = keys.chunks(KEY).map(Digest::from_slice).collect();
        keys.is_some_and(|keys| self.cache.actions().has_all(keys))
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
    /// Who is told that the run ended.
    #[must_use]
    pub fn hooks(&self) -> &BTreeMap<String, Hook> {
        &self.remembered.head.hooks
    }

    /// What programs of others are told of the run.
    #[must_use]
    pub fn tracking(&self) -> &Tracking {
        &self.remembered.head.tracking
    }

    /// The events of the steps, one JSON object a line.
    #[must_use]
    pub fn step_events(&self) -> &[u8] {
        self.remembered.events()
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
        let head = &self.remembered.head;
        let placed = match &head.report {
            Some(report) => {
                let place = run_dir.join("report.html");
                cache.store().materialize(report, &place)
            }
            None => Ok(()),
        };
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
        let written = placed.map_err(RunError::from).and_then(|()| {
            let written = self.write(&run_dir, &run_id, &first, &last);
            written.map_err(|source| RunError::Record {
                path: run_dir.clone(),
                source,
            })
        });
        if let Err(error) = written {
            discard(&run_dir);
            return Err(error);
        }
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
        let mut plan = std::fs::File::create(run_dir.join("plan.json"))?;
        let pieces = self.remembered.plan_of(run_id);
        pieces.iter().try_for_each(|piece| plan.write_all(piece))?;
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
