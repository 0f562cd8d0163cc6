//! Clocks that go back or forward: those of files, and that of the process.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use super::{Made, RUN, digests, project, words};
use crate::project::{Project, Run};

/// Thirty years, in seconds.
const YEARS: i64 = 30 * 365 * 86_400;

/// A library that shifts the system's time, as `clock_gettime` gives it, for the process that it is
/// loaded into. The steady clock goes on, as it does when somebody sets the time; so do the times
/// of files, which are the kernel's.
const SHIFTED: &str = r"
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    long code = syscall(SYS_clock_gettime, clock, now);
    if (code == 0 && clock == CLOCK_REALTIME) now->tv_sec += SHIFT;
    return (int)code;
}
";

/// Compiles it, with the linker that this test was built with.
fn library(project: &Project, name: &str, shift: i64) -> PathBuf {
    project.write("clock.c", SHIFTED);
    let path = project.path(name);
    let status = Command::new("cc")
        .args(["-shared", "-fPIC", "-w", &format!("-DSHIFT=({shift}L)")])
        .arg("-o")
        .args([&path, &project.path("clock.c")])
        .status();
    assert!(status.unwrap().success(), "cc makes no {name}");
    path
}

fn run_with(clock: Option<&Path>, project: &Project, args: &[&str]) -> Run {
    let mut command = project.command(args);
    if let Some(clock) = clock {
        command.env("LD_PRELOAD", clock);
    }
    Run::of(command.output().unwrap()).ok()
}

/// A field of the first event.
fn begun(run: &Run, field: &str) -> String {
    run.events()[0][field].as_str().unwrap().to_owned()
}

#[test]
fn a_process_whose_clock_was_set_back_or_forward_makes_what_it_made_and_loses_nothing() {
    let libraries = Project::new();
    let back = library(&libraries, "back.so", -YEARS);
    let forward = library(&libraries, "forward.so", YEARS);
    let project = project();
    let first = project.run(RUN).ok();
    let right = Made::of(&project, &first);
    let mut runs = vec![begun(&first, "run")];
    let mut decades = BTreeSet::from([begun(&first, "at")[..3].to_owned()]);
    // Each but the first finds what a later or an earlier clock left.
    for (what, clock) in [
        ("back", Some(&*back)),
        ("as it was", None),
        ("forward", Some(&*forward)),
        ("back from there", None),
    ] {
        let mut run = |args: &[&str]| {
            let run = run_with(clock, &project, args);
            runs.push(begun(&run, "run"));
            decades.insert(begun(&run, "at")[..3].to_owned());
            run
        };
        let nothing = run(RUN);
        assert!(nothing.steps("ran").is_empty(), "{what}");
        Made::of(&project, &nothing).assert_is(&right, what);
        project.write("words.txt", &words("fruit").replace("apple", what));
        let other = run(RUN);
        assert!(other.steps("ran").contains(&"strip".to_owned()), "{what}");
        let words_in = |name: &str| project.read(name).lines().filter(|l| *l == what).count();
        assert!(words_in("results/all.txt") > 0, "{what}");
        project.write("words.txt", &words("fruit"));
        let again = run(RUN);
        assert!(again.steps("ran").is_empty(), "{what}");
        Made::of(&project, &again).assert_is(&right, what);
        // What the last runs need stays, whatever age the clock gives it.
        let gc = ["cache", "gc", "--keep-runs", "1", "--max-age", "1d"];
        run_with(clock, &project, &gc);
        run_with(clock, &project, &["cache", "verify"]);
        let kept = run(RUN);
        assert!(kept.steps("ran").is_empty(), "{what}");
        Made::of(&project, &kept).assert_is(&right, what);
    }
    assert!(
        runs.is_sorted(),
        "each sorts after those before it: {runs:?}"
    );
    assert_eq!(decades.len(), 3, "three clocks: {decades:?}");
}

#[test]
fn times_of_files_set_back_or_forward_change_no_result() {
    let project = project();
    let expected = digests(&project.run(RUN).ok());
    let hours = Duration::from_secs(3600 * 100_000);
    for time in [
        SystemTime::now() + hours,
        SystemTime::UNIX_EPOCH + Duration::from_secs(1),
    ] {
        for path in [project.path("words.txt"), project.path("results/all.txt")] {
            std::fs::File::options()
                .write(true)
                .open(path)
                .unwrap()
                .set_modified(time)
                .unwrap();
        }
        let run = project.run(RUN).ok();
        assert!(run.steps("ran").is_empty());
        assert_eq!(digests(&run), expected);
        // The same length at the same time: only the bytes tell.
        let at = |text: &str| {
            project.write("words.txt", text);
            std::fs::File::options()
                .write(true)
                .open(project.path("words.txt"))
                .unwrap()
                .set_modified(time)
                .unwrap();
            project.run(RUN).ok()
        };
        let other = at(&words("fruit").replace("apple", "Apple"));
        assert_ne!(digests(&other), expected);
        assert_eq!(digests(&at(&words("fruit"))), expected);
    }
    // The newest run came from a clock that is ahead: the next one still sorts after it.
    let runs = project.path(".flowrun/runs");
    std::fs::create_dir_all(runs.join("20991231-235959-ffff/logs")).unwrap();
    let id = |run: &Run| run.events()[0]["run"].as_str().unwrap().to_owned();
    let (first, second) = (id(&project.run(RUN).ok()), id(&project.run(RUN).ok()));
    assert!(
        *"20991231-235959-ffff" < *first && first < second,
        "{first} {second}"
    );
}
