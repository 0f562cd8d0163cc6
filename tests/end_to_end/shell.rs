//! Shell pipelines: the cache, `--from`, exit codes, mistakes, history.

use crate::project::Project;

const JSON: &[&str] = &["pipeline.yaml", "--json"];

#[test]
fn a_second_run_does_nothing_and_says_so() {
    let project = Project::shell();
    let first = project.run(JSON).ok();
    assert_eq!(first.steps("ran"), ["strip", "count", "note"]);
    assert_eq!(project.read("results/note.txt"), "lines with it 2\n");
    let second = project.run(JSON).ok();
    assert_eq!(second.steps("cached"), ["strip", "count", "note"]);
    let plain = project.run(&[]).ok();
    assert!(
        plain.stderr.contains("nothing to do: 0 ran, 3 cached"),
        "{}",
        plain.stderr
    );
}

#[test]
fn a_param_reruns_what_depends_on_it_and_equal_bytes_stop_the_wave() {
    let project = Project::shell();
    project.run(JSON).ok();
    let other = project
        .run(&["pipeline.yaml", "--json", "--set", "letter=l"])
        .ok();
    assert_eq!(
        other.steps("cached"),
        ["strip", "note"],
        "apple and plum: two again"
    );
    assert_eq!(other.steps("ran"), ["count"]);
    project.edit("words.txt", "# fruit", "# fruits of the season");
    let edited = project.run(JSON).ok();
    assert_eq!(edited.steps("ran"), ["strip"]);
    project.edit("words.txt", "# fruits of the season", "# fruit");
    assert!(
        project.run(JSON).ok().steps("ran").is_empty(),
        "an older result is restored"
    );
}

#[test]
fn a_dry_run_is_the_plan_and_makes_nothing() {
    let project = Project::shell();
    let dry = |project: &Project| {
        let dry = project.run(&["pipeline.yaml", "--dry-run"]).ok().stdout;
        assert_eq!(dry, project.run(&["plan", "pipeline.yaml"]).ok().stdout);
        dry
    };
    let all = dry(&project);
    for step in ["strip", "count", "note"] {
        assert!(all.contains(step), "{all}");
    }
    for made in ["results", ".flowrun/runs", ".flowrun/actions"] {
        assert!(!project.path(made).exists(), "{made}");
    }
    project.run(JSON).ok();
    assert!(dry(&project).contains("nothing to do"));
    assert_eq!(project.run(&["runs"]).ok().stdout.lines().count(), 1);
}

#[test]
fn each_value_of_a_list_is_a_step_of_its_own_and_is_cached_by_itself() {
    let project = Project::new();
    project.write(
        "pipeline.yaml",
        "name: each\nsteps:\n  each:\n    foreach: { n: [3, 1, 2] }\n    run: echo \"$N\" > \"$out\"\n    \
         env: { N: \"${{ item.n }}\" }\n    out: { out: out.txt }\n  all:\n    run: cat \"$parts\"/* > \"$out\"\n    \
         in: { parts: each.out }\n    out: { out: out.txt }\n    publish: { out: all.txt }\n",
    );
    let ran = || {
        let mut ran = project.run(JSON).ok().steps("ran");
        ran.sort();
        ran
    };
    let words = || {
        let mut words = project.words("all.txt");
        words.sort();
        words
    };
    assert_eq!(ran(), ["all", "each[1]", "each[2]", "each[3]"]);
    assert_eq!(words(), ["1", "2", "3"]);
    project.edit("pipeline.yaml", "[3, 1, 2]", "[3, 4, 2]");
    assert_eq!(ran(), ["all", "each[4]"]);
    assert_eq!(words(), ["2", "3", "4"]);
}

#[test]
fn from_reruns_a_step_and_what_follows() {
    let project = Project::shell();
    project.run(JSON).ok();
    let run = project.run(&["--json", "--from", "count"]).ok();
    assert_eq!(run.steps("cached"), ["strip"]);
    assert_eq!(run.steps("ran"), ["count", "note"]);
    let unknown = project.run(&["--from", "cuont"]);
    assert_eq!(unknown.code, Some(2));
    assert!(unknown.stderr.contains("`cuont`"), "{}", unknown.stderr);
}

