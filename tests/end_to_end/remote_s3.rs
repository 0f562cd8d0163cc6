//! The remote cache in S3, on a real server (SeaweedFS) of this machine, and its failures.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::time::Duration;

use crate::project::{Project, Run};
use crate::remote_cache::{
    Machines, a_second_machine_gets_every_step, fetched, large, machine, outputs, uploaded,
    warnings, write_at_once,
};
use crate::weed::{Gate, Weed};

const REMOTE: &str = "s3://flow/team/cache";
const ARGS: [&str; 4] = ["pipeline.yaml", "--json", "--remote", REMOTE];

/// Bytes of a file that goes in parts, more than are under way at once.
const LARGE: u64 = 100_000_000;

#[test]
fn a_second_machine_gets_every_step_from_s3() {
    let Some(weed) = Weed::start() else { return };
    let run = |project: &Project, args: &[&str]| weed.run(project, args);
    let Machines { here, there, made } = a_second_machine_gets_every_step(&run, REMOTE);
    assert_eq!(
        there.read("results/folder/deep/words"),
        here.read("results/folder/deep/words")
    );
    let mode = std::fs::metadata(there.path("results/folder/tool")).unwrap();
    assert_eq!(mode.permissions().mode() & 0o111, 0o111);
    let doctor = weed
        .run(&there, &["doctor", "pipeline.yaml", "--remote", REMOTE])
        .ok();
    assert!(
        doctor.stdout.contains(&format!("{REMOTE} can be read")),
        "{}",
        doctor.stdout
    );

    read_only_leaves_it_as_it_is(&weed);
    wrong_credentials_cost_a_warning(&weed);
    what_is_wrong_there_is_a_miss(&weed, &made);
    writers_at_once(&weed);
    by_hand(&weed);
}

fn read_only_leaves_it_as_it_is(weed: &Weed) {
    let before = weed.files("team");
    assert!(before.len() > 5);
    let args = [&ARGS[..], &["--remote-read-only", "--set", "letter=c"]].concat();
    let got = weed.run(&machine(), &args).ok();
    assert_eq!(got.steps("ran").len(), 6);
    assert_eq!(weed.files("team"), before);
    // Credentials that may only read: what is there is used, the rest waits here.
    let reader = machine();
    let as_reader = |more: &[&str]| {
        let mut command = weed.command(&reader, &[&ARGS[..], more].concat());
        command
            .env("AWS_ACCESS_KEY_ID", "RK")
            .env("AWS_SECRET_ACCESS_KEY", "RS");
        Run::of(command.output().unwrap()).ok()
    };
    let got = as_reader(&[]);
    assert_eq!((fetched(&got).len(), warnings(&got).len()), (5, 0));
    let got = as_reader(&["--set", "letter=c"]);
    assert_eq!(got.steps("ran").len(), 6);
    let told = warnings(&got);
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(
        told[0].contains("cannot be written to (AccessDenied"),
        "{told:?}"
    );
    assert_eq!(weed.files("team"), before);
}

fn wrong_credentials_cost_a_warning(weed: &Weed) {
    let project = machine();
    let mut command = weed.command(&project, &ARGS);
    command.env("AWS_SECRET_ACCESS_KEY", "wrong-secret");
    let alone = Run::of(command.output().unwrap()).ok();
    assert_eq!(alone.steps("ran").len(), 6);
    let told = warnings(&alone);
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].contains("SignatureDoesNotMatch"), "{told:?}");
    assert!(!format!("{}{}", alone.stdout, alone.stderr).contains("wrong-secret"));
    let args = ["pipeline.yaml", "--json", "--remote", "s3://absent/x"];
    let absent = weed.run(&machine(), &args).ok();
    assert!(
        warnings(&absent)[0].contains("cannot be used"),
        "{:?}",
        warnings(&absent)
    );
}

fn what_is_wrong_there_is_a_miss(weed: &Weed, made: &Run) {
    let all: BTreeMap<_, _> = weed.files("team").into_iter().collect();
    let results = all.iter().filter(|(path, _)| path.contains("/actions/"));
    let result = results.map(|(path, _)| path.clone()).next().unwrap();
    let object = outputs(made)["\"folder\".folder"]
        .as_str()
        .unwrap()
        .to_owned();
    let object = format!("team/cache/objects/{}/{}", &object[..2], &object[2..]);
    for path in [result, object] {
        let good = &all[&path];
        let mut flipped = good.clone();
        flipped[good.len() / 2] ^= 1;
        for bad in [
            Some(Vec::new()),
            Some(good[..9].to_vec()),
            Some(flipped),
            None,
        ] {
            match &bad {
                Some(bytes) => weed.write(&path, bytes),
                None => weed.remove(&path),
            }
            let there = machine();
            let got = weed.run(&there, &ARGS).ok();
            assert_eq!(&outputs(&got), &outputs(made));
            let told = warnings(&got);
            let silent = bad.is_none() && path.contains("/actions/");
            assert_eq!(told.len(), usize::from(!silent), "{path}: {told:?}");
            assert_eq!(
                got.steps("ran").len(),
                2,
                "the step and the one that always runs"
            );
            let now = weed.files("team").remove(&path).unwrap();
            // A result names the time that it was made.
            assert_eq!(
                now == *good,
                path.contains("/objects/"),
                "{path} was written anew"
            );
            assert_ne!(Some(now), bad);
            there.run(&["cache", "verify"]).ok();
        }
    }
}

