//! Looking after the cache: what it holds, damage, garbage, moving runs.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use serde_json::Value;

use crate::files;
use crate::project::{Project, Run};

const JSON: &[&str] = &["pipeline.yaml", "--json"];

fn json(project: &Project, args: &[&str]) -> Value {
    let args = [args, &["--json"]].concat();
    serde_json::from_str(&project.run(&args).ok().stdout).unwrap()
}

fn run_with(project: &Project, letter: &str) -> Vec<String> {
    let set = format!("letter={letter}");
    let run = project.run(&["pipeline.yaml", "--json", "--set", &set]);
    run.ok().steps("ran")
}

/// Files below a folder of the cache.
fn files(project: &Project, folder: &str) -> Vec<PathBuf> {
    files::below(&project.path(".flowrun").join(folder))
}

fn flip(path: &PathBuf) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)).unwrap();
    let mut bytes = std::fs::read(path).unwrap();
    bytes[0] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn what_the_last_runs_need_stays_and_the_rest_goes() {
    let project = Project::shell();
    for letter in ["a", "p", "l", "u"] {
        run_with(&project, letter);
    }
    let stats = json(&project, &["cache", "stats", "--keep-runs", "2"]);
    assert!(stats["spare_bytes"].as_u64() > Some(0), "{stats}");
    let gc = ["cache", "gc", "--keep-runs", "2", "--max-size", "0"];
    let before = files(&project, "");
    let would = json(&project, &[&gc[..], &["--dry-run"]].concat());
    assert_eq!(before, files(&project, ""), "a dry run removes nothing");
    let did = json(&project, &gc);
    assert_eq!(did["results"], would["results"]);
    assert_eq!((&did["runs"], &did["dry_run"]), (&2.into(), &false.into()));
    assert!(did["results"].as_u64() >= Some(2), "{did}");
    assert_eq!(
        json(&project, &["cache", "verify"])["damage"],
        Value::Array(vec![])
    );
    for kept in ["u", "l"] {
        assert!(run_with(&project, kept).is_empty(), "{kept} is all cached");
    }
    assert!(run_with(&project, "a").contains(&"count".to_owned()));
    assert_eq!(json(&project, &["cache", "stats"])["spare_bytes"], 0);
}

#[test]
fn another_pipeline_in_the_same_cache_keeps_its_own_runs() {
    let project = Project::shell();
    let text = project.read("pipeline.yaml");
    project.write(
        "other.yaml",
        &text
            .replace("name: shell", "name: other")
            .replace("grep -c", "grep -ic"),
    );
    project.run(&["other.yaml", "--json"]).ok();
    for letter in ["a", "p", "l"] {
        run_with(&project, letter);
    }
    project
        .run(&["cache", "gc", "--keep-runs", "1", "--max-size", "0"])
        .ok();
    let other = project.run(&["other.yaml", "--json"]).ok();
    assert!(other.steps("ran").is_empty(), "{:?}", other.steps("ran"));
}

#[test]
fn a_row_of_failures_displaces_nothing() {
    let project = Project::shell();
    run_with(&project, "a");
    for _ in 0..3 {
        let failed = project.run(&["pipeline.yaml", "--set", "letter=z"]);
        assert_eq!(failed.code, Some(4), "no word has a `z`");
    }
    let gc = ["cache", "gc", "--keep-runs", "1", "--max-size", "0"];
    let found = json(&project, &gc);
    assert_eq!((&found["results"], &found["runs"]), (&0.into(), &2.into()));
    assert!(run_with(&project, "a").is_empty());
    let none = Project::new();
    let refused = none.run(&["cache", "stats"]);
    assert_eq!(refused.code, Some(2));
    assert!(refused.stderr.contains("no cache at"), "{}", refused.stderr);
}

#[test]
fn a_run_that_ends_keeps_the_cache_within_its_bounds() {
    let project = Project::shell();
    let run = |letter: &str| {
        // As if the last look were long ago.
        let _ = std::fs::remove_file(project.path(".flowrun/gc.json"));
        let set = format!("letter={letter}");
        let args = [
            "pipeline.yaml",
            "--set",
            &set,
            "--max-size",
            "1B",
            "--keep-runs",
            "2",
        ];
        project.run(&args).ok().stderr
    };
    run("a");
    run("u");
    let told = run("b");
    assert!(told.contains("cache: removed"), "{told}");
    let count = |name: &str| {
        std::fs::read_dir(project.path(".flowrun").join(name))
            .unwrap()
            .count()
    };
    assert_eq!(count("runs"), 2);
    let plan = |letter: &str| {
        let set = format!("letter={letter}");
        project
            .run(&["plan", "pipeline.yaml", "--set", &set])
            .ok()
            .stdout
    };
    assert!(
        plan("b").contains("nothing to do"),
        "the last two runs stay"
    );
    assert!(!plan("a").contains("nothing to do"));
    // Old things go by age, whatever the size.
    let old = SystemTime::now() - Duration::from_secs(3 * 86_400);
    let gc = [
        "cache",
        "gc",
        "--keep-runs",
        "0",
        "--max-age",
        "1d",
        "--json",
    ];
    let aged = project.run(&gc).ok();
    assert_eq!(aged.events()[0]["results"], 0, "all was used today");
    for file in files(&project, "actions")
        .iter()
        .chain(&files(&project, "runs"))
    {
        std::fs::File::open(file)
            .unwrap()
            .set_modified(old)
            .unwrap();
    }
    for file in files(&project, "runs") {
        let text = std::fs::read_to_string(&file).unwrap();
        let today = humantime_day(SystemTime::now());
        std::fs::write(&file, text.replace(&today, &humantime_day(old))).unwrap();
    }
    let aged = project.run(&gc).ok();
    assert!(
        aged.events()[0]["results"].as_u64() > Some(0),
        "{}",
        aged.stdout
    );
}

