//! The official `openai` Python package, unmodified, as a client of `flowrun serve`.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::external::set;
use crate::project::Project;
use crate::required::skip;
use crate::server::Server;
use crate::tiny::{write_adapter, write_model};

/// The version that continuous integration has too.
fn package() -> String {
    let versions = include_str!("../versions.env");
    let version = versions.lines().find_map(|l| l.strip_prefix("OPENAI="));
    format!("openai=={}", version.unwrap())
}

/// The interpreter of an environment that has the package: `FLOWRUN_OPENAI_PYTHON` names one; else
/// one is made here. None where the package client cannot get the package.
fn python() -> Option<PathBuf> {
    if let Some(named) = set("FLOWRUN_OPENAI_PYTHON") {
        return Some(named);
    }
    let package = package();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("openai-sdk");
    let python = folder.join("bin/python");
    let works = |command: &mut Command| command.output().is_ok_and(|done| done.status.success());
    if works(Command::new(&python).args(["-c", "import openai"])) {
        return Some(python);
    }
    let made = works(Command::new("python3").args(["-m", "venv"]).arg(&folder))
        && works(Command::new(&python).args(["-m", "pip", "install", "-q", &package]));
    if !made {
        skip(
            "sdk",
            &format!("the package client cannot install {package}"),
        );
    }
    made.then_some(python)
}

#[test]
fn the_official_client_works_unmodified() {
    let Some(python) = python() else { return };
    let project = Project::new();
    write_model(&project.path("tiny"), 1);
    write_adapter(&project.path("adapters/one"), 11);
    write_adapter(&project.path("adapters/two"), 12);
    let serve = ["serve", "tiny", "--adapters", "adapters"];
    let mut command = project.command(&serve);
    command.args(["--batches", "batches"]);
    command.env_remove("FLOWRUN_API_KEY");
    let server = Server::start(command);
    let script = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/end_to_end/openai_sdk.py"
    );
    let done = Command::new(python)
        .args([script, &format!("{}/v1", server.url), &server.model])
        .env("NO_PROXY", "127.0.0.1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&done.stdout);
    let errors = String::from_utf8_lossy(&done.stderr);
    assert!(
        done.status.success() && said.starts_with("ok "),
        "{said}{errors}"
    );
}
