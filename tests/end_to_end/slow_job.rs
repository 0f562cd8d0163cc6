//! A step that is a job somewhere: it says which process works, and works until it may go on.

use std::process::{Child, Stdio};

pub(crate) use crate::processes::{lives, signal, until};
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

    /// Job folders.
    pub(crate) fn left(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.project.path(".flowrun/jobs"));
        let names = entries.into_iter().flatten().flatten();
        names
            .map(|e| e.file_name().into_string().unwrap())
            .collect()
    }
}
