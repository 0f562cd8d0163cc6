//! What bounds how much runs at once.

use std::path::Path;

use super::example;
use crate::project::Project;

#[test]
fn the_pools_example_runs() {
    let project = example("pools");
    let run = project.run(&["pipeline.yaml", "--json", "-j", "4"]).ok();
    assert_eq!(run.steps("ran").len(), 5);
    assert_eq!(project.read("results/heaviest.txt").trim(), "apple 5");
    let one_less = [
        "pipeline.yaml",
        "--json",
        "--set",
        "fruit=[pear, apple, plum]",
    ];
    let run = project.run(&one_less);
    assert_eq!(run.code, Some(5), "the gate asks for four items");
    assert_eq!(
        run.steps("cached").len(),
        3,
        "items are cached one by one, in any order"
    );
    assert!(
        run.stdout.contains("the gate `items == 4` was not met"),
        "{}",
        run.stdout
    );
}

/// The most lines `start` without their `end` at once.
fn most_at_once(log: &Path) -> usize {
    let (mut now, mut most) = (0usize, 0);
    for line in std::fs::read_to_string(log).unwrap().lines() {
        match line {
            "start" => now += 1,
            _ => now -= 1,
        }
        most = most.max(now);
    }
    most
}

#[test]
fn a_pool_bounds_what_runs_at_once_across_steps() {
    let project = Project::new();
    let log = project.path("log");
    let step = |name: &str| {
        format!(
            "  {name}:\n    foreach: {{ i: [1, 2, 3] }}\n    pool: narrow\n    env: {{ LOG: {} }}\n    \
             run: echo start >> $LOG; sleep 0.02; echo end >> $LOG; echo '${{{{ item.i }}}} {name}'\n",
            log.display()
        )
    };
    for places in [1, 2] {
        let text = format!(
            "pools: {{ narrow: {places} }}\nsteps:\n{}{}",
            step("a"),
            step("b")
        );
        project.write("p.yaml", &text);
        let _ = std::fs::remove_file(&log);
        let run = project
            .run(&["p.yaml", "--json", "-j", "6", "--force"])
            .ok();
        assert_eq!(run.steps("ran").len(), 6);
        assert!(most_at_once(&log) <= places, "{places}");
    }
}

#[test]
fn more_than_the_machine_has_is_told_and_runs_alone() {
    let project = Project::new();
    let text = "steps:\n  big: { run: \"true\", resources: { cpu: 9999, memory: 900TB } }\n";
    project.write("p.yaml", text);
    let run = project.run(&["p.yaml"]).ok();
    assert!(
        run.stderr.contains("asks for 9999 cores of"),
        "{}",
        run.stderr
    );
    assert!(
        run.stderr
            .contains("it runs when no other that asks for the same does"),
        "{}",
        run.stderr
    );
}
