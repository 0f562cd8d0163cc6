//! A student that another program trains, as a job somewhere: the program starts where the step's
//! worker is.

use std::process::{Child, Stdio};

use serde_json::Value;

use crate::processes::{lives, signal, until};
use crate::project::{Project, Run};
use crate::{heavy_steps, tiny};

/// A project whose `finetune` is such a job.
pub(crate) struct CommandJob {
    project: Project,
    /// Of the step, trained without a job.
    made: Made,
}

/// The key of a step and the digests of its outputs.
type Made = (Value, Vec<(String, Value)>);

/// In front of the stand-in for a program: it says who it is and whom it works for, and works when
/// it may.
const WAITS: &str = r#"
if [ ! -e "$HERE/go" ]; then
  echo "$PPID $$" > "$HERE/pids.new"; mv "$HERE/pids.new" "$HERE/pids"
  while [ ! -e "$HERE/go" ] && [ -d "$HERE" ]; do sleep 0.1; done
fi
echo begun >> "$HERE/begun"
"#;

impl CommandJob {
    /// Trains here; then says that `runner`, which the section `runners` names, does it.
    pub(crate) fn new(runner: &str, runners: &str) -> Self {
        let project = tiny::project();
        let backend = tiny::stand_in_trainer(&project);
        tiny::train(&project, None, &backend);
        let here = format!("HERE='{}'\n", project.path("").display());
        let script = project.read("trainer.sh");
        project.write("trainer.sh", &format!("{here}{WAITS}{script}"));
        project.write("go", "");
        let made = trained(&project.run(&["pipeline.yaml", "--json"]).ok());
        std::fs::remove_file(project.path("begun")).unwrap();
        let settings = format!("    runner: {runner}\n");
        heavy_steps::move_kinds(&project, runners, &settings, &["finetune"]);
        Self { project, made }
    }

    /// How often the program was begun.
    fn begun(&self) -> usize {
        self.project.read("begun").lines().count()
    }

    fn start(&self, env: &[(&str, &str)]) -> Child {
        let args = ["pipeline.yaml", "--json", "--from", "finetune"];
        let mut command = self.project.command(&args);
        let command = command.envs(env.iter().copied());
        let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    }

    /// The worker of the step and the program that it started, once they are there.
    fn processes(&self) -> (u32, u32) {
        until("the program did not begin", || {
            self.project.path("pids").exists()
        });
        let text = self.project.read("pids");
        std::fs::remove_file(self.project.path("pids")).unwrap();
        let (worker, program) = text.trim().split_once(' ').unwrap();
        (worker.parse().unwrap(), program.parse().unwrap())
    }

    /// What the step has said so far.
    fn said(&self) -> String {
        let runs = std::fs::read_dir(self.project.path(".flowrun/runs")).unwrap();
        let logs = runs.map(|run| run.unwrap().path().join("logs/finetune.log"));
        logs.filter_map(|log| std::fs::read_to_string(log).ok())
            .collect()
    }

    fn ended_well(&self, child: Child) {
        let run = Run::of(child.wait_with_output().unwrap()).ok();
        assert_eq!(trained(&run), self.made);
        assert_eq!(self.begun(), 1);
    }

    /// The job makes what was made here; `says` is what the step's log has of such a job.
    pub(crate) fn makes_the_same(&self, env: &[(&str, &str)], says: &str) {
        self.ended_well(self.start(env));
        let said = self.said();
        assert!(said.contains(says), "it was no job: {said}");
    }

    /// The worker is killed. Its program may live on, so the next one waits for it, or begins it
    /// again where it died as well; it trains once.
    pub(crate) fn outlives_its_worker(&self, env: &[(&str, &str)]) {
        std::fs::remove_file(self.project.path("go")).unwrap();
        let child = self.start(env);
        let (worker, _) = self.processes();
        signal("-KILL", worker);
        until("no other worker came", || {
            let waits = self.said().contains("of an attempt that was killed");
            waits || self.project.path("pids").exists()
        });
        self.project.write("go", "");
        self.ended_well(child);
    }

    /// An interrupted run stops its job, and the program.
    pub(crate) fn is_stopped_with_its_run(&self, env: &[(&str, &str)]) {
        std::fs::remove_file(self.project.path("go")).unwrap();
        let child = self.start(env);
        let (worker, program) = self.processes();
        signal("-INT", child.id());
        let ended = Run::of(child.wait_with_output().unwrap());
        assert_eq!(ended.code, Some(130), "{}", ended.stderr);
        until("the program works on", || !lives(worker) && !lives(program));
        assert!(!self.project.path("begun").exists());
    }
}

fn trained(run: &Run) -> Made {
    heavy_steps::made_by(run, "finetune")
}
