//! OpenAI's API: chats and completions, whole and streamed, drawn and restricted.

use serde_json::{Value, json};

use super::{ids, serve, with_adapters};
use crate::project::Project;
use crate::server::{Server, chat, chunks, content};
use crate::tiny::{self, write_adapter, write_model};

/// A chat template that adds five characters, which are tokens, where it is told not to think.
const TEMPLATE: &str = "{% for m in messages %}{{ m.content }}{% endfor %}\
    {% if enable_thinking is defined and not enable_thinking %}12345{% endif %}";

#[test]
fn an_adapter_is_told_what_it_was_trained_with() {
    let project = tiny::project();
    project.write("tiny/chat_template.jinja", TEMPLATE);
    write_adapter(&project.path("adapters/told"), 11);
    write_adapter(&project.path("adapters/unsaid"), 12);
    let checkpoint = json!({
        "version": 2, "name": "epochs-1-total-trained-steps-8", "epoch": 1, "step": 8,
        "chat_template_kwargs": {"enable_thinking": true},
    });
    project.write("adapters/told/checkpoint.json", &checkpoint.to_string());
    let usual = r#"{"enable_thinking": false}"#;
    let usual = ["--default-chat-template-kwargs", usual];
    let server = serve(
        &project,
        &[["tiny", "--adapters", "adapters"].as_slice(), &usual].concat(),
    );
    let tokens = |model: &str, told: Value| {
        let mut body = chat(model, "hello", 1);
        body["chat_template_kwargs"] = told;
        let answer = server.json("/v1/chat/completions", &body);
        answer["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    assert_eq!(tokens("tiny", json!({})), 10);
    assert_eq!(tokens("tiny:unsaid", json!({})), 10);
    assert_eq!(tokens("tiny:told", json!({})), 5);
    assert_eq!(tokens("tiny:told", json!({"enable_thinking": false})), 10);
}

#[test]
fn a_chat_template_is_told_what_the_models_entry_and_the_request_say() {
    let project = tiny::project();
    project.write("tiny/chat_template.jinja", TEMPLATE);
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