fn writers_at_once(weed: &Weed) {
    let args = [&ARGS[..3], &["s3://flow/both"]].concat();
    let runs: [Run; 2] = write_at_once(|project| weed.command(project, &args));
    let got = weed.run(&machine(), &args).ok();
    assert_eq!(fetched(&got).len(), 5);
    assert_eq!(outputs(&got), outputs(&runs[0]));
}

fn by_hand(weed: &Weed) {
    let (here, there) = (machine(), machine());
    here.run(&["pipeline.yaml"]).ok();
    let remote = ["--remote", "s3://flow/by-hand"];
    let push = [&["cache", "push"][..], &remote].concat();
    let told = weed.run(&here, &push).ok().stdout;
    assert!(told.contains("sent 6 of 6 results"), "{told}");
    let told = weed.run(&here, &push).ok().stdout;
    assert!(told.contains("sent 0 of 6 results (0 objects"), "{told}");
    let pull = [&["cache", "pull"][..], &remote].concat();
    let told = weed.run(&there, &pull).ok().stdout;
    assert!(told.contains("got 6 results"), "{told}");
    assert_eq!(
        there.run(&["pipeline.yaml", "--json"]).ok().steps("ran"),
        ["told"]
    );
}

#[test]
fn a_large_file_goes_on_where_a_killed_upload_left_off() {
    let Some(weed) = Weed::start() else { return };
    let here = large(LARGE);
    // More than the eight parts under way can hold, so that some are there when it closes.
    let gate = Gate::before(&weed.endpoint(), 90_000_000);
    let mut command = weed.command(&here, &ARGS);
    command
        .env("AWS_ENDPOINT_URL", &gate.url)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let parts = || {
        let notes = std::fs::read_dir(here.path(".flowrun/remotes"))
            .into_iter()
            .flatten();
        let notes = notes.flat_map(|d| std::fs::read_dir(d.unwrap().path().join("uploads")));
        let notes = notes
            .flatten()
            .map(|n| std::fs::read_to_string(n.unwrap().path()).unwrap());
        notes
            .map(|text| text.matches("\"part\":").count().saturating_sub(1))
            .sum::<usize>()
    };
    while !(gate.is_closed() && parts() > 0) {
        assert!(
            child.try_wait().unwrap().is_none(),
            "it ended before it was killed"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let there = parts();
    assert!(
        weed.files("team/cache/actions").is_empty(),
        "no result before its objects"
    );
    gate.open();

    let mut command = weed.command(&here, &ARGS);
    command.env("AWS_ENDPOINT_URL", &gate.url);
    let again = Run::of(command.output().unwrap()).ok();
    assert_eq!(again.steps("cached"), ["large"]);
    let sent = uploaded(&again).unwrap();
    let moved = sent["bytes"].as_u64().unwrap();
    assert_eq!(
        moved,
        LARGE - (there as u64) * (8 << 20),
        "{sent}, {there} parts were there"
    );
    assert_eq!((&sent["results"], &sent["waiting"]), (&1.into(), &0.into()));

    let other = large(LARGE);
    let got = weed.run(&other, &ARGS).ok();
    assert_eq!(fetched(&got), ["large"]);
    assert_eq!(outputs(&got), outputs(&again));
    assert_eq!(
        std::fs::metadata(other.path("large.txt")).unwrap().len(),
        LARGE
    );
    other.run(&["cache", "verify"]).ok();
}

#[test]
fn a_server_that_stops_in_the_middle_of_a_run_fails_nothing() {
    let Some(mut weed) = Weed::start() else {
        return;
    };
    let project = |go: &str| {
        let project = Project::new();
        let wait = format!("touch {go}.began; while [ ! -e {go} ]; do sleep 0.05; done");
        project.write(
            "pipeline.yaml",
            &format!("steps:\n  first:\n    run: echo 1 > \"$a\"\n    out: {{ a: a }}\n  second:\n    run: \"{wait}; cat \\\"$a\\\" > \\\"$b\\\"\"\n    in: {{ a: first.a }}\n    out: {{ b: b }}\n  third:\n    run: cat \"$b\" > \"$c\"\n    in: {{ b: second.b }}\n    out: {{ c: c }}\n"),
        );
        project
    };
    let scratch = tempfile::tempdir().unwrap();
    let go = scratch.path().join("go").display().to_string();
    let here = project(&go);
    let mut command = weed.command(&here, &ARGS);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    while !std::path::Path::new(&format!("{go}.began")).exists()
        || weed.files("team/cache/actions").is_empty()
    {
        std::thread::sleep(Duration::from_millis(20));
    }
    weed.down();
    std::fs::write(&go, "").unwrap();
    let run = Run::of(child.wait_with_output().unwrap()).ok();
    assert_eq!(run.steps("ran"), ["first", "second", "third"]);
    let told = warnings(&run);
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!(uploaded(&run).unwrap()["waiting"], 2);

    // The next run of nothing sends what is left.
    weed.up();
    let again = weed.run(&here, &ARGS).ok();
    assert_eq!(again.steps("cached").len(), 3);
    let sent = uploaded(&again).unwrap();
    assert_eq!((&sent["results"], &sent["waiting"]), (&2.into(), &0.into()));
    let got = weed.run(&project(&go), &ARGS).ok();
    assert_eq!(fetched(&got).len(), 3);
}
