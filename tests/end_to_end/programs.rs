//! Programs and their optimizers through the real binary, against a model on loopback.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::classify::{self, CONVERT, DEPLOY, TEST, run, scores, serve, shown};
use crate::oracle::{Oracle, query};
use crate::project::Project;
use crate::server::chat;
use crate::tiny::write_model;

const OPTIMIZE: &str = "  optimize:
    uses: optimize
    in: { program: convert.program, trainset: labels.train, valset: labels.train }
    publish: { program: program.json }
    with:
      model: m
";

/// A project whose `optimize` has these settings.
pub(crate) fn project(with: &str) -> Project {
    let project = classify::project(&[CONVERT, OPTIMIZE, with, TEST]);
    let rows = |rows: &[(&'static str, &'static str)]| {
        let rows = rows.iter();
        rows.map(|(text, label)| ((*text).to_owned(), *label))
            .collect::<Vec<_>>()
    };
    let train = rows(&[
        ("Where is my new card?", "card"),
        ("My card has not come yet", "card"),
        ("I forgot my PIN", "pin"),
        ("How do I change my PIN code?", "pin"),
        ("My card is late", "card"),
        ("The PIN does not work", "pin"),
    ]);
    let test = rows(&[
        ("When will the card arrive?", "card"),
        ("Can I have another PIN?", "pin"),
    ]);
    classify::write_rows(&project, "train.csv", train);
    classify::write_rows(&project, "test.csv", test);
    project
}

#[test]
fn demos_are_the_rows_most_like_each_query_and_a_bundle_serves_them() {
    // Repeats the last example, which is the most similar one.
    let oracle = Oracle::start(|body| Some((*shown(body).last().unwrap_or(&"none")).to_owned()));
    let project = project("      knn_few_shot: { k: 2, embedder: embedder }\n");
    project.write("p.yaml", &format!("{}{DEPLOY}", project.read("p.yaml")));
    run(&project, &oracle).ok();
    let scores = scores(&project);
    assert_eq!(scores["programs"][0]["accuracy"], 1.0);
    // Two test rows, asked once more each by the smoke test of the bundle.
    assert_eq!(oracle.calls(), 4);
    let program: Value = serde_json::from_str(&project.read("program.json")).unwrap();
    let neighbours = &program["prompt"]["neighbours"]["predict"];
    assert_eq!(neighbours["rows"].as_array().unwrap().len(), 6);
    assert!(neighbours["embedder"]["weights"]["sha256"].is_string());
    let server = serve(&project);
    let asked = json!({"text": "My card is not here yet"});
    assert_eq!(server.json("/predict", &asked)["label"], "card");
    let short = json!({"texts": ["Which PIN do I have?", "Has my card come?"]});
    let answers = server.json("/predict/batch", &short);
    assert_eq!(answers["predictions"][0]["label"], "pin");
    // What the server that has the model is not told is refused, not dropped.
    let mut told = chat(&server.model, "hello", 3);
    told["chat_template_kwargs"] = json!({"enable_thinking": false});
    let (status, problem) = server.problem("/v1/chat/completions", &told);
    assert_eq!(status, 400, "{problem}");
    assert_eq!(problem["param"], "chat_template_kwargs");
    // Two demos a question, chosen for it.
    assert_eq!(oracle.calls(), 3);
}

#[test]
fn a_model_in_the_server_sees_the_demos_that_it_was_evaluated_with() {
    let nobody = Oracle::start(|_| None);
    let project = project("      knn_few_shot: { k: 2, embedder: embedder }\n");
    write_model(&project.path("tiny"), 1);
    project.write("p.yaml", &format!("{}{DEPLOY}", project.read("p.yaml")));
    let remote = "{ provider: openai, base_url: \"${{ params.url }}\", model: m, max_retries: 0, concurrency: 1 }";
    project.edit(
        "p.yaml",
        remote,
        "{ provider: embedded, weights: { file: tiny } }",
    );
    project.edit(
        "p.yaml",
        "type: label }]",
        "type: label }]\n      constrain: true",
    );
    run(&project, &nobody).ok();
    let server = serve(&project);
    for row in scores(&project)["programs"][0]["rows"].as_array().unwrap() {
        let answer = server.json("/predict", &json!({"text": row["text"]}));
        assert_eq!(answer["label"], row["predicted"]);
        let sure = |value: &Value| value["confidence"].as_f64().unwrap();
        assert!((sure(&answer) - sure(row)).abs() < 1e-5, "{answer} {row}");
    }
    assert_eq!(nobody.calls(), 0);
    // It says how sure it is, so that this can be compared with how often it is right.
    let calibration = &scores(&project)["programs"][0]["calibration"];
    assert_eq!(calibration["n"], 2);
    let bins = calibration["bins"].as_array().unwrap();
    let held: u64 = bins.iter().map(|bin| bin["n"].as_u64().unwrap()).sum();
    assert_eq!(held, 2);
}

