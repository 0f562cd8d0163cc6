//! The remote cache in Google's object store: against a server of the tests' own, because no
//! emulator that can be installed speaks the XML API as far as it is asked.

use crate::gcs_server::{BUCKET, Gcs};
use crate::project::Project;
use crate::remote::{fetched, machine, outputs, uploaded, warnings};

/// A run of the pipeline with a place in the bucket as the remote.
fn args<'a>(remote: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["pipeline.yaml", "--json", "--remote", remote], more].concat()
}

#[test]
fn a_second_machine_gets_every_step_over_googles_api() {
    let gcs = Gcs::start();
    let remote = format!("gs://{BUCKET}/team/cache");
    let here = machine();
    let made = gcs.run(&here, &args(&remote, &[])).ok();
    assert_eq!(made.steps("ran").len(), 6);
    assert!(warnings(&made).is_empty(), "{:?}", warnings(&made));
    let sent = uploaded(&made).unwrap();
    assert_eq!((&sent["results"], &sent["waiting"]), (&5.into(), &0.into()));
    let objects = gcs.objects();
    assert!(
        objects.iter().all(|name| name.starts_with("team/cache/")),
        "{objects:?}"
    );
    let there = machine();
    let got = gcs.run(&there, &args(&remote, &[])).ok();
    assert_eq!(
        (fetched(&got).len(), got.steps("ran")),
        (5, vec!["told".into()])
    );
    assert_eq!(outputs(&got), outputs(&made));
    assert_eq!(there.read("results/all.txt"), here.read("results/all.txt"));
    there.run(&["cache", "verify"]).ok();

    // What is there stays, and is not sent again; a list has more than one page.
    let forced = gcs.run(&here, &["cache", "push", "--remote", &remote]).ok();
    assert!(forced.stdout.contains("sent 1 of 6"), "{}", forced.stdout);
    assert!(gcs.refused() > 0, "results are written once");
    let pulled = gcs.run(&machine(), &["cache", "pull", "--remote", &remote]);
    let pulled = pulled.ok();
    assert!(pulled.stdout.contains("got 6 results"), "{}", pulled.stdout);
    assert!(gcs.pages() > 0, "the list had one page");

    // A bucket that is not there costs a warning.
    let absent = gcs.run(&machine(), &args("gs://absent/x", &[])).ok();
    assert_eq!(absent.steps("ran").len(), 6);
    assert_eq!(warnings(&absent).len(), 1, "{:?}", warnings(&absent));
}

#[test]
fn a_large_file_goes_over_googles_api_in_parts() {
    let gcs = Gcs::start();
    let remote = format!("gs://{BUCKET}/large");
    let large = || {
        let project = Project::new();
        let pipeline = "steps:\n  large:\n    run: seq 1 20000000 | head -c 30000000 > \"$large\"\n    out: { large: large.txt }\n    publish: { large: large.txt }\n";
        project.write("pipeline.yaml", pipeline);
        project
    };
    let made = gcs.run(&large(), &args(&remote, &[])).ok();
    assert_eq!(uploaded(&made).unwrap()["bytes"], 30_000_000);
    assert_eq!(gcs.begun(), 1);
    let got = gcs.run(&large(), &args(&remote, &[])).ok();
    assert_eq!(fetched(&got), ["large"]);
    assert_eq!(outputs(&got), outputs(&made));
}
