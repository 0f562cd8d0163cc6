//! A step that is a job somewhere: it says which process works, and works until it may go on.

use std::path::Path;
use std::process::{Child, Stdio};

use crate::processes::{lives, signal, until};
use crate::project::{Project, Run};

/// A project with that step.
pub(crate) struct Slow {
    pub(crate) project: Project,
}

const SLOW: &str = "\
steps:
  slow:
    run: |
      echo \"$PWD\" >> \"$PLACES\"
      echo $PPID > \"$PID.new\"; mv \"$PID.new\" \"$PID\"
      while [ ! -e \"$GO\" ] && [ -d \"${GO%/*}\" ]; do sleep 0.1; done
      cat \"$text\" > \"$out\"; echo end >> \"$out\"
    runner: RUNNER
    in: { text: { file: text.txt } }
    out: { out: deep/out.txt }
    env: { GO: HERE/go, PID: HERE/pid, PLACES: HERE/places }
    publish: { out: result.txt }
";

impl Slow {
    /// `runners` is the section of the pipeline that says where `runner` is.
    pub(crate) fn new(runner: &str, runners: &str) -> Self {
        let project = Project::new();
        let here = project.path("").display().to_string();
        let here = here.trim_end_matches('/');
        project.write("text.txt", "text\n");
        let steps = SLOW.replace("HERE", here).replace("RUNNER", runner);
        project.write("p.yaml", &format!("{runners}{steps}"));
        Self { project }
    }

    pub(crate) fn start(&self) -> Child {
        self.start_with(&[])
    }

    pub(crate) fn start_with(&self, env: &[(&str, &str)]) -> Child {
        let mut command = self.project.command(&["p.yaml", "--json"]);
        let command = command.envs(env.iter().copied());
        let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    }

    /// The process that works, once there is one.
    pub(crate) fn worker(&self) -> u32 {
        until("the step did not begin", || {
            self.project.path("pid").exists()
        });
        let pid = self.project.read("pid").trim().parse().unwrap();
        std::fs::remove_file(self.project.path("pid")).unwrap();
        pid
    }

    /// A run's log of the step holds these words.
    pub(crate) fn has_said(&self, words: &str) -> bool {
        let runs = std::fs::read_dir(self.project.path(".flowrun/runs"));
        let logs = runs.into_iter().flatten().flatten();
        let logs =
            logs.filter_map(|run| std::fs::read_to_string(run.path().join("logs/slow.log")).ok());
        logs.into_iter().any(|log| log.contains(words))
    }

    /// How often the work was begun.
    pub(crate) fn begun(&self) -> usize {
        self.project.read("places").lines().count()
    }

    pub(crate) fn go(&self) {
        self.project.write("go", "");
    }

    pub(crate) fn ended_well(&self, child: Child) -> Run {
        let run = Run::of(child.wait_with_output().unwrap()).ok();
        assert_eq!(self.project.read("result.txt"), "text\nend\n");
        assert!(!self.project.path(".flowrun/jobs").exists() || self.left().is_empty());
        run
    }

    /// The worker is killed, and another one does the work.
    pub(crate) fn outlives_its_worker(&self, child: Child) {
        let first = self.worker();
        signal("-KILL", first);
        let second = self.worker();
        assert_ne!(first, second);
        self.go();
        let run = self.ended_well(child);
        assert_eq!(self.begun(), 2);
        assert!(run.stdout.contains("it is begun again"), "{}", run.stdout);
    }

    /// The run is killed, and the next one takes up its job; `meanwhile` happens before it ends.
    pub(crate) fn outlives_its_run(&self, start: impl Fn() -> Child, meanwhile: impl FnOnce()) {
        let mut child = start();
        let worker = self.worker();
        signal("-KILL", child.id());
        child.wait().unwrap();
        let next = start();
        until("the next run did not find it", || {
            self.has_said("of an earlier run")
        });
        assert!(lives(worker), "the job works on");
        meanwhile();
        self.go();
        self.ended_well(next);
        assert_eq!(self.begun(), 1, "it was not begun again");
    }

    /// An interrupted run stops its job.
    pub(crate) fn is_stopped_with_its_run(&self, child: Child) {
        let worker = self.worker();
        signal("-INT", child.id());
        let ended = Run::of(child.wait_with_output().unwrap());
        assert_eq!(ended.code, Some(130), "{}", ended.stderr);
        until("the job works on", || !lives(worker));
    }

    /// No place of the work was in the project, where its cache folder is.
    pub(crate) fn worked_elsewhere(&self) {
        let places = self.project.read("places");
        let project = self.project.path("");
        let elsewhere = |place: &str| !Path::new(place).starts_with(&project);
        assert!(places.lines().all(elsewhere), "{places}");
    }

    /// Job folders.
    pub(crate) fn left(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.project.path(".flowrun/jobs"));
        let names = entries.into_iter().flatten().flatten();
        names
            .map(|e| e.file_name().into_string().unwrap())
            .collect()
    }
}

/// Notes of jobs that lie in the store of a project whose jobs see no folder of the run.
pub(crate) fn notes(project: &Project) -> usize {
    let jobs = project.path("store/jobs");
    std::fs::read_dir(jobs).map_or(0, Iterator::count)
}