const COMPARE: &str = "  compare:
    uses: evaluate
    in: { rows: labels.test, program: convert.program, optimised: optimize.program }
    with: { model: m }
    publish: { scores: compare.json }
";

#[test]
fn a_program_is_compared_with_its_optimised_self_row_by_row() {
    // Without examples every query is of a card; with them the card of the last row is missed.
    let oracle = Oracle::start(|body| {
        let wrong = query(body) == "The card again";
        let label = match shown(body).is_empty() {
            true => "card",
            false if wrong => "pin",
            false if query(body).contains("PIN") => "pin",
            false => "card",
        };
        Some(label.to_owned())
    });
    let project = project("      search: { restrict: [-2], max_labeled_demos: 2 }\n");
    project.write("p.yaml", &format!("{}{COMPARE}", project.read("p.yaml")));
    let pins = (0..8).map(|i| (format!("PIN number {i}"), "pin"));
    let cards = ["A card", "The card again"].map(|text| (text.to_owned(), "card"));
    classify::write_rows(&project, "test.csv", pins.chain(cards));
    run(&project, &oracle).ok();
    let scores: Value = serde_json::from_str(&project.read("compare.json")).unwrap();
    let programs = scores["programs"].as_array().unwrap();
    let of = |at: usize| (&programs[at]["program"], &programs[at]["correct"]);
    assert_eq!(of(0), (&"plain".into(), &2.into()));
    assert_eq!(of(1), (&"optimised".into(), &9.into()));
    let comparison = &scores["comparison"];
    assert_eq!(
        (&comparison["only_first"], &comparison["only_second"]),
        (&1.into(), &8.into())
    );
    // Two-sided binomial: 2 · (1 + 9) / 2⁹.
    let p = comparison["p_value"].as_f64().unwrap();
    assert!((p - 20.0 / 512.0).abs() < 1e-12, "{p}");
}

const CHATS: &str = "  convert:
    uses: convert-to-messages
    in: { rows: [labels.train], labels: labels.labels }
    with: { program: classify }
    publish: { messages: messages.jsonl }
";

#[test]
fn a_student_is_asked_and_served_with_the_very_prompts_that_it_is_trained_on() {
    for adapter in ["compact", "chat"] {
        let asked: Arc<Mutex<Vec<Value>>> = Arc::default();
        let heard = Arc::clone(&asked);
        let oracle = Oracle::start(move |body| {
            heard.lock().unwrap().push(body["messages"].clone());
            Some(match adapter {
                "compact" => "card".to_owned(),
                _ => "[[ ## label ## ]]\ncard\n\n[[ ## completed ## ]]".to_owned(),
            })
        });
        let own = |step: &str| {
            step.replace("optimize.program", "convert.program")
                .replace("labels.test", "labels.train")
                .replace("role: best }", "role: best, leakage: allow }")
        };
        let project = classify::project(&[CHATS, &own(TEST), &own(DEPLOY)]);
        project.edit("p.yaml", "adapter: compact", &format!("adapter: {adapter}"));
        let texts = [
            "Where is it?",
            "My  card, \u{201c}new\u{201d}",
            "Which PIN?",
        ];
        let labels = ["card", "card", "pin"];
        let rows = texts.into_iter().zip(labels);
        let rows: Vec<(String, &str)> = rows
            .map(|(text, label)| (format!("\"{text}\""), label))
            .collect();
        classify::write_rows(&project, "train.csv", rows.clone());
        classify::write_rows(&project, "test.csv", rows);
        run(&project, &oracle).ok();
        // All but the last message of each chat, which is the answer.
        let prompt = |line: &str| -> Value {
            let mut chat: Value = serde_json::from_str(line).unwrap();
            let messages = chat["messages"].as_array_mut().unwrap();
            assert_eq!(messages.pop().unwrap()["role"], "assistant");
            chat["messages"].take()
        };
        let trained: Vec<Value> = project.read("messages.jsonl").lines().map(prompt).collect();
        assert_eq!(trained.len(), 3);
        let taken = || std::mem::take(&mut *asked.lock().unwrap());
        let evaluated = taken();
        assert!(trained.iter().all(|prompt| evaluated.contains(prompt)));
        assert!(evaluated.iter().all(|prompt| trained.contains(prompt)));
        let server = serve(&project);
        for (text, prompt) in texts.iter().zip(&trained) {
            server.json("/predict", &json!({ "text": text }));
            assert_eq!(taken(), std::slice::from_ref(prompt), "{adapter}");
        }
    }
}

