//! Several files in one pipeline: `include`; and what a file says at its top: pools.

use super::{load_options, mistakes_in, project, vocabulary};
use crate::language::load_pipeline;
use crate::pipeline::{Pipeline, RunnerKind};

fn load(files: &[(&str, &str)]) -> Pipeline {
    let dir = project(files);
    let options = load_options(dir.path());
    load_pipeline(&dir.path().join("main.yaml"), &vocabulary(), &options).unwrap()
}

#[test]
fn included_files_lie_underneath_and_paths_are_relative_to_them() {
    let main = "\
include: [parts/a.yaml, parts/b.yaml]
params: { x: from main }
steps:
  own: { run: \"echo ${{ params.x }} ${{ params.y }}\" }
";
    let a = "include: [deep/c.yaml]\nparams: { x: from a, y: from a }\nsteps:\n  a: { run: a }\n";
    let b = "params: { y: from b }\nsteps:\n  a: { env: { B: 1 } }\n";
    let c = "steps:\n  c: { run: c }\n";
    let pipeline = load(&[
        ("main.yaml", main),
        ("parts/a.yaml", a),
        ("parts/b.yaml", b),
        ("parts/deep/c.yaml", c),
    ]);
    assert_eq!(pipeline.params["x"], "from main");
    assert_eq!(pipeline.params["y"], "from b", "a later file wins");
    let names: Vec<&str> = pipeline.steps.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["c", "a", "own"]);
    assert_eq!(pipeline.steps[1].env["B"], "1", "steps are merged");
}

#[test]
fn mistakes_in_included_files_have_their_own_places() {
    let main = "include: [parts/a.yaml]\nsteps:\n  own: { run: ls }\n";
    let a = "steps:\n  a:\n    rnu: ls\n    run: ls\n";
    let found = mistakes_in(&[("main.yaml", main), ("parts/a.yaml", a)]);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert!(
        found[0].starts_with("parts/a.yaml:3:5: error:"),
        "{}",
        found[0]
    );
    let missing = mistakes_in(&[("main.yaml", &main.replace("a.yaml", "b.yaml"))]);
    assert!(
        missing[0].starts_with("main.yaml:1:11: error: cannot read `parts/b.yaml`"),
        "{missing:#?}"
    );
    assert!(missing[0].contains("relative to the file that names them"));
    let itself = mistakes_in(&[
        ("main.yaml", main),
        ("parts/a.yaml", "include: [../main.yaml]\n"),
    ]);
    assert!(
        itself[0].starts_with("parts/a.yaml:1:11: error:"),
        "{itself:#?}"
    );
    assert!(itself[0].contains("includes itself"));
}

#[test]
fn a_pipe_that_a_file_names_is_not_waited_for() {
    for main in [
        "include: [pipe.yaml]\nsteps:\n  own: { run: ls }\n",
        "steps:\n  own: { uses: ./pipe.yaml }\n",
    ] {
        let dir = project(&[("main.yaml", main)]);
        let pipe = dir.path().join("pipe.yaml");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status();
        assert!(made.unwrap().success());
        let options = load_options(dir.path());
        let loaded = load_pipeline(&dir.path().join("main.yaml"), &vocabulary(), &options);
        let text = loaded.err().unwrap().to_string();
        assert!(text.contains("neither a file nor a folder"), "{text}");
    }
}

#[test]
fn a_definition_in_an_included_file_is_relative_to_that_file() {
    let main = "include: [parts/a.yaml]\nsteps:\n  own: { run: ls }\n";
    let a = "steps:\n  a: { uses: ./d.yaml }\n";
    let d = "steps:\n  inner: { run: ls }\n";
    let pipeline = load(&[
        ("main.yaml", main),
        ("parts/a.yaml", a),
        ("parts/d.yaml", d),
    ]);
    assert_eq!(pipeline.steps[0].name, "a/inner");
}

#[test]
fn pools_are_declared_with_their_size() {
    let main = "\
params: { at_once: 3 }
pools:
  api: 2
  big: ${{ params.at_once }}
profiles:
  wide: { pools: { api: 9 } }
steps:
  a: { run: ls, pool: api }
";
    let pipeline = load(&[("main.yaml", main)]);
    assert_eq!((pipeline.pools["api"], pipeline.pools["big"]), (2, 3));
    assert_eq!(pipeline.steps[0].pool.as_deref(), Some("api"));
    let dir = project(&[("main.yaml", main)]);
    let mut options = load_options(dir.path());
    options.profiles = vec!["wide".into()];
    let wide = load_pipeline(&dir.path().join("main.yaml"), &vocabulary(), &options).unwrap();
    assert_eq!(wide.pools["api"], 9);
    for (from, to, place, words) in [
        (
            "pool: api",
            "pool: apo",
            "main.yaml:8:23",
            "did you mean `api`?",
        ),
        ("  api: 2", "  api: 0", "main.yaml:3:8", ""),
        ("  api: 2", "  api: two", "main.yaml:3:8", ""),
    ] {
        let found = mistakes_in(&[("main.yaml", &main.replace(from, to))]);
        assert!(
            found
                .iter()
                .any(|m| m.starts_with(place) && m.contains(words)),
            "{to}: {found:#?}"
        );
    }
    let none = mistakes_in(&[("main.yaml", "steps:\n  a: { run: ls, pool: api }\n")]);
    assert!(none[0].contains("`pools: { api: 2 }`"), "{none:#?}");
}

#[test]
fn a_runner_is_named() {
    let main = "steps:\n  load: { uses: load, runner: process, with: { path: x } }\n";
    let pipeline = load(&[("main.yaml", main)]);
    assert_eq!(pipeline.steps[0].runner, RunnerKind::Process);
    let wrong = mistakes_in(&[("main.yaml", &main.replace("process", "proces"))]);
    assert!(wrong[0].starts_with("main.yaml:2:31"), "{wrong:#?}");
    assert!(wrong[0].contains("process"), "{wrong:#?}");
    let command = mistakes_in(&[("main.yaml", "steps:\n  a: { run: ls, runner: process }\n")]);
    assert!(
        command[0].contains("a command is always a process"),
        "{command:#?}"
    );
}
