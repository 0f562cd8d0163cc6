//! A project in a temporary folder, and the binary run in it.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

pub(crate) struct Project {
    dir: tempfile::TempDir,
}

impl Project {
    /// An empty project.
    pub(crate) fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    /// The shell example.
    pub(crate) fn shell() -> Self {
        let project = Self::new();
        project.copy_example("shell", "");
        project
    }

    /// Copies the files of an example into a folder of the project.
    pub(crate) fn copy_example(&self, example: &str, into: &str) {
        let from = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("examples")
            .join(example);
        let into = self.path(into);
        std::fs::create_dir_all(&into).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_file() {
                std::fs::copy(entry.path(), into.join(entry.file_name())).unwrap();
            }
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    pub(crate) fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }

    /// The words of a file.
    pub(crate) fn words(&self, name: &str) -> Vec<String> {
        let text = self.read(name);
        text.split_whitespace().map(str::to_owned).collect()
    }

    /// Replaces text that must be there.
    pub(crate) fn edit(&self, name: &str, from: &str, to: &str) {
        let text = self.read(name);
        assert!(text.contains(from), "{from}");
        self.write(name, &text.replace(from, to));
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_flowrun"));
        command
            .args(args)
            .current_dir(self.dir.path())
            .env_remove("FLOWRUN_DISTDIR")
            .env_remove("FLOWRUN_CACHE_DIR")
            .env_remove("FLOWRUN_REMOTE")
            .env_remove("FLOWRUN_REMOTE_READ_ONLY")
            .env_remove("MLFLOW_TRACKING_URI")
            .env_remove("OTEL_EXPORTER_OTLP_ENDPOINT")
            .env_remove("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
            .env_remove("TRACEPARENT")
            .env("XDG_CACHE_HOME", self.path("user-cache"));
        // The user's own settings of the Hugging Face hub.
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if name.starts_with("HF_") || name.starts_with("HUGGING") {
                command.env_remove(&*name);
            }
        }
        command
    }

    /// Starts the binary in a group of its own, so that a test can kill the lot.
    pub(crate) fn spawn(&self, args: &[&str]) -> Child {
        let mut command = self.command(args);
        command.process_group(0);
        command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// The step kinds that the binary lists.
    pub(crate) fn kinds(&self) -> Vec<String> {
        let list = self.run(&["steps"]).ok().stdout;
        let kinds = list.lines().filter_map(|l| l.split_whitespace().next());
        kinds.map(str::to_owned).collect()
    }

    pub(crate) fn run(&self, args: &[&str]) -> Run {
        Run::of(self.command(args).output().unwrap())
    }
}

/// A finished run of the binary.
pub(crate) struct Run {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Run {
    pub(crate) fn of(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Exit code 0, or the test fails with what was printed.
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{}\n{}", self.stdout, self.stderr);
        self
    }

    /// The events of a `--json` run.
    pub(crate) fn events(&self) -> Vec<Value> {
        self.stdout
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// How a step of a `--json` run ended.
    pub(crate) fn ended(&self, step: &str) -> Value {
        let is_it = |e: &Value| e["event"] == "step_finished" && e["step"] == step;
        self.events().into_iter().find(is_it).unwrap()
    }

    /// The steps that ended in this way, in order.
    pub(crate) fn steps(&self, status: &str) -> Vec<String> {
        self.events()
            .iter()
            .filter(|e| e["event"] == "step_finished" && e["status"] == status)
            .map(|e| e["step"].as_str().unwrap().to_owned())
            .collect()
    }
}
