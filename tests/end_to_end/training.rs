//! Training in this process: checkpoints by step, an early end by the validation loss, and which
//! rows count as having decided it.

use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::files;
use crate::project::{Project, Run};
use crate::server::{Server, chat};
use crate::tiny::{self, write_model};

const RUN: [&str; 2] = ["--json", "pipeline.yaml"];

/// A project that trains the tiny model on twelve chats of two labels and does more with it.
fn project(steps: &str) -> Project {
    let project = tiny::project();
    let rows = |split: &str, count: usize| -> String {
        let row = |i: usize| format!("{split} {i},{}\n", ["card", "pin"][i % 2]);
        (0..count).map(row).collect()
    };
    project.write("train.csv", &format!("text,label\n{}", rows("train", 12)));
    project.write("test.csv", &format!("text,label\n{}", rows("test", 4)));
    tiny::instead_of_scoring(&project, steps);
    project.edit("pipeline.yaml", "data/known.csv", "train.csv");
    project.edit("pipeline.yaml", "data/queries.csv", "test.csv");
    project.edit("pipeline.yaml", "n: 3", "n: 2");
    project
}

/// The checkpoints of a finished `finetune`, by its result in the cache.
fn checkpoints(project: &Project, finetune: &Value) -> Vec<String> {
    let key = finetune["key"].as_str().unwrap();
    let file = format!(".flowrun/actions/{}/{}.json", &key[..2], &key[2..]);
    let text = project.read(&file);
    let result: Value = serde_json::from_str(text.lines().nth(1).unwrap()).unwrap();
    let list = result["outputs"]["checkpoints"]["value"]["list"].clone();
    let labels = list.as_array().unwrap().iter();
    let labels = labels.map(|item| item["label"].as_str().unwrap().to_owned());
    labels.collect()
}

/// The models that were scored, not those whose scores were known.
fn scored(project: &Project, run: &Run) -> Vec<String> {
    let events = run.events();
    let ran = events.iter().filter(|e| {
        let step = e["step"].as_str().unwrap_or_default();
        e["event"] == "step_finished" && e["status"] == "ran" && step.starts_with("score[")
    });
    let model = |event: &Value| {
        let path = event["outputs"]["scores"]["path"].as_str().unwrap();
        let scores: Value = serde_json::from_str(&project.read(path)).unwrap();
        scores["model"].as_str().unwrap().to_owned()
    };
    let mut all: Vec<String> = ran.map(model).collect();
    all.sort();
    all
}

/// Two epochs of six steps.
const BY_STEPS: &str = r#"  finetune:
    uses: finetune
    in: { messages: chats.messages, lineage: chats.lineage }
    with: { model: student, epochs: 2, batch_size: 2, save_steps: 5, lora: { rank: 2 } }
  optimize:
    uses: optimize
    foreach: { adapter: [finetune.base, finetune.checkpoints] }
    in:
      program: chats.program
      adapter: "${{ item.adapter }}"
      trainset: labels.train
      valset: labels.train
    with: { model: student, search: { restrict: [-2], max_labeled_demos: 1 } }
  score:
    uses: evaluate
    foreach: { adapter: [finetune.base, finetune.checkpoints] }
    in: { rows: labels.test, program: chats.program, adapter: "${{ item.adapter }}" }
    with: { model: student }
  select:
    uses: select
    in:
      scores: score.scores
      adapters: [finetune.base, finetune.checkpoints]
      optimised: optimize.program
      program: chats.program
    publish: { choice: choice.json }
  again:
    uses: evaluate
    in: { rows: labels.test, program: select.program, adapter: select.adapter }
    with: { model: student, role: best, leakage: allow }
  deploy:
    uses: deploy
    in: { program: select.program, adapter: select.adapter, scores: again.scores }
    with: { name: tiny, model: student }
    publish: { bundle: bundle }
"#;

