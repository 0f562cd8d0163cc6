//! `doctor`: what a machine lacks.

use serde_json::Value;

use crate::project::{Project, Run};
use crate::receiver::Receiver;

/// A server that answers every request with one status and JSON text.
fn server(status: u16, body: &'static str) -> String {
    let server = Receiver::start(move |_, _| (status, body.to_owned()));
    format!("{}/v1", server.url)
}

#[test]
fn the_doctor_says_what_is_missing() {
    let project = Project::shell();
    let fine = project.run(&["doctor", "pipeline.yaml"]).ok();
    for what in ["machine", "cache", "disk", "pipeline"] {
        assert!(fine.stdout.contains(what), "{what} in\n{}", fine.stdout);
    }
    assert!(!project.path(".flowrun").exists(), "it only looks");

    let list = r#"{"object":"list","data":[{"id":"there","object":"model"}]}"#;
    let url = server(200, list);
    let models = |model: &str, url: &str| {
        let spec = format!(
            "{{ provider: openai, base_url: \"{url}\", model: {model}, api_key_env: ORACLE_KEY }}"
        );
        let weights = "{ provider: embedded, weights: { file: nowhere.gguf } }";
        format!(
            "name: m\nmodels:\n  oracle: {spec}\n  student: {weights}\nsteps:\n  s:\n    run: echo > \"$o\"\n    out: {{ o: o }}\n"
        )
    };
    let doctor = |yaml: &str, key: Option<&str>| {
        project.write("models.yaml", yaml);
        let mut command = project.command(&["doctor", "models.yaml", "--json"]);
        command.env_remove("ORACLE_KEY");
        command.envs(key.map(|key| ("ORACLE_KEY", key)));
        let run = Run::of(command.output().unwrap());
        let found: Value = serde_json::from_str(&run.stdout).unwrap();
        (run.code, found)
    };
    let status = |found: &Value, text: &str| {
        let all = found.as_array().unwrap();
        let one = all
            .iter()
            .find(|f| f["text"].as_str().unwrap().contains(text));
        assert!(one.is_some(), "{text} in {found:#}");
        one.unwrap()["status"].clone()
    };
    let (code, found) = doctor(&models("there", &url), None);
    assert_eq!(code, Some(3));
    assert_eq!(status(&found, "`ORACLE_KEY` is not set"), "missing");
    assert_eq!(status(&found, "serves `there`"), "ok");
    assert_eq!(status(&found, "nowhere.gguf"), "missing");
    let (_, found) = doctor(&models("other", &url), Some("k"));
    assert_eq!(status(&found, "`ORACLE_KEY` is set"), "ok");
    assert_eq!(status(&found, "does not serve `other`"), "missing");
    let (_, found) = doctor(&models("there", "http://127.0.0.1:9/v1"), Some("k"));
    assert_eq!(status(&found, "does not answer"), "missing");
    // In vLLM's words.
    let wary = server(401, r#"{"error":"Unauthorized"}"#);
    let (_, found) = doctor(&models("there", &wary), Some("k"));
    assert_eq!(status(&found, "it says 401"), "missing");
    let found = found.to_string();
    assert!(found.contains("correct the key"), "{found}");

    project.edit(
        "pipeline.yaml",
        "in: { words: strip.stripped }",
        "in: { words: strip.strapped }",
    );
    let wrong = project.run(&["doctor", "pipeline.yaml"]);
    assert_eq!(wrong.code, Some(3));
    assert!(wrong.stdout.contains("strip.stripped"), "{}", wrong.stdout);
    project.write("file", "");
    assert_eq!(
        project.run(&["doctor", "--cache-dir", "file/x"]).code,
        Some(6)
    );
}
