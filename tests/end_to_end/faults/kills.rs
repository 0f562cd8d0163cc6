//! Kills at random moments: of runs that make everything, that make it anew, that put results
//! back or do nothing, and of what looks after the cache.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Made, RUN, Random, count, damage, project, ran_keys, recorded, words};
use crate::files;
use crate::processes::signal;
use crate::project::Project;

/// What is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Victim {
    /// A run without a cache.
    Cold,
    /// A run after the source changed: all is made anew.
    Changed,
    /// A run that has only to put published results back.
    Restoring,
    /// A run with nothing to do.
    Unchanged,
    /// `cache gc` of all that the last run does not need.
    Collection,
    /// `cache repair` of a cache with a damaged file.
    Repair,
    /// `cache import` into a new cache.
    Import,
}

const VICTIMS: [Victim; 7] = [
    Victim::Cold,
    Victim::Changed,
    Victim::Restoring,
    Victim::Unchanged,
    Victim::Collection,
    Victim::Repair,
    Victim::Import,
];

impl Victim {
    /// All that is needed was made before it.
    fn is_idle(self) -> bool {
        matches!(self, Self::Restoring | Self::Unchanged | Self::Collection)
    }
}

/// The source of a version: no output of one is that of another.
fn source(version: u64) -> String {
    words("fruit").replace("apple", &format!("apple{version}"))
}

struct Suite {
    /// Never interrupted: what it makes is right.
    whole: Project,
    /// Killed again and again.
    worn: Rc<Project>,
    /// The first run of `whole`, exported.
    archive: String,
    /// What the first version and the present one make.
    first: Made,
    right: Made,
    version: u64,
    /// How long each takes when nobody kills it.
    lengths: BTreeMap<Victim, Duration>,
    kills: BTreeMap<Victim, usize>,
    kept: usize,
    damages: usize,
    random: Random,
}

impl Suite {
    fn new() -> Self {
        let random = Random::new();
        let whole = at_first();
        let started = Instant::now();
        let run = whole.run(RUN).ok();
        let lengths = BTreeMap::from([(Victim::Cold, started.elapsed())]);
        whole.run(&["cache", "export", "moved.tar.zst"]).ok();
        let worn = at_first();
        worn.run(RUN).ok();
        Self {
            archive: whole.path("moved.tar.zst").display().to_string(),
            first: Made::of(&whole, &run),
            right: Made::of(&whole, &run),
            whole,
            worn: Rc::new(worn),
            version: 0,
            lengths,
            kills: BTreeMap::new(),
            kept: 0,
            damages: 0,
            random,
        }
    }

    fn args(&self, victim: Victim) -> Vec<&str> {
        match victim {
            Victim::Cold | Victim::Changed | Victim::Restoring | Victim::Unchanged => RUN.to_vec(),
            Victim::Collection => vec!["cache", "gc", "--keep-runs", "1", "--max-size", "0"],
            Victim::Repair => vec!["cache", "repair"],
            Victim::Import => vec!["cache", "import", &self.archive],
        }
    }

    /// One victim: killed once or more, then left to come to its end.
    fn round(&mut self, victim: Victim, most: usize) {
        let length = self.lengths.get(&victim).copied();
        if length.is_none() {
            let project = self.set_up(victim);
            let started = Instant::now();
            project.run(&self.args(victim)).ok();
            self.lengths.insert(victim, started.elapsed());
            if victim == Victim::Import {
                let run = project.run(RUN).ok();
                assert_eq!(run.steps("ran"), Vec::<String>::new(), "all was taken over");
            }
            self.finish(victim, &project);
        }
        let project = self.set_up(victim);
        for _ in 0..=self.random.below(2) {
            if self.killed() == most || !self.kill(victim, &project) {
                break;
            }
        }
        self.finish(victim, &project);
    }

    fn killed(&self) -> usize {
        self.kills.values().sum()
    }

    fn set_up(&mut self, victim: Victim) -> Rc<Project> {
        match victim {
            Victim::Cold | Victim::Import => return Rc::new(at_first()),
            Victim::Changed => self.change(),
            Victim::Restoring if self.random.below(2) == 0 => {
                std::fs::remove_dir_all(self.worn.path("results")).unwrap();
            }
            Victim::Restoring => self.worn.write("results/count.txt", "no count\n"),
            Victim::Unchanged => {}
            Victim::Collection => {
                // What was made before is garbage then.
                self.change();
                self.worn.run(RUN).ok();
            }
            Victim::Repair => self.damage(),
        }
        Rc::clone(&self.worn)
    }

    /// The next version of the source; what it makes is known.
    fn change(&mut self) {
        self.version += 1;
        for project in [&self.whole, &*self.worn] {
            project.write("words.txt", &source(self.version));
        }
        let run = self.whole.run(RUN).ok();
        self.right = Made::of(&self.whole, &run);
    }

