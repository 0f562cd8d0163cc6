//! Adapters over one base model: loaded when asked for, and from allowed folders alone.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::{ids, serve, with_adapters};
use crate::server::{Server, chat, content};
use crate::tiny::write_adapter;

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