#[test]
fn a_search_that_was_cut_short_asks_only_for_the_rest() {
    let settings = "      search: { max_bootstrapped_demos: 2, num_candidate_programs: 2, \
                    concurrency: 1 }\n";
    let answer = |body: &Value| {
        Some(
            if query(body).contains("PIN") {
                "pin"
            } else {
                "card"
            }
            .to_owned(),
        )
    };
    let whole = Oracle::start(answer);
    run(&project(settings), &whole).ok();
    let all = whole.calls();

    let answered = AtomicUsize::new(0);
    let short = Oracle::start(move |body| {
        let turn = answered.fetch_add(1, Ordering::SeqCst);
        answer(body).filter(|_| turn < 9)
    });
    let project = project(settings);
    let failed = run(&project, &short);
    assert_eq!(failed.code, Some(4), "{}", failed.stdout);
    assert!(failed.stdout.contains("a later run asks only for the rest"));

    let rest = Oracle::start(answer);
    run(&project, &rest).ok();
    assert_eq!(rest.calls(), all - 9);
}

#[test]
fn instructions_are_written_from_mistakes_and_kept_when_they_help() {
    let oracle = Oracle::start(|body| {
        let first = body["messages"][0]["content"].as_str().unwrap();
        if first.starts_with("You improve") {
            assert!(first.contains("expected: pin"), "{first}");
            return Some("```\nSort; a PIN is pin.\n```".to_owned());
        }
        let told = first.contains("a PIN is pin");
        Some(
            if told && query(body).contains("PIN") {
                "pin"
            } else {
                "card"
            }
            .to_owned(),
        )
    });
    let project =
        project("      instructions: { proposer: m, search: { rounds: 3, minibatch: 4 } }\n");
    run(&project, &oracle).ok();
    assert_eq!(scores(&project)["programs"][0]["accuracy"], 1.0);
    let program = project.read("program.json");
    assert!(program.contains("Sort; a PIN is pin."), "{program}");
}

