//! The remote cache in a folder: what one machine made, another has; what is wrong there is as
//! if it were not there.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::files;
use crate::project::{Project, Run};
use crate::remote_cache::{args, fetched, machine, outputs, uploaded, warnings, write_at_once};

/// A run with the remote.
fn run(project: &Project, remote: &str, more: &[&str]) -> Run {
    project.run(&args(remote, more))
}

/// Files and their bytes.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let files = files::below(folder).into_iter();
    files
        .map(|path| (path.clone(), std::fs::read(path).unwrap()))
        .collect()
}

const STEPS: [&str; 5] = ["all", "folder", "use[one]", "use[two]", "words"];

#[test]
fn a_second_machine_gets_every_step_as_a_hit() {
    let shared = tempfile::tempdir().unwrap();
    let remote = format!("file://{}", shared.path().display());
    let here = machine();
    let made = run(&here, &remote, &[]).ok();
    assert_eq!(made.steps("ran").len(), 6);
    let sent = uploaded(&made).unwrap();
    assert_eq!((&sent["results"], &sent["waiting"]), (&5.into(), &0.into()));
    assert_eq!(sent["to"], remote.as_str());

    let there = machine();
    let plan = there
        .run(&["plan", "pipeline.yaml", "--remote", &remote])
        .ok()
        .stdout;
    assert!(plan.contains("1 to run, 4 cached"), "{plan}");
    assert!(
        !there.path(".flowrun/objects").exists(),
        "a plan gets nothing"
    );
    let got = run(&there, &remote, &[]).ok();
    assert_eq!(got.steps("ran"), ["told"]);
    assert_eq!(fetched(&got), STEPS);
    assert_eq!(outputs(&got), outputs(&made));
    assert!(uploaded(&got).is_none(), "there is nothing to send");
    for file in ["results/all.txt", "results/folder/deep/words"] {
        assert_eq!(there.read(file), here.read(file));
    }
    assert_eq!(
        there.read("results/all.txt"),
        "tool\n3\none\ntool\n3\ntwo\n"
    );
    let mode = std::fs::metadata(there.path("results/folder/tool")).unwrap();
    assert_eq!(mode.permissions().mode() & 0o111, 0o111);
    there.run(&["cache", "verify"]).ok();

    // From now on it is there, whatever becomes of the remote; and the memory of the run holds.
    drop(shared);
    let plain = |project: &Project| {
        std::fs::remove_dir_all(project.path("results")).unwrap();
        project.run(&["pipeline.yaml", "--json"]).ok()
    };
    let kept = plain(&there);
    assert_eq!(kept.steps("ran"), ["told"]);
    assert!(fetched(&kept).is_empty());
    assert_eq!(there.read("results/all.txt"), here.read("results/all.txt"));
}

#[test]
fn the_settings_of_a_project_name_the_remote() {
    let shared = tempfile::tempdir().unwrap();
    let settings = |folder: &str, read_only: bool| {
        format!("remote:\n  url: {folder}\n  read_only: {read_only}\n")
    };
    let plain = ["pipeline.yaml", "--json"];
    let here = machine();
    // A folder is relative to the file; the file may lie above.
    here.write(".flowrun.yaml", &settings("shared", false));
    here.write("below/pipeline.yaml", &here.read("pipeline.yaml"));
    here.write("below/words.txt", &here.read("words.txt"));
    let mut below = here.command(&plain);
    let made = Run::of(below.current_dir(here.path("below")).output().unwrap()).ok();
    assert_eq!(uploaded(&made).unwrap()["results"], 5);
    assert!(here.path("shared/actions").is_dir());

    let there = machine();
    let folder = here.path("shared").display().to_string();
    there.write(".flowrun.yaml", &settings(&folder, true));
    let before = files(&here.path("shared"));
    assert_eq!(fetched(&there.run(&plain).ok()), STEPS);
    let other = [&plain[..], &["--set", "letter=c"]].concat();
    assert!(uploaded(&there.run(&other).ok()).is_none());
    assert_eq!(files(&here.path("shared")), before);
    // The environment goes before the file, and the option before both.
    let with = |name: &str, value: &str, args: &[&str]| {
        Run::of(there.command(args).env(name, value).output().unwrap()).ok()
    };
    let letter = |letter: &'static str| [&plain[..], &["--set", letter]].concat();
    let sent = with("FLOWRUN_REMOTE_READ_ONLY", "0", &letter("letter=d"));
    assert!(uploaded(&sent).is_some());
    let without = with("FLOWRUN_REMOTE", "", &letter("letter=b"));
    assert!(uploaded(&without).is_none());
    let remote = format!("file://{}", shared.path().display());
    let named = run(&there, &remote, &["--set", "letter=ba"]);
    assert!(uploaded(&named.ok()).is_some());

    there.write(".flowrun.yaml", "remotes: x\n");
    let wrong = there.run(&plain);
    assert_eq!(wrong.code, Some(3));
    assert!(wrong.stderr.contains(".flowrun.yaml: "), "{}", wrong.stderr);
    assert!(wrong.stderr.contains("`remotes`"), "{}", wrong.stderr);
}

