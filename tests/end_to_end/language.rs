//! What the pipeline language promises, through the real binary.

mod definitions;
mod items;
mod pools;
mod secrets;

use crate::project::Project;

fn example(name: &str) -> Project {
    let project = Project::new();
    project.copy_example(name, "");
    project
}

#[test]
fn a_step_whose_when_is_false_takes_those_with_it_that_need_its_data() {
    let project = Project::new();
    let text = "\
params: { deep: false }
steps:
  a: { run: \"echo a > $x\", out: { x: x } }
  b:
    when: ${{ params.deep and run.name == 'p' }}
    run: echo b > $x
    out: { x: x }
  reads-b: { run: cat $x, in: { x: b.x } }
  waits-for-b: { run: cat $x, in: { x: a.x }, needs: [b] }
";
    project.write("p.yaml", text);
    let run = project.run(&["p.yaml", "--json"]).ok();
    assert_eq!(run.steps("skipped"), ["b", "reads-b"]);
    assert_eq!(run.steps("ran"), ["a", "waits-for-b"]);
    let deep = project
        .run(&["p.yaml", "--json", "--set", "deep=true"])
        .ok();
    assert!(deep.steps("skipped").is_empty());
}

#[test]
fn a_command_that_declares_retry_is_tried_again_and_a_time_limit_ends_it() {
    let project = Project::new();
    let mark = project.path("mark");
    let flaky = format!(
        "steps:\n  flaky:\n    retry: {{ times: 2, backoff: 5ms }}\n    env: {{ MARK: {} }}\n    \
         run: \"echo x >> $MARK; [ $(wc -l < $MARK) -ge 3 ]\"\n",
        mark.display()
    );
    project.write("p.yaml", &flaky);
    let run = project.run(&["p.yaml", "--json"]).ok();
    let retries = run
        .events()
        .iter()
        .filter(|e| e["event"] == "step_retry")
        .count();
    assert_eq!(retries, 2);
    std::fs::remove_file(&mark).unwrap();
    project.write(
        "p.yaml",
        &flaky.replace("    retry: { times: 2, backoff: 5ms }\n", ""),
    );
    let run = project.run(&["p.yaml", "--json", "--force"]);
    assert_eq!(run.code, Some(4));
    assert_eq!(std::fs::read_to_string(&mark).unwrap().lines().count(), 1);
    project.write(
        "p.yaml",
        "steps:\n  slow: { run: sleep 60, timeout: 100ms }\n",
    );
    let slow = project.run(&["p.yaml"]);
    assert_eq!(slow.code, Some(4));
    assert!(
        slow.stderr
            .contains("took longer than its `timeout` of 100ms"),
        "{}",
        slow.stderr
    );
}

#[test]
fn a_published_output_is_put_back_when_it_is_missing_or_changed() {
    let project = example("definitions");
    let args = ["pipeline.yaml", "--json"];
    project.run(&args).ok();
    let kept = project.read("results/all.txt");
    std::fs::remove_file(project.path("results/all.txt")).unwrap();
    project.write("results/trees.txt", "something else");
    let run = project.run(&args).ok();
    assert!(run.steps("ran").is_empty());
    assert_eq!(project.read("results/all.txt"), kept);
    assert_eq!(project.read("results/trees.txt").trim(), "3 oak");
}
