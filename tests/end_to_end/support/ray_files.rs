//! The files that `deploy render` writes for Ray Serve, and a Python that reads them as Ray does.

use std::path::Path;
use std::process::Command;

use crate::project::Project;
use crate::tiny;

/// A project with the files of its bundle in `files`.
pub(crate) fn rendered() -> Project {
    let project = tiny::project();
    project.run(&["pipeline.yaml"]).ok();
    let render = ["deploy", "render", "bundle", "--target", "ray-serve"];
    let set = ["--set", "base_model=org/base"];
    let more = ["--set", "adapters_url=s3://bucket/adapters", "-o", "files"];
    project.run(&[&render[..], &set, &more].concat()).ok();
    project
}

/// Whether a program of this Python takes the file, and what it says.
pub(crate) fn takes(python: &Path, program: &str, file: &Path) -> (bool, String) {
    let checked = Command::new(python)
        .args(["-c", program])
        .arg(file)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&checked.stderr).into_owned();
    (checked.status.success(), said)
}