#[test]
fn checkpoints_by_step_are_scored_selected_and_deployed() {
    let project = project(BY_STEPS);
    // The rows that chose between the checkpoints are not clean to test the chosen one.
    project.edit("pipeline.yaml", ", leakage: allow }", " }");
    let refused = project.run(&RUN);
    assert_eq!(refused.code, Some(4), "{}", refused.stdout);
    let said = "4 rows selected by (`queries:test:0`, ";
    assert!(refused.stdout.contains(said), "{}", refused.stdout);
    project.edit(
        "pipeline.yaml",
        "role: best }",
        "role: best, leakage: allow }",
    );
    let finetune = refused.ended("finetune");
    project.run(&RUN).ok();
    let names = [
        "epochs-1-total-trained-steps-5",
        "epochs-2-total-trained-steps-10",
        "epochs-2-total-trained-steps-12",
    ];
    assert_eq!(checkpoints(&project, &finetune), names);
    let ids = names.map(|name| format!("base:{name}"));
    let mut models = vec!["base".to_owned()];
    models.extend(ids);
    models.sort();
    assert_eq!(scored(&project, &refused), models);
    let choice: Value = serde_json::from_str(&project.read("choice.json")).unwrap();
    let chosen = choice["model"].as_str().unwrap();
    assert!(models.iter().any(|model| model == chosen), "{chosen}");
    let bundled = project.read("bundle/adapter/checkpoint.json");
    let bundled: Value = serde_json::from_str(&bundled).unwrap();
    let name = chosen.strip_prefix("base:").unwrap_or(chosen);
    assert_eq!(bundled["name"], name);

    // By epochs, with all else alike, the last checkpoint is the same: its score is known.
    project.edit("pipeline.yaml", " save_steps: 5,", "");
    let run = project.run(&RUN).ok();
    let names = [
        "epochs-1-total-trained-steps-6",
        "epochs-2-total-trained-steps-12",
    ];
    assert_eq!(checkpoints(&project, &run.ended("finetune")), names);
    assert_eq!(scored(&project, &run), [format!("base:{}", names[0])]);
}

#[test]
fn a_killed_training_ends_with_the_same_checkpoints() {
    const LONG: &str = "  finetune:
    uses: finetune
    in: { messages: chats.messages, lineage: chats.lineage }
    with: { model: student, epochs: 60, batch_size: 1, save_steps: 7, lora: { rank: 2 } }
";
    let killed = project(LONG);
    let mut child = killed
        .command(&RUN)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let saved = || {
        let files = files::below(&killed.path(".flowrun"));
        let all = files
            .iter()
            .filter(|path| path.ends_with("checkpoint.json"));
        all.count()
    };
    let deadline = Instant::now() + Duration::from_secs(60);
    while saved() < 10 {
        assert!(Instant::now() < deadline, "{} checkpoints", saved());
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none(), "the run ended before it was killed");
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();

    let resumed = killed.run(&RUN).ok();
    let events = resumed.events();
    let run_dir = events.last().unwrap()["run_dir"].as_str().unwrap();
    let log = killed.path(run_dir).join("logs/finetune.log");
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.contains("going on after step "), "{log}");
    let resumed = resumed.ended("finetune");
    // 720 steps: 102 sevens, and the last one.
    let names = checkpoints(&killed, &resumed);
    assert_eq!(names.len(), 103);
    assert_eq!(names[0], "epochs-1-total-trained-steps-7");
    assert_eq!(names[102], "epochs-60-total-trained-steps-720");

    let whole = project(LONG);
    let whole = whole.run(&RUN).ok().ended("finetune");
    for output in ["checkpoints", "loss"] {
        let digest = |of: &Value| of["outputs"][output]["digest"].clone();
        assert!(digest(&whole).is_string());
        assert_eq!(digest(&resumed), digest(&whole), "{output}");
    }
}

/// Trains on answers that are the opposite of what it is validated on.
const PATIENT: &str = "\
name: patience
models:
  student: { provider: embedded, weights: { file: tiny } }
