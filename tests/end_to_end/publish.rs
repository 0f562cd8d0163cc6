//! What lies where an output is published is the user's, until it is known to be a step's; and what
//! is to be published again is told before it is.

use serde_json::{Value, json};

use crate::project::Project;

const PIPELINE: &str = r#"
name: publish
params: { word: one }
steps:
  make:
    run: echo "${{ params.word }}" > "$text"; mkdir "$tree"; echo "${{ params.word }}" > "$tree/a"
    out: { text: text.txt, tree: tree }
    publish: { text: results/text.txt, tree: results/tree }
"#;

#[test]
fn what_no_step_made_is_kept_when_it_is_replaced() {
    let project = Project::new();
    project.write("pipeline.yaml", PIPELINE);
    project.write("results/text.txt", "mine\n");
    project.write("results/tree/notes/today", "also mine\n");
    project.write("results/other", "not in the way\n");
    let run = project.run(&["pipeline.yaml"]).ok();
    assert_eq!(project.read("results/text.txt"), "one\n");
    assert!(!project.path("results/tree/notes").exists());
    let runs = project.path(".flowrun/runs");
    let run_dir = std::fs::read_dir(runs).unwrap().next().unwrap();
    let kept = run_dir.unwrap().path().join("replaced/results");
    let read = |name: &str| std::fs::read_to_string(kept.join(name)).unwrap();
    assert_eq!(read("text.txt"), "mine\n");
    assert_eq!(read("tree/notes/today"), "also mine\n");
    assert!(!kept.join("other").exists());
    assert!(
        run.stderr
            .contains("`results/text.txt` held what no step made"),
        "{}",
        run.stderr
    );
    // What a step made before is replaced without a word, by a new result and by an old one.
    for word in ["two", "one"] {
        let run = project.run(&["pipeline.yaml", "--set", &format!("word={word}")]);
        let run = run.ok();
        assert_eq!(project.read("results/tree/a"), format!("{word}\n"));
        assert!(!run.stderr.contains("no step made"), "{}", run.stderr);
    }
}

#[test]
fn a_users_file_is_kept_also_when_a_step_has_read_it() {
    let project = Project::new();
    project.write(
        "pipeline.yaml",
        "name: sorted\nsteps:\n  sort:\n    run: sort \"$text\" > \"$out\"\n    in: { text: { file: notes.txt } }\n    \
         out: { out: out.txt }\n    publish: { out: notes.txt }\n",
    );
    project.write("notes.txt", "b\na\n");
    project.run(&["pipeline.yaml"]).ok();
    assert_eq!(project.read("notes.txt"), "a\nb\n");
    let kept = || {
        let runs = std::fs::read_dir(project.path(".flowrun/runs")).unwrap();
        let places = runs.map(|run| run.unwrap().path().join("replaced/notes.txt"));
        places
            .filter_map(|path| std::fs::read_to_string(path).ok())
            .collect::<Vec<_>>()
    };
    assert_eq!(kept(), ["b\na\n"]);
    // No bound of the cache removes it.
    project
        .run(&["cache", "gc", "--keep-runs", "0", "--max-size", "0"])
        .ok();
    assert_eq!(kept(), ["b\na\n"]);
}

#[test]
fn what_was_replaced_stays_behind_when_the_run_moves() {
    let project = Project::new();
    project.write("pipeline.yaml", PIPELINE);
    project.write("results/text.txt", "mine\n");
    let link = project.path("results/tree");
    std::os::unix::fs::symlink("nowhere", link).unwrap();
    project.run(&["pipeline.yaml"]).ok();
    project.run(&["cache", "export", "moved.tar.zst"]).ok();
    let there = Project::new();
    there.write("pipeline.yaml", PIPELINE);
    let file = project.path("moved.tar.zst").display().to_string();
    there.run(&["cache", "import", &file]).ok();
    let runs = std::fs::read_dir(there.path(".flowrun/runs")).unwrap();
    let runs: Vec<_> = runs.map(|run| run.unwrap().path()).collect();
    assert_eq!(runs.len(), 1);
    assert!(runs[0].join("events.jsonl").is_file());
    assert!(!runs[0].join("replaced").exists());
    let run = there.run(&["pipeline.yaml", "--json"]).ok();
    assert_eq!(run.steps("cached"), ["make"]);
}