    fn damage(&mut self) {
        let cache = self.worn.path(".flowrun");
        let all = ["objects", "actions"].map(|name| files::below(&cache.join(name)));
        let aside = cache.join("objects/quarantine");
        let all: Vec<PathBuf> = all.into_iter().flatten().collect();
        let all: Vec<&PathBuf> = all.iter().filter(|f| !f.starts_with(&aside)).collect();
        let at = self.random.below(all.len() as u64) as usize;
        let how = self.random.below(5);
        damage(all[at], how, &mut self.random);
        self.damages += 1;
    }

    /// Kills it after a random time; false when it had ended by then.
    fn kill(&mut self, victim: Victim, project: &Project) -> bool {
        let before = recorded(project);
        let length = self.lengths[&victim].as_micros() as u64;
        let child = project.spawn(&self.args(victim));
        let wait = self.random.below(length + length / 8);
        std::thread::sleep(Duration::from_micros(wait));
        // One that has ended is there until it is waited for.
        signal("-KILL", child.id());
        let cut = child.wait_with_output().unwrap();
        let killed = cut.status.signal() == Some(9);
        assert!(killed || cut.status.success(), "{victim:?}: {}", cut.status);
        let after = recorded(project);
        if self.args(victim).contains(&"--json") {
            for key in told(&cut.stdout) {
                assert!(!before.contains(&key), "{victim:?} made {key} again");
                assert!(after.contains(&key), "{victim:?} told of {key} too early");
            }
            assert!(before.is_subset(&after), "{victim:?} lost results");
        }
        if killed {
            *self.kills.entry(victim).or_default() += 1;
        }
        killed
    }

    /// The run after it does what is left to do, and all is as if nothing had been killed.
    fn finish(&mut self, victim: Victim, project: &Project) {
        let right = match victim {
            Victim::Cold | Victim::Import => &self.first,
            _ => &self.right,
        };
        let before = recorded(project);
        let run = project.run(RUN).ok();
        // What was damaged has to be made again.
        if victim != Victim::Repair {
            self.kept += before.len();
            let again: Vec<_> = ran_keys(&run).intersection(&before).cloned().collect();
            assert!(again.is_empty(), "{victim:?}: made again: {again:?}");
        }
        if victim.is_idle() {
            assert_eq!(run.steps("ran"), Vec::<String>::new(), "{victim:?}");
        }
        Made::of(project, &run).assert_is(right, &format!("{victim:?}"));
        if matches!(victim, Victim::Collection | Victim::Repair) {
            project.run(&self.args(victim)).ok();
            let run = project.run(RUN).ok();
            Made::of(project, &run).assert_is(right, &format!("{victim:?} to its end"));
        }
        assert_eq!(project.run(RUN).ok().steps("ran"), Vec::<String>::new());
        project.run(&["cache", "verify"]).ok();
    }

    /// What runs that were killed staged beside published results is gone after one that publishes.
    fn end(mut self) {
        self.change();
        self.worn.run(RUN).ok();
        let results = files::below(&self.worn.path("results"));
        // A kill before the folder was marked leaves an empty file.
        let left = results.iter().filter(|path| !path.ends_with("young"));
        assert_eq!(left.count(), self.right.files.len(), "{results:?}");
        self.worn.run(&["cache", "verify"]).ok();
        let kinds: Vec<String> = self
            .kills
            .iter()
            .map(|(victim, n)| format!("{n} {victim:?}").to_lowercase())
            .collect();
        println!(
            "{} kills ({}), {} recorded results kept, {} damages, FLOWRUN_FAULT_SEED={}",
            self.killed(),
            kinds.join(", "),
            self.kept,
            self.damages,
            self.random.seed
        );
    }
}

fn at_first() -> Project {
    let project = project();
    project.write("words.txt", &source(0));
    project
}

/// Keys of the steps that a run told to have run. Its last line may be cut.
fn told(stdout: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(stdout);
    let lines = text
        .split_inclusive('\n')
        .filter(|line| line.ends_with('\n'));
    lines
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .filter(|event| event["event"] == "step_finished" && event["status"] == "ran")
        .map(|event| event["key"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn killed_at_random_moments_nothing_recorded_runs_again_and_every_byte_is_right() {
    let most = count("FLOWRUN_KILLS", 6);
    let mut suite = Suite::new();
    // A few kills reach other victims each time.
    let first = suite.random.below(VICTIMS.len() as u64) as usize;
    for victim in VICTIMS.iter().cycle().skip(first) {
        if suite.killed() == most {
            break;
        }
        suite.round(*victim, most);
    }
    suite.end();
}