#[test]
fn a_run_with_nothing_to_do_does_not_ask_the_remote() {
    let shared = tempfile::tempdir().unwrap();
    let remote = format!("file://{}", shared.path().display());
    let [here, there] = [(); 2].map(|()| Project::shell());
    run(&here, &remote, &[]).ok();
    let got = run(&there, &remote, &[]).ok();
    assert_eq!(fetched(&got).len(), 3);
    let table = Project::shell()
        .run(&["pipeline.yaml", "--remote", &remote])
        .ok();
    let said = "nothing to do: 0 ran, 3 cached (3 from the remote cache)";
    assert!(table.stderr.contains(said), "{}", table.stderr);
    for file in files(shared.path()).into_keys() {
        std::fs::write(file, "spoilt").unwrap();
    }
    let again = run(&there, &remote, &[]).ok();
    assert_eq!((again.steps("cached").len(), fetched(&again).len()), (3, 0));
    assert!(warnings(&again).is_empty(), "{:?}", warnings(&again));
    // A changed file: the rest is known, and what is new is made and sent.
    there.write("words.txt", "# other\nalpha\n");
    let changed = run(&there, &remote, &[]).ok();
    assert!(changed.steps("ran").contains(&"strip".to_owned()));
    assert_eq!(uploaded(&changed).unwrap()["waiting"], 0);
}

#[test]
fn what_is_wrong_there_is_a_miss_with_a_warning_and_is_mended() {
    let shared = tempfile::tempdir().unwrap();
    let remote = format!("file://{}", shared.path().display());
    let made = run(&machine(), &remote, &[]).ok();
    let all = files(shared.path());
    for (path, good) in &all {
        let is_result = path.starts_with(shared.path().join("actions"));
        let mut flipped = good.clone();
        flipped[0] ^= 1;
        let cut = good[..good.len() / 2].to_vec();
        for bad in [Some(Vec::new()), Some(cut), Some(flipped), None] {
            match &bad {
                Some(bytes) => std::fs::write(path, bytes).unwrap(),
                None => std::fs::remove_file(path).unwrap(),
            }
            let there = machine();
            let got = run(&there, &remote, &[]).ok();
            assert_eq!(outputs(&got), outputs(&made));
            assert!(got.steps("ran").len() > 1, "{}", path.display());
            // A result that is gone was never there; all else is told of, once for each step.
            let told = warnings(&got);
            let silent = is_result && bad.is_none();
            assert_eq!(told.is_empty(), silent, "{}: {told:?}", path.display());
            assert!(told.iter().all(|t| t.contains("the step runs")), "{told:?}");
            let now = std::fs::read(path).unwrap();
            // A result names the time that it was made.
            assert_eq!(
                now == *good,
                !is_result,
                "{} was written anew",
                path.display()
            );
            assert_ne!(Some(now), bad);
            there.run(&["cache", "verify"]).ok();
        }
    }
    assert_eq!(fetched(&run(&machine(), &remote, &[]).ok()), STEPS);
}

#[test]
fn read_only_use_leaves_the_remote_as_it_is() {
    let shared = tempfile::tempdir().unwrap();
    let remote = format!("file://{}", shared.path().display());
    run(&machine(), &remote, &[]).ok();
    let before = files(shared.path());
    let there = machine();
    let got = run(
        &there,
        &remote,
        &["--remote-read-only", "--set", "letter=c"],
    )
    .ok();
    assert_eq!(got.steps("ran").len(), 6);
    assert!(uploaded(&got).is_none());
    assert_eq!(files(shared.path()), before);
    let same = run(&machine(), &remote, &["--remote-read-only"]).ok();
    assert_eq!(fetched(&same), STEPS);
    assert_eq!(files(shared.path()), before);
    let push = ["cache", "push", "--remote", &remote, "--remote-read-only"];
    assert_eq!(there.run(&push).code, Some(2));
    // By the variable, too; a folder that is not there is not made.
    let absent = shared.path().join("absent").display().to_string();
    let run = Run::of(
        there
            .command(&["pipeline.yaml", "--json", "--force"])
            .env("FLOWRUN_REMOTE", &absent)
            .env("FLOWRUN_REMOTE_READ_ONLY", "1")
            .output()
            .unwrap(),
    );
    assert!(run.stderr.contains("goes on without it"), "{}", run.stderr);
    assert_eq!(run.ok().steps("ran").len(), 6);
    assert!(!Path::new(&absent).exists());
}

#[test]
fn two_writers_at_once_and_a_third_who_reads() {
    let shared = tempfile::tempdir().unwrap();
    let remote = format!("file://{}", shared.path().display());
    let runs: [Run; 3] = write_at_once(|project| project.command(&args(&remote, &[])));
    let got = run(&machine(), &remote, &[]).ok();
    assert_eq!(fetched(&got), STEPS);
    assert_eq!(outputs(&got), outputs(&runs[0]));
    let left = files(shared.path()).into_keys();
    let temporary: Vec<_> = left.filter(|p| p.to_string_lossy().contains('#')).collect();
    assert!(temporary.is_empty(), "{temporary:?}");
}

