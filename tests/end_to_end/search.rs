//! A search that was killed goes on where it was, by what it kept of each candidate.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::classify::{self, CONVERT, command, run, shown};
use crate::files;
use crate::oracle::{Oracle, query};
use crate::project::{Project, Run};

const OPTIMIZE: &str = "  optimize:
    uses: optimize
    in: { program: convert.program, trainset: labels.train, valset: labels.test }
    with:
      model: m
      search: { max_bootstrapped_demos: 2, max_labeled_demos: 3, num_candidate_programs: 3, early_stopping: false, concurrency: 1 }
    publish: { program: program.json, candidates: candidates.json }
";

fn project() -> Project {
    let project = classify::project(&[CONVERT, OPTIMIZE]);
    let rows = |split: &'static str, count: usize| {
        (0..count).map(move |i| {
            let label = ["card", "pin"][i % 2];
            (format!("{split} {i} {label}"), label)
        })
    };
    classify::write_rows(&project, "train.csv", rows("train", 40));
    classify::write_rows(&project, "test.csv", rows("test", 12));
    project
}

/// Right for as many of every five rows as it sees demos.
fn answer(body: &Value) -> String {
    let words: Vec<&str> = query(body).split(' ').collect();
    let number: usize = words[1].parse().unwrap();
    match number % 5 < 1 + shown(body).len() {
        true => words[2],
        false => "neither",
    }
    .to_owned()
}

/// Answers and remembers what it was asked, in order; from the call `silent_from` on it says
/// nothing for a long time.
fn oracle(silent_from: usize) -> (Oracle, Arc<Mutex<Vec<String>>>) {
    let asked: Arc<Mutex<Vec<String>>> = Arc::default();
    let heard = Arc::clone(&asked);
    let oracle = Oracle::start(move |body| {
        let mut asked = heard.lock().unwrap();
        asked.push(body["messages"].to_string());
        if asked.len() > silent_from {
            drop(asked);
            std::thread::sleep(Duration::from_secs(60));
        }
        Some(answer(body))
    });
    (oracle, asked)
}

fn asked(of: &Mutex<Vec<String>>) -> Vec<String> {
    of.lock().unwrap().clone()
}

fn is_scoring(request: &&String) -> bool {
    let body: Value = serde_json::from_str(request).unwrap();
    let last = body.as_array().unwrap().last().unwrap();
    last["content"].as_str().unwrap().starts_with("test ")
}

fn candidates(project: &Project) -> Vec<Value> {
    serde_json::from_str(&project.read("candidates.json")).unwrap()
}

/// Files of the action cache that hold a candidate's score.
fn kept(project: &Project) -> Vec<PathBuf> {
    let files = files::below(&project.path(".flowrun/actions")).into_iter();
    let is_candidate = |path: &PathBuf| {
        let text = std::fs::read_to_string(path).unwrap();
        text.contains("\"kind\":\"optimize-candidate\"")
    };
    files.filter(is_candidate).collect()
}

