//! `--device`: where models compute.

use std::process::Command;

use crate::project::{Project, Run};
use crate::tiny::{self, write_model};

/// A GPU that is there is hidden.
fn without_gpus(mut command: Command) -> Run {
    command.env("CUDA_VISIBLE_DEVICES", "");
    Run::of(command.output().unwrap())
}

#[test]
fn a_device_that_cannot_be_had_is_a_clear_error() {
    let home = Project::new();
    write_model(&home.path("tiny"), 1);
    let unknown = home.run(&["serve", "tiny", "--device", "gpu"]);
    assert_eq!(unknown.code, Some(2));
    assert!(unknown.stderr.contains("cuda-tf32"), "{}", unknown.stderr);
    for device in ["cuda", "cuda-tf32"] {
        let serve = ["serve", "tiny", "--port", "0", "--device", device];
        let refused = without_gpus(home.command(&serve));
        assert_eq!(refused.code, Some(3), "{}", refused.stderr);
        assert!(refused.stderr.contains("GPU: "), "{}", refused.stderr);
        assert!(refused.stderr.contains("FLOWRUN_DEVICE"));
        let doctor = without_gpus(home.command(&["doctor", "--device", device]));
        assert_eq!(doctor.code, Some(3), "{}", doctor.stdout);
        assert!(doctor.stdout.contains("device: GPU: "), "{}", doctor.stdout);
    }
}

#[test]
fn results_of_another_device_are_taken_from_the_cache() {
    let project = tiny::project();
    let with = |device: &str| {
        let mut command = project.command(&["pipeline.yaml", "--json"]);
        command.env("FLOWRUN_DEVICE", device);
        without_gpus(command).ok()
    };
    assert!(!with("auto").steps("ran").is_empty());
    let again = with("cuda").steps("ran");
    assert!(again.is_empty(), "{again:?}");
    // An empty variable says nothing.
    assert!(with("").steps("ran").is_empty());
}
