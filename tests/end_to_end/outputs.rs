//! What of a file or folder a step passes on, beside its bytes; and walks that end.

use std::os::unix::fs::{PermissionsExt, symlink};

use crate::project::{Project, Run};

const JSON: &[&str] = &["pipeline.yaml", "--json"];

const TOOLS: &str = r#"
name: tools
steps:
  make:
    run: |
      printf '#!/bin/sh\necho made\n' > "$tool"
      chmod +x "$tool"
    out: { tool: tool }
    publish: { tool: bin/tool }
  use:
    run: '"$tool" > "$said"; "$own" >> "$said"'
    in: { tool: make.tool, own: { file: own.sh } }
    out: { said: said.txt }
    publish: { said: said.txt }
"#;

fn set_mode(project: &Project, name: &str, mode: u32) {
    let mode = std::fs::Permissions::from_mode(mode);
    std::fs::set_permissions(project.path(name), mode).unwrap();
}

fn is_program(project: &Project, name: &str) -> bool {
    let meta = std::fs::metadata(project.path(name)).unwrap();
    meta.permissions().mode() & 0o100 != 0
}

fn tools() -> Project {
    let project = Project::new();
    project.write("pipeline.yaml", TOOLS);
    project.write("own.sh", "#!/bin/sh\necho own\n");
    set_mode(&project, "own.sh", 0o755);
    project
}

/// All is as it was made, and nothing was made again.
fn assert_restored(project: &Project, run: &Run) {
    let mut cached = run.steps("cached");
    cached.sort();
    assert_eq!(cached, ["make", "use"], "{}", run.stderr);
    assert!(is_program(project, "bin/tool"));
    assert_eq!(project.read("said.txt"), "made\nown\n");
}

#[test]
fn a_program_that_a_step_made_or_the_project_has_can_be_run() {
    let project = tools();
    project.run(JSON).ok();
    assert_restored(&project, &project.run(JSON).ok());
    std::fs::remove_file(project.path("bin/tool")).unwrap();
    assert_restored(&project, &project.run(JSON).ok());
    // What was published is put back with its mode; that a file was made a program is left alone.
    set_mode(&project, "bin/tool", 0o644);
    set_mode(&project, "said.txt", 0o755);
    assert_restored(&project, &project.run(JSON).ok());
    assert!(is_program(&project, "said.txt"));

    set_mode(&project, "own.sh", 0o644);
    let why = project.run(&["why", "use", "pipeline.yaml"]).ok().stdout;
    assert!(why.contains("a program → a file"), "{why}");
    let run = project.run(JSON);
    assert_eq!(run.code, Some(4), "{}", run.stderr);
    set_mode(&project, "own.sh", 0o755);
    assert_restored(&project, &project.run(JSON).ok());
    project.run(&["cache", "verify"]).ok();
}

#[test]
fn a_program_stays_one_on_another_machine() {
    let here = tools();
    let shared = format!("file://{}", here.path("shared").display());
    here.run(&["pipeline.yaml", "--remote", &shared]).ok();
    here.run(&["cache", "export", "moved.tar.zst"]).ok();
    let by_file = tools();
    let moved = here.path("moved.tar.zst").display().to_string();
    by_file.run(&["cache", "import", &moved]).ok();
    assert_restored(&by_file, &by_file.run(JSON).ok());
    let by_remote = tools();
    let run = by_remote.run(&["pipeline.yaml", "--json", "--remote", &shared]);
    assert_restored(&by_remote, &run.ok());
}

#[test]
fn empty_folders_of_an_output_are_passed_on_and_published() {
    let project = Project::new();
    project.write(
        "pipeline.yaml",
        r#"
name: folders
steps:
  make:
    run: mkdir -p "$tree/a" "$tree/empty/deep" && echo x > "$tree/a/x"
    out: { tree: tree }
    publish: { tree: results }
  look:
    run: (cd "$tree" && find . -type d | LC_ALL=C sort) > "$found"
    in: { tree: make.tree }
    out: { found: found.txt }
    publish: { found: found.txt }
"#,
    );
    let found = ".\n./a\n./empty\n./empty/deep\n";
    project.run(JSON).ok();
    assert_eq!(project.read("found.txt"), found);
    assert!(project.path("results/empty/deep").is_dir());
    std::fs::remove_dir_all(project.path("results/empty")).unwrap();
    let again = project.run(JSON).ok();
    assert!(again.steps("ran").is_empty(), "{}", again.stdout);
    assert!(project.path("results/empty/deep").is_dir());
    // Of a folder of the project, too.
    project.write("data/a/x", "x\n");
    std::fs::create_dir_all(project.path("data/empty/deep")).unwrap();
    project.edit("pipeline.yaml", "make.tree", "{ file: data }");
    project.run(JSON).ok();
    assert_eq!(project.read("found.txt"), found);
    std::fs::remove_dir(project.path("data/empty/deep")).unwrap();
    assert_eq!(project.run(JSON).ok().steps("ran"), ["look"]);
    assert_eq!(project.read("found.txt"), ".\n./a\n./empty\n");
}

#[test]
fn a_link_that_leads_up_ends_a_step_and_is_named() {
    let project = Project::new();
    project.write(
        "pipeline.yaml",
        "name: links\nsteps:\n  make:\n    run: mkdir \"$out\"; ln -s . \"$out/one\"; ln -s . \"$out/two\"\n    \
         out: { out: out }\n",
    );
    let run = project.run(&["pipeline.yaml"]);
    assert_eq!(run.code, Some(4), "{}", run.stderr);
    let expected = "the link leads to a folder that it lies in";
    assert!(run.stderr.contains(expected), "{}", run.stderr);
    let named = ["out/one", "out/two"];
    let is_named = named.iter().any(|link| run.stderr.contains(link));
    assert!(is_named, "{}", run.stderr);

    project.write("data/deep/file", "x");
    symlink("..", project.path("data/deep/up")).unwrap();
    project.write(
        "pipeline.yaml",
        "name: links\nsteps:\n  count:\n    run: ls \"$data\" > \"$out\"\n    in: { data: { file: data } }\n    \
         out: { out: out }\n",
    );
    let run = project.run(&["pipeline.yaml"]);
    assert_ne!(run.code, Some(0), "{}", run.stderr);
    assert!(run.stderr.contains("data/deep/up"), "{}", run.stderr);
    assert!(run.stderr.contains(expected), "{}", run.stderr);
    std::fs::remove_file(project.path("data/deep/up")).unwrap();
    symlink("deep", project.path("data/again")).unwrap();
    project.run(JSON).ok();
}

#[test]
fn a_folder_that_holds_the_cache_is_read_without_it() {
    let project = Project::new();
    let work = project.path("work");
    project.write("work/data.txt", "x\n");
    project.write(
        "work/pipeline.yaml",
        "name: all\nsteps:\n  count:\n    run: test ! -e \"$all/.flowrun\" && ls -A \"$all\" > \"$list\"\n    \
         in: { all: { file: . } }\n    out: { list: list.txt }\n",
    );
    let run = |args: &[&str]| {
        let mut command = project.command(args);
        Run::of(command.current_dir(&work).output().unwrap()).ok()
    };
    assert_eq!(run(JSON).steps("ran"), ["count"]);
    assert!(work.join(".flowrun/objects").is_dir());
    for _ in 0..2 {
        assert_eq!(run(JSON).steps("cached"), ["count"]);
    }
    let plan = run(&["plan", "pipeline.yaml"]).stdout;
    assert!(plan.contains("nothing to do"), "{plan}");
    project.write("work/more.txt", "x\n");
    assert_eq!(run(JSON).steps("ran"), ["count"]);
}