steps:
  finetune:
    uses: finetune
    in: { messages: { file: train.jsonl }, validation: { file: held.jsonl } }
    with:
      model: student
      epochs: 40
      batch_size: 4
      patience: 1
      learning_rate: 0.02
      lora: { rank: 2 }
";

fn patient() -> Project {
    let project = Project::new();
    write_model(&project.path("tiny"), 1);
    let chats = |answer: &str| -> String {
        let chat = |i: usize| {
            let messages = json!([
                {"role": "user", "content": format!("query {i}")},
                {"role": "assistant", "content": answer},
            ]);
            format!("{}\n", json!({ "messages": messages }))
        };
        (0..8).map(chat).collect()
    };
    project.write("train.jsonl", &chats("aa"));
    project.write("held.jsonl", &chats("zz"));
    project.write("pipeline.yaml", PATIENT);
    project
}

#[test]
fn a_training_that_gets_no_better_on_other_chats_ends_early() {
    let project = patient();
    let run = project.run(&RUN).ok();
    let ended = run.ended("finetune");
    let metrics = &ended["metrics"];
    assert_eq!(metrics["stopped_early"], true, "{metrics}");
    let names = checkpoints(&project, &ended);
    assert!((2..40).contains(&names.len()), "{names:?}");
    let epochs = names.len();
    assert_eq!(metrics["best_epoch"], epochs - 1);
    assert_eq!(metrics["steps"], 2 * epochs);
    let last = format!("epochs-{epochs}-total-trained-steps-{}", 2 * epochs);
    assert_eq!(names.last(), Some(&last));
    assert!(metrics["validation_loss"].as_f64().unwrap() > 0.0);
    // The curve has both losses, this one at the end of each epoch.
    let curve = ended["outputs"]["loss"]["path"].as_str().unwrap();
    let curve: Vec<Value> = serde_json::from_str(&project.read(curve)).unwrap();
    let told = curve.iter().filter(|point| point["validation"].is_number());
    let told: Vec<&Value> = told.collect();
    let steps: Vec<u64> = told.iter().filter_map(|p| p["step"].as_u64()).collect();
    let ends: Vec<u64> = (1..=epochs as u64).map(|epoch| 2 * epoch).collect();
    assert_eq!(steps, ends);
    assert_eq!(told[epochs - 2]["validation"], metrics["validation_loss"]);
    assert_eq!(curve.len(), 2 * epochs);

    // Without patience it goes on, and still tells the loss.
    project.edit("pipeline.yaml", "      patience: 1\n", "");
    let ended = project.run(&RUN).ok().ended("finetune");
    assert_eq!(checkpoints(&project, &ended).len(), 40);
    assert_eq!(ended["metrics"]["stopped_early"], false);
}

#[test]
fn settings_that_cannot_be_met_are_refused_with_their_reason() {
    let project = patient();
    project.edit("pipeline.yaml", ", validation: { file: held.jsonl }", "");
    let refused = project.run(&RUN);
    assert_eq!(refused.code, Some(4), "{}", refused.stdout);
    let said = "`patience` needs chats to validate on";
    assert!(refused.stdout.contains(said), "{}", refused.stdout);

    project.edit("pipeline.yaml", "patience: 1", "save_steps: 3");
    let elsewhere = "model: student\n      backend: { command: { trainer: trl, base: some/base } }";
    project.edit("pipeline.yaml", "model: student", elsewhere);
    let refused = project.run(&RUN);
    assert_eq!(refused.code, Some(4), "{}", refused.stdout);
    let said = "`save_steps`: only training in this process knows it";
    assert!(refused.stdout.contains(said), "{}", refused.stdout);

    project.edit("pipeline.yaml", "save_steps: 3", "max_tokens: 512");
    let refused = project.run(&RUN);
    let said = "`max_tokens`: only training in this process knows it";
    assert!(refused.stdout.contains(said), "{}", refused.stdout);

    project.edit("pipeline.yaml", "rank: 2 }", "rank: 2, layer_names: text }");
    let refused = project.run(&RUN);
    let said = "`lora.layer_names`: TRL names the layers as it loads the model";
    assert!(refused.stdout.contains(said), "{}", refused.stdout);

    for (from, to) in [
        ("max_tokens: 512", "max_tokens: 0"),
        ("max_tokens: 0", "max_grad_norm: -1"),
        ("max_grad_norm: -1", "save_steps: 0"),
        ("save_steps: 0", "patience: 0"),
    ] {
        project.edit("pipeline.yaml", from, to);
        let refused = project.run(&["check", "pipeline.yaml"]);
        assert_eq!(refused.code, Some(3), "{to}: {}", refused.stderr);
    }
}