#[test]
fn a_forced_step_takes_the_place_of_what_was_there() {
    let shared = tempfile::tempdir().unwrap();
    let remote = shared.path().display().to_string();
    let pipeline = "steps:\n  now:\n    run: date +%N > \"$now\"\n    out: { now: now.txt }\n";
    let project = || {
        let project = Project::new();
        project.write("pipeline.yaml", pipeline);
        project
    };
    let (a, b) = (project(), project());
    let first = outputs(&run(&a, &remote, &[]).ok());
    assert_eq!(outputs(&run(&b, &remote, &[]).ok()), first);
    let forced = outputs(&run(&b, &remote, &["--force"]).ok());
    assert_ne!(forced, first);
    assert_eq!(outputs(&run(&project(), &remote, &[]).ok()), forced);
}

#[test]
fn by_hand() {
    let shared = tempfile::tempdir().unwrap();
    let remote = format!("file://{}/new", shared.path().display());
    let here = machine();
    here.run(&["pipeline.yaml"]).ok();
    let push = ["cache", "push", "--remote", &remote];
    let told = here.run(&push).ok().stdout;
    assert!(told.contains("sent 6 of 6 results"), "{told}");
    let again = here.run(&push).ok().stdout;
    assert!(again.contains("sent 0 of 6 results (0 objects"), "{again}");
    let there = machine();
    let told = there
        .run(&["cache", "pull", "--remote", &remote])
        .ok()
        .stdout;
    assert!(told.contains("got 6 results"), "{told}");
    let stats = there
        .run(&["cache", "stats", "--json", "--remote", &remote])
        .ok();
    assert_eq!(stats.events()[0]["remote"]["url"], remote.as_str());
    let stats = there.run(&["cache", "stats", "--remote", &remote, "--remote-read-only"]);
    assert!(
        stats.stdout.contains("nothing is sent there"),
        "{}",
        stats.stdout
    );
    let got = there.run(&["pipeline.yaml", "--json", "--offline"]).ok();
    assert_eq!(got.steps("ran"), ["told"]);
    let doctor = there
        .run(&["doctor", "pipeline.yaml", "--remote", &remote])
        .ok();
    assert!(doctor.stdout.contains("can be read"), "{}", doctor.stdout);
    assert_eq!(there.run(&["cache", "pull"]).code, Some(2));
    for wrong in ["s3://", "ftp://host/x", "s3://AK:SECRET@bucket/x"] {
        let refused = there.run(&["pipeline.yaml", "--remote", wrong]);
        assert_eq!(refused.code, Some(2), "{}", refused.stderr);
        assert!(
            refused.stderr.contains("s3://bucket/path"),
            "{}",
            refused.stderr
        );
        assert!(!refused.stderr.contains("SECRET"), "{}", refused.stderr);
    }
}

#[test]
fn a_server_that_is_not_there_costs_one_warning_and_a_later_run_sends() {
    let port = crate::server::free_port();
    let here = machine();
    let with = |project: &Project, args: &[&str]| {
        let mut command = project.command(args);
        command
            .env("AWS_ACCESS_KEY_ID", "AK")
            .env("AWS_SECRET_ACCESS_KEY", "SK")
            .env("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{port}"));
        Run::of(command.output().unwrap())
    };
    let args = ["pipeline.yaml", "--json", "--remote", "s3://bucket/path"];
    let alone = with(&here, &args).ok();
    assert_eq!(alone.steps("ran").len(), 6);
    let told = warnings(&alone);
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(
        told[0].contains("s3://bucket/path cannot be used"),
        "{told:?}"
    );
    assert_eq!(uploaded(&alone).unwrap()["waiting"], 5);
    let doctor = with(
        &here,
        &["doctor", "pipeline.yaml", "--remote", "s3://bucket/path"],
    );
    assert!(
        doctor.stdout.contains("cannot be read"),
        "{}",
        doctor.stdout
    );
    let push = with(&here, &["cache", "push", "--remote", "s3://bucket/path"]);
    assert_eq!(push.code, Some(6), "{}", push.stderr);
    let offline = with(&here, &[&args[..], &["--offline"]].concat()).ok();
    assert!(warnings(&offline).is_empty());

    // A folder whose file system is in the way, then one that is not.
    let shared = tempfile::tempdir().unwrap();
    let place = shared.path().join("place");
    std::fs::write(&place, "a file").unwrap();
    let remote = place.display().to_string();
    let blocked = run(&here, &remote, &["--set", "letter=c"]);
    assert!(
        blocked.stderr.contains("goes on without it"),
        "{}",
        blocked.stderr
    );
    blocked.ok();
}
