//! Kills at random moments, damaged files, full and read-only disks, power cuts, many runs
//! at once, a clock that goes back: never a wrong result, nothing finished is lost.

mod clock;
mod kills;

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, SystemTime};

use serde_json::Value;

use crate::files;
use crate::mount::Mount;
use crate::project::{Project, Run};

const RUN: &[&str] = &["pipeline.yaml", "--json", "-j", "3"];

/// Files, a folder, a fan-out, a large output, published results; some 20 actions.
const PIPELINE: &str = r#"
name: faults
steps:
  strip:
    run: sleep 0.01; grep -v '^#' "$words" > "$out"
    in: { words: { file: words.txt } }
    out: { out: out.txt }
  each:
    foreach: { n: [1, 2, 3, 4, 5, 6, 7, 8] }
    run: for i in 1 2 3; do cat "$words"; echo "$N $i"; sleep 0.005; done > "$out"
    in: { words: strip.out }
    env: { N: "${{ item.n }}" }
    out: { out: out.txt }
  tree:
    run: mkdir -p "$out/sub"; for i in 1 2 3 4; do cp "$words" "$out/sub/$i"; sleep 0.005; done
    in: { words: strip.out }
    out: { out: folder }
  big:
    run: seq 200000 > "$out"; cat "$words" >> "$out"
    in: { words: strip.out }
    out: { out: out.txt }
  copies:
    foreach: { n: [1, 2, 3, 4] }
    run: cat $(ls -d "$parts"/*) > "$out"; cat "$tree/sub/$N" >> "$out"; sleep 0.01
    in: { parts: each.out, tree: tree.out }
    env: { N: "${{ item.n }}" }
    out: { out: out.txt }
  all:
    run: cat "$copies"/* "$big" > "$out"; wc -l < "$out" > "$count"
    in: { copies: copies.out, big: big.out }
    out: { out: all.txt, count: count.txt }
    publish: { out: results/all.txt, count: results/count.txt }
"#;

fn project() -> Project {
    let project = Project::new();
    project.write("pipeline.yaml", PIPELINE);
    project.write("words.txt", &words("fruit"));
    project
}

/// Digest of every output of every step, by step and port.
fn digests(run: &Run) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    for event in run.events() {
        if event["event"] != "step_finished" {
            continue;
        }
        for (port, output) in event["outputs"].as_object().unwrap() {
            let name = format!("{}.{port}", event["step"].as_str().unwrap());
            all.insert(name, output["digest"].as_str().unwrap().to_owned());
        }
    }
    all
}

/// What a run made.
struct Made {
    /// As [`digests`] gives them.
    digests: BTreeMap<String, String>,
    /// The bytes of all that lies published, by place.
    files: BTreeMap<PathBuf, Vec<u8>>,
}

impl Made {
    fn of(project: &Project, run: &Run) -> Self {
        let folder = project.path("results");
        let mut published = BTreeMap::new();
        for path in files::below(&folder) {
            let place = path.strip_prefix(&folder).unwrap().to_owned();
            // What a killed run staged there is no result.
            if !place.to_string_lossy().starts_with(".flowrun-") {
                published.insert(place, std::fs::read(path).unwrap());
            }
        }
        Self {
            digests: digests(run),
            files: published,
        }
    }

    /// Digest by digest and byte by byte; the bytes are too many to be shown.
    fn assert_is(&self, right: &Self, what: &str) {
        assert_eq!(self.digests, right.digests, "{what}");
        let places = |made: &Self| made.files.keys().cloned().collect::<Vec<_>>();
        assert_eq!(places(self), places(right), "{what}");
        for (place, bytes) in &self.files {
            assert!(*bytes == right.files[place], "{what}: {}", place.display());
        }
    }
}

/// Keys of the steps that a run ran.
fn ran_keys(run: &Run) -> BTreeSet<String> {
    run.events()
        .iter()
        .filter(|e| e["event"] == "step_finished" && e["status"] == "ran")
        .map(|e| e["key"].as_str().unwrap().to_owned())
        .collect()
}

/// Keys of all results that are recorded.
fn recorded(project: &Project) -> BTreeSet<String> {
    files::below(&project.path(".flowrun/actions"))
        .iter()
        .filter(|path| path.extension().is_some_and(|e| e == "json"))
        .map(|path| {
            let folder = path.parent().unwrap().file_name().unwrap();
            format!(
                "{}{}",
                folder.to_string_lossy(),
                path.file_stem().unwrap().to_string_lossy()
            )
        })
        .collect()
}

/// Numbers that differ from run to run; printed, so that a failure can be repeated.
struct Random {
    seed: u64,
    state: u64,
}

impl Random {
    fn new() -> Self {
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap();
        let seed = std::env::var("FLOWRUN_FAULT_SEED").map_or_else(
            |_| u64::from(std::process::id()) << 32 ^ now.as_nanos() as u64,
            |text| text.parse().unwrap(),
        );
        println!("FLOWRUN_FAULT_SEED={seed}");
        Self {
            seed,
            state: seed | 1,
        }
    }

    /// A number below `n`; 0 where there is none.
    fn below(&mut self, n: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % n.max(1)
    }
}

fn count(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

/// The source, long enough for the index to take it.
fn words(note: &str) -> String {
    format!("# {note}{}\napple\npear\nplum\n", " ".repeat(20_000))
}

/// Damages a file in one of the ways that disks and interrupted copies do.
fn damage(path: &Path, how: u64, random: &mut Random) {
    let mut bytes = std::fs::read(path).unwrap();
    let at = random.below(bytes.len() as u64) as usize;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)).unwrap();
    match how {
        0 => bytes.truncate(at),
        1 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << random.below(8);
            }
        }
        // A torn write: the right length, the tail all zeros.
        2 => bytes[at..].fill(0),
        3 => bytes.clear(),
        _ => {
            std::fs::remove_file(path).unwrap();
            return;
        }
    }
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn damaged_files_of_the_cache_are_never_believed() {
    let whole = project();
    let right = Made::of(&whole, &whole.run(RUN).ok());
    whole.run(RUN).ok();
    let mut random = Random::new();
    let mut damages = 0;
    let kinds = [
        "objects",
        "actions",
        "index.sled",
        "index.closed",
        "runs",
        "lock",
        "last-pipeline",
        "CACHEDIR.TAG",
    ];
    for round in 0..count("FLOWRUN_DAMAGES", 2) {
        for kind in kinds {
            for how in 0..5 {
                let files: Vec<PathBuf> = match whole.path(".flowrun").join(kind) {
                    path if path.is_file() => vec![path],
                    path => files::below(&path),
                };
                if files.is_empty() {
                    continue;
                }
                let path = &files[random.below(files.len() as u64) as usize];
                damage(path, how, &mut random);
                damages += 1;
                // A change at the end makes something read what was damaged.
                let note = format!("fruit {kind} {round} {how}");
                whole.write("words.txt", &words(&note));
                std::fs::remove_dir_all(whole.path("results")).unwrap();
                let run = whole.run(RUN).ok();
                let what = format!("{} {how}", path.display());
                Made::of(&whole, &run).assert_is(&right, &what);
            }
        }
    }
    // Whatever is left is whole: a clean cache makes the same.
    for args in [&["--force"][..], &["--from", "strip"]] {
        let run = whole.run(&[RUN, args].concat()).ok();
        Made::of(&whole, &run).assert_is(&right, "forced");
    }
    // What no run read any more is found by who reads all.
    let repaired = whole.run(&["cache", "repair", "--json"]).ok().stdout;
    let repaired: Value = serde_json::from_str(&repaired).unwrap();
    let found = repaired["damage"].as_array().unwrap().len();
    whole.run(&["cache", "verify"]).ok();
    let run = whole.run(RUN).ok();
    Made::of(&whole, &run).assert_is(&right, "repaired");
    println!(
        "{damages} damages, {found} left for `cache repair`, FLOWRUN_FAULT_SEED={}",
        random.seed
    );
}

#[test]
fn an_index_that_would_make_sled_spin_or_panic_never_reaches_it() {
    let project = project();
    project.run(RUN).ok();
    // A settled file gets into the index.
    let old = std::time::SystemTime::now() - Duration::from_secs(60);
    std::fs::File::open(project.path("words.txt"))
        .unwrap()
        .set_modified(old)
        .unwrap();
    std::thread::sleep(Duration::from_millis(2100));
    project.run(RUN).ok();
    let db = project.path(".flowrun/index.sled/db");
    let whole = std::fs::read(&db).unwrap();
    let mut warned = 0;
    for eighth in 0..8 {
        let at = whole.len() * eighth / 8;
        let mut bytes = whole.clone();
        if eighth % 2 == 0 {
            bytes.truncate(at);
        } else {
            bytes[at] ^= 0x55;
        }
        std::fs::write(&db, bytes).unwrap();
        let run = project.run(&["pipeline.yaml", "--json", "--force"]).ok();
        warned += usize::from(run.stdout.contains("index was not closed cleanly"));
    }
    assert!(warned >= 7, "{warned} of 8 were noticed");
    std::fs::remove_dir_all(project.path(".flowrun/index.sled")).unwrap();
    project.write(".flowrun/index.sled", "not even a folder");
    assert_eq!(project.run(RUN).ok().steps("ran"), Vec::<String>::new());
}

#[test]
fn a_full_disk_is_told_and_leaves_the_cache_valid() {
    let whole = project();
    let expected = digests(&whole.run(RUN).ok());
    let project = project();
    let Some(mount) = Mount::tmpfs(&project.path(".flowrun"), "size=64k") else {
        return;
    };
    let mut told = 0;
    // Each size lets the run get a little further.
    for size in [16, 64, 128, 256, 512, 1024, 2048, 3072] {
        mount.remount(&format!("size={size}k"));
        let before = recorded(&project);
        let run = project.run(RUN);
        assert!(ran_keys(&run).is_disjoint(&before), "{size}k");
        let said = format!("{size}k: {:?} {}\n{}", run.code, run.stdout, run.stderr);
        if run.code == Some(0) {
            assert_eq!(digests(&run), expected);
        } else {
            assert!(matches!(run.code, Some(4 | 6)), "{said}");
            assert!(said.to_lowercase().contains("no space left"), "{said}");
            told += 1;
        }
        assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
    }
    assert!(told >= 3, "{told}");
    mount.remount("size=64m");
    assert_eq!(digests(&project.run(RUN).ok()), expected);
    assert!(project.run(RUN).ok().steps("ran").is_empty());
}

#[test]
fn a_cache_that_cannot_be_written_is_told_and_can_be_read() {
    let project = project();
    let Some(mount) = Mount::tmpfs(&project.path(".flowrun"), "size=64m") else {
        return;
    };
    project.run(RUN).ok();
    mount.remount("ro");
    let run = project.run(RUN);
    assert_eq!(run.code, Some(6), "{}", run.stderr);
    assert!(
        run.stderr.contains("cannot be written") && run.stderr.contains("--cache-dir"),
        "{}",
        run.stderr
    );
    let plan = project.run(&["plan", "pipeline.yaml"]).ok();
    assert!(plan.stdout.contains("nothing to do"), "{}", plan.stdout);
    assert!(project.run(&["runs"]).ok().stdout.contains("faults"));
    project.run(&["show"]).ok();
}

#[test]
fn eight_runs_at_once_on_one_cache_run_each_step_once() {
    let project = project();
    project.write(
        "other.yaml",
        &PIPELINE.replace("name: faults", "name: other"),
    );
    let children: Vec<Child> = (0..8)
        .map(|i| {
            let file = ["pipeline.yaml", "other.yaml"][i % 2];
            project.spawn(&[file, "--json"])
        })
        .collect();
    let runs: Vec<Run> = children
        .into_iter()
        .map(|child| Run::of(child.wait_with_output().unwrap()).ok())
        .collect();
    let expected = digests(&runs[0]);
    let mut ran = BTreeSet::new();
    for run in &runs {
        assert_eq!(digests(run), expected);
        for key in ran_keys(run) {
            assert!(ran.insert(key), "a step ran twice");
        }
    }
    assert_eq!(
        project.run(&["runs"]).ok().stdout.lines().count(),
        8,
        "each has a record of its own"
    );
}

#[test]
fn after_a_power_cut_what_was_written_last_is_looked_at_before_it_is_used() {
    let project = project();
    let begun = SystemTime::now();
    let right = Made::of(&project, &project.run(RUN).ok());
    // The note of a run that had not synced all when the machine stopped, and an object that did
    // not get to the disk.
    project.write(".flowrun/unsynced", "the id of an earlier start");
    let note = std::fs::File::options()
        .write(true)
        .open(project.path(".flowrun/unsynced"));
    note.unwrap().set_modified(begun).unwrap();
    let strip = &right.digests["strip.out"];
    let objects = project.path(".flowrun/objects");
    let object = objects.join(&strip[..2]).join(&strip[2..]);
    let length = std::fs::metadata(&object).unwrap().len() as usize;
    std::fs::set_permissions(&object, std::fs::Permissions::from_mode(0o644)).unwrap();
    std::fs::write(&object, vec![0; length]).unwrap();
    let run = project.run(RUN).ok();
    let told = "the machine stopped before everything was on the disk; 1 damaged objects";
    assert!(run.stdout.contains(told), "{}", run.stdout);
    assert_eq!(run.steps("ran"), ["strip"]);
    Made::of(&project, &run).assert_is(&right, "after the power cut");
    assert!(!project.path(".flowrun/unsynced").exists());
    project.run(&["cache", "verify"]).ok();
    let quiet = project.run(RUN).ok();
    assert!(
        !quiet.stdout.contains("machine stopped"),
        "{}",
        quiet.stdout
    );
    assert!(quiet.steps("ran").is_empty());
}

#[test]
fn what_was_tampered_with_deleted_or_put_back_is_right_again() {
    let project = project();
    let first = project.run(RUN).ok();
    let expected = digests(&first);
    let right = project.read("results/count.txt");
    // The same length and time as before.
    let path = project.path("results/count.txt");
    let time = std::fs::metadata(&path).unwrap().modified().unwrap();
    let wrong: String = right
        .chars()
        .map(|c| if c.is_ascii_digit() { '7' } else { c })
        .collect();
    std::fs::write(&path, &wrong).unwrap();
    std::fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_modified(time)
        .unwrap();
    assert!(project.run(RUN).ok().steps("ran").is_empty());
    assert_eq!(project.read("results/count.txt"), right);
    // A, B, A: what A made is still there.
    project.edit("words.txt", "apple", "quince");
    assert_ne!(digests(&project.run(RUN).ok()), expected);
    project.edit("words.txt", "quince", "apple");
    let back = project.run(RUN).ok();
    assert!(back.steps("ran").is_empty());
    assert_eq!(
        (digests(&back), project.read("results/count.txt")),
        (expected.clone(), right)
    );
    // An intermediate result is gone: it alone is made again.
    let strip = expected["strip.out"].clone();
    let object = project
        .path(".flowrun/objects")
        .join(&strip[..2])
        .join(&strip[2..]);
    std::fs::remove_file(object).unwrap();
    let mended = project.run(RUN).ok();
    assert_eq!(mended.steps("ran"), ["strip"]);
    assert_eq!(digests(&mended), expected);
    // Touched, the same bytes: nothing to do.
    project.write("words.txt", &project.read("words.txt"));
    assert!(project.run(RUN).ok().steps("ran").is_empty());
}

#[test]
fn a_command_that_writes_into_its_input_spoils_no_result() {
    let project = Project::new();
    project.write(
        "pipeline.yaml",
        r#"
name: rude
steps:
  make:
    run: echo right > "$out"
    out: { out: out.txt }
  rude:
    run: chmod u+w "$text"; echo wrong > "$text"; cp "$text" "$out"
    in: { text: make.out }
    out: { out: out.txt }
  polite:
    run: sleep 0.2; cp "$text" "$out"
    in: { text: make.out }
    out: { out: out.txt }
    publish: { out: result.txt }
"#,
    );
    let run = project.run(&["pipeline.yaml", "--json", "--keep-going", "-j", "2"]);
    assert_eq!(run.code, Some(4), "{}\n{}", run.stdout, run.stderr);
    assert!(
        run.stdout
            .contains("the input `text` was changed while the step ran"),
        "{}",
        run.stdout
    );
    assert_eq!(project.read("result.txt"), "right\n");
}