#[test]
fn a_chat_of_several_turns_is_trained_whole_and_ends_with_an_answer() {
    let project = patient();
    let said = |role: &str, text: &str| json!({"role": role, "content": text});
    let turns = [
        said("user", "query 1"),
        said("assistant", "aa"),
        said("user", "query 2"),
        said("assistant", "bb"),
    ];
    let line = |turns: &[Value]| format!("{}\n", json!({ "messages": turns }));
    project.write("train.jsonl", &(line(&turns) + &line(&turns[..3])));
    let refused = project.run(&RUN);
    assert_eq!(refused.code, Some(4), "{}", refused.stdout);
    let reason = "line 2: a chat to train on ends with a message of the assistant";
    assert!(refused.stdout.contains(reason), "{}", refused.stdout);

    project.edit("pipeline.yaml", "epochs: 40", "epochs: 1");
    project.write("train.jsonl", &line(&turns).repeat(4));
    let trained = project.run(&RUN).ok().ended("finetune");
    // Both answers of a chat in one row.
    assert_eq!(trained["metrics"]["rows"], 4, "{trained}");
    assert_eq!(trained["metrics"]["steps"], 1);
}

/// The test rows say when the training ends.
const ENDED_BY_TEST_ROWS: &str = r#"  held:
    uses: convert-to-messages
    in: { rows: [labels.test], labels: labels.labels }
    with: { program: classify }
  finetune:
    uses: finetune
    in:
      messages: chats.messages
      lineage: chats.lineage
      validation: held.messages
      validation_lineage: held.lineage
    with: { model: student, epochs: 1, patience: 1, lora: { rank: 2 } }
  score:
    uses: evaluate
    foreach: { adapter: finetune.checkpoints }
    in: { rows: labels.test, program: chats.program, adapter: "${{ item.adapter }}" }
    with: { model: student }
"#;

/// Whether the scores of the only checkpoint are known to be clean, and by how many rows it was
/// selected.
fn leakage(project: &Project, run: &Run) -> (Value, Value) {
    let events = run.events();
    let score = events.iter().find(|e| {
        let step = e["step"].as_str().unwrap_or_default();
        e["event"] == "step_finished" && step.starts_with("score[")
    });
    let path = score.unwrap()["outputs"]["scores"]["path"].as_str();
    let scores: Value = serde_json::from_str(&project.read(path.unwrap())).unwrap();
    let leakage = &scores["programs"][0]["leakage"];
    (leakage["known"].clone(), leakage["selected"].clone())
}

#[test]
fn rows_that_ended_the_training_are_not_clean_to_test_it() {
    let project = project(ENDED_BY_TEST_ROWS);
    let refused = project.run(&RUN);
    assert_eq!(refused.code, Some(4), "{}", refused.stdout);
    let said = "4 rows selected by (`queries:test:0`, `queries:test:1`, ";
    assert!(refused.stdout.contains(said), "{}", refused.stdout);

    let lineage = "      validation_lineage: held.lineage\n";
    project.edit("pipeline.yaml", lineage, "");
    let unknown = project.run(&RUN).ok();
    assert_eq!(leakage(&project, &unknown), (json!(false), json!(0)));

    // The loss on them is told, and nothing hangs on it.
    project.edit("pipeline.yaml", " patience: 1,", "");
    let told = project.run(&RUN).ok();
    assert_eq!(leakage(&project, &told), (json!(true), json!(0)));
}

