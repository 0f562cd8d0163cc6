//! The remote cache on a real S3 server (SeaweedFS) behind a proxy that refuses requests and breaks
//! off answers: a run goes on, says what it could not do, and believes nothing but digests.

use serde_json::Value;

use crate::http::Request;
use crate::project::{Project, Run};
use crate::remote_cache::{fetched, large, machine, outputs, uploaded, warnings};
use crate::s3_proxy::{Fault, S3Proxy};
use crate::weed::Weed;

/// Bytes of a file that goes in four parts.
const LARGE: u64 = 30_000_000;

fn through(weed: &Weed, proxy: &S3Proxy, project: &Project, remote: &str) -> Run {
    let args = ["pipeline.yaml", "--json", "--remote", remote];
    let mut command = weed.command(project, &args);
    command.env("AWS_ENDPOINT_URL", &proxy.url);
    Run::of(command.output().unwrap()).ok()
}

/// An object's or a result's bytes are asked for, not a list or a part of an upload.
fn reads_a_file(request: &Request) -> bool {
    request.method == "GET" && !request.path.contains('?')
}

fn counts(run: &Run) -> (Value, Value) {
    let sent = uploaded(run).unwrap();
    (sent["results"].clone(), sent["waiting"].clone())
}

/// Another machine has the step from the remote, whose answers break off once for every file.
fn another_machine_has_it(weed: &Weed, remote: &str, project: &Project, made: &Run) {
    let cuts = S3Proxy::before(&weed.endpoint(), |request, times| {
        (times == 1 && reads_a_file(request)).then_some(Fault::Cut)
    });
    let got = through(weed, &cuts, project, remote);
    assert!(warnings(&got).is_empty(), "{:?}", warnings(&got));
    // The result, and what it names.
    assert!(cuts.faults() >= 2, "{}", cuts.faults());
    assert!(!fetched(&got).is_empty());
    assert_eq!(outputs(&got), outputs(made));
    project.run(&["cache", "verify"]).ok();
}

#[test]
fn a_busy_s3_is_asked_again_and_left_alone_when_it_stays_busy() {
    let Some(weed) = Weed::start() else { return };
    let remote = "s3://flow/busy";
    let once = S3Proxy::before(&weed.endpoint(), |_, times| {
        (times == 1).then_some(Fault::SlowDown)
    });
    let made = through(&weed, &once, &machine(), remote);
    assert!(warnings(&made).is_empty(), "{:?}", warnings(&made));
    assert!(once.faults() > 5);
    assert_eq!(counts(&made), (5.into(), 0.into()));
    let there = machine();
    another_machine_has_it(&weed, remote, &there, &made);

    let remote = "s3://flow/stays-busy";
    let always = S3Proxy::before(&weed.endpoint(), |_, _| Some(Fault::SlowDown));
    let here = machine();
    let alone = through(&weed, &always, &here, remote);
    assert_eq!(alone.steps("ran").len(), 6);
    assert_eq!(outputs(&alone), outputs(&made));
    let told = warnings(&alone);
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].contains("SlowDown"), "{told:?}");
    assert!(weed.files("stays-busy").is_empty());
    // What it kept is sent once that is over.
    always.calm();
    let again = through(&weed, &always, &here, remote);
    assert_eq!(again.steps("cached").len(), 5);
    assert_eq!(counts(&again), (5.into(), 0.into()));
    another_machine_has_it(&weed, remote, &machine(), &made);
}

#[test]
fn a_part_that_s3_fails_at_is_sent_again_in_this_run_or_the_next() {
    let Some(weed) = Weed::start() else { return };
    let part = |request: &Request, number: &str| {
        let query = request.query();
        request.method == "PUT" && query.get("partNumber").is_some_and(|part| part == number)
    };
    let remote = "s3://flow/part-once";
    let once = S3Proxy::before(&weed.endpoint(), move |request, times| {
        (times == 1 && part(request, "2")).then_some(Fault::InternalError)
    });
    let made = through(&weed, &once, &large(LARGE), remote);
    assert!(warnings(&made).is_empty(), "{:?}", warnings(&made));
    assert_eq!(once.faults(), 1);
    assert_eq!(uploaded(&made).unwrap()["bytes"], LARGE);
    another_machine_has_it(&weed, remote, &large(LARGE), &made);

    let remote = "s3://flow/part-never";
    let always = S3Proxy::before(&weed.endpoint(), move |request, _| {
        part(request, "3").then_some(Fault::InternalError)
    });
    let here = large(LARGE);
    let alone = through(&weed, &always, &here, remote);
    let told = warnings(&alone);
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].contains("InternalError"), "{told:?}");
    assert_eq!(counts(&alone), (0.into(), 1.into()));
    assert!(
        weed.files("part-never/actions").is_empty(),
        "no result before its objects"
    );
    always.calm();
    let again = through(&weed, &always, &here, remote);
    assert_eq!(again.steps("cached"), ["large"]);
    assert_eq!(counts(&again), (1.into(), 0.into()));
    another_machine_has_it(&weed, remote, &large(LARGE), &made);
}

#[test]
fn an_object_that_always_breaks_off_is_made_here() {
    let Some(weed) = Weed::start() else { return };
    let remote = "s3://flow/cut";
    let calm = S3Proxy::before(&weed.endpoint(), |_, _| None);
    let made = through(&weed, &calm, &large(LARGE), remote);
    assert_eq!(calm.faults(), 0);
    let cuts = S3Proxy::before(&weed.endpoint(), |request, _| {
        let of_object = reads_a_file(request) && request.path.contains("/objects/");
        of_object.then_some(Fault::Cut)
    });
    let there = large(LARGE);
    let got = through(&weed, &cuts, &there, remote);
    assert!(cuts.faults() > 1);
    assert_eq!(got.steps("ran"), ["large"]);
    let told = warnings(&got);
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!(outputs(&got), outputs(&made));
    there.run(&["cache", "verify"]).ok();
}
