//! `budget:` of a model, and what `plan` says that its steps cost.

use std::time::Duration;

use serde_json::Value;

use crate::fault_proxy::{Fault, Proxy};
use crate::label_job::{all_there, project, run, upstream};
use crate::project::Project;

const ROWS: usize = 40;
/// Tokens that one request may use: bytes of its prompt, what a template adds, and its answer.
const WORST: u64 = 200;
const LIMIT: u64 = 1500;

/// A second step that labels the other rows of the same model, in a process of its own.
const MORE: &str = "  label-train:
    uses: bootstrap
    runner: process
    in: { unlabelled: more.train, labels: labels.labels }
    with: { program: classify, model: oracle, sampling: { max_tokens: 40 } }
    publish: { rows: more.jsonl, dropped: more-dropped.jsonl }
  more:
    uses: load
    with: { name: e, train: { file: more.csv }, test: { file: test.csv } }
";

fn with_budget(proxy: &Proxy, budget: &str) -> Project {
    let project = project(ROWS, &proxy.url, "tiny", budget);
    project.edit("p.yaml", "concurrency: 1", "concurrency: 4");
    project.edit(
        "p.yaml",
        "model: oracle }",
        "model: oracle, sampling: { max_tokens: 40 } }",
    );
    project
}

fn answers(proxy: &Proxy) -> usize {
    proxy.counts().values().map(|count| count.answers).sum()
}

#[test]
fn all_steps_of_a_run_together_stop_before_their_budget_is_overrun() {
    let (_folder, server) = upstream();
    let proxy = Proxy::start(&server.url, |_| None);
    let project = with_budget(&proxy, &format!(", budget: {{ tokens: {LIMIT} }}"));
    let rows = (ROWS..2 * ROWS).map(|i| (format!("query {i}"), "pin"));
    crate::classify::write_rows(&project, "more.csv", rows);
    let text = project.read("p.yaml") + MORE;
    project.write("p.yaml", &text);
    let mut before = 0;
    let mut runs = 0;
    loop {
        runs += 1;
        let ended = project.run(&["p.yaml", "--json", "--keep-going"]);
        let spent = proxy.tokens() - before;
        before = proxy.tokens();
        let said = format!("run {runs}: {spent}: {}\n{}", ended.stdout, ended.stderr);
        assert!(spent <= LIMIT, "{said}");
        if ended.code == Some(0) {
            break;
        }
        assert_eq!(ended.code, Some(4), "{said}");
        assert!(
            ended
                .stdout
                .contains("the run's `budget` for `tiny` is spent")
                && ended
                    .stdout
                    .contains(&format!("of {LIMIT} tokens were used")),
            "{said}"
        );
        // Nor does it stop long before.
        assert!(spent + WORST > LIMIT, "{said}");
        assert!(runs < 20, "{said}");
    }
    assert!(runs > 2);
    all_there(&project, ROWS);
    assert_eq!(answers(&proxy), 2 * ROWS);
    assert!(proxy.counts().values().all(|count| count.requests == 1));
}

#[test]
fn steps_that_run_at_once_share_their_places_and_connections() {
    let (_folder, server) = upstream();
    let proxy = Proxy::start(&server.url, |_| {
        Some(Fault::Late(Duration::from_millis(20)))
    });
    let project = with_budget(&proxy, "");
    let rows = (ROWS..2 * ROWS).map(|i| (format!("query {i}"), "pin"));
    crate::classify::write_rows(&project, "more.csv", rows);
    let text = project.read("p.yaml") + &MORE.replace("    runner: process\n", "");
    project.write("p.yaml", &text);
    project.run(&["p.yaml", "-j", "2"]).ok();
    assert_eq!(answers(&proxy), 2 * ROWS);
    assert!(proxy.most_at_once() <= 4, "{}", proxy.most_at_once());
    // One that is being given back may not be there in time.
    assert!(proxy.connections() <= 8, "{}", proxy.connections());
}

/// The rows in four shards, each labelled in a process of its own.
const SHARDED: &str = "  shard:
    uses: shard
    in: { rows: load.test }
    with: { size: 10 }
  label:
    uses: bootstrap
    runner: process
    foreach: { shard: shard.shards }
    in: { unlabelled: '${{ item.shard }}', labels: labels.labels }
    with: { program: classify, model: oracle }
  all:
    uses: concat
    in: { parts: label.rows }
    publish: { rows: rows.jsonl }
  left:
    uses: concat
    in: { parts: label.dropped }
    publish: { rows: dropped.jsonl }