/// The last checkpoint of two epochs labels the rows for another training.
const SECOND_ROUND: &str = r#"  finetune:
    uses: finetune
    in: { messages: chats.messages, lineage: chats.lineage }
    with: { model: student, epochs: 2, batch_size: 2, save_steps: 100, lora: { rank: 2 } }
  said:
    uses: evaluate
    foreach: { adapter: finetune.checkpoints }
    in: { rows: labels.train, program: chats.program, adapter: "${{ item.adapter }}" }
    with: { model: student, leakage: allow }
  relabel:
    uses: bootstrap
    foreach: { adapter: finetune.checkpoints }
    in: { unlabelled: labels.train, labels: labels.labels, adapter: "${{ item.adapter }}" }
    with: { program: classify, model: student }
  relabel-by-program:
    uses: bootstrap
    foreach: { adapter: finetune.checkpoints }
    in:
      unlabelled: labels.train
      labels: labels.labels
      program: chats.program
      adapter: "${{ item.adapter }}"
    with: { model: student }
  label:
    uses: bootstrap
    in: { unlabelled: labels.train, labels: labels.labels }
    with: { program: classify, model: student }
  label-by-base:
    uses: bootstrap
    in: { unlabelled: labels.train, labels: labels.labels, adapter: finetune.base }
    with: { program: classify, model: student }
  chats-2:
    uses: convert-to-messages
    in:
      rows: [relabel.rows]
      labels: labels.labels
      teachers: [relabel.teacher]
      test: labels.test
    with: { program: classify }
  finetune-2:
    uses: finetune
    in: { messages: chats-2.messages, lineage: chats-2.lineage }
    with: { model: student, epochs: 2, batch_size: 2, lora: { rank: 2 } }
  score:
    uses: evaluate
    foreach: { adapter: finetune-2.checkpoints }
    in: { rows: labels.test, program: chats-2.program, adapter: "${{ item.adapter }}" }
    with: { model: student }
"#;

/// Id, label and confidence of every row of an output of a `bootstrap`, and who labelled them.
fn labelled(project: &Project, run: &Run, step: &str) -> (Vec<(Value, Value, f32)>, Value) {
    let path = run.ended(step)["outputs"]["rows"]["path"].clone();
    let text = project.read(path.as_str().unwrap());
    let rows = text.lines().map(|line| serde_json::from_str(line).unwrap());
    let rows: Vec<Value> = rows.collect();
    let sure = |row: &Value| row["confidence"].as_f64().unwrap() as f32;
    let answer = |row: &Value| (row["id"].clone(), row["label"].clone(), sure(row));
    let teacher = rows[0]["teacher"].clone();
    assert!(rows.iter().all(|row| row["teacher"] == teacher));
    (rows.iter().map(answer).collect(), teacher)
}