#[test]
fn what_nobody_bounds_is_bounded_by_ten_runs_ninety_days_and_ten_gigabytes() {
    let project = Project::shell();
    let note = project.path(".flowrun/gc.json");
    let run = |letter: &str| {
        let set = format!("letter={letter}");
        let mut command = project.command(&["pipeline.yaml", "--set", &set]);
        for bound in ["KEEP_RUNS", "MAX_AGE", "MAX_SIZE"] {
            command.env_remove(format!("FLOWRUN_CACHE_{bound}"));
        }
        Run::of(command.output().unwrap()).ok().stderr
    };
    let day_due = || {
        let text = std::fs::read_to_string(&note).unwrap();
        let mut last: Value = serde_json::from_str(&text).unwrap();
        last["swept"]["secs_since_epoch"] = 0.into();
        std::fs::write(&note, last.to_string()).unwrap();
    };
    // As if what ran until now had run so many days ago.
    let age = |days: u64| {
        let now = SystemTime::now();
        let then = now - Duration::from_secs(days * 86_400);
        for file in files(&project, "runs") {
            let text = std::fs::read_to_string(&file).unwrap();
            let aged = text.replace(&humantime_day(now), &humantime_day(then));
            std::fs::write(&file, aged).unwrap();
        }
    };
    run("a");
    // A new cache is not measured: it holds what its first run wrote.
    let counted: Value = serde_json::from_slice(&std::fs::read(&note).unwrap()).unwrap();
    let bytes = |folder: &str| -> u64 {
        let files = files(&project, folder).into_iter();
        files.map(|file| file.metadata().unwrap().len()).sum()
    };
    let stored = bytes("objects") + bytes("actions") + bytes("runs");
    assert_eq!(counted["size"], stored);
    age(91);
    run("l");
    age(89);
    for _ in 0..7 {
        run("p");
    }
    day_due();
    let told = run("p");
    assert!(!told.contains("1 result"), "one of the last ten: {told}");
    day_due();
    let told = run("p");
    assert!(told.contains("cache: removed 1 result"), "older: {told}");
    day_due();
    let told = run("p");
    assert!(!told.contains("1 result"), "only 89 days: {told}");
    // A file that takes no room but has a length.
    let large = std::fs::File::create(project.path(".flowrun/large")).unwrap();
    large.set_len(9_900_000_000).unwrap();
    std::fs::remove_file(&note).unwrap();
    let told = run("u");
    assert!(!told.contains("1 result"), "less than 10 GB: {told}");
    large.set_len(10_000_000_000).unwrap();
    std::fs::remove_file(&note).unwrap();
    let told = run("b");
    assert!(told.contains("cache: removed 1 result"), "more: {told}");
    for (letter, again) in [("p", 0), ("l", 1), ("a", 1)] {
        let ran = run_with(&project, letter);
        assert_eq!(ran, vec!["count"; again], "{letter}");
    }
}