/// Runs until as many calls were made, and kills it.
fn kill_after(project: &Project, calls: usize) -> Vec<String> {
    let (silent, heard) = oracle(calls);
    let mut child = command(project, &silent)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while asked(&heard).len() <= calls {
        assert!(Instant::now() < deadline, "{} calls", asked(&heard).len());
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    asked(&heard)
}

#[test]
fn a_killed_search_asks_nothing_of_finished_candidates_even_without_kept_answers() {
    let (whole, heard) = oracle(usize::MAX);
    let untouched = project();
    run(&untouched, &whole).ok();
    let all = asked(&heard);
    let scored: Vec<Value> = candidates(&untouched);
    assert_eq!(scored.len(), 6);

    let project = project();
    let before = kill_after(&project, all.len() / 2);
    let finished = kept(&project).len();
    assert!((2..6).contains(&finished), "{finished} of 6 candidates");
    std::fs::remove_dir_all(project.path(".flowrun/completions")).unwrap();

    let (rest, heard) = oracle(usize::MAX);
    let resumed = run(&project, &rest).ok();
    let after = asked(&heard);
    assert!(after.len() < all.len(), "{} of {}", after.len(), all.len());
    // Twelve rows score a candidate; those of the one under way are asked again, no others.
    let scoring: Vec<&String> = before.iter().filter(is_scoring).collect();
    let (done, _) = scoring.split_at(scoring.len() / 12 * 12);
    let done: BTreeSet<&&String> = done.iter().collect();
    assert_eq!(done.len(), finished * 12);
    assert!(!after.iter().any(|request| done.contains(&request)));
    assert_eq!(project.read("program.json"), untouched.read("program.json"));
    assert_eq!(candidates(&project), scored);
    let known = |e: &Value| e["metrics"]["known_before"] == finished;
    assert!(resumed.events().iter().any(known), "{}", resumed.stdout);

    // Each score lies where its candidate says, and another search with the same candidates only
    // asks for what is new.
    for candidate in &scored {
        let key = candidate["key"].as_str().unwrap();
        let file = format!(".flowrun/actions/{}/{}.json", &key[..2], &key[2..]);
        assert!(kept(&project).contains(&project.path(&file)), "{file}");
    }
    std::fs::remove_dir_all(project.path(".flowrun/completions")).unwrap();
    project.edit(
        "p.yaml",
        "num_candidate_programs: 3",
        "num_candidate_programs: 4",
    );
    let (new, heard) = oracle(usize::MAX);
    run(&project, &new).ok();
    assert_eq!(candidates(&project)[..6], scored);
    assert_eq!(asked(&heard).iter().filter(is_scoring).count(), 12);
}

#[test]
fn candidates_that_another_machine_scored_are_found_in_the_remote_cache() {
    let shared = tempfile::tempdir().unwrap();
    let run = |project: &Project| {
        let (oracle, heard) = oracle(usize::MAX);
        let mut command = command(project, &oracle);
        command.env("FLOWRUN_REMOTE", shared.path());
        Run::of(command.output().unwrap()).ok();
        asked(&heard).iter().filter(is_scoring).count()
    };
    let [here, there] = [(); 2].map(|()| project());
    assert_eq!(run(&here), 6 * 12);
    let programs = "num_candidate_programs: ";
    there.edit("p.yaml", &format!("{programs}3"), &format!("{programs}4"));
    assert_eq!(run(&there), 12, "only the new one");
    assert_eq!(candidates(&there)[..6], candidates(&here));
}

/// Moves the last run of one project to another, in a file.
fn move_run(from: &Project, to: &Project) {
    from.run(&["cache", "export", "moved.tar.zst"]).ok();
    let file = from.path("moved.tar.zst").display().to_string();
    to.run(&["cache", "import", &file]).ok();
}

#[test]
fn a_run_that_is_moved_takes_its_candidates_along() {
    let [here, there, elsewhere] = [(); 3].map(|()| project());
    let (first, _) = oracle(usize::MAX);
    run(&here, &first).ok();
    move_run(&here, &there);
    assert_eq!(kept(&there).len(), 6);
    let programs = "num_candidate_programs: ";
    there.edit("p.yaml", &format!("{programs}3"), &format!("{programs}4"));
    let (second, heard) = oracle(usize::MAX);
    run(&there, &second).ok();
    assert_eq!(asked(&heard).iter().filter(is_scoring).count(), 12);
    assert_eq!(candidates(&there)[..6], candidates(&here));

    // A run that did not search takes none of them.
    let mut loads = command(&here, &first);
    Run::of(loads.args(["--until", "convert"]).output().unwrap()).ok();
    move_run(&here, &elsewhere);
    assert_eq!(kept(&elsewhere).len(), 0);
    let (third, heard) = oracle(usize::MAX);
    run(&elsewhere, &third).ok();
    assert_eq!(asked(&heard).iter().filter(is_scoring).count(), 6 * 12);
}

#[test]
fn a_killed_search_goes_on_where_its_run_is_moved_to() {
    let [here, there] = [(); 2].map(|()| project());
    // Two candidates without bootstrapping come first: 24 calls.
    kill_after(&here, 30);
    let finished = kept(&here).len();
    assert!((2..6).contains(&finished), "{finished} of 6 candidates");
    move_run(&here, &there);
    assert_eq!(kept(&there).len(), finished);
    let (rest, heard) = oracle(usize::MAX);
    run(&there, &rest).ok();
    let scoring = asked(&heard).iter().filter(is_scoring).count();
    assert_eq!(scoring, (6 - finished) * 12);
}

#[test]
fn what_early_stopping_left_is_not_kept_as_a_score() {
    let project = project();
    project.edit("p.yaml", "early_stopping: false", "early_stopping: true");
    // More rows than are asked at once, and a student without demos that cannot be beaten.
    let rows = (0..20).map(|i| (format!("test {i} card"), "card"));
    classify::write_rows(&project, "test.csv", rows);
    let sure = Oracle::start(|body| Some(query(body).split(' ').next_back()?.to_owned()));
    run(&project, &sure).ok();
    let all = candidates(&project);
    let (first, others) = all.split_first().unwrap();
    assert!(first["key"].is_string() && others.len() == 5);
    for other in others {
        assert_eq!(other["stopped_after"], 16, "{other}");
        assert!(other.get("key").is_none());
    }
    assert_eq!(kept(&project).len(), 1);
}