#[test]
fn a_checkpoint_labels_the_rows_for_the_next_round() {
    let project = project(SECOND_ROUND);
    let run = project.run(&RUN).ok();
    let last = "epochs-2-total-trained-steps-12";
    let (rows, teacher) = labelled(&project, &run, &format!("relabel[{last}]"));
    assert_eq!(rows.len(), 12);

    // What `evaluate` says that it answers.
    let said = run.ended(&format!("said[{last}]"));
    let scores = project.read(said["outputs"]["scores"]["path"].as_str().unwrap());
    let scores: Value = serde_json::from_str(&scores).unwrap();
    let scored = scores["programs"][0]["rows"].as_array().unwrap().iter();
    let sure = |row: &Value| row["confidence"].as_f64().unwrap() as f32;
    let answer = |row: &Value| (row["id"].clone(), row["predicted"].clone(), sure(row));
    assert_eq!(rows, scored.map(answer).collect::<Vec<_>>());
    // By the program that the training made it is the same teacher.
    let by_program = labelled(&project, &run, &format!("relabel-by-program[{last}]"));
    assert_eq!(by_program, (rows.clone(), teacher.clone()));
    // The student before training answers otherwise, and its checkpoint adds nothing to it.
    let before = labelled(&project, &run, "label");
    assert_eq!(labelled(&project, &run, "label-by-base"), before);
    assert_ne!(before.0, rows);
    assert_ne!(before.1, teacher);

    // All of its answers are trained on, and the test rows took no part.
    let chats = &run.ended("chats-2")["metrics"]["chats"];
    assert_eq!(chats, 12);
    let names = checkpoints(&project, &run.ended("finetune-2"));
    assert_eq!(names, ["epochs-1-total-trained-steps-6", last]);
    assert_eq!(leakage(&project, &run), (json!(true), json!(0)));

    // Of its surest answers alone, those are trained on that are as sure.
    let mut sure: Vec<f64> = rows.iter().map(|(_, _, sure)| f64::from(*sure)).collect();
    sure.sort_by(f64::total_cmp);
    let least = f64::midpoint(sure[5], sure[6]);
    let kept = sure.iter().filter(|one| **one >= least).count();
    assert!((1..12).contains(&kept), "{sure:?}");
    let adapter = r#"labels: labels.labels, adapter: "${{ item.adapter }}" }
    with: { program: classify, model: student"#;
    let surest = format!("{adapter}, min_confidence: {least}");
    project.edit("pipeline.yaml", adapter, &surest);
    let run = project.run(&RUN).ok();
    let metrics = &run.ended(&format!("relabel[{last}]"))["metrics"];
    assert_eq!(metrics["labelled"], kept, "{metrics}");
    assert_eq!(metrics["dropped"], 12 - kept, "{metrics}");
    assert_eq!(run.ended("chats-2")["metrics"]["chats"], kept);
}

#[test]
fn rows_that_a_labelling_checkpoint_was_trained_on_took_part_in_its_labels() {
    let project = project(SECOND_ROUND);
    // The first round is trained on the test rows; the second on its labels of others alone.
    let first = "in: { rows: [labels.train], labels";
    let leaky = "in: { rows: [labels.train, labels.test], labels";
    project.edit("pipeline.yaml", first, leaky);
    let refused = project.run(&RUN);
    assert_eq!(refused.code, Some(4), "{}", refused.stdout);
    let said =
        "test rows are among the rows to train on: 4 rows known to its teacher (`queries:test:0`, ";
    assert!(refused.stdout.contains(said), "{}", refused.stdout);

    // What is not known is not clean.
    project.edit("pipeline.yaml", leaky, first);
    project.edit("pipeline.yaml", ", lineage: chats.lineage }", " }");
    let unknown = project.run(&RUN).ok();
    let said = "it is not known which rows trained the teacher";
    assert!(unknown.stdout.contains(said), "{}", unknown.stdout);
    assert_eq!(leakage(&project, &unknown), (json!(false), json!(0)));

    // A classifier asks no model that could answer as a checkpoint.
    project.edit(
        "pipeline.yaml",
        "programs:\n",
        "  encoder:
    provider: sentence-encoder
    weights: { file: none }
    tokenizer: { file: none }
programs:
  fitted: { embedding_classifier: { embedder: \"${{ models.encoder }}\", method: centroid } }
",
    );
    project.edit(
        "pipeline.yaml",
        "adapter: finetune.base }\n    with: { program: classify,",
        "adapter: finetune.base }\n    with: { program: fitted,",
    );
    let refused = project.run(&["check", "pipeline.yaml"]);
    assert_eq!(refused.code, Some(3), "{}", refused.stderr);
    let said = "asks no model, so no checkpoint can answer for it";
    assert!(refused.stderr.contains(said), "{}", refused.stderr);
}

/// Trains by one entry and asks by another, which says nothing of the chat template.
const BY_TWO_ENTRIES: &str = r#"  finetune:
    uses: finetune
    in: { messages: chats.messages, lineage: chats.lineage }
    with: { model: student, epochs: 1, lora: { rank: 2 } }
  alone:
    uses: evaluate
    in: { rows: labels.test, program: chats.program }
    with: { model: plain }
  optimize:
    uses: optimize
    foreach: { adapter: finetune.checkpoints }
    in:
      program: chats.program
      adapter: "${{ item.adapter }}"
      trainset: labels.train
      valset: labels.train
    with: { model: plain, search: { restrict: [-2], max_labeled_demos: 1 } }
  score:
    uses: evaluate
    foreach: { adapter: finetune.checkpoints }
    in: { rows: labels.test, program: chats.program, adapter: "${{ item.adapter }}" }
    with: { model: plain }
  select:
    uses: select
    in:
      scores: score.scores
      adapters: [finetune.checkpoints]
      optimised: optimize.program
      program: chats.program
  again:
    uses: evaluate
    in: { rows: labels.test, program: select.program, adapter: select.adapter }
    with: { model: plain, role: best, leakage: allow }
  deploy:
    uses: deploy
    in: { program: select.program, adapter: select.adapter, scores: again.scores }
    with: { name: tiny, model: plain }
    publish: { bundle: bundle }
"#;

/// Tokens of all prompts that a step scored.
fn prompt_tokens(project: &Project, run: &Run, step: &str) -> u64 {
    let events = run.events();
    let is_it = |e: &&Value| {
        let name = e["step"].as_str().unwrap_or_default();
        e["event"] == "step_finished" && name.starts_with(step)
    };
    let path = events.iter().find(is_it).unwrap()["outputs"]["scores"]["path"].as_str();
    let scores: Value = serde_json::from_str(&project.read(path.unwrap())).unwrap();
    scores["programs"][0]["prompt_tokens"].as_u64().unwrap()
}

#[test]
fn a_checkpoint_is_asked_with_what_its_training_told_the_template() {
    let project = project(BY_TWO_ENTRIES);
    let template = "{% for m in messages %}{{ m.content }}{% endfor %}\
        {% if enable_thinking is defined and not enable_thinking %}12345{% endif %}";
    project.write("tiny/chat_template.jinja", template);
    project.edit(
        "pipeline.yaml",
        "    weights: { file: tiny }\n",
        "    weights: { file: tiny }\n    chat_template_kwargs: { enable_thinking: false }\n  \
         plain:\n    provider: embedded\n    weights: { file: tiny }\n",
    );
    let run = project.run(&RUN).ok();
    // Five more characters, which are tokens, in each of the four prompts.
    let alone = prompt_tokens(&project, &run, "alone");
    assert_eq!(prompt_tokens(&project, &run, "score["), alone + 4 * 5);
    let read = |file: &str| -> Value { serde_json::from_str(&project.read(file)).unwrap() };
    let checkpoint = read("bundle/adapter/checkpoint.json");
    let told = json!({"enable_thinking": false});
    assert_eq!(checkpoint["chat_template_kwargs"], told);

    let mut command = project.command(&["serve", "bundle"]);
    command.env_remove("FLOWRUN_API_KEY");
    let server = Server::start(command);
    let tokens = |model: &str| {
        let answer = server.json("/v1/chat/completions", &chat(model, "hello", 1));
        answer["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    assert_eq!(tokens(&server.model), 10);
    assert_eq!(tokens("tiny"), 5);

    // What an entry says on purpose is not overruled in silence.
    project.edit(
        "pipeline.yaml",
        "  plain:\n",
        "  plain:\n    chat_template_kwargs: { enable_thinking: true }\n",
    );
    let refused = project.run(&["check", "pipeline.yaml"]);
    assert_eq!(refused.code, Some(3), "{}", refused.stderr);
    let said = "the checkpoints of `finetune` are trained with `chat_template_kwargs: ";
    assert!(refused.stderr.contains(said), "{}", refused.stderr);
}
