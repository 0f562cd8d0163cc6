//! The remote cache in Google's object store: against a server of the tests' own, because no
//! emulator that can be installed speaks the XML API as far as it is asked.

use crate::gcs_server::{BUCKET, Gcs};
use crate::project::Project;
use crate::remote_cache::{
    a_large_file_goes_and_comes, a_second_machine_gets_every_step, it_is_pushed_and_pulled_by_hand,
    it_need_not_be_there,
};

#[test]
fn a_second_machine_gets_every_step_over_googles_api() {
    let gcs = Gcs::start();
    let run = |project: &Project, args: &[&str]| gcs.run(project, args);
    let remote = format!("gs://{BUCKET}/team/cache");
    let machines = a_second_machine_gets_every_step(&run, &remote);
    let objects = gcs.objects();
    assert!(
        objects.iter().all(|name| name.starts_with("team/cache/")),
        "{objects:?}"
    );
    // A list has more than one page.
    it_is_pushed_and_pulled_by_hand(&run, &remote, &machines.here);
    assert!(gcs.refused() > 0, "results are written once");
    assert!(gcs.pages() > 0, "the list had one page");
    it_need_not_be_there(&run, "gs://absent/x");
}

#[test]
fn a_large_file_goes_over_googles_api_in_parts() {
    let gcs = Gcs::start();
    let run = |project: &Project, args: &[&str]| gcs.run(project, args);
    a_large_file_goes_and_comes(&run, &format!("gs://{BUCKET}/large"));
    assert_eq!(gcs.begun(), 1);
}
