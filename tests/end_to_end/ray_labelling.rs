//! What labelling as jobs of Ray costs when its workers are killed: no answer that is there is asked
//! for again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::classify::write_rows;
use crate::fault_proxy::{Fault, Proxy};
use crate::files;
use crate::label_job::{all_there, project, upstream};
use crate::oracle::{Oracle, query};
use crate::processes::{running, signal, until};
use crate::project::{Project, Run};
use crate::ray_cluster::Ray;

/// Shards of the rows; about a second each for Ray on two cores, whatever they hold.
const SHARDS: usize = 20;
/// The one whose worker is killed.
const STRUCK: usize = 1;
/// Jobs at once.
const JOBS: usize = 4;
/// Requests that the entry allows; the jobs may have to share them.
const CONCURRENCY: usize = 32;
/// As the example has them.
const LABELS: [&str; 3] = ["card_arrival", "change_pin", "exchange_rate"];

/// The process that works for the job whose order holds these words.
fn worker_of(project: &Project, words: &str) -> u32 {
    let orders = files::holding(&project.path(".flowrun/jobs"), words);
    let mut orders = orders
        .iter()
        .filter_map(|file| file.strip_suffix("/request.json"));
    let (_, job) = orders.next().unwrap().split_once(".flowrun/").unwrap();
    running(&["exec --job", job]).unwrap()
}

/// Answers that the project has kept.
fn kept(project: &Project) -> usize {
    let files = files::below(&project.path(".flowrun/completions"));
    let texts = files
        .iter()
        .filter_map(|file| std::fs::read_to_string(file).ok());
    texts.map(|text| text.lines().count()).sum()
}

