//! The program of a bundle, asked for predictions.

use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use super::{DEPLOYED, serve};
use crate::processes::signal;
use crate::required::skip;
use crate::tiny;

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
    signal("-TERM", child.id());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    // The shell's word for a command that is not there.
    if asked.status.code() == Some(127) {
        skip("curl", "there is no curl");
        return;
    }
    let said = String::from_utf8_lossy(&asked.stdout);
    assert!(asked.status.success(), "{told}: {said}");
    let answer: Value = serde_json::from_str(&said).unwrap();
    assert!(answer["label"].is_string(), "{answer}");
}