";

#[test]
fn items_in_processes_share_the_places_of_their_entry() {
    let (_folder, server) = upstream();
    let proxy = Proxy::start(&server.url, |_| {
        Some(Fault::Late(Duration::from_millis(20)))
    });
    let project = project(ROWS, &proxy.url, "tiny", "");
    project.edit("p.yaml", "concurrency: 1", "concurrency: 4");
    let text = project.read("p.yaml");
    let (head, _) = text.split_once("  label:\n").unwrap();
    project.write("p.yaml", &format!("{head}{SHARDED}"));
    project.run(&["p.yaml", "-j", "4"]).ok();
    all_there(&project, ROWS);
    assert_eq!(answers(&proxy), ROWS);
    assert!(proxy.most_at_once() <= 4, "{}", proxy.most_at_once());
}

#[test]
fn an_answer_that_was_lost_counts_with_its_worst_case() {
    let (_folder, server) = upstream();
    // Each first answer breaks off, and may have been charged.
    let proxy = Proxy::start(&server.url, |asked| {
        (asked.attempt == 1).then_some(Fault::Truncated)
    });
    let budget = ", prices: { input: 1.0, output: 10.0 }, budget: { usd: 0.002 }";
    let project = with_budget(&proxy, budget);
    let ended = run(&project);
    let said = format!("{}\n{}", ended.stdout, ended.stderr);
    assert_eq!(ended.code, Some(4), "{said}");
    assert!(
        said.contains("of $0.002 were spent and one more request may cost"),
        "{said}"
    );
    let lost = proxy.requests() - answers(&proxy);
    // 40 tokens of an answer at $10 alone.
    assert!(lost > 0 && lost <= 5, "{lost}: {said}");
}

#[test]
fn dollars_need_prices() {
    let project = project(2, "http://127.0.0.1:9/v1", "tiny", ", budget: { usd: 1 }");
    let ended = run(&project);
    let said = format!("{}\n{}", ended.stdout, ended.stderr);
    assert_eq!(ended.code, Some(4), "{said}");
    assert!(
        said.contains("`budget.usd` of `tiny` needs `prices`"),
        "{said}"
    );
}

#[test]
fn a_plan_says_what_a_run_would_cost() {
    let (_folder, server) = upstream();
    let proxy = Proxy::start(&server.url, |_| None);
    let project = with_budget(&proxy, ", prices: { input: 1.0, output: 10.0 }");
    let plan = || -> Value {
        serde_json::from_str(&project.run(&["plan", "p.yaml", "--json"]).ok().stdout).unwrap()
    };
    let number = |value: &Value| value.as_f64().unwrap();
    // The rows are not read yet.
    let shown = project.run(&["plan", "p.yaml"]).ok().stdout;
    assert!(shown.contains("cost unknown (calls of a model"), "{shown}");
    assert_eq!(plan()["cost"]["unknown"][0], "label");

    project.run(&["p.yaml", "--until", "labels"]).ok();
    let shown = project.run(&["plan", "p.yaml"]).ok().stdout;
    assert!(shown.contains("40 requests, about"), "{shown}");
    let bound = number(&plan()["cost"]["usd_at_most"]);
    assert_eq!(proxy.requests(), 0, "a plan asks nothing");

    let ran = project.run(&["p.yaml", "--json"]).ok();
    let cost = number(&ran.ended("label")["metrics"]["cost_usd"]);
    assert!(cost > 0.0 && cost <= bound, "{cost} {bound}");
    assert_eq!(plan().get("cost"), None);

    // Ten more rows: forty answers are kept, and say how long the new ones will be.
    let queries = (0..ROWS + 10).map(|i| (format!("query {i}"), "pin"));
    crate::classify::write_rows(&project, "test.csv", queries);
    project.run(&["p.yaml", "--until", "labels"]).ok();
    let shown = project.run(&["plan", "p.yaml"]).ok().stdout;
    assert!(
        shown.contains("10 requests, about") && shown.contains("40 answers are kept"),
        "{shown}"
    );
    let likely = number(&plan()["cost"]["usd"]);
    let before = proxy.requests();
    let ran = project.run(&["p.yaml", "--json"]).ok();
    assert_eq!(proxy.requests() - before, 10);
    let cost = number(&ran.ended("label")["metrics"]["cost_usd"]);
    assert!(
        likely > cost / 5.0 && likely < cost * 5.0,
        "{likely} {cost}"
    );
}
