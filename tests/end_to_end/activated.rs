//! An activated adapter (`lora.invocation`) from training through scores to a server.

use serde_json::{Value, json};

use crate::project::{Project, Run};
use crate::server::{Server, content};
use crate::tiny;

const STEPS: &str = r#"  finetune:
    uses: finetune
    in: { messages: chats.messages, lineage: chats.lineage }
    with:
      model: student
      epochs: 8
      save_steps: 20
      batch_size: 2
      learning_rate: 0.02
      lora: { rank: 4, invocation: "<|im_start|>assistant" }
  optimize:
    uses: optimize
    foreach: { adapter: finetune.checkpoints }
    in:
      program: chats.program
      adapter: "${{ item.adapter }}"
      trainset: labels.train
      valset: labels.train
    with: { model: student, search: { restrict: [-2], max_labeled_demos: 1 } }
  score:
    uses: evaluate
    foreach: { adapter: finetune.checkpoints }
    in: { rows: labels.test, program: chats.program, adapter: "${{ item.adapter }}" }
    with: { model: student }
  select:
    uses: select
    in:
      scores: score.scores
      adapters: finetune.checkpoints
      optimised: optimize.program
      program: chats.program
  again:
    uses: evaluate
    in: { rows: labels.test, program: select.program, adapter: select.adapter }
    with: { model: student, role: best, leakage: allow }
    publish: { scores: scores.json }
  deploy:
    uses: deploy
    in: { program: select.program, adapter: select.adapter, scores: again.scores }
    with: { name: tiny, model: student }
    publish: { bundle: bundle }
"#;

/// The tiny model, trained, scored and deployed.
fn trained() -> (Project, Run) {
    let project = tiny::project();
    tiny::instead_of_scoring(&project, STEPS);
    let chats = "    with: { program: classify }\n";
    let published = format!("{chats}    publish: {{ messages: messages.jsonl }}\n");
    project.edit("pipeline.yaml", chats, &published);
    let run = project.run(&["--json", "pipeline.yaml"]).ok();
    (project, run)
}

fn serve(project: &Project, args: &[&str]) -> Server {
    let mut command = project.command(&["serve"]);
    command.args(args).env_remove("FLOWRUN_API_KEY");
    Server::start(command)
}

/// What every chat that was learnt from asks, without its answer.
fn questions(project: &Project) -> Vec<Value> {
    let text = project.read("messages.jsonl");
    let question = |line: &str| {
        let mut chat: Value = serde_json::from_str(line).unwrap();
        let mut messages = chat["messages"].take();
        let answer = messages.as_array_mut().unwrap().pop().unwrap();
        assert_eq!(answer["role"], "assistant");
        messages
    };
    text.lines().map(question).collect()
}

#[test]
fn an_activated_adapter_is_trained_scored_and_served() {
    let (project, run) = trained();
    let config: Value =
        serde_json::from_str(&project.read("bundle/adapter/adapter_config.json")).unwrap();
    // `<|im_start|>` and the nine bytes of the word.
    let tokens = config["alora_invocation_tokens"].as_array().unwrap();
    assert_eq!(tokens.len(), 10, "{config}");
    assert_eq!(tokens[0], 256);

    // The server gives the answers that were scored.
    let server = serve(&project, &["bundle"]);
    let scores: Value = serde_json::from_str(&project.read("scores.json")).unwrap();
    let rows = scores["programs"][0]["rows"].as_array().unwrap();
    assert!(!rows.is_empty());
    // How far its confidences are from what is right is a metric of the step.
    let ended = run.ended("again");
    let calibration = &scores["programs"][0]["calibration"];
    assert!(calibration["ece"].is_f64(), "{calibration}");
    assert_eq!(ended["metrics"]["ece"], calibration["ece"]);
    for row in rows {
        let answer = server.json("/predict", &json!({"text": row["text"]}));
        assert_eq!(answer["label"], row["predicted"]);
        let sure = |value: &Value| value["confidence"].as_f64().unwrap();
        assert!((sure(&answer) - sure(row)).abs() < 1e-5, "{answer} {row}");
    }
    drop(server);

    let from = project.path("bundle/adapter");
    std::fs::create_dir_all(project.path("adapters/one")).unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        let to = project.path("adapters/one").join(file);
        std::fs::copy(from.join(file), to).unwrap();
    }
    let server = serve(&project, &["tiny", "--adapters", "adapters"]);
    let ask = |model: &str, messages: &Value| {
        let body = json!({
            "model": model, "temperature": 0, "max_tokens": 16, "messages": messages,
        });
        server.json("/v1/chat/completions", &body)
    };
    let (mut moved, mut cached) = (0, 0);
    for question in questions(&project).iter().take(6) {
        let (base, adapted) = (ask("tiny", question), ask("tiny:one", question));
        moved += usize::from(content(&base) != content(&adapted));
        let again = ask("tiny:one", question);
        assert_eq!(content(&again), content(&adapted));
        let usage = &again["usage"]["prompt_tokens_details"];
        cached += usage["cached_tokens"].as_u64().unwrap();
    }
    assert!(moved > 0, "the adapter says what the base model says");
    // What comes before the invocation was computed before.
    assert!(cached > 0);

    // Without the invocation it is the base model that answers.
    let say = |model: &str, prompt: &str| {
        let body = json!({"model": model, "temperature": 0, "max_tokens": 16, "prompt": prompt});
        let answer = server.json("/v1/completions", &body);
        answer["choices"][0]["text"].as_str().unwrap().to_owned()
    };
    for prompt in ["My card is lost", "<|im_start|>user\nMy PIN<|im_end|>\n"] {
        assert_eq!(say("tiny", prompt), say("tiny:one", prompt));
    }
}
