//! The target `hugging-face`: `transformers` loads what it writes, and counts tokens as the server
//! does. `FLOWRUN_TRANSFORMERS_PYTHON` names a Python that has it; else `python3` is tried.

use std::process::Command;

use serde_json::{Value, json};

use crate::external::set;
use crate::required::skip;
use crate::server::Server;
use crate::tiny;

/// Prints how many tokens each chat has.
const COUNT: &str = "
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
for text in json.loads(sys.argv[2]):
    chat = [{'role': 'user', 'content': text}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    print(len(tokenizer(prompt, add_special_tokens=False)['input_ids']), tokenizer.eos_token)
";

#[test]
fn a_gguf_models_tokenizer_is_exported_for_transformers() {
    let project = tiny::project();
    let weights = concat!(env!("CARGO_MANIFEST_DIR"), "/model/parity/tiny/mixed.gguf");
    std::fs::copy(weights, project.path("mixed.gguf")).unwrap();
    project.edit("pipeline.yaml", "{ file: tiny }", "{ file: mixed.gguf }");
    project.run(&["pipeline.yaml"]).ok();
    let render = [
        "deploy",
        "render",
        "bundle",
        "--target",
        "hugging-face",
        "-o",
        "hub",
    ];
    let run = project.run(&render).ok();
    assert!(run.stdout.contains("hub/tokenizer.json"), "{}", run.stdout);
    let config: Value = serde_json::from_str(&project.read("hub/tokenizer_config.json")).unwrap();
    assert_eq!(config["eos_token"], "<|im_end|>");
    assert!(
        config["chat_template"]
            .as_str()
            .unwrap()
            .contains("<|im_start|>")
    );

    let texts = [
        "my card",
        "12 cards, 3456 €",
        "a  b\n\nc 😀",
        "I'll say: it's",
    ];
    let named = set("FLOWRUN_TRANSFORMERS_PYTHON");
    let python = named.clone().unwrap_or_else(|| "python3".into());
    let counted = Command::new(python)
        .args(["-c", COUNT])
        .arg(project.path("hub"))
        .arg(json!(texts).to_string())
        .env("HF_HUB_OFFLINE", "1")
        .output();
    let counted = match counted {
        Ok(counted) if counted.status.success() => counted,
        Ok(failed) if named.is_some() => panic!("{}", String::from_utf8_lossy(&failed.stderr)),
        _ => {
            let why = "no Python has `transformers`; name one in FLOWRUN_TRANSFORMERS_PYTHON";
            skip("transformers", why);
            return;
        }
    };
    let mut command = project.command(&["serve", "bundle"]);
    command.env_remove("FLOWRUN_API_KEY");
    let server = Server::start(command);
    let ours = texts.map(|text| {
        let chat = json!({"model": server.model, "max_tokens": 1,
            "messages": [{"role": "user", "content": text}]});
        let answer = server.json("/v1/chat/completions", &chat);
        format!("{} <|im_end|>", answer["usage"]["prompt_tokens"])
    });
    let theirs = String::from_utf8(counted.stdout).unwrap();
    assert_eq!(theirs.lines().collect::<Vec<_>>(), ours);
}
