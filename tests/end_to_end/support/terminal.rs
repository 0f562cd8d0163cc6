//! A terminal for the binary.

use std::fs::File;
use std::process::Command;

use crate::project::Project;
use crate::required::skip;

/// Runs the binary on a terminal of 80 columns that answers so; gives what was written to it,
/// or nothing where there is no `script` to make a terminal with, which is said.
pub(crate) fn on_a_terminal(
    project: &Project,
    args: &str,
    answers: &str,
    env: &[(&str, &str)],
) -> Option<String> {
    let binary = env!("CARGO_BIN_EXE_flowrun");
    let line = format!("stty cols 80 rows 24; '{binary}' {args}");
    project.write("answers", answers);
    let mut command = Command::new("script");
    command
        .args(["-qec", &line, "/dev/null"])
        .current_dir(project.path(""))
        .stdin(File::open(project.path("answers")).unwrap())
        .env_remove("CI")
        .env_remove("NO_COLOR")
        .env("TERM", "xterm-256color")
        .envs(env.iter().copied());
    let Ok(output) = command.output() else {
        skip("terminal", "there is no `script` to make a terminal with");
        return None;
    };
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}
