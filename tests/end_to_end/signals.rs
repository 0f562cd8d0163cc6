//! A run that is told to stop, once or twice.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::processes::signal;
use crate::project::{Project, Run};

/// A quick step, then one that starts a process of its own and takes long to clean up.
const STUBBORN: &str = r#"
name: stubborn
steps:
  quick:
    run: echo done > "$out"
    out: { out: out.txt }
  stubborn:
    run: |
      trap 'echo > "$DIR/asked"; sleep 1.9; echo > "$DIR/cleaned"; exit' TERM
      sleep 1000 & echo $! > "$DIR/pid"
      cat "$text"; while :; do sleep 0.1; done
    in: { text: quick.out }
    env: { DIR: DIR_NAME }
    out: { out: out.txt }
"#;

fn is_gone(pid: &str) -> bool {
    (0..400).any(|_| {
        std::thread::sleep(Duration::from_millis(5));
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
        stat.map_or(true, |stat| stat.contains(") Z "))
    })
}

fn wait_for(path: &Path) -> String {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        if text.ends_with('\n') {
            return text;
        }
        assert!(Instant::now() < deadline, "no {}", path.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn stopped_by(name: &str, times: usize) {
    let project = Project::new();
    let here = project.path("").display().to_string();
    let text = STUBBORN.replace("DIR_NAME", here.trim_end_matches('/'));
    project.write("pipeline.yaml", &text);
    let child = project.spawn(&["pipeline.yaml", "--json"]);
    let pid = wait_for(&project.path("pid"));
    signal(name, child.id());
    if times == 2 {
        wait_for(&project.path("asked"));
        signal(name, child.id());
    }
    let ended = Run::of(child.wait_with_output().unwrap());
    let said = format!("{name} {times}: {}\n{}", ended.stdout, ended.stderr);
    assert_eq!(ended.code, Some(130), "{said}");
    assert!(is_gone(&pid), "{said}");
    assert_eq!(ended.steps("ran"), ["quick"], "{said}");
    assert!(times == 1 || !project.path("cleaned").exists(), "{said}");
    project.edit(
        "pipeline.yaml",
        "while :; do sleep 0.1; done",
        "echo > $out",
    );
    let next = project.run(&["pipeline.yaml", "--json"]).ok();
    assert_eq!(next.steps("cached"), ["quick"]);
}

#[test]
fn one_signal_or_two_stop_the_whole_process_group_and_keep_what_finished() {
    std::thread::scope(|scope| {
        for name in ["-INT", "-TERM", "-HUP"] {
            for times in [1, 2] {
                scope.spawn(move || stopped_by(name, times));
            }
        }
    });
}