#[test]
fn a_killed_worker_leaves_its_answers_to_the_next() {
    const ROWS: usize = 60;
    const BEFORE: usize = 20;
    let Some(ray) = Ray::at_hand() else { return };
    let (_folder, server) = upstream();
    let stuck = Arc::new(AtomicBool::new(true));
    let on = Arc::clone(&stuck);
    let admitted = AtomicUsize::new(0);
    let proxy = Proxy::start(&server.url, move |_| {
        let late = admitted.fetch_add(1, Ordering::SeqCst) >= BEFORE;
        (on.load(Ordering::SeqCst) && late).then_some(Fault::Hang)
    });
    let project = project(ROWS, &proxy.url, "tiny", "");
    project.edit("p.yaml", "concurrency: 1", "concurrency: 4");
    project.edit(
        "p.yaml",
        "uses: bootstrap\n",
        "uses: bootstrap\n    runner: ray\n",
    );
    project.write("p.yaml", &(ray.runners() + &project.read("p.yaml")));
    let child = project
        .command(&["p.yaml", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    until("it does not label", || {
        kept(&project) == BEFORE && proxy.requests() == BEFORE + 4
    });
    signal("-KILL", worker_of(&project, "\"step\""));
    let before = proxy.counts();
    let answered: BTreeSet<&String> = before
        .iter()
        .filter(|(_, count)| count.answers > 0)
        .map(|(query, _)| query)
        .collect();
    assert_eq!(answered.len(), BEFORE);
    stuck.store(false, Ordering::SeqCst);
    let run = Run::of(child.wait_with_output().unwrap()).ok();
    assert!(run.stdout.contains("it is begun again"), "{}", run.stdout);
    all_there(&project, ROWS);
    for (query, count) in proxy.counts() {
        assert_eq!(count.answers, 1, "{query}");
        let asked_before = before.get(&query).map_or(0, |count| count.requests);
        let again = count.requests - asked_before;
        assert_eq!(again, usize::from(!answered.contains(&query)), "{query}");
    }
}

/// Where the oracle lets one shard wait in its middle.
#[derive(Default)]
struct Gate {
    is_open: AtomicBool,
    waiting: AtomicUsize,
}

impl Gate {
    fn pass(&self) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        while !self.is_open.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

fn number(query: &str) -> usize {
    query.trim_start_matches("query ").parse().unwrap()
}

/// The example `shards` with more rows: 2,000, or as many as `FLOWRUN_SHARD_ROWS` says.
#[test]
fn many_shards_lose_no_row_and_pay_for_none_twice() {
    let Some(ray) = Ray::at_hand() else { return };
    let rows = std::env::var("FLOWRUN_SHARD_ROWS");
    let rows: usize = rows.map_or(2_000, |rows| rows.parse().unwrap());
    let size = rows.div_ceil(SHARDS);
    let struck = STRUCK * size + size / 2..(STRUCK + 1) * size;
    let gate = Arc::new(Gate::default());
    let asked: Arc<Mutex<BTreeMap<usize, usize>>> = Arc::default();
    let oracle = {
        let (gate, asked, struck) = (Arc::clone(&gate), Arc::clone(&asked), struck.clone());
        Oracle::start(move |body| {
            let number = number(query(body));
            *asked.lock().unwrap().entry(number).or_default() += 1;
            if struck.contains(&number) {
                gate.pass();
            }
            Some(LABELS[number % LABELS.len()].to_owned())
        })
    };
    let project = Project::new();
    project.copy_example("shards", "");
    project.edit("pipeline.yaml", "jobs: 64", &format!("jobs: {JOBS}"));
    let concurrency = format!("guided: vllm\n    concurrency: {CONCURRENCY}\n");
    project.edit("pipeline.yaml", "guided: vllm\n", &concurrency);
    let queries = (0..rows).map(|i| (format!("query {i}"), LABELS[i % LABELS.len()]));
    write_rows(&project, "queries.csv", queries);

    let started = Instant::now();
    let mut command = project.command(&["pipeline.yaml", "--json", "--until", "labelled"]);
    command.args(["--set", "runner=ray", "--set"]);
    command.arg(format!("ray={}", ray.dashboard));
    command.args(["--set".to_owned(), format!("base_url={}", oracle.url)]);
    command.args(["--set".to_owned(), format!("size={size}")]);
    // It says more than a pipe holds.
    let mut child = command
        .stdout(File::create(project.path("events")).unwrap())
        .stderr(File::create(project.path("said")).unwrap())
        .spawn()
        .unwrap();
    until("the struck shard is not labelled", || {
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none(), "{}", project.read("said"));
        gate.waiting.load(Ordering::SeqCst) >= CONCURRENCY / JOBS
    });
    signal("-KILL", worker_of(&project, &format!("label[{STRUCK:06}]")));
    gate.is_open.store(true, Ordering::SeqCst);
    let ended = child.wait().unwrap();
    let took = started.elapsed().as_secs_f64();
    assert!(ended.success(), "{}", project.read("said"));
    assert!(project.read("events").contains("it is begun again"));

    let labelled = project.read("results/labelled.jsonl");
    let mut expected = 0..rows;
    for line in labelled.lines() {
        let row: Value = serde_json::from_str(line).unwrap();
        let number = number(row["text"].as_str().unwrap());
        assert_eq!(Some(number), expected.next());
        assert_eq!(row["label"], LABELS[number % LABELS.len()]);
    }
    assert_eq!(expected.next(), None);
    // Paid twice is what was under way when the worker was killed.
    let asked = asked.lock().unwrap();
    assert_eq!(asked.len(), rows);
    let twice = asked.iter().filter(|(_, times)| **times > 1);
    let twice: Vec<(&usize, &usize)> = twice.collect();
    let under_way = |(number, times): &(&usize, &usize)| struck.contains(*number) && **times == 2;
    assert!(twice.iter().all(under_way), "{twice:?}");
    assert!(twice.len() <= CONCURRENCY, "{twice:?}");
    let speed = rows as f64 / took;
    println!("{rows} rows in {SHARDS} shards, a worker killed: {took:.1} s, {speed:.0} rows/s");
}
