//! The remote cache in Azure's blob store, on Microsoft's emulator of it (Azurite).

use crate::azurite::{Azurite, CONTAINER};
use crate::project::{Project, Run};
use crate::remote_cache::{
    a_large_file_goes_and_comes, a_second_machine_gets_every_step, args,
    it_is_pushed_and_pulled_by_hand, it_need_not_be_there, large, machine, uploaded, warnings,
};

#[test]
fn a_second_machine_gets_every_step_from_azure() {
    let Some(azurite) = Azurite::start() else {
        return;
    };
    let run = |project: &Project, args: &[&str]| azurite.run(project, args);
    let remote = format!("az://{CONTAINER}/team/cache");
    let machines = a_second_machine_gets_every_step(&run, &remote);
    it_is_pushed_and_pulled_by_hand(&run, &remote, &machines.here);
    let doctor = ["doctor", "pipeline.yaml", "--remote", &remote];
    let doctor = azurite.run(&machines.there, &doctor).ok().stdout;
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
    it_need_not_be_there(&run, "az://absent/x");
}

#[test]
fn a_large_file_goes_to_azure_in_blocks() {
    let Some(azurite) = Azurite::start() else {
        return;
    };
    let run = |project: &Project, args: &[&str]| azurite.run(project, args);
    let remote = format!("az://{CONTAINER}/large");
    a_large_file_goes_and_comes(&run, &remote);
    let again = args(&remote, &["--remote-read-only", "--force"]);
    let read_only = azurite.run(&large(30_000_000), &again);
    assert!(uploaded(&read_only.ok()).is_none());
}
