//! A run whose premises all hold does nothing, says what an ordinary run says, and
//! is never mistaken: whatever changes, an ordinary run follows.

use std::time::{Duration, SystemTime};

use serde_json::Value;

use crate::project::{Project, Run};

const PIPELINE: &str = r#"
name: unchanged
include: [more.yaml]
params: { greeting: hello }
steps:
  strip:
    run: sh tool.sh "$words" > "$out"
    in: { words: { file: words.txt }, tool: { file: tool.sh } }
    out: { out: out.txt }
  each:
    foreach: { n: [1, 2] }
    run: echo "${{ params.greeting }} $N" > "$out"; cat "$words" >> "$out"
    in: { words: strip.out }
    env: { N: "${{ item.n }}" }
    out: { out: out.txt }
  never:
    when: ${{ params.greeting == "bye" }}
    run: echo > "$out"
    out: { out: out.txt }
"#;

const MORE: &str = r#"
steps:
  all:
    run: cat "$parts"/* > "$out"; mkdir "$tree"; cp "$out" "$tree/copy"
    in: { parts: each.out }
    out: { out: all.txt, tree: tree }
    publish: { out: results/all.txt, tree: results/tree }
"#;

fn project() -> Project {
    let project = Project::new();
    project.write(
        "pipeline.yaml",
        &PIPELINE.replace("sh tool.sh", "sh \"$tool\""),
    );
    project.write("more.yaml", MORE);
    project.write("words.txt", "# fruit\napple\npear\n");
    project.write("tool.sh", "grep -v '^#' \"$1\"\n");
    project
}

/// One run, and whether it did without reading the pipeline.
fn run(project: &Project) -> (Run, bool) {
    let mut command = project.command(&["pipeline.yaml", "--json"]);
    command.env("FLOWRUN_LOG", "flowrun_engine=debug");
    let run = Run::of(command.output().unwrap()).ok();
    let skipped = run.stderr.contains("all premises of the last run hold");
    (run, skipped)
}

/// The events less what differs between any two runs.
fn told(run: &Run) -> Vec<Value> {
    let mut events = run.events();
    let id = events[0]["run"].as_str().unwrap().to_owned();
    for event in &mut events {
        let event = event.as_object_mut().unwrap();
        if let Some(Value::String(text)) = event.get_mut("text") {
            *text = text.replace(&id, "RUN");
        }
        for name in ["run", "at", "took_ms", "run_dir"] {
            event.remove(name);
        }
    }
    let key = |event: &Value| event.to_string();
    let last = events.len() - 1;
    events[1..last].sort_by_key(key);
    events
}

fn settle(project: &Project) -> Vec<Value> {
    run(project);
    let (second, _) = run(project);
    told(&second)
}

#[test]
fn it_tells_and_records_what_an_ordinary_run_does() {
    let project = project();
    run(&project);
    let (quick, skipped) = run(&project);
    assert!(skipped, "{}", quick.stderr);
    std::fs::remove_dir_all(project.path(".flowrun/premises")).unwrap();
    let (ordinary, skipped) = run(&project);
    assert!(!skipped);
    assert_eq!(told(&quick), told(&ordinary));
    let record = |name: &str| {
        let id = |run: &Run| run.events()[0]["run"].as_str().unwrap().to_owned();
        let of = |run: &Run| project.read(&format!(".flowrun/runs/{}/{name}", id(run)));
        (
            of(&quick).replace(&id(&quick), ""),
            of(&ordinary).replace(&id(&ordinary), ""),
        )
    };
    let (plan, expected) = record("plan.json");
    assert_eq!(plan, expected);
    let (events, _) = record("events.jsonl");
    assert_eq!(events.lines().count(), ordinary.events().len());
    let plain = project.run(&["pipeline.yaml"]).ok();
    assert!(plain.stderr.contains("0 ran, 4 cached"), "{}", plain.stderr);
}

#[test]
fn a_pipeline_in_a_folder_is_remembered_too() {
    let project = project();
    for name in ["pipeline.yaml", "more.yaml", "words.txt", "tool.sh"] {
        project.write(&format!("sub/{name}"), &project.read(name));
    }
    let run = || {
        let mut command = project.command(&["sub/pipeline.yaml", "--json"]);
        command.env("FLOWRUN_LOG", "flowrun_engine=debug");
        let run = Run::of(command.output().unwrap()).ok();
        run.stderr.contains("all premises of the last run hold")
    };
    assert_eq!([run(), run()], [false, true]);
    assert!(project.read("sub/results/all.txt").contains("apple"));
    project.write("sub/results/all.txt", "other");
    assert!(!run());
    assert!(project.read("sub/results/all.txt").contains("apple"));
}

#[test]
fn whatever_changes_an_ordinary_run_follows() {
    let project = project();
    let expected = settle(&project);
    let object = |port: &str| {
        let event = expected
            .iter()
            .find(|e| e["step"] == "all" && e["outputs"].is_object());
        let path = event.unwrap()["outputs"][port]["path"]
            .as_str()
            .unwrap()
            .to_owned();
        project.path(&path)
    };
    let keep_time = |path: &std::path::Path, bytes: &[u8]| {
        let time = std::fs::metadata(path).unwrap().modified().unwrap();
        let _ = std::fs::remove_file(path);
        std::fs::write(path, bytes).unwrap();
        let file = std::fs::File::options().write(true).open(path).unwrap();
        file.set_modified(time).unwrap();
    };
    type Change<'a> = (&'a str, Box<dyn Fn() + 'a>, &'a [&'a str]);
    let changes: Vec<Change<'_>> = vec![
        (
            "a comment in a source",
            Box::new(|| project.edit("words.txt", "# fruit", "# fruits")),
            &["strip"],
        ),
        (
            "and back",
            Box::new(|| project.edit("words.txt", "# fruits", "# fruit")),
            &[],
        ),
        (
            "the pipeline",
            Box::new(|| project.edit("pipeline.yaml", "greeting: hello", "greeting: hi")),
            &["all", "each[1]", "each[2]"],
        ),
        (
            "and back",
            Box::new(|| project.edit("pipeline.yaml", "greeting: hi", "greeting: hello")),
            &[],
        ),
        (
            "an included file",
            Box::new(|| project.edit("more.yaml", "mkdir", "true; mkdir")),
            &["all"],
        ),
        (
            "and back",
            Box::new(|| project.edit("more.yaml", "true; mkdir", "mkdir")),
            &[],
        ),
        (
            "a published file is gone",
            Box::new(|| std::fs::remove_file(project.path("results/all.txt")).unwrap()),
            &[],
        ),
        (
            "a published file is another",
            Box::new(|| keep_time(&project.path("results/all.txt"), b"xxxx")),
            &[],
        ),
        (
            "a published folder has one more",
            Box::new(|| project.write("results/tree/more", "")),
            &[],
        ),
        (
            "an object is gone",
            Box::new(|| std::fs::remove_file(object("out")).unwrap()),
            &["all"],
        ),
        (
            "an object has other bytes, its length and its time",
            Box::new(|| {
                let path = object("out");
                let length = std::fs::read(&path).unwrap().len();
                keep_time(&path, &vec![b'x'; length]);
            }),
            &["all"],
        ),
        (
            "the results are gone",
            Box::new(|| std::fs::remove_dir_all(project.path(".flowrun/actions")).unwrap()),
            &["all", "each[1]", "each[2]", "strip"],
        ),
        (
            "a file has the name of a word",
            Box::new(|| project.write("cat", "x")),
            &["all", "each[1]", "each[2]"],
        ),
        (
            "and is gone",
            Box::new(|| std::fs::remove_file(project.path("cat")).unwrap()),
            &[],
        ),
    ];
    for (what, change, ran) in changes {
        change();
        let (after, skipped) = run(&project);
        assert!(!skipped, "{what}");
        let mut found = after.steps("ran");
        found.sort();
        assert_eq!(found, ran, "{what}");
        assert!(project.read("results/all.txt").contains("apple"), "{what}");
        assert!(!project.path("results/tree/more").exists(), "{what}");
        assert!(run(&project).1, "{what}: the next run has nothing to do");
    }
    let mut other = project.command(&["pipeline.yaml", "--json"]);
    other
        .env("FLOWRUN_LOG", "flowrun_engine=debug")
        .env("SOMETHING", "new");
    let other = Run::of(other.output().unwrap()).ok();
    assert!(
        !other.stderr.contains("all premises"),
        "another environment"
    );
    // A damaged memory is as good as none: what a run rests on, and how its steps ended.
    for ending in [None, Some("steps")] {
        damage_each_eighth(&project, ending);
    }
}

/// Damages the file of the last run's memory with this ending in eight ways; each time an
/// ordinary run follows.
fn damage_each_eighth(project: &Project, ending: Option<&str>) {
    for eighth in 0..8 {
        // The other file is as good as new: only one is damaged at a time.
        settle(project);
        let files = std::fs::read_dir(project.path(".flowrun/premises")).unwrap();
        let mut files: Vec<_> = files
            .map(|file| file.unwrap().path())
            .filter(|path| path.extension().and_then(|e| e.to_str()) == ending)
            .map(|path| (path.metadata().unwrap().modified().unwrap(), path))
            .collect();
        files.sort();
        let (_, memory) = files.pop().unwrap();
        let mut bytes = std::fs::read(&memory).unwrap();
        let at = bytes.len() * eighth / 8;
        match eighth % 2 {
            0 => bytes.truncate(at),
            _ => bytes[at] ^= 1,
        }
        std::fs::write(&memory, bytes).unwrap();
        // How steps ended is read only when a file has changed.
        if ending.is_some() {
            project.edit("words.txt", "# fruit", "# fruit,");
        }
        let (after, skipped) = run(project);
        assert!(!skipped, "{ending:?}, {eighth} of 8");
        let expected: &[&str] = if ending.is_some() { &["strip"] } else { &[] };
        assert_eq!(after.steps("ran"), expected, "{ending:?}, {eighth} of 8");
    }
}

#[test]
fn a_stamp_counts_only_once_the_file_has_settled() {
    let project = project();
    settle(&project);
    // Young files are hashed each time, so a change within the clock's grain is seen.
    project.edit("words.txt", "apple", "grape");
    assert_eq!(run(&project).0.steps("ran").len(), 4);
    std::thread::sleep(Duration::from_millis(3100));
    assert!(run(&project).1 && run(&project).1);
    // Old by its own word only: the time of the change of the inode is now.
    project.edit("words.txt", "grape", "apple");
    let file = std::fs::File::options()
        .write(true)
        .open(project.path("words.txt"))
        .unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(3600))
        .unwrap();
    let (after, skipped) = run(&project);
    assert!(!skipped && after.steps("ran").is_empty());
    assert!(project.read("results/all.txt").contains("apple"));
}

#[test]
fn a_published_file_may_be_made_a_program() {
    use std::os::unix::fs::PermissionsExt;
    let project = project();
    let make_program = |name: &str| {
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(project.path(name), mode).unwrap();
    };
    settle(&project);
    assert!(run(&project).1);
    make_program("results/all.txt");
    let (after, skipped) = run(&project);
    assert!(skipped, "{}", after.stderr);
    // A step that takes a file may see its mode.
    make_program("tool.sh");
    let (after, skipped) = run(&project);
    assert!(!skipped, "{}", after.stderr);
    assert_eq!(after.steps("ran"), ["strip"]);
}

/// As an ordinary run goes, which knows nothing of the last one.
fn ordinary(project: &Project) -> Run {
    let _ = std::fs::remove_dir_all(project.path(".flowrun/premises"));
    let run = project.run(&["pipeline.yaml", "--json"]);
    assert!(run.code == Some(0) || run.code == Some(4), "{}", run.stderr);
    run
}

#[test]
fn a_changed_file_reaches_what_it_must_and_nothing_else() {
    let (quick, plain) = (project(), project());
    settle(&quick);
    ordinary(&plain);
    // What is changed, whether the run fails of it, and what runs again.
    let edits: [(&str, &str, bool, &[&str]); 9] = [
        (
            "words.txt",
            "# just a comment\napple\npear\n",
            false,
            &["strip"],
        ),
        (
            "words.txt",
            "apple\nplum\n",
            false,
            &["all", "each[1]", "each[2]", "strip"],
        ),
        ("words.txt", "# back\napple\npear\n", false, &["strip"]),
        ("tool.sh", "exit 3\n", true, &[]),
        ("tool.sh", "grep -v '^#' \"$1\" | sort\n", false, &["strip"]),
        ("results/all.txt", "tampered\n", false, &[]),
        ("results/tree/copy", "tampered\n", false, &[]),
        (
            "words.txt",
            "pear\n",
            false,
            &["all", "each[1]", "each[2]", "strip"],
        ),
        ("words.txt", "# back\napple\npear\n", false, &[]),
    ];
    for (file, text, fails, ran) in edits {
        for project in [&quick, &plain] {
            project.write(file, text);
        }
        let mut command = quick.command(&["pipeline.yaml", "--json"]);
        command.env("FLOWRUN_LOG", "flowrun_engine=debug");
        let run = Run::of(command.output().unwrap());
        let expected = ordinary(&plain);
        assert_eq!(run.code, Some(if fails { 4 } else { 0 }), "{}", run.stderr);
        let mut steps = run.steps("ran");
        steps.sort();
        assert_eq!(steps, ran, "{file}: {text}");
        assert!(run.stderr.contains("only files changed"), "{file}: {text}");
        assert_eq!(told(&run), told(&expected), "{file}: {text}");
        for result in ["results/all.txt", "results/tree/copy"] {
            assert_eq!(quick.read(result), plain.read(result), "{file}: {text}");
        }
        let id = run.events()[0]["run"].as_str().unwrap().to_owned();
        let shown = |project: &Project| project.run(&["show"]).ok().stdout.lines().count();
        assert_eq!(shown(&quick), shown(&plain));
        let record = quick.read(&format!(".flowrun/runs/{id}/events.jsonl"));
        assert_eq!(record, run.stdout);
        if !fails {
            assert!(self::run(&quick).1, "{file}: {text}");
        }
    }
}

#[test]
fn a_step_that_lost_its_input_has_it_made_again() {
    let project = Project::new();
    project.write(
        "pipeline.yaml",
        "name: lost\nsteps:\n  first:\n    run: echo first > \"$out\"\n    out: { out: out }\n  last:\n    run: cat \"$one\" \"$two\" > \"$out\"\n    in: { one: first.out, two: { file: two.txt } }\n    out: { out: out }\n    publish: { out: result.txt }\n",
    );
    project.write("two.txt", "2\n");
    settle(&project);
    project.write("two.txt", "3\n");
    let (run, _) = self::run(&project);
    assert_eq!(run.steps("ran"), ["last"]);
    let first = run.events();
    let first = first
        .iter()
        .find(|e| e["step"] == "first" && e["outputs"].is_object());
    let path = first.unwrap()["outputs"]["out"]["path"]
        .as_str()
        .unwrap()
        .to_owned();
    std::fs::remove_file(project.path(&path)).unwrap();
    project.write("two.txt", "4\n");
    let (run, _) = self::run(&project);
    assert_eq!(run.steps("ran"), ["first", "last"]);
    assert_eq!(project.read("result.txt"), "first\n4\n");
}