#[test]
fn five_mistakes_are_told_with_their_places_and_nothing_runs() {
    let project = Project::shell();
    project.edit(
        "pipeline.yaml",
        "in: { words: strip.stripped }",
        "in: { words: strip.striped }",
    );
    project.edit(
        "pipeline.yaml",
        "{ file: words.txt }",
        "{ file: nowhere.txt }",
    );
    project.edit("pipeline.yaml", "params.letter", "params.lettre");
    project.edit(
        "pipeline.yaml",
        "publish: { note: results/note.txt }",
        "publish: { note: ../x }",
    );
    project.edit(
        "pipeline.yaml",
        "  note:\n    run:",
        "  note:\n    rnu: x\n    run:",
    );
    let run = project.run(JSON);
    assert_eq!(run.code, Some(3), "{}", run.stderr);
    for place in [
        "pipeline.yaml:9:",
        "pipeline.yaml:13:",
        "pipeline.yaml:15:",
        "pipeline.yaml:17:",
        "pipeline.yaml:21:",
    ] {
        assert!(run.stderr.contains(place), "{place} in\n{}", run.stderr);
    }
    assert!(
        run.stderr.contains("did you mean `strip.stripped`?"),
        "{}",
        run.stderr
    );
    assert!(
        run.stderr.contains("5 errors; nothing was run"),
        "{}",
        run.stderr
    );
    assert!(!project.path(".flowrun").exists());
    let check = project.run(&["check", "pipeline.yaml", "--json"]);
    assert_eq!(check.code, Some(3));
    let found = &check.events()[0];
    assert_eq!(found["errors"].as_array().unwrap().len(), 5);
    assert_eq!(found["errors"][0]["line"], 9);
}

#[test]
fn a_failed_step_shows_its_output_and_exits_4() {
    let project = Project::shell();
    project.edit(
        "pipeline.yaml",
        "run: grep -c",
        "run: echo no luck >&2; exit 3; grep -c",
    );
    let run = project.run(&["pipeline.yaml"]);
    assert_eq!(run.code, Some(4));
    assert!(run.stderr.contains("no luck"), "{}", run.stderr);
    let usage = project.run(&["--no-such-flag"]);
    assert_eq!(usage.code, Some(2));
}

#[test]
fn why_names_what_changed() {
    let project = Project::shell();
    project.run(JSON).ok();
    let args = ["why", "count", "pipeline.yaml", "--set", "letter=m"];
    let why = project.run(&args).ok();
    assert!(why.stdout.contains("LETTER"), "{}", why.stdout);
    let plan = project.run(&["plan", "pipeline.yaml"]).ok();
    assert!(plan.stdout.contains("nothing to do"), "{}", plan.stdout);
}

#[test]
fn history_is_there_without_the_lock() {
    let project = Project::shell();
    project.run(JSON).ok();
    assert!(project.run(&["runs"]).ok().stdout.contains("shell"));
    assert!(project.run(&["show"]).ok().stdout.contains("strip"));
    let id = project
        .run(&["runs"])
        .stdout
        .split(' ')
        .next()
        .unwrap()
        .to_owned();
    assert!(
        project
            .run(&["show", &id, "note"])
            .ok()
            .stdout
            .contains("output note: file")
    );
}

#[test]
fn a_tampered_result_is_put_back() {
    let project = Project::shell();
    project.run(JSON).ok();
    project.write("results/note.txt", "lines with it 9\n");
    project.run(JSON).ok();
    assert_eq!(project.read("results/note.txt"), "lines with it 2\n");
}

#[test]
fn an_output_that_leads_to_another_or_out_of_the_project_leaves_both_whole() {
    let project = Project::new();
    project.write("model/weights", "w");
    let model = project.path("model");
    project.write(
        "pipeline.yaml",
        &format!(
            "name: links
steps:
  make:
    run: |
      mkdir \"$all\"; mkdir \"$all/epoch-2\"; echo a > \"$all/epoch-2/adapter\"
      ln -s epoch-2 \"$all/best\"; ln -s all/epoch-2 \"$best\"; ln -s {0} \"$base\"
    out: {{ all: all, best: best, base: base }}
    publish: {{ all: r/all, best: r/best, base: r/base }}
  lead:
    run: rmdir out; ln -s {0} out
    out: {{ weights: weights }}
    publish: {{ weights: r/weights }}
",
            model.display()
        ),
    );
    project.run(JSON).ok();
    for path in [
        "r/all/epoch-2/adapter",
        "r/all/best/adapter",
        "r/best/adapter",
    ] {
        assert_eq!(project.read(path), "a\n", "{path}");
    }
    assert_eq!(project.read("r/base/weights"), "w");
    assert_eq!(project.read("r/weights"), "w");
    assert_eq!(project.read("model/weights"), "w", "it was only read");
}