#[test]
fn two_actions_that_publish_to_one_path_are_an_error() {
    let project = Project::new();
    let two = |fixed: &str| {
        format!(
            "name: two\nsteps:\n  fixed:\n    run: echo fixed > \"$out\"\n    out: {{ out: out.txt }}\n    publish: {{ out: {fixed} }}\n  \
             each:\n    foreach: {{ x: [a, b] }}\n    needs: [fixed]\n    run: echo ${{{{ item.x }}}} > \"$out\"\n    out: {{ out: out.txt }}\n    \
             publish: {{ out: \"results/${{{{ item.x }}}}.txt\" }}\n"
        )
    };
    for fixed in ["results/a.txt", "./results/b.txt", "results"] {
        project.write("pipeline.yaml", &two(fixed));
        let run = project.run(&["pipeline.yaml"]);
        assert_eq!(run.code, Some(4), "{}", run.stderr);
        assert!(
            run.stderr.contains("`fixed` published to"),
            "{}",
            run.stderr
        );
    }
    std::fs::remove_file(project.path("results")).unwrap();
    project.write("pipeline.yaml", &two("results/c.txt"));
    project.run(&["pipeline.yaml"]).ok();
    assert_eq!(project.read("results/b.txt"), "b\n");
}

#[test]
fn a_path_in_the_way_of_another_is_refused_before_anything_runs() {
    let project = Project::new();
    let within = PIPELINE.replace("results/text.txt", "results/tree/text.txt");
    let source = PIPELINE.replace("tree: results/tree", "tree: pipelines");
    for (file, text, expected) in [
        ("pipeline.yaml", within, "lies in `results/tree`"),
        ("pipelines/it.yaml", source, "would replace `it.yaml`"),
    ] {
        project.write(file, &text);
        let run = project.run(&[file]);
        assert_eq!(run.code, Some(3), "{}", run.stderr);
        assert!(run.stderr.contains(expected), "{}", run.stderr);
        assert!(!project.path("results").exists());
    }
    // The cache is no place for results, wherever it lies.
    project.write("pipeline.yaml", PIPELINE);
    let run = project.run(&["pipeline.yaml", "--cache-dir", "results/text.txt/cache"]);
    assert_eq!(run.code, Some(4), "{}", run.stderr);
    assert!(
        run.stderr.contains("the cache lies there"),
        "{}",
        run.stderr
    );
}

#[test]
fn a_plan_says_what_is_published_again() {
    let project = Project::new();
    project.write("pipeline.yaml", PIPELINE);
    let said = |args: &[&str]| project.run(args).ok().stdout;
    let plan = || {
        let plan = said(&["plan", "pipeline.yaml"]);
        assert_eq!(plan, said(&["pipeline.yaml", "--dry-run"]));
        plan
    };
    let run = || project.run(&["pipeline.yaml", "--json"]).ok();
    assert_eq!(plan(), "run    make  never ran\n1 to run, 0 cached\n");
    assert_eq!(run().steps("ran"), ["make"]);
    assert!(plan().contains("nothing to do"));
    std::fs::remove_file(project.path("results/text.txt")).unwrap();
    project.write("results/tree/a", "two\n");
    let expected = "cached make\n       publish  results/text.txt (missing)\n       \
                    publish  results/tree (changed)\n0 to run, 1 cached, 2 to publish\n";
    assert_eq!(plan(), expected);
    let value: Value = serde_json::from_str(&said(&["plan", "pipeline.yaml", "--json"])).unwrap();
    let step = &value["steps"][0];
    assert_eq!(step["status"]["status"], "fresh");
    assert_eq!(
        step["items"][0]["publish"],
        json!([
            {"path": "results/text.txt", "found": "missing"},
            {"path": "results/tree", "found": "changed"},
        ])
    );
    let why = said(&["why", "make", "pipeline.yaml"]);
    assert!(
        why.contains("    publish  results/text.txt (missing)\n"),
        "{why}"
    );
    assert!(!project.path("results/text.txt").exists());
    // The run does it.
    assert_eq!(run().steps("cached"), ["make"]);
    assert_eq!(project.read("results/text.txt"), "one\n");
    assert_eq!(project.read("results/tree/a"), "one\n");
    assert!(plan().contains("nothing to do"));
    project.write("results/text.txt", "two\n");
    assert!(plan().contains("publish  results/text.txt (changed)\n"));
}
