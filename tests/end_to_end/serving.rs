//! `flowrun serve` with a tiny model: OpenAI's API, adapters, load, faults and security.

use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;
use std::time::Duration;

use serde_json::{Value, json};

use crate::project::{Project, Run};
use crate::server::{Server, chat, chunks, client, content};
use crate::tiny::{self, write_adapter, write_model};

/// Tokens of an answer that does not end while a test looks.
const ENDLESS: u32 = 20_000;

/// A project with a deployed bundle: made once for all tests, which only read it.
static DEPLOYED: LazyLock<Project> = LazyLock::new(|| {
    let project = tiny::project();
    project.run(&["pipeline.yaml"]).ok();
    project
});

fn serve(project: &Project, args: &[&str]) -> Server {
    let mut command = project.command(&["serve"]);
    command.args(args).env_remove("FLOWRUN_API_KEY");
    Server::start(command)
}

/// The base model alone, with a folder of two adapters.
pub(crate) fn with_adapters(more: &[&str]) -> (Project, Server) {
    let project = Project::new();
    write_model(&project.path("tiny"), 1);
    write_adapter(&project.path("adapters/one"), 11);
    write_adapter(&project.path("adapters/two"), 12);
    let server = serve(
        &project,
        &[&["tiny", "--adapters", "adapters"], more].concat(),
    );
    (project, server)
}

