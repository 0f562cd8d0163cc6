//! What a faulty server does to a step that asks it: a clear end, no row lost, no answer paid for
//! twice. A real `flowrun serve` answers, behind a proxy that spoils some of its answers.

use std::collections::BTreeSet;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};

use crate::fault_proxy::{Asked, Fault, Proxy};
use crate::label_job::{all_there, project, rows, run, upstream};
use crate::project::Run;

/// Rows of a case, and which of them meets its fault.
const ROWS: usize = 6;
const STRUCK: &str = "query 3";

/// How a case ends.
enum Ending {
    /// The row is labelled like every other.
    Labelled,
    /// The row is dropped with this reason.
    Dropped(&'static str),
    /// The row is dropped without an answer, with a reason that begins so; a run by force asks again.
    Unanswered(&'static str),
    /// The step fails with this text; a run after the fault is over asks for the rest.
    Failed(&'static str),
}

struct Case {
    /// As docs/connected.md names it.
    name: &'static str,
    /// What happens to the struck row, by attempt; `Asked` says more.
    fault: fn(&Asked<'_>) -> Option<Fault>,
    /// Further fields of the model's entry.
    more: &'static str,
    /// Requests for the struck row, until the run with the fault ends.
    requests: usize,
    ending: Ending,
}

fn first(asked: &Asked<'_>, fault: Fault) -> Option<Fault> {
    (asked.attempt == 1).then_some(fault)
}

/// A 429 that asks for a wait; who comes back before it is over is refused again.
fn busy(asked: &Asked<'_>, headers: String) -> Option<Fault> {
    let early = asked.since < Duration::from_secs(1);
    early.then(|| Fault::with_headers(429, "rate_limit_exceeded", headers))
}

fn in_two_seconds() -> String {
    // Dates have whole seconds.
    let date = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(2));
    format!("retry-after: {date}\r\n")
}

const TOO_LONG: &str = "400, the prompt is too long";
const THRICE: &str = ", max_retries: 2";

#[rustfmt::skip]
fn cases() -> Vec<Case> {
    use Ending::{Dropped, Failed, Labelled, Unanswered};
    let case = |name, requests, ending, more, fault| Case { name, fault, more, requests, ending };
    vec![
        case("429, `Retry-After` in seconds", 2, Labelled, "", |a| busy(a, "retry-after: 1\r\n".into())),
        case("429, `Retry-After` as a date", 2, Labelled, "", |a| busy(a, in_two_seconds())),
        case("429, a wait that is longer than `deadline_s`", 1, Failed("after `deadline_s`"), "",
            |_| Some(Fault::with_headers(429, "rate_limit_exceeded", "retry-after: 3600\r\n".into()))),
        case("429 without credit (`insufficient_quota`)", 1, Failed("no credit left"), "",
            |_| Some(Fault::status(429, "insufficient_quota"))),
        case("500 once", 2, Labelled, "", |a| first(a, Fault::status(500, "server_error"))),
        case("502 once, with an HTML page", 2, Labelled, "", |a| first(a, Fault::Instead {
            status: 502, headers: "content-type: text/html\r\n".into(), body: "<html>Bad gateway</html>".into() })),
        case("503 once, `Retry-After`", 2, Labelled, "", |a| (a.since < Duration::from_secs(1))
            .then(|| Fault::with_headers(503, "overloaded", "retry-after: 1\r\n".into()))),
        case("500 at every try", 3, Failed("status 500: refused: server_error (3 attempts)"), THRICE,
            |_| Some(Fault::status(500, "server_error"))),
        case("connection reset once", 2, Labelled, "", |a| first(a, Fault::Reset)),
        case("connection reset at every try", 3, Failed("(3 attempts)"), THRICE, |_| Some(Fault::Reset)),
        case("no answer once", 2, Labelled, ", timeout_s: 5", |a| first(a, Fault::Hang)),
        case("no answer at every try", 2, Failed("`deadline_s`"), ", timeout_s: 4, deadline_s: 6", |_| Some(Fault::Hang)),
        case("a slow answer", 1, Labelled, "", |a| first(a, Fault::Late(Duration::from_millis(1500)))),
        case("body cut off once", 2, Labelled, "", |a| first(a, Fault::Truncated)),
        case("body cut off at every try", 3, Failed("(3 attempts)"), THRICE, |_| Some(Fault::Truncated)),
        case("no JSON once", 2, Labelled, "", |a| first(a, Fault::body("{\"choices\": [{\"mess"))),
        case("an HTML page at every try", 3, Failed("is `base_url` right?"), "", |_| Some(Fault::body("<html>Log in</html>"))),
        case("no choices once", 2, Labelled, "", |a| first(a, Fault::Changed(|v| v["choices"] = json!([])))),
        case("an error with status 200, once", 2, Labelled, "", |a| first(a, Fault::body("{\"error\": {\"message\": \"busy\"}}"))),
        case("an answer that the server broke off (`finish_reason: error`), once", 2, Labelled, "", |a| first(a, Fault::body(
            "{\"choices\": [{\"message\": {\"content\": \"card_arr\"}, \"finish_reason\": \"error\"}]}"))),
        case("two choices", 1, Labelled, "", |_| Some(Fault::Changed(|v| {
            let mut second = v["choices"][0].clone();
            second["message"]["content"] = json!("nonsense");
            v["choices"].as_array_mut().unwrap().push(second);
        }))),
        case("`finish_reason: content_filter`", 1, Dropped("the provider withheld the answer (content filter)"), "",
            |_| Some(Fault::Changed(|v| {
                v["choices"][0]["finish_reason"] = json!("content_filter");
                v["choices"][0]["message"]["content"] = json!("");
            }))),
        case("a refusal in place of the content", 1, Dropped("the provider withheld the answer (content filter)"), "",
            |_| Some(Fault::Changed(|v| v["choices"][0]["message"] = json!({"role": "assistant", "content": null, "refusal": "no"})))),
        case("400 `content_filter`: the prompt is withheld", 1, Dropped("the provider withheld the answer (content filter)"), "",
            |_| Some(Fault::status(400, "content_filter"))),
        case("`finish_reason: length`", 1, Dropped("the answer was cut off at `max_tokens`, perhaps within the label"), "",
            |_| Some(Fault::Changed(|v| v["choices"][0]["finish_reason"] = json!("length")))),
        case(TOO_LONG, 1, Unanswered("context_length_exceeded"), "", |_| Some(Fault::status(400, "context_length_exceeded"))),
        case("400, a field that the model does not take", 1, Failed("`body` of the model's entry"), "",
            |_| Some(Fault::status(400, "unsupported_parameter"))),
        case("401, an expired key", 1, Failed("set `api_key_env`"), "", |_| Some(Fault::status(401, "invalid_api_key"))),
        case("404, no such model", 1, Failed("check `base_url` and the model id `tiny`"), "",
            |_| Some(Fault::status(404, "model_not_found"))),
    ]
}

#[test]
fn every_fault_ends_clearly_and_costs_no_row_and_no_answer_twice() {
    let (_folder, server) = upstream();
    let url = server.url.as_str();
    let docs = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/connected.md"));
    let docs = docs.unwrap();
    let cases = cases();
    std::thread::scope(|scope| {
        for case in &cases {
            let docs = docs.as_str();
            scope.spawn(move || {
                let name = case.name;
                println!("{name}");
                endures(case, url);
                let line = format!("| {name} | {} |", case.requests);
                assert!(docs.contains(&line), "docs/connected.md lacks `{line}`");
            });
        }
    });
}

fn endures(case: &Case, upstream: &str) {
    let name = case.name;
    let faulty = Arc::new(AtomicBool::new(true));
    let (on, fault) = (Arc::clone(&faulty), case.fault);
    let proxy = Proxy::start(upstream, move |asked| {
        let struck = asked.query == STRUCK && on.load(Ordering::SeqCst);
        struck.then(|| fault(asked)).flatten()
    });
    let project = project(ROWS, &proxy.url, "tiny", case.more);
    let ended = run(&project);
    let said = format!("{name}: {}\n{}", ended.stdout, ended.stderr);
    assert_eq!(proxy.counts()[STRUCK].requests, case.requests, "{said}");
    match case.ending {
        Ending::Labelled => {
            ended.ok();
            assert_eq!(rows(&project, "rows.jsonl").len(), ROWS, "{said}");
        }
        Ending::Dropped(reason) => {
            ended.ok();
            let dropped = [(STRUCK.to_owned(), Some(reason.to_owned()))];
            assert_eq!(rows(&project, "dropped.jsonl"), dropped, "{said}");
        }
        Ending::Unanswered(reason) => {
            ended.ok();
            let dropped = rows(&project, "dropped.jsonl");
            let [(query, Some(why))] = dropped.as_slice() else {
                unreachable!("{dropped:?}: {said}");
            };
            assert_eq!(query, STRUCK, "{said}");
            assert!(why.starts_with(reason), "{why}");
            assert!(said.contains("\"too_long\":1"), "{said}");
        }
        Ending::Failed(text) => {
            assert_eq!(ended.code, Some(4), "{said}");
            assert!(
                ended.stderr.contains(text) || ended.stdout.contains(text),
                "{said}"
            );
            faulty.store(false, Ordering::SeqCst);
            run(&project).ok();
        }
    }
    all_there(&project, ROWS);
    // What was answered whole was asked for once; a withheld prompt, or one too long, is no answer.
    let refused = name.starts_with("400 `content_filter`") || name == TOO_LONG;
    for (query, count) in proxy.counts() {
        let most = usize::from(!refused || query != STRUCK);
        assert_eq!(count.answers, most, "{query}: {said}");
        assert!(query == STRUCK || count.requests == 1, "{query}: {said}");
    }
    // Nothing is asked again, not even for what was dropped; but for what had no answer at all.
    let before = proxy.requests();
    project.run(&["p.yaml", "--json", "--force"]).ok();
    let again = usize::from(matches!(case.ending, Ending::Unanswered(_)));
    assert_eq!(proxy.requests(), before + again, "{said}");
}

#[test]
fn a_prompt_that_is_too_long_counts_as_wrong_and_against_max_errors() {
    let (_folder, server) = upstream();
    let proxy = Proxy::start(&server.url, |asked| {
        let struck = asked.query == STRUCK;
        struck.then(|| Fault::status(400, "context_length_exceeded"))
    });
    let project = project(ROWS, &proxy.url, "tiny", "");
    let score = "  score:\n    uses: evaluate\n    \
                 in: { rows: load.test, program: label.teacher }\n    \
                 with: { model: oracle }\n    publish: { scores: scores.json }\n";
    project.write("p.yaml", &(project.read("p.yaml") + score));
    run(&project).ok();
    let scores: Value = serde_json::from_str(&project.read("scores.json")).unwrap();
    let program = &scores["programs"][0];
    assert_eq!(
        (&program["n"], &program["parse_failures"]),
        (&json!(ROWS), &json!(1))
    );
    for row in program["rows"].as_array().unwrap() {
        let why = row["error"].as_str().unwrap_or_default();
        let told = why.starts_with("context_length_exceeded: ");
        assert_eq!(told, row["text"] == STRUCK, "{row}");
    }
    // Asked by each of the two steps; every other row once.
    assert_eq!(proxy.requests(), ROWS + 1);

    let limited = "with: { model: oracle, max_errors: 1 }";
    project.edit("p.yaml", "with: { model: oracle }", limited);
    let ended = run(&project);
    let said = format!("{}\n{}", ended.stdout, ended.stderr);
    assert_eq!(ended.code, Some(4), "{said}");
    assert!(said.contains("1 rows failed (`max_errors` is 1)"), "{said}");
}

#[test]
fn a_key_that_expires_stops_the_step_at_once_and_a_new_one_goes_on() {
    let (_folder, server) = upstream();
    let expired = Arc::new(AtomicBool::new(true));
    let on = Arc::clone(&expired);
    let proxy = Proxy::start(&server.url, move |asked| {
        let over = on.load(Ordering::SeqCst) && asked.answered >= 5;
        over.then(|| Fault::status(401, "invalid_api_key"))
    });
    let project = project(40, &proxy.url, "tiny", ", api_key_env: ORACLE_KEY");
    let run = |key: &str| {
        let mut command = project.command(&["p.yaml", "--json"]);
        Run::of(command.env("ORACLE_KEY", key).output().unwrap())
    };
    let ended = run("old");
    assert_eq!(ended.code, Some(4), "{}", ended.stderr);
    assert!(
        ended.stdout.contains("35 of 40 rows got no answer")
            && ended.stdout.contains("(this attempt used ")
            && ended.stdout.contains("check the key in `ORACLE_KEY`"),
        "{}",
        ended.stdout
    );
    assert_eq!(proxy.requests(), 6, "one refusal is enough");
    expired.store(false, Ordering::SeqCst);
    run("new").ok();
    all_there(&project, 40);
    assert_eq!(proxy.requests(), 41);
    // One connection a run.
    assert_eq!(proxy.connections(), 2);
}

#[test]
fn a_model_that_the_server_does_not_have_is_asked_for_once() {
    let (_folder, server) = upstream();
    let proxy = Proxy::start(&server.url, |_| None);
    let project = project(40, &proxy.url, "another", "");
    let ended = run(&project);
    assert_eq!(ended.code, Some(4), "{}", ended.stderr);
    assert!(
        ended.stdout.contains("the model id `another`"),
        "{}",
        ended.stdout
    );
    assert_eq!(proxy.requests(), 1);
}

#[test]
fn labels_in_a_json_schema_are_taken_out_of_their_object() {
    let (_folder, server) = upstream();
    let proxy = Proxy::start(&server.url, |_| None);
    let project = project(ROWS, &proxy.url, "tiny", "");
    project.edit("p.yaml", "guided: vllm", "guided: json_schema");
    run(&project).ok();
    assert_eq!(rows(&project, "rows.jsonl").len(), ROWS);
    assert_eq!(proxy.requests(), ROWS);

    // Another body is another answer.
    let body = "body: { max_tokens: null, max_completion_tokens: 100 }";
    project.edit(
        "p.yaml",
        "guided: json_schema",
        &format!("guided: json_schema, {body}"),
    );
    run(&project).ok();
    assert_eq!(rows(&project, "rows.jsonl").len(), ROWS);
    assert_eq!(proxy.requests(), 2 * ROWS);
    let last = proxy.last_body();
    assert_eq!(
        (last.get("max_tokens"), &last["max_completion_tokens"]),
        (None, &json!(100))
    );
}

#[test]
fn a_killed_step_goes_on_at_the_row_it_reached() {
    let (_folder, server) = upstream();
    let stuck = Arc::new(AtomicBool::new(true));
    let on = Arc::clone(&stuck);
    let admitted = AtomicUsize::new(0);
    let proxy = Proxy::start(&server.url, move |_| {
        let late = admitted.fetch_add(1, Ordering::SeqCst) >= 20;
        (on.load(Ordering::SeqCst) && late).then_some(Fault::Hang)
    });
    let project = project(60, &proxy.url, "tiny", "");
    project.edit("p.yaml", "concurrency: 1", "concurrency: 4");
    let mut child = project
        .command(&["p.yaml"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let kept = || {
        let folder = std::fs::read_dir(project.path(".flowrun/completions"));
        let files = folder.into_iter().flatten().flatten();
        let texts = files.filter_map(|entry| std::fs::read_to_string(entry.path()).ok());
        texts.map(|text| text.lines().count()).sum::<usize>()
    };
    let deadline = Instant::now() + Duration::from_secs(60);
    while kept() < 20 {
        assert!(Instant::now() < deadline, "{} of 20", kept());
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let before = proxy.counts();
    let answered: BTreeSet<String> = before
        .iter()
        .filter(|(_, count)| count.answers > 0)
        .map(|(query, _)| query.clone())
        .collect();
    stuck.store(false, Ordering::SeqCst);
    run(&project).ok();
    all_there(&project, 60);
    for (query, count) in proxy.counts() {
        assert_eq!(count.answers, 1, "{query}");
        let asked_before = before.get(&query).map_or(0, |count| count.requests);
        let again = count.requests - asked_before;
        assert_eq!(again, usize::from(!answered.contains(&query)), "{query}");
    }
}