/// `2026-11-24`.
fn humantime_day(at: SystemTime) -> String {
    let output = std::process::Command::new("date")
        .args(["-u", "+%F", "-d"])
        .arg(format!(
            "@{}",
            at.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
        ))
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn a_run_that_did_nothing_does_not_look_at_the_cache() {
    let project = Project::shell();
    run_with(&project, "a");
    let note = project.path(".flowrun/gc.json");
    let before = std::fs::read(&note).unwrap();
    run_with(&project, "a");
    assert_eq!(std::fs::read(&note).unwrap(), before);
}

#[test]
fn collecting_waits_for_the_run_that_holds_the_cache() {
    let project = Project::new();
    let go = project.path("go").display().to_string();
    project.write(
        "pipeline.yaml",
        &format!("name: slow\nsteps:\n  slow:\n    run: touch {go}.began; while [ ! -e {go} ]; do sleep 0.05; done; echo x > \"$out\"\n    out: {{ out: out.txt }}\n"),
    );
    let child = project
        .command(&["pipeline.yaml", "--json"])
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    while !project.path("go.began").exists() {
        std::thread::sleep(Duration::from_millis(20));
    }
    let refused = project.run(&["cache", "gc", "--no-wait"]);
    assert_eq!(refused.code, Some(6), "{}", refused.stderr);
    let doctor = project.run(&["doctor", "pipeline.yaml"]).ok();
    assert!(
        doctor.stdout.contains("in use by process"),
        "{}",
        doctor.stdout
    );
    // Readers do not wait.
    project.run(&["cache", "stats"]).ok();
    project.run(&["cache", "verify"]).ok();
    let mut command = project.command(&["cache", "gc", "--max-size", "0", "--keep-runs", "0"]);
    let gc = command
        .stderr(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(300));
    project.write("go", "");
    let mut child = child;
    assert!(child.wait().unwrap().success(), "the run was not disturbed");
    let gc = Run::of(gc.wait_with_output().unwrap()).ok();
    assert!(gc.stderr.contains("waiting for process"), "{}", gc.stderr);
    assert!(gc.stdout.contains("removed 1 result"), "{}", gc.stdout);
}

#[test]
fn damage_is_found_set_aside_and_made_again() {
    let project = Project::shell();
    project.run(JSON).ok();
    let ok = project.run(&["cache", "verify"]).ok();
    assert!(ok.stdout.contains("no damage"), "{}", ok.stdout);
    let digest = json(&project, &["lineage", "count.number"])["artifact"]["digest"].clone();
    let digest = digest.as_str().unwrap();
    flip(&project.path(&format!(
        ".flowrun/objects/{}/{}",
        &digest[..2],
        &digest[2..]
    )));
    flip(&files(&project, "actions")[0]);
    let found = project.run(&["cache", "verify"]);
    assert_eq!(found.code, Some(6), "{}", found.stdout);
    for part in [
        "its bytes are not what was stored",
        "it cannot be read",
        "cache repair",
    ] {
        assert!(found.stdout.contains(part), "{part} in\n{}", found.stdout);
    }
    let repaired = json(&project, &["cache", "repair"]);
    assert!(repaired["damage"].as_array().unwrap().len() >= 2);
    project.run(&["cache", "verify"]).ok();
    let again = project.run(JSON).ok();
    assert!(!again.steps("ran").is_empty());
    assert_eq!(project.read("results/note.txt"), "lines with it 2\n");
    project.run(&["cache", "verify"]).ok();
}

#[test]
fn a_command_that_only_reads_leaves_damage_to_whoever_holds_the_cache() {
    let project = Project::shell();
    project.run(JSON).ok();
    let damaged = &files(&project, "actions")[0];
    flip(damaged);
    project.run(&["plan", "pipeline.yaml"]).ok();
    project.run(&["why", "note", "pipeline.yaml"]).ok();
    assert!(damaged.exists());
    let repaired = json(&project, &["cache", "repair"]);
    assert!(!repaired["damage"].as_array().unwrap().is_empty());
    assert!(!damaged.exists());
    project.run(&["cache", "verify"]).ok();
}

#[test]
fn an_index_that_is_no_folder_is_repaired() {
    let project = Project::shell();
    project.run(JSON).ok();
    project.write(".flowrun/index.sled", "no index\n");
    project.run(&["cache", "repair"]).ok();
    assert!(!project.path(".flowrun/index.sled").is_file());
    project.run(&["cache", "verify"]).ok();
}

#[test]
fn one_file_moves_a_run_to_another_machine() {
    let here = Project::shell();
    here.run(JSON).ok();
    let run = here.run(JSON).ok();
    here.run(&["cache", "export", "moved.tar.zst"]).ok();

    let there = Project::shell();
    let file = here.path("moved.tar.zst").display().to_string();
    let told = there.run(&["cache", "import", &file]).ok().stdout;
    assert!(told.contains("3 results"), "{told}");
    let again = there.run(JSON).ok();
    assert_eq!(again.steps("cached"), ["strip", "count", "note"]);
    assert_eq!(there.read("results/note.txt"), "lines with it 2\n");
    let runs = there.run(&["runs", "--json"]).ok();
    assert_eq!(runs.events()[1]["run"], run.events()[0]["run"]);
    assert!(
        there
            .run(&["lineage", "note.note"])
            .ok()
            .stdout
            .contains("(source)")
    );
    there.run(&["cache", "verify"]).ok();

    let bytes = std::fs::read(&file).unwrap();
    let cut = std::fs::File::create(there.path("cut.tar.zst")).unwrap();
    (&cut).write_all(&bytes[..bytes.len() / 2]).unwrap();
    let refused = there.run(&["cache", "import", "cut.tar.zst"]);
    assert_eq!(refused.code, Some(3), "{}", refused.stderr);
    assert!(refused.stderr.contains("damaged"), "{}", refused.stderr);
    there.run(&["cache", "verify"]).ok();
    assert_eq!(there.run(&["cache", "import", "nowhere"]).code, Some(2));
}

#[test]
fn bounds_are_said_in_words_that_are_checked() {
    let project = Project::shell();
    project.run(JSON).ok();
    let wrong = project.run(&["cache", "gc", "--max-size", "10"]);
    assert_eq!(wrong.code, Some(2));
    assert!(wrong.stderr.contains("10GB"), "{}", wrong.stderr);
    let none = ["cache", "gc", "--max-size", "none", "--max-age", "none"];
    let none = project.run(&none).ok();
    assert!(none.stdout.contains("nothing to remove"), "{}", none.stdout);
}
