//! The remote cache in Azure's blob store, on Microsoft's emulator of it (Azurite).

use crate::azurite::{Azurite, CONTAINER, script};
use crate::project::{Project, Run};
use crate::remote::{fetched, machine, outputs, uploaded, warnings};

/// A run of the pipeline with a place in the container as the remote.
fn args<'a>(remote: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["pipeline.yaml", "--json", "--remote", remote], more].concat()
}

#[test]
fn a_second_machine_gets_every_step_from_azure() {
    let Some(script) = script() else { return };
    let azurite = Azurite::start(&script);
    let remote = format!("az://{CONTAINER}/team/cache");
    let here = machine();
    let made = azurite.run(&here, &args(&remote, &[])).ok();
    assert_eq!(made.steps("ran").len(), 6);
    assert!(warnings(&made).is_empty(), "{:?}", warnings(&made));
    let sent = uploaded(&made).unwrap();
    assert_eq!((&sent["results"], &sent["waiting"]), (&5.into(), &0.into()));
    let there = machine();
    let got = azurite.run(&there, &args(&remote, &[])).ok();
    assert_eq!(
        (fetched(&got).len(), got.steps("ran")),
        (5, vec!["told".into()])
    );
    assert_eq!(outputs(&got), outputs(&made));
    assert_eq!(there.read("results/all.txt"), here.read("results/all.txt"));
    there.run(&["cache", "verify"]).ok();

    // What is there stays, and is not sent again.
    let forced = azurite
        .run(&here, &["cache", "push", "--remote", &remote])
        .ok();
    assert!(forced.stdout.contains("sent 1 of 6"), "{}", forced.stdout);
    let pulled = azurite.run(&machine(), &["cache", "pull", "--remote", &remote]);
    let pulled = pulled.ok();
    assert!(pulled.stdout.contains("got 6 results"), "{}", pulled.stdout);
    let doctor = azurite.run(&there, &["doctor", "pipeline.yaml", "--remote", &remote]);
    let doctor = doctor.ok().stdout;
    assert!(
        doctor.contains(&format!("{remote} can be read")),
        "{doctor}"
    );

    // A wrong key, and a container that is not there, cost a warning.
    let project = machine();
    let mut command = azurite.command(&project, &args(&remote, &[]));
    command.env("AZURE_STORAGE_ACCOUNT_KEY", "d3Jvbmcga2V5");
    let alone = Run::of(command.output().unwrap()).ok();
    assert_eq!(alone.steps("ran").len(), 6);
    assert_eq!(warnings(&alone).len(), 1, "{:?}", warnings(&alone));
    assert!(!format!("{}{}", alone.stdout, alone.stderr).contains("d3Jvbmcga2V5"));
    let absent = azurite.run(&machine(), &args("az://absent/x", &[])).ok();
    assert_eq!(absent.steps("ran").len(), 6);
    assert_eq!(warnings(&absent).len(), 1, "{:?}", warnings(&absent));
}

#[test]
fn a_large_file_goes_to_azure_in_blocks() {
    let Some(script) = script() else { return };
    let azurite = Azurite::start(&script);
    let remote = format!("az://{CONTAINER}/large");
    let large = || {
        let project = Project::new();
        let pipeline = "steps:\n  large:\n    run: seq 1 20000000 | head -c 30000000 > \"$large\"\n    out: { large: large.txt }\n    publish: { large: large.txt }\n";
        project.write("pipeline.yaml", pipeline);
        project
    };
    let made = azurite.run(&large(), &args(&remote, &[])).ok();
    assert_eq!(uploaded(&made).unwrap()["bytes"], 30_000_000);
    let there = large();
    let got = azurite.run(&there, &args(&remote, &[])).ok();
    assert_eq!(fetched(&got), ["large"]);
    assert_eq!(outputs(&got), outputs(&made));
    let read_only = azurite.run(&large(), &args(&remote, &["--remote-read-only", "--force"]));
    assert!(uploaded(&read_only.ok()).is_none());
}