#[test]
fn several_prompts_and_typed_columns_make_one_program() {
    let oracle = Oracle::start(|body| {
        let system = body["messages"][0]["content"].as_str().unwrap();
        let query = query(body);
        // The first prompt sees the typed column, the second one what the first said.
        Some(if system == "Find the topic." {
            assert!(
                query.contains("[\"a\", 1]") || query.contains("[\"b\", 2]"),
                "{query}"
            );
            if query.contains("PIN") {
                "secret"
            } else {
                "plastic"
            }
            .to_owned()
        } else {
            assert!(query.contains("topic: "), "{query}");
            if query.contains("secret") {
                "pin"
            } else {
                "card"
            }
            .to_owned()
        })
    });
    let project = project("      search: { restrict: [-3] }\n");
    project.write("p.yaml", &format!("{}{DEPLOY}", project.read("p.yaml")));
    let stages = "programs:
  classify:
    stages:
      - name: topic
        predict:
          adapter: compact
          instructions: Find the topic.
          inputs: [{ name: text }, { name: tags, type: json }]
          outputs: [{ name: topic }]
      - name: label
        predict:
          adapter: compact
          instructions: Sort.
          inputs: [{ name: text }, { name: topic }]
          outputs: [{ name: label, type: label }]
";
    let text = project.read("p.yaml");
    let (head, rest) = text.split_once("programs:\n").unwrap();
    let (_, steps) = rest.split_once("steps:\n").unwrap();
    project.write("p.yaml", &format!("{head}{stages}steps:\n{steps}"));
    project.edit("p.yaml", "train.csv", "train.jsonl");
    project.edit("p.yaml", "test.csv", "test.jsonl");
    let rows = "{\"text\": \"My card\", \"label\": \"card\", \"tags\": [\"a\", 1]}\n\
                {\"text\": \"My PIN\", \"label\": \"pin\", \"tags\": [\"b\", 2]}\n";
    project.write("train.jsonl", rows);
    project.write("test.jsonl", &rows.replace("My", "The"));
    run(&project, &oracle).ok();
    let scores = scores(&project);
    assert_eq!(scores["programs"][0]["accuracy"], 1.0);
    // Two prompts for each of two rows: validated, tested, and asked by the bundle's smoke test.
    assert_eq!(oracle.calls(), 12);

    let server = serve(&project);
    let answer = server.json("/predict", &json!({"text": "My PIN", "tags": ["b", 2]}));
    assert_eq!(answer["label"], "pin");
    for (question, field) in [
        (json!({"text": "My PIN"}), "tags"),
        (json!({"tags": ["b", 2]}), "text"),
        (json!({"text": "My PIN", "tags": [], "topic": "x"}), "topic"),
        (json!({"text": 7, "tags": []}), "text"),
    ] {
        let (status, problem) = server.problem("/predict", &question);
        assert_eq!((status, &problem["param"]), (400, &field.into()));
        assert!(problem["message"].as_str().unwrap().contains(field));
    }
    let rows = json!([{"text": "My PIN", "tags": ["b", 2]}, {"text": "My card", "tags": ["a", 1]}]);
    let answers = server.json("/predict/batch", &json!({ "rows": rows }));
    let labels: Vec<&Value> = (answers["predictions"].as_array().unwrap().iter())
        .map(|answer| &answer["label"])
        .collect();
    assert_eq!(labels, ["pin", "card"]);
    let wrong = json!({"rows": [{"text": "My PIN", "tags": []}, {"text": "My card"}]});
    let (status, problem) = server.problem("/predict/batch", &wrong);
    assert_eq!((status, &problem["param"]), (400, &"rows[1].tags".into()));
    let document: Value = server.get("/openapi.json").json().unwrap();
    let question = &document["components"]["schemas"]["Question"];
    assert_eq!(question["required"], json!(["text", "tags"]));
    assert_eq!(question["properties"]["text"]["type"], "string");
    let health: Value = server.get("/health").json().unwrap();
    assert_eq!(health["inputs"][1]["name"], "tags");
}

#[test]
fn scores_are_in_the_order_of_the_rows_and_too_many_unreadable_answers_end_it() {
    // Later rows are answered first; one answer cannot be read as both fields.
    let oracle = Oracle::start(|body| {
        let number: u64 = query(body).trim_start_matches("query ").parse().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(60 - 3 * number));
        let label = ["pin", "card"][usize::from(number % 2 == 1)];
        let line = if number == 3 {
            "no such line"
        } else {
            "label: "
        };
        Some(format!("{line}{label}\nsure: yes"))
    });
    let project = project("      search: { restrict: [-2], max_labeled_demos: 0 }\n");
    project.edit(
        "p.yaml",
        "max_retries: 0, concurrency: 1",
        "max_retries: 0, concurrency: 8",
    );
    project.edit(
        "p.yaml",
        "outputs: [{ name: label, type: label }]",
        "outputs: [{ name: label, type: label }, { name: sure, type: bool }]",
    );
    let row = |i: usize| format!("query {i},{}\n", ["pin", "card"][i % 2]);
    let rows: String = (0..16).map(row).collect();
    project.write("train.csv", &format!("text,label\n{rows}"));
    project.write("test.csv", &format!("text,label\n{rows}"));
    run(&project, &oracle).ok();
    let scores = scores(&project);
    let score = &scores["programs"][0];
    assert_eq!(
        (&score["correct"], &score["parse_failures"]),
        (&15.into(), &1.into())
    );
    for (i, row) in score["rows"].as_array().unwrap().iter().enumerate() {
        assert_eq!(row["id"], format!("d:test:{i}"));
        let expected: Value = match i {
            3 => Value::Null,
            _ => ["pin", "card"][i % 2].into(),
        };
        assert_eq!(row["predicted"], expected, "row {i}");
    }
    assert_eq!(
        score["per_label"][0]["recall"].as_f64().map(|r| r < 1.0),
        Some(true)
    );

    project.edit("p.yaml", "role: best }", "role: best, max_errors: 1 }");
    let ended = run(&project, &oracle);
    assert_eq!(ended.code, Some(4));
    assert!(
        ended.stdout.contains("1 rows failed (`max_errors` is 1)"),
        "{}",
        ended.stdout
    );
}