fn ids(server: &Server) -> Vec<String> {
    let models: Value = server.get("/v1/models").json().unwrap();
    let models = models["data"].as_array().unwrap();
    models
        .iter()
        .map(|m| m["id"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn a_chat_template_is_told_what_the_models_entry_and_the_request_say() {
    let project = tiny::project();
    let template = "{% for m in messages %}{{ m.content }}{% endfor %}\
        {% if enable_thinking is defined and not enable_thinking %}12345{% endif %}";
    std::fs::write(project.path("tiny/chat_template.jinja"), template).unwrap();
    let body = |server: &Server, told: Value| {
        let message = json!({"role": "user", "content": "hello"});
        let mut body = json!({"model": ids(server)[0], "messages": [message], "max_tokens": 1});
        if !told.is_null() {
            body["chat_template_kwargs"] = told;
        }
        body
    };
    let tokens = |server: &Server, told: Value| {
        let answer = server.json("/v1/chat/completions", &body(server, told));
        answer["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    let (quick, slow) = (
        json!({"enable_thinking": false}),
        json!({"enable_thinking": true}),
    );
    let server = serve(&project, &["tiny"]);
    assert_eq!(tokens(&server, Value::Null), 5);
    assert_eq!(tokens(&server, quick), 10);
    assert_eq!(tokens(&server, slow.clone()), 5);
    let (status, problem) = server.problem(
        "/v1/chat/completions",
        &body(&server, json!({"messages": []})),
    );
    assert_eq!(status, 400, "{problem}");

    let told = r#"{"enable_thinking": false}"#;
    let usual = serve(&project, &["tiny", "--default-chat-template-kwargs", told]);
    assert_eq!(tokens(&usual, Value::Null), 10);
    assert_eq!(tokens(&usual, slow.clone()), 5);

    // What the entry says is part of the keys and of the bundle, and the request wins over it.
    project.run(&["pipeline.yaml", "--json"]).ok();
    project.edit(
        "pipeline.yaml",
        "weights: { file: tiny }",
        "weights: { file: tiny }\n    chat_template_kwargs: { enable_thinking: false }",
    );
    let told = project.run(&["pipeline.yaml", "--json"]).ok();
    assert_eq!(told.steps("ran"), ["score", "deploy"]);
    let server = serve(&project, &["bundle"]);
    assert_eq!(tokens(&server, Value::Null), 10);
    assert_eq!(tokens(&server, slow), 5);
}

#[test]
fn a_raw_text_begins_with_the_begin_token_where_the_model_asks_for_it() {
    let project = Project::new();
    write_model(&project.path("tiny"), 1);
    let tokens = |server: &Server, prompt: &str| {
        let body = json!({"model": "tiny", "prompt": prompt, "max_tokens": 1});
        let answer = server.json("/v1/completions", &body);
        answer["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    let server = serve(&project, &["tiny"]);
    assert_eq!(tokens(&server, "once"), 4);
    project.edit(
        "tiny/tokenizer_config.json",
        "{",
        r#"{"add_bos_token": true, "#,
    );
    let server = serve(&project, &["tiny"]);
    assert_eq!(tokens(&server, "once"), 5);
    // Not twice.
    assert_eq!(tokens(&server, "<|im_start|>once"), 5);
}

#[test]
fn the_program_of_a_bundle_always_answers() {
    let server = serve(&DEPLOYED, &["bundle"]);
    let labels = ["card_arrival", "change_pin", "exchange_rate"];
    let answer = server.json("/predict", &json!({"text": "Where is my card?"}));
    assert!(
        labels.contains(&answer["label"].as_str().unwrap()),
        "{answer}"
    );
    let confidence = answer["confidence"].as_f64().unwrap();
    assert!((1.0 / 3.0 - 1e-6..=1.0).contains(&confidence), "{answer}");
    let texts = ["Where is my card?", "My PIN", "y".repeat(300).as_str()].map(str::to_owned);
    let answers = server.json("/predict/batch", &json!({"texts": texts}));
    let answers = answers["predictions"].as_array().unwrap();
    assert_eq!(answers.len(), 3);
    assert_eq!(answers[0]["label"], answer["label"]);
    for bad in [json!({"text": " "}), json!({"txt": "a"}), json!([])] {
        assert_eq!(server.problem("/predict", &bad).0, 400);
    }
    assert_eq!(
        server.problem("/predict/batch", &json!({"texts": []})).0,
        400
    );
    // A text that is longer than the model's context has no answer alone, and one in a batch
    // says why.
    let long = "card ".repeat(8000);
    let (status, problem) = server.problem("/predict", &json!({"text": long}));
    assert_eq!(
        (status, &problem["code"]),
        (400, &json!("context_length_exceeded"))
    );
    let answers = server.json("/predict/batch", &json!({"texts": [long, "My PIN"]}));
    assert_eq!(answers["predictions"][0]["label"], "unknown");
    assert!(
        answers["predictions"][0]["error"]
            .as_str()
            .unwrap()
            .contains("context")
    );
    assert!(labels.contains(&answers["predictions"][1]["label"].as_str().unwrap()));

    for path in ["/health", "/health/live", "/health/ready"] {
        assert_eq!(server.get(path).status(), 200, "{path}");
    }
    let health: Value = server.get("/health").json().unwrap();
    assert_eq!(health["pid"], server.pid());
    assert_eq!(health["name"], "tiny");
    let document: Value = server.get("/openapi.json").json().unwrap();
    assert!(document["paths"]["/predict"]["post"].is_object());
    let page = server.get("/").text().unwrap();
    assert!(page.contains("</html>") && !page.contains("http://") && !page.contains("https://"));
    let metrics = server.get("/metrics").text().unwrap();
    for line in [
        "flowrun_requests_total{path=\"/predict\",status=\"200\"} 1",
        "flowrun_requests_total{path=\"/predict\",status=\"400\"} 4",
        "flowrun_predictions_total{label=\"unknown\"} 1",
        "flowrun_running 0",
        "# EOF",
    ] {
        assert!(metrics.contains(line), "{line}\n{metrics}");
    }
    assert!(server.metric("flowrun_generated_tokens_total") >= 5.0);
    // From the third one on, the start of the program's prompt is known.
    let cached = server.metric("flowrun_cached_prompt_tokens_total");
    assert!(
        (16.0..server.metric("flowrun_prompt_tokens_total")).contains(&cached),
        "{cached}"
    );
    assert_eq!(server.stop(), Some(0));
}

/// The prompt within a saved program.
fn prompt(program: &mut Value) -> Option<&mut Value> {
    if program.get("outputs").is_some() {
        return Some(program);
    }
    program.as_object_mut()?.values_mut().find_map(prompt)
}

#[test]
fn an_answer_that_is_no_label_is_unknown_with_what_the_model_said() {
    let project = tiny::project();
    project.run(&["pipeline.yaml"]).ok();
    let saved: Value = serde_json::from_str(&project.read("bundle/program.json")).unwrap();
    // The model is held to nothing: it says what is no label, or knows not the form of two fields.
    for (second, reason) in [
        (None, "is none of the program's labels"),
        (Some(json!({"name": "sure", "type": "bool"})), ""),
    ] {
        let mut program = saved.clone();
        let spec = prompt(&mut program).unwrap();
        spec["constrain"] = false.into();
        spec["outputs"].as_array_mut().unwrap().extend(second);
        std::fs::remove_file(project.path("bundle/program.json")).unwrap();
        project.write("bundle/program.json", &program.to_string());
        let server = serve(&project, &["bundle"]);
        let answer = server.json("/predict", &json!({"text": "Where is my card?"}));
        assert_eq!(answer["label"], "unknown", "{answer}");
        assert!(!answer["raw"].as_str().unwrap().is_empty(), "{answer}");
        assert!(
            answer["error"].as_str().unwrap().contains(reason),
            "{answer}"
        );
        assert!(answer["confidence"].is_null(), "{answer}");
        let answers = server.json("/predict/batch", &json!({"texts": ["My PIN"]}));
        assert_eq!(answers["predictions"][0]["label"], "unknown");
    }
}

#[test]
fn the_command_that_a_server_tells_of_works_with_curl() {
    let project = tiny::project();
    project.run(&["pipeline.yaml"]).ok();
    let log = project.path("log");
    let mut command = project.command(&["serve", "bundle", "--port", "0"]);
    command
        .env_remove("FLOWRUN_API_KEY")
        .stderr(std::fs::File::create(&log).unwrap());
    let mut child = command.spawn().unwrap();
    let told = loop {
        let text = std::fs::read_to_string(&log).unwrap();
        let mut lines = text
            .split_inclusive('\n')
            .filter(|line| line.ends_with('\n'));
        if let Some(line) = lines.find(|line| line.trim().starts_with("curl ")) {
            break line.trim().to_owned();
        }
        assert!(child.try_wait().unwrap().is_none(), "{text}");
        std::thread::sleep(Duration::from_millis(20));
    };
    let asked = Command::new("sh")
        .args(["-c", &told])
        .envs([("NO_PROXY", "127.0.0.1"), ("no_proxy", "127.0.0.1")])
        .output()
        .unwrap();
    let stopped = Command::new("kill").arg(child.id().to_string()).status();
    assert!(stopped.unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    // The shell's word for a command that is not there.
    if asked.status.code() == Some(127) {
        println!("skipped: there is no curl");
        return;
    }
    let said = String::from_utf8_lossy(&asked.stdout);
    assert!(asked.status.success(), "{told}: {said}");
    let answer: Value = serde_json::from_str(&said).unwrap();
    assert!(answer["label"].is_string(), "{answer}");
}

#[test]
fn a_chat_is_whole_or_streamed_token_by_token() {
    let (_project, server) = with_adapters(&[]);
    let mut body = chat("tiny", "Where is my card?", 12);
    body["logprobs"] = true.into();
    body["top_logprobs"] = 2.into();
    let whole = server.json("/v1/chat/completions", &body);
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    assert_eq!(whole["usage"]["completion_tokens"], 12);
    let tokens = whole["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap();
    assert_eq!(tokens.len(), 12);
    let said: String = tokens
        .iter()
        .map(|t| t["token"].as_str().unwrap())
        .collect();
    assert_eq!(said, content(&whole));
    for token in tokens {
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 2);
        assert_eq!(top[0]["token"], token["token"]);
        assert!(token["logprob"].as_f64().unwrap() <= 0.0);
    }

    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    let streamed = chunks(server.ask("/v1/chat/completions", &body));
    let pieces: Vec<&str> = streamed
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
        .filter(|piece| !piece.is_empty())
        .collect();
    assert_eq!(pieces.len(), 12, "token by token: {pieces:?}");
    assert_eq!(pieces.concat(), content(&whole));
    let (usage, others) = streamed.split_last().unwrap();
    assert_eq!(usage["usage"]["completion_tokens"], 12);
    assert!(others.iter().all(|chunk| chunk["usage"].is_null()));
    assert_eq!(
        others.last().unwrap()["choices"][0]["finish_reason"],
        "length"
    );
    assert_eq!(others[0]["choices"][0]["delta"]["role"], "assistant");

    // A stop text never shows, not even its first half.
    let text = content(&whole).to_owned();
    let stop = &text[4..7];
    body["stop"] = json!([stop]);
    let stopped = chunks(server.ask("/v1/chat/completions", &body));
    let said: String = stopped
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(said, text[..text.find(stop).unwrap()]);
}

#[test]
fn answers_may_be_several_drawn_and_restricted() {
    let (_project, server) = with_adapters(&[]);
    let mut body = chat("tiny", "hello", 8);
    body["n"] = 3.into();
    body["temperature"] = json!(1.0);
    body["seed"] = 7.into();
    let first = server.json("/v1/chat/completions", &body);
    let texts = |answer: &Value| -> Vec<String> {
        let choices = answer["choices"].as_array().unwrap();
        choices
            .iter()
            .map(|c| c["message"]["content"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(texts(&first).len(), 3);
    assert_ne!(texts(&first)[0], texts(&first)[1]);
    assert_eq!(
        texts(&first),
        texts(&server.json("/v1/chat/completions", &body))
    );
    let prompt = first["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(first["usage"]["total_tokens"], prompt + 24);
    body["stream"] = true.into();
    let streamed = chunks(server.ask("/v1/chat/completions", &body));
    let mut pieces = vec![String::new(); 3];
    for chunk in &streamed {
        let choice = &chunk["choices"][0];
        let at = choice["index"].as_u64().unwrap() as usize;
        pieces[at].push_str(choice["delta"]["content"].as_str().unwrap_or_default());
    }
    assert_eq!(pieces, texts(&first));

    let mut body = chat("tiny", "which way?", 8);
    body["structured_outputs"] = json!({"choice": ["north", "south"]});
    let answer = server.json("/v1/chat/completions", &body);
    assert!(["north", "south"].contains(&content(&answer)), "{answer}");
    let mut body = chat("tiny", "which way?", 8);
    body["logprobs"] = true.into();
    body["top_logprobs"] = 5.into();
    body["response_format"] = json!({"type": "json_schema", "json_schema": {
        "name": "way", "schema": {"type": "object", "properties": {
            "way": {"enum": ["north", "south"]}, "sure": {"type": "boolean"},
        }},
    }});
    let answer = server.json("/v1/chat/completions", &body);
    let way: Value = serde_json::from_str(content(&answer)).unwrap();
    assert!(way["sure"].is_boolean() && way["way"].is_string(), "{way}");
    let top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        .as_array()
        .unwrap();
    let sum: f64 = top
        .iter()
        .map(|t| t["logprob"].as_f64().unwrap().exp())
        .sum();
    assert!(top.len() == 4 && (sum - 1.0).abs() < 1e-4, "{top:?}");

    let text = json!({"model": "tiny", "prompt": ["once", "twice"], "max_tokens": 5,
        "temperature": 0, "logprobs": 1});
    let answer = server.json("/v1/completions", &text);
    assert_eq!(answer["object"], "text_completion");
    assert_eq!(answer["choices"].as_array().unwrap().len(), 2);
    assert_eq!(
        answer["choices"][0]["logprobs"]["tokens"]
            .as_array()
            .unwrap()
            .len(),
        5
    );
    assert_eq!(answer["usage"]["prompt_tokens"], 9);
    let offsets = &answer["choices"][1]["logprobs"]["text_offset"];
    assert_eq!(offsets[0], 0);
    let mut streaming = text;
    streaming["stream"] = true.into();
    let streamed = chunks(server.ask("/v1/completions", &streaming));
    let told = streamed
        .iter()
        .filter(|chunk| chunk["choices"][0]["index"] == 1);
    let told: Vec<&Value> = told
        .filter_map(|chunk| chunk["choices"][0]["logprobs"]["text_offset"].as_array())
        .flatten()
        .collect();
    assert_eq!(told, offsets.as_array().unwrap().iter().collect::<Vec<_>>());
}

#[test]
fn adapters_are_loaded_when_asked_for_and_the_oldest_goes() {
    let (project, server) = with_adapters(&["--max-adapters", "1"]);
    assert_eq!(ids(&server), ["tiny", "tiny:one", "tiny:two"]);
    let loaded = |server: &Server| -> Vec<String> {
        let models: Value = server.get("/v1/models").json().unwrap();
        let models = models["data"].as_array().unwrap();
        let loaded = models.iter().filter(|m| m["loaded"] == true);
        loaded
            .map(|m| m["id"].as_str().unwrap().to_owned())
            .collect()
    };
    let say = |model: &str| {
        let answer = server.json("/v1/chat/completions", &chat(model, "hello", 8));
        assert_eq!(answer["model"], model);
        content(&answer).to_owned()
    };
    let (base, one) = (say("tiny"), say("tiny:one"));
    assert_ne!(base, one);
    assert_eq!(loaded(&server), ["tiny", "tiny:one"]);
    let two = say("tiny:two");
    assert_ne!(two, one);
    assert_eq!(loaded(&server), ["tiny", "tiny:two"]);
    assert_eq!(server.metric("flowrun_adapters_loaded"), 1.0);
    assert_eq!(say("tiny:one"), one);

    // A new checkpoint, and other weights in the place of old ones: no restart.
    write_adapter(&project.path("adapters/three"), 13);
    assert_ne!(say("tiny:three"), one);
    let weights = project.path("adapters/one/adapter_model.safetensors");
    let other = std::fs::read(project.path("adapters/two/adapter_model.safetensors")).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    std::fs::write(weights, other).unwrap();
    assert_eq!(say("tiny:one"), two);
    // And with the same weights, another strength.
    let config = project.path("adapters/one/adapter_config.json");
    let strong = std::fs::read_to_string(&config).unwrap();
    let weak = strong.replace("\"lora_alpha\":32", "\"lora_alpha\":1e-12");
    assert_ne!(weak, strong);
    std::fs::write(&config, weak).unwrap();
    assert_eq!(say("tiny:one"), base);

    let (status, error) = server.problem("/v1/chat/completions", &chat("tiny:none", "a", 1));
    assert_eq!((status, &error["code"]), (404, &json!("model_not_found")));
    assert_eq!(error["param"], "model");
    assert_eq!(server.get("/v1/models/tiny:two").status(), 200);
    assert_eq!(server.get("/v1/models/tiny:none").status(), 404);

    let load = |name: &str, path: &Path| json!({"lora_name": name, "lora_path": path});
    let two = project.path("adapters/two");
    let answer = server.ask("/v1/load_lora_adapter", &load("mine", &two));
    assert_eq!(answer.status(), 200);
    assert_eq!(
        answer.text().unwrap(),
        "Success: LoRA adapter 'mine' added successfully."
    );
    assert_eq!(say("mine"), say("tiny:two"));
    let mut other = load("mine", &project.path("adapters/three"));
    other["load_inplace"] = true.into();
    assert_eq!(server.ask("/v1/load_lora_adapter", &other).status(), 200);
    assert_eq!(say("mine"), say("tiny:three"));
    assert_eq!(
        server
            .problem("/v1/load_lora_adapter", &load("mine", &two))
            .0,
        400
    );
    assert_eq!(
        server
            .problem("/v1/load_lora_adapter", &load("tiny", &two))
            .0,
        400
    );
    let name = json!({"lora_name": "mine"});
    assert_eq!(server.ask("/v1/unload_lora_adapter", &name).status(), 200);
    assert_eq!(server.problem("/v1/unload_lora_adapter", &name).0, 404);
    assert_eq!(
        server
            .problem("/v1/chat/completions", &chat("mine", "a", 1))
            .0,
        404
    );
}

#[test]
fn adapters_come_from_allowed_folders_alone_and_bad_ones_are_errors() {
    let (project, server) = with_adapters(&[]);
    write_adapter(&project.path("elsewhere/secret"), 14);
    std::os::unix::fs::symlink(
        project.path("elsewhere/secret"),
        project.path("adapters/link"),
    )
    .unwrap();
    let load = |path: &Path| {
        let body = json!({"lora_name": "x", "lora_path": path});
        server.problem("/v1/load_lora_adapter", &body).0
    };
    assert_eq!(load(&project.path("elsewhere/secret")), 403);
    assert_eq!(load(&project.path("adapters/../elsewhere/secret")), 403);
    assert_eq!(load(&project.path("adapters/link")), 403);
    assert_eq!(load(&project.path("adapters")), 403);
    assert_eq!(load(Path::new("/etc/passwd")), 403);
    for id in [
        "tiny:../elsewhere/secret",
        "tiny:link",
        "tiny:one/../one",
        "tiny:",
        "tiny:..",
    ] {
        let (status, _) = server.problem("/v1/chat/completions", &chat(id, "a", 1));
        assert_eq!(status, 404, "{id}");
    }

    let folder = project.path("adapters/bad");
    let good = std::fs::read(project.path("adapters/one/adapter_model.safetensors")).unwrap();
    let mut said = Vec::new();
    let mut attempt = |config: &[u8], weights: &[u8]| {
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("adapter_config.json"), config).unwrap();
        std::fs::write(folder.join("adapter_model.safetensors"), weights).unwrap();
        let (status, error) = server.problem("/v1/chat/completions", &chat("tiny:bad", "a", 1));
        assert_eq!(
            (status, &error["code"]),
            (400, &json!("invalid_adapter")),
            "{error}"
        );
        let message = error["message"].as_str().unwrap().to_owned();
        assert!(
            !message.contains(&project.path("").display().to_string()),
            "{message}"
        );
        said.push(message);
    };
    let config = std::fs::read(project.path("adapters/one/adapter_config.json")).unwrap();
    attempt(b"{", &good);
    attempt(
        b"{\"peft_type\": \"LORA\", \"r\": 3, \"lora_alpha\": 1}",
        &good,
    );
    attempt(&config, b"");
    attempt(&config, &good[..good.len() - 3]);
    attempt(&config, &[0xff; 64]);
    assert!(said[1].contains("shape"), "{said:?}");
    let answer = server.json("/v1/chat/completions", &chat("tiny:one", "a", 2));
    assert_eq!(answer["usage"]["completion_tokens"], 2);
    let alone = serve(&project, &["tiny"]);
    let body = json!({"lora_name": "x", "lora_path": project.path("adapters/one")});
    assert_eq!(alone.problem("/v1/load_lora_adapter", &body).0, 403);
}

#[test]
fn a_batch_takes_as_many_places_as_it_has_rows_up_to_half_of_all() {
    let server = serve(
        &DEPLOYED,
        &["bundle", "--max-batch", "3", "--max-queue", "1"],
    );
    let running = [endless(&server), endless(&server), endless(&server)];
    let texts = |count: usize| json!({"texts": vec!["My PIN"; count]});
    // One place is left.
    let (status, error) = server.problem("/predict/batch", &texts(2));
    assert_eq!((status, &error["type"]), (429, &json!("rate_limit_error")));
    drop(running);
    server.wait_for("flowrun_running", 0.0);
    server.wait_for("flowrun_waiting", 0.0);
    let answers = server.json("/predict/batch", &texts(10));
    assert_eq!(answers["predictions"].as_array().unwrap().len(), 10);
    assert_eq!(server.stop(), Some(0));
}

/// Starts an answer that does not end by itself, and reads its first chunk.
fn endless(server: &Server) -> reqwest::blocking::Response {
    let mut body = chat("tiny", "hello", ENDLESS);
    body["stream"] = true.into();
    let mut answer = server.ask("/v1/chat/completions", &body);
    assert_eq!(answer.status(), 200);
    answer.read_exact(&mut [0; 64]).unwrap();
    answer
}

#[test]
fn a_full_queue_refuses_and_a_client_that_leaves_makes_room() {
    let (_project, server) = with_adapters(&["--max-batch", "2", "--max-queue", "1"]);
    let running = [endless(&server), endless(&server)];
    let url = format!("{}/v1/chat/completions", server.url);
    let waiting = std::thread::spawn(move || {
        let body = chat("tiny", "waits", 3);
        let answer = client().post(url).json(&body).send().unwrap();
        answer.json::<Value>().unwrap()
    });
    server.wait_for("flowrun_waiting", 1.0);
    // What never fits is no matter of waiting.
    let mut many = chat("tiny", "no", 3);
    many["n"] = 4.into();
    assert_eq!(server.problem("/v1/chat/completions", &many).0, 400);
    let refused = server.ask("/v1/chat/completions", &chat("tiny", "no", 3));
    assert_eq!(refused.status(), 429);
    assert_eq!(refused.headers()["retry-after"], "1");
    let error: Value = refused.json().unwrap();
    assert_eq!(error["error"]["type"], "rate_limit_error");
    assert_eq!(
        server.metric("flowrun_refused_total{reason=\"queue_full\"}"),
        1.0
    );

    drop(running);
    // The one that waited is computed once the others are gone.
    assert_eq!(waiting.join().unwrap()["usage"]["completion_tokens"], 3);
    server.wait_for("flowrun_running", 0.0);
    assert_eq!(server.metric("flowrun_given_up_total"), 2.0);
    let generated = server.metric("flowrun_generated_tokens_total");
    assert!(generated < f64::from(ENDLESS), "{generated}");
    server.json("/v1/chat/completions", &chat("tiny", "again", 3));
}

#[test]
fn a_client_that_leaves_before_its_answer_is_computed_no_further() {
    let (_project, server) = with_adapters(&["--max-batch", "2", "--max-queue", "0"]);
    let body = chat("tiny", "hello", ENDLESS).to_string();
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut streams = [server.connect(), server.connect()];
    for stream in &mut streams {
        stream.write_all(request.as_bytes()).unwrap();
    }
    server.wait_for("flowrun_running", 2.0);
    let refused = server.ask("/v1/chat/completions", &chat("tiny", "no", 3));
    assert_eq!(refused.status(), 429);
    drop(streams);
    server.wait_for("flowrun_running", 0.0);
    assert_eq!(server.metric("flowrun_given_up_total"), 2.0);
    assert_eq!(server.metric("flowrun_generated_tokens_total"), 0.0);
    server.json("/v1/chat/completions", &chat("tiny", "again", 3));
}

#[test]
fn an_answer_that_takes_too_long_is_cut_off() {
    let (_project, server) = with_adapters(&["--timeout", "1"]);
    let (status, error) = server.problem("/v1/chat/completions", &chat("tiny", "hello", ENDLESS));
    assert_eq!((status, &error["code"]), (504, &json!("timeout")));
    let mut body = chat("tiny", "hello", ENDLESS);
    body["stream"] = true.into();
    let text = server.ask("/v1/chat/completions", &body).text().unwrap();
    assert!(text.contains("took too long") && !text.contains("[DONE]"));
    server.wait_for("flowrun_running", 0.0);
}

#[test]
fn a_server_told_to_stop_finishes_what_is_under_way() {
    let (_project, mut server) = with_adapters(&[]);
    let mut body = chat("tiny", "hello", 1500);
    body["stream"] = true.into();
    let answer = server.ask("/v1/chat/completions", &body);
    server.signal("-TERM");
    let chunks = chunks(answer);
    assert_eq!(
        chunks.last().unwrap()["choices"][0]["finish_reason"],
        "length"
    );
    assert_eq!(server.wait(), Some(0));

    // What does not end in time is cut off.
    let (_project, mut server) = with_adapters(&["--drain", "1"]);
    let _answer = endless(&server);
    server.signal("-TERM");
    assert_eq!(server.wait(), Some(0));
    // And a second signal ends it at once.
    let (_project, mut server) = with_adapters(&["--drain", "3600"]);
    let _answer = endless(&server);
    server.signal("-TERM");
    std::thread::sleep(Duration::from_millis(300));
    server.signal("-TERM");
    assert_eq!(server.wait(), Some(0));
}

#[test]
fn slow_and_oversized_requests_are_refused() {
    let (_project, server) = with_adapters(&["--read-timeout", "1"]);
    // A head that never ends is hung up on.
    let answer = server.raw("GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: ");
    assert!(!answer.contains("200 OK"), "{answer}");
    let head = |length: usize| {
        format!(
            "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        )
    };
    let answer = server.raw(&format!("{}{{", head(20)));
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    // By its head alone: nothing of it is read.
    let answer = server.raw(&head(2 << 20));
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    let mut stream = server.connect();
    let chunked = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";
    stream.write_all(chunked.as_bytes()).unwrap();
    let chunk = format!("10000\r\n{}\r\n", "x".repeat(1 << 16));
    for _ in 0..20 {
        // The server stops reading at its limit, and may hang up before all is sent.
        if stream.write_all(chunk.as_bytes()).is_err() {
            break;
        }
    }
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer);
    assert!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 413"),
        "{answer}"
    );
    let huge = format!(
        "GET /health HTTP/1.1\r\nHost: localhost\r\n{}: x\r\n\r\n",
        "h".repeat(400_000)
    );
    let answer = server.raw(&huge);
    assert!(!answer.contains("200 OK"), "{answer}");
    assert_eq!(
        server.metric("flowrun_refused_total{reason=\"slow_request\"}"),
        1.0
    );
    assert_eq!(
        server.metric("flowrun_refused_total{reason=\"too_large\"}"),
        2.0
    );
    server.json("/v1/chat/completions", &chat("tiny", "still there", 2));
}

#[test]
fn only_those_who_may_are_answered() {
    let project = Project::new();
    write_model(&project.path("tiny"), 1);
    let (_, open) = with_adapters(&[]);
    let get = |host: &str| {
        let request = client()
            .get(format!("{}/v1/models", open.url))
            .header("host", host);
        request.send().unwrap().status().as_u16()
    };
    assert_eq!((get("evil.example"), get("localhost")), (403, 200));
    // A form can send no JSON, and another site's page nothing at all, nor be told that it may.
    let form = || {
        client()
            .post(format!("{}/v1/chat/completions", open.url))
            .header("content-type", "text/plain")
            .body(chat("tiny", "a", 1).to_string())
    };
    assert_eq!(form().send().unwrap().status(), 415);
    let cross = form().header("origin", "http://evil.example");
    let cross = cross.send().unwrap();
    assert_eq!(cross.status(), 403);
    assert!(
        !cross
            .headers()
            .keys()
            .any(|name| name.as_str().starts_with("access-control"))
    );

    let mut command = project.command(&["serve", "tiny", "-v"]);
    command.env("FLOWRUN_API_KEY", "sk-secret-1");
    let locked = Server::start(command);
    let ask = |key: Option<&str>| {
        let mut request = client().get(format!("{}/v1/models", locked.url));
        if let Some(key) = key {
            request = request.bearer_auth(key);
        }
        request.send().unwrap().status().as_u16()
    };
    assert_eq!(ask(None), 401);
    assert_eq!(ask(Some("sk-secret-2")), 401);
    assert_eq!(ask(Some("sk-secret-1")), 200);
    assert_eq!(locked.get("/health/ready").status(), 200);
    assert_eq!(locked.get("/metrics").status(), 401);

    let fails = |args: &[&str]| {
        let mut command = project.command(&["serve", "tiny"]);
        command.args(args).env_remove("FLOWRUN_API_KEY");
        Run::of(command.output().unwrap())
    };
    let everywhere = fails(&["--host", "0.0.0.0"]);
    assert_eq!(everywhere.code, Some(2), "{}", everywhere.stderr);
    assert!(everywhere.stderr.contains("FLOWRUN_API_KEY"));
    let port = open.url.rsplit_once(':').unwrap().1;
    let taken = fails(&["--port", port]);
    assert_eq!(taken.code, Some(1));
    assert!(
        taken.stderr.contains("choose another --port"),
        "{}",
        taken.stderr
    );
}

#[test]
fn a_key_is_never_logged() {
    let project = Project::new();
    write_model(&project.path("tiny"), 1);
    let log = project.path("log");
    let mut command = project.command(&["serve", "tiny", "-v"]);
    command
        .env("FLOWRUN_API_KEY", "sk-secret-1")
        .env("FLOWRUN_LOG", "trace")
        .args(["--port", "0"])
        .stderr(std::fs::File::create(&log).unwrap());
    let mut child = command.spawn().unwrap();
    let url = loop {
        let text = std::fs::read_to_string(&log).unwrap();
        if let Some((_, rest)) = text.split_once("served at ") {
            break rest.split(';').next().unwrap().to_owned();
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let ask = |key: &str| {
        client()
            .get(format!("{url}/v1/models"))
            .bearer_auth(key)
            .send()
    };
    assert_eq!(ask("sk-secret-1").unwrap().status(), 200);
    assert_eq!(ask("sk-wrong-1").unwrap().status(), 401);
    let stopped = Command::new("kill").arg(child.id().to_string()).status();
    assert!(stopped.unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let text = std::fs::read_to_string(&log).unwrap();
    assert!(
        !text.contains("sk-secret") && !text.contains("sk-wrong"),
        "{text}"
    );
}

#[test]
fn a_load_is_measured() {
    let bundle = serve(
        &DEPLOYED,
        &["bundle", "--max-batch", "2", "--max-queue", "1"],
    );
    let bench = |url: &str, more: &[&str]| {
        let args = [&["bench", "serve", url, "--seconds", "1"], more].concat();
        DEPLOYED.run(&args)
    };
    let run = bench(&bundle.url, &["--clients", "1,8", "--json"]).ok();
    let said: Value = serde_json::from_str(&run.stdout).unwrap();
    let rows = said["measured"].as_array().unwrap();
    assert_eq!((rows.len(), &rows[1]["clients"]), (2, &json!(8)));
    let asked = bundle.metric("flowrun_requests_total{path=\"/predict\",status=\"200\"}");
    let answered: f64 = rows
        .iter()
        .map(|row| row["answered"].as_f64().unwrap())
        .sum();
    assert!(
        answered > 1.0 && (asked - answered).abs() < 0.5,
        "{asked} {said}"
    );
    // Eight clients and three places.
    let refused = bundle.metric("flowrun_refused_total{reason=\"queue_full\"}");
    let told = rows[1]["refused"].as_f64().unwrap();
    assert!(
        told > 0.0 && (refused - told).abs() < 0.5,
        "{refused} {said}"
    );
    for row in rows {
        assert_eq!(row["failed"], 0, "{row}");
        let at = |name: &str| row[name].as_f64().unwrap();
        assert!(at("p50_ms") > 0.0 && at("p50_ms") <= at("p95_ms") && at("p95_ms") <= at("p99_ms"));
        assert!(at("memory_most_mb") > 1.0 && at("cpu_ms_per_query") > 0.0);
    }
    // A base model alone is chatted with.
    let (_project, server) = with_adapters(&[]);
    let run = bench(&server.url, &["--clients", "2"]).ok();
    assert!(run.stdout.starts_with("| clients |"), "{}", run.stdout);
    assert!(run.stdout.contains("\n| 2 | "), "{}", run.stdout);
    let nobody = bench("http://127.0.0.1:9", &[]);
    assert_eq!(nobody.code, Some(2), "{}", nobody.stderr);
}
