//! A server that forgets adapters while a step asks it, and the job that this may not stop: the
//! adapter is loaded again, and no row is asked for twice.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::project::{Project, Run};
use crate::receiver::Receiver;
use crate::server::patient_client;
use crate::tiny;

/// What was asked of the server behind it.
#[derive(Default)]
struct Counts {
    /// Whole answers, by model and prompt.
    answers: BTreeMap<String, usize>,
    loads: usize,
    unloads: usize,
}

/// Stands before a server of the model `tiny`, and unloads an adapter after each second answer that
/// it gave, twice.
struct Forgetful {
    upstream: String,
    counts: Mutex<Counts>,
}

impl Forgetful {
    fn start(upstream: &str) -> (Arc<Self>, String) {
        let own = Arc::new(Self {
            upstream: upstream.to_owned(),
            counts: Mutex::default(),
        });
        let forgetful = Arc::clone(&own);
        let server = Receiver::start(move |_, sent| {
            let body = serde_json::from_slice::<Value>(&sent.body);
            // Status 0 hangs up.
            body.map_or((0, String::new()), |body| own.answer(&sent.path, &body))
        });
        (forgetful, format!("{}/v1", server.url))
    }

    fn answer(&self, path: &str, body: &Value) -> (u16, String) {
        // One at a time, so that what is unloaded is so before the next request.
        let mut counts = self.counts.lock().unwrap();
        let (status, text) = self.post(path, body);
        if path.ends_with("load_lora_adapter") && status == 200 {
            counts.loads += 1;
        }
        if path.ends_with("chat/completions") && status == 200 {
            let asked = format!("{} {}", body["model"], body["messages"]);
            *counts.answers.entry(asked).or_default() += 1;
            let model = body["model"].as_str().unwrap_or_default();
            let of_model = format!("\"{model}\" ");
            let all = counts.answers.keys();
            let answered = all.filter(|asked| asked.starts_with(&of_model)).count();
            if model != "tiny" && answered.is_multiple_of(2) && answered <= 4 {
                let name = json!({"lora_name": model});
                assert_eq!(self.post("/v1/unload_lora_adapter", &name).0, 200);
                counts.unloads += 1;
            }
        }
        (status, text)
    }

    fn post(&self, path: &str, body: &Value) -> (u16, String) {
        let url = format!("{}{path}", self.upstream);
        let answer = patient_client().post(url).json(body).send().unwrap();
        (answer.status().as_u16(), answer.text().unwrap())
    }
}

/// Has the server at `upstream` (`flowrun` or `vllm`) forget adapters, while the base and the two
/// checkpoints that a back end makes are scored there. Those are put into the folder `given`.
pub(crate) fn scored(
    upstream: &str,
    kind: &str,
    given: &Path,
    backend: impl Fn(&Project) -> String,
) -> (Project, Run) {
    let (forgetful, url) = Forgetful::start(upstream);
    let project = tiny::project();
    let student = format!(
        "  student:\n    provider: openai\n    base_url: {url}\n    model: tiny\n    guided: vllm\n    adapters: {{ folder: {}, load: true, server: {kind} }}\n",
        given.display()
    );
    tiny::train(&project, Some(&student), &backend(&project));
    // Room for a whole label, of which each byte is a token.
    project.edit("pipeline.yaml", "max_tokens: 8", "max_tokens: 64");

    let run = project.run(&["--json", "pipeline.yaml"]).ok();
    let scored = run.steps("ran");
    let scored = scored.iter().filter(|step| step.starts_with("score["));
    assert_eq!(scored.count(), 3);
    let events = run.events();
    let warned = events.iter().filter_map(|event| event["text"].as_str());
    let warned = warned.filter(|text| text.contains("the server had forgotten `tiny:"));
    assert_eq!(warned.count(), 2, "once for each checkpoint");
    let counts = forgetful.counts.lock().unwrap();
    assert!(counts.unloads >= 2, "{}", counts.unloads);
    // The first time, and once for each time that it was asked for after it was unloaded.
    assert!(counts.loads > 2, "{}", counts.loads);
    assert!(
        counts.answers.values().all(|times| *times == 1),
        "{:?}",
        counts.answers
    );
    drop(counts);
    (project, run)
}
