//! Students that are trained or asked elsewhere: by a server with OpenAI's fine-tuning API, by
//! another program, and as adapters on an OpenAI-compatible server. The servers are this program's.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::external::named;
use crate::processes::signal;
use crate::project::{Project, Run};
use crate::server::Server;
use crate::tiny::{self, answers, answers_here, write_adapter, write_model};

/// The student at a server, trained as `backend` says, every checkpoint scored.
fn project(server: &Server, backend: &str, adapters: &str) -> Project {
    let project = tiny::project();
    let student = format!(
        "  student:\n    provider: openai\n    base_url: {}/v1\n    model: tiny\n    guided: vllm\n{adapters}",
        server.url
    );
    tiny::train(
        &project,
        Some(&student),
        &format!("backend:\n        {backend}"),
    );
    project
}

/// A server of the tiny model that trains, working in `project`.
fn trainer(project: &Project) -> Server {
    let mut command = project.command(&["serve", "tiny", "--fine-tuning", "tuning"]);
    command.env_remove("FLOWRUN_API_KEY");
    Server::start(command)
}

fn home() -> Project {
    let project = Project::new();
    write_model(&project.path("tiny"), 1);
    project
}

const OPENAI: &str = "openai: { poll_s: 0.1, suffix: intents, hyperparameters: { learning_rate: 0.01, lora_rank: 2 } }";

/// A project whose training takes a while.
fn slow_project(server: &Server) -> Project {
    let project = project(server, OPENAI, "");
    project.edit("pipeline.yaml", "epochs: 2", "epochs: 80");
    project.edit("pipeline.yaml", "batch_size: 4", "batch_size: 1");
    project
}

fn jobs(server: &Server) -> Vec<Value> {
    let listed: Value = server.get("/v1/fine_tuning/jobs").json().unwrap();
    listed["data"].as_array().unwrap().clone()
}

/// The models of the server besides its base.
fn adapters(server: &Server) -> Vec<String> {
    let models: Value = server.get("/v1/models").json().unwrap();
    let models = models["data"].as_array().unwrap().iter();
    let ids = models.map(|model| model["id"].as_str().unwrap().to_owned());
    ids.filter(|id| id != "tiny").collect()
}

#[test]
fn a_server_trains_and_every_checkpoint_is_scored_there() {
    let home = home();
    let server = trainer(&home);
    let project = project(&server, OPENAI, "");
    let run = project.run(&["--json", "pipeline.yaml"]).ok();
    let scored = run
        .steps("ran")
        .into_iter()
        .filter(|step| step.starts_with("score["));
    let scored: Vec<String> = scored.collect();
    assert_eq!(scored.len(), 3, "{scored:?}");
    let jobs = jobs(&server);
    assert_eq!(jobs.len(), 1);
    assert_eq!(jobs[0]["status"], "succeeded");
    let models = adapters(&server);
    assert_eq!(models.len(), 2, "{models:?}");
    assert!(
        models
            .iter()
            .all(|id| id.starts_with("tiny:intents-epochs-"))
    );
    assert!(models.contains(&jobs[0]["fine_tuned_model"].as_str().unwrap().to_owned()));
    // Each answered as itself.
    for id in models.iter().map(String::as_str).chain(["tiny"]) {
        let body =
            json!({"model": id, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4});
        assert_eq!(server.json("/v1/chat/completions", &body)["model"], id);
    }
    assert_eq!(
        project
            .run(&["--json", "pipeline.yaml"])
            .ok()
            .steps("ran")
            .len(),
        0
    );
    // A lost cache does not train again what the server has.
    std::fs::remove_dir_all(project.path(".flowrun")).unwrap();
    let again = project.run(&["--json", "pipeline.yaml"]).ok();
    assert!(again.steps("ran").contains(&"finetune".to_owned()));
    assert_eq!(self::jobs(&server).len(), 1);
}

#[test]
fn a_job_outlives_a_kill_of_the_run_and_of_the_server() {
    job_outlives_kills(true);
}

#[test]
fn a_job_whose_run_was_killed_before_it_heard_of_it_is_found_at_the_servers_new_address() {
    job_outlives_kills(false);
}

/// `heard`: the run has written down which job it is.
fn job_outlives_kills(heard: bool) {
    let home = home();
    let server = trainer(&home);
    let project = slow_project(&server);
    let started = |server: &Server| {
        let jobs = jobs(server);
        jobs.iter().any(|job| job["status"] == "running")
    };
    let mut run = project
        .command(&["pipeline.yaml"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait(|| started(&server));
    run.kill().unwrap();
    run.wait().unwrap();
    if !heard {
        let saved = std::fs::read_dir(project.path(".flowrun/partial")).unwrap();
        let states = saved.map(|folder| folder.unwrap().path().join("job.json"));
        let states: Vec<_> = states.filter(|state| state.exists()).collect();
        assert_eq!(states.len(), 1);
        std::fs::write(&states[0], "{}").unwrap();
    }
    let id = jobs(&server)[0]["id"].as_str().unwrap().to_owned();
    server.signal("-KILL");
    drop(server);
    // On the same folder, and with the port that the pipeline names.
    let server = trainer(&home);
    let url = format!("{}/v1", server.url);
    let old = project.read("pipeline.yaml");
    let line = old.lines().find(|line| line.contains("base_url")).unwrap();
    project.edit("pipeline.yaml", line, &format!("    base_url: {url}"));
    let run = project
        .run(&["--json", "--until", "finetune", "pipeline.yaml"])
        .ok();
    assert!(run.steps("ran").contains(&"finetune".to_owned()));
    let jobs = jobs(&server);
    assert_eq!(jobs.len(), 1, "{jobs:?}");
    assert_eq!(jobs[0]["id"], id);
    let events: Value = server
        .get(&format!("/v1/fine_tuning/jobs/{id}/events?limit=1000"))
        .json()
        .unwrap();
    let events = events["data"].as_array().unwrap();
    assert!(
        events
            .iter()
            .any(|event| event["message"] == "the server was started again")
    );
    // Every step that was told of is in the curve; one answer lists a part of them alone.
    let told = events
        .iter()
        .filter_map(|event| event["data"]["step"].as_u64());
    let told: BTreeSet<u64> = told.collect();
    let finished = run.ended("finetune");
    let path = finished["outputs"]["loss"]["path"].as_str();
    let loss: Value = serde_json::from_str(&project.read(path.unwrap())).unwrap();
    let points = loss.as_array().unwrap().iter();
    let kept: BTreeSet<u64> = points.filter_map(|point| point["step"].as_u64()).collect();
    assert!(told.len() > 100, "{}", told.len());
    assert_eq!(kept, told);
}

#[test]
fn stopping_the_run_cancels_the_job() {
    let home = home();
    let server = trainer(&home);
    let project = slow_project(&server);
    let mut run = project
        .command(&["pipeline.yaml"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait(|| jobs(&server).iter().any(|job| job["status"] == "running"));
    signal("-INT", run.id());
    assert_eq!(run.wait().unwrap().code(), Some(130));
    let said: Vec<String> = BufReader::new(run.stderr.take().unwrap())
        .lines()
        .map_while(Result::ok)
        .collect();
    assert!(
        said.iter().any(|line| line.contains("was cancelled")),
        "{said:?}"
    );
    wait(|| jobs(&server)[0]["status"] == "cancelled");
    assert!(adapters(&server).is_empty());
}

#[test]
fn the_server_that_trains_takes_on_what_another_one_was_asked_for() {
    let home = home();
    let (first, second) = (trainer(&home), trainer(&home));
    let row = |text: &str| {
        let said = |role: &str, text: &str| json!({"role": role, "content": text});
        json!({"messages": [said("user", text), said("assistant", "yes")]}).to_string()
    };
    let chats: Vec<String> = (0..50).map(|at| row(&format!("text {at}"))).collect();
    let part = reqwest::blocking::multipart::Part::bytes(chats.join("\n").into_bytes());
    let form = reqwest::blocking::multipart::Form::new()
        .text("purpose", "fine-tune")
        .part("file", part.file_name("chats.jsonl"));
    let files = format!("{}/v1/files", second.url);
    let client = crate::server::client();
    let file: Value = (client.post(&files).multipart(form).send().unwrap())
        .json()
        .unwrap();
    let file = file["id"].as_str().unwrap();
    let how = json!({"n_epochs": 100, "batch_size": 1, "lora_rank": 2});
    let order = json!({"model": "tiny", "training_file": file, "hyperparameters": how});
    let job = second.json("/v1/fine_tuning/jobs", &order);
    let path = format!("/v1/fine_tuning/jobs/{}", job["id"].as_str().unwrap());
    let status = || -> Value {
        let job: Value = second.get(&path).json().unwrap();
        job["status"].clone()
    };
    wait(|| status() == "running");
    let (refused, error) = second.problem(&format!("{path}/cancel"), &json!({}));
    assert_eq!((refused, &error["code"]), (409, &json!("not_in_charge")));
    // What it is trained on is needed as long.
    let delete = |server: &Server| {
        let url = format!("{}/v1/files/{file}", server.url);
        client.delete(url).send().unwrap().status().as_u16()
    };
    assert_eq!((delete(&first), delete(&second)), (409, 409));
    first.json(&format!("{path}/cancel"), &json!({}));
    wait(|| status() == "cancelled");
    assert_eq!(delete(&second), 200);
    assert_eq!(delete(&first), 404);
}

fn wait(until: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !until() {
        assert!(Instant::now() < deadline, "it did not come in time");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn wrong_files_and_orders_are_refused_in_openais_shape() {
    let home = home();
    let server = trainer(&home);
    let order = |changes: Value| {
        let mut body = json!({"model": "tiny", "training_file": "file-000000000000000000000000"});
        body.as_object_mut()
            .unwrap()
            .extend(changes.as_object().unwrap().clone());
        server.problem("/v1/fine_tuning/jobs", &body)
    };
    let (status, error) = order(json!({}));
    assert_eq!((status, &error["param"]), (400, &json!("training_file")));
    let upload = |text: &str| {
        let part = reqwest::blocking::multipart::Part::bytes(text.as_bytes().to_vec());
        let form = reqwest::blocking::multipart::Form::new()
            .text("purpose", "fine-tune")
            .part("file", part.file_name("chats.jsonl"));
        let url = format!("{}/v1/files", server.url);
        let answer = crate::server::client()
            .post(url)
            .multipart(form)
            .send()
            .unwrap();
        (answer.status().as_u16(), answer.json::<Value>().unwrap())
    };
    for bad in [
        "",
        "no json",
        "{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}",
    ] {
        let (status, body) = upload(bad);
        assert_eq!(status, 400, "{bad}: {body}");
        let message = body["error"]["message"].as_str().unwrap();
        assert!(!message.contains("tuning/"), "{message}");
    }
    let chat = r#"{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}"#;
    let (status, file) = upload(chat);
    assert_eq!((status, &file["status"]), (200, &json!("processed")));
    let id = file["id"].as_str().unwrap();
    assert_eq!(
        server
            .get(&format!("/v1/files/{id}/content"))
            .text()
            .unwrap(),
        chat
    );
    for changes in [
        json!({"model": "other"}),
        json!({"validation_file": id}),
        json!({"suffix": "../up"}),
        json!({"method": {"type": "dpo"}}),
        json!({"hyperparameters": {"n_epochs": 0}}),
        json!({"hyperparameters": {"what": 1}}),
        json!({"hyperparameters": {"learning_rate": -1.0}}),
    ] {
        let mut changes = changes;
        changes["training_file"] = changes.get("training_file").cloned().unwrap_or(json!(id));
        assert_eq!(order(changes.clone()).0, 400, "{changes}");
    }
    assert_eq!(server.get("/v1/files/..%2F..%2Fetc").status(), 404);
    assert_eq!(server.get("/v1/fine_tuning/jobs/ftjob-1").status(), 404);
    let plain = crate::serving::with_adapters(&[]);
    assert_eq!(plain.1.get("/v1/files").status(), 404);
}

/// A stand-in for a trainer on a machine without Python: it holds the contract, which is the
/// config that it is given and the folders that the Trainer of `transformers` leaves.
const STAND_IN: &str = r#"
set -eu
test "$1 $2" = "sft --config"
out=$(sed -n 's/^output_dir: //p' "$3")
grep -q '^model_name_or_path: some/base$' "$3"
grep -q '^lora_r: 16$' "$3"
grep -q '"completion":\[{' train.jsonl
for step in 3 6; do
  mkdir -p "$out/checkpoint-$step"
  cp "$ADAPTERS/$step"/* "$out/checkpoint-$step"
  echo "{\"epoch\": $((step / 3)).0, \"log_history\": [{\"step\": $step, \"epoch\": $((step / 3)).0, \"loss\": 0.5}]}" > "$out/checkpoint-$step/trainer_state.json"
  echo "{'loss': '0.5', 'epoch': '$((step / 3)).0'}"
done
"#;

/// The checkpoints that are scored label the same rows.
const LABELLED: &str = r#"
  relabel:
    uses: bootstrap
    foreach: { adapter: [finetune.base, finetune.checkpoints] }
    in: { unlabelled: labels.test, labels: labels.labels, adapter: "${{ item.adapter }}" }
    with: { program: classify, model: student, sampling: { max_tokens: 8 } }
"#;

fn labels_are_the_scored_answers(project: &Project, run: &Run) {
    let mut events = run.events();
    events.retain(|event| event["event"] == "step_finished");
    let read = |event: &Value, output: &str| {
        let path = event["outputs"][output]["path"].as_str().unwrap();
        project.read(path)
    };
    let answers = |rows: &[Value], answer: &str| -> BTreeMap<String, Value> {
        let rows = rows.iter();
        let answers = rows.map(|row| (row["id"].to_string(), row[answer].clone()));
        answers.collect()
    };
    let mut compared = 0;
    for event in &events {
        let step = event["step"].as_str().unwrap();
        let Some(item) = step.strip_prefix("relabel") else {
            continue;
        };
        let lines = read(event, "rows") + &read(event, "dropped");
        let rows = lines
            .lines()
            .map(|line| serde_json::from_str(line).unwrap());
        let rows: Vec<Value> = rows.collect();
        let scored = run.ended(&format!("score{item}"));
        let scores: Value = serde_json::from_str(&read(&scored, "scores")).unwrap();
        let scored = scores["programs"][0]["rows"].as_array().unwrap();
        let said = answers(&rows, "sanitised_label");
        assert_eq!(said, answers(scored, "predicted"), "{step}");
        compared += 1;
    }
    assert_eq!(compared, 3);
}

#[test]
fn another_programs_adapters_are_scored_at_a_server_as_in_this_process() {
    let home = home();
    let mut command = home.command(&["serve", "tiny", "--adapters", "adapters"]);
    std::fs::create_dir_all(home.path("adapters")).unwrap();
    command.env_remove("FLOWRUN_API_KEY");
    let server = Server::start(command);
    let place = |load: bool| {
        let folder = home.path("adapters");
        format!(
            "    adapters: {{ folder: {}, load: {load} }}\n",
            folder.display()
        )
    };
    let backend = "command: { trainer: trl, program: [sh, trainer.sh], base: some/base }";
    for load in [true, false] {
        let project = project(&server, backend, &place(load));
        write_adapter(&project.path("made/3"), 21);
        write_adapter(&project.path("made/6"), 22);
        let script = format!("ADAPTERS={}\n{STAND_IN}", project.path("made").display());
        project.write("trainer.sh", &script);
        let trainer = project.path("trainer.sh");
        project.edit(
            "pipeline.yaml",
            "trainer.sh",
            &trainer.display().to_string(),
        );
        project.write("pipeline.yaml", &(project.read("pipeline.yaml") + LABELLED));
        let run = project.run(&["--json", "pipeline.yaml"]).ok();
        let elsewhere = answers(&project, &run);
        assert_eq!(elsewhere.len(), 3);
        assert_eq!(adapters(&server).len(), 2);
        labels_are_the_scored_answers(&project, &run);
        // The same adapters over the same base in this process.
        assert_eq!(answers_here(&project), elsewhere);
    }
}

/// The tiny model's loss on the six chats before it has learnt anything, per token: on the answers
/// with the token that ends a turn, which is what this process trains on.
const LEARNS_THE_ANSWER: f64 = 5.206_97;
/// The same with the line end that the template writes after that token; said by TRL and by
/// LLaMA-Factory alike.
const LEARNS_THE_LINE_END: f64 = 5.265_66;

#[test]
fn this_process_learns_the_answers() {
    let project = tiny::project();
    tiny::with_chat_template(&project.path("tiny"));
    tiny::train(&project, None, AT_ONCE);
    assert_first_loss(&project, LEARNS_THE_ANSWER);
}

/// All rows in a step, which changes next to nothing.
const AT_ONCE: &str = "learning_rate: 0.0000001";

/// The real thing, where `FLOWRUN_TRL` names TRL's command.
#[test]
fn trl_trains_and_its_checkpoints_answer() {
    if let Some(trl) = named("FLOWRUN_TRL", "`trl` (pip install trl peft)") {
        trains(&trl, "trainer: trl", LEARNS_THE_LINE_END);
    }
}

/// The same of LLaMA-Factory, whose template of this name is ChatML.
#[test]
fn llama_factory_trains_and_its_checkpoints_answer() {
    let what = "`llamafactory-cli` (pip install llamafactory)";
    if let Some(program) = named("FLOWRUN_LLAMA_FACTORY", what) {
        let trainer = "trainer: llama-factory, template: chatml";
        trains(&program, trainer, LEARNS_THE_LINE_END);
    }
}

/// The same of axolotl.
#[test]
fn axolotl_trains_and_its_checkpoints_answer() {
    let what = "`axolotl` (pip install axolotl)";
    if let Some(program) = named("FLOWRUN_AXOLOTL", what) {
        // Its own kernels are for GPUs.
        let plain = "lora_mlp_kernel: false, lora_qkv_kernel: false, lora_o_kernel: false";
        let trainer = format!("trainer: axolotl, config: {{ {plain} }}");
        trains(&program, &trainer, LEARNS_THE_ANSWER);
    }
}

/// A program trains the tiny model for six epochs, on the CPU; a server is handed all checkpoints
/// and answers with them. Its first loss says which tokens it learns.
fn trains(program: &Path, trainer: &str, first_loss: f64) {
    assert!(program.is_file(), "{} is no file", program.display());
    let home = home();
    // The programs write conversations with the model's own template.
    tiny::with_chat_template(&home.path("tiny"));
    std::fs::create_dir_all(home.path("adapters")).unwrap();
    let mut command = home.command(&["serve", "tiny", "--adapters", "adapters"]);
    command.env_remove("FLOWRUN_API_KEY");
    let server = Server::start(command);
    let backend = format!(
        "command: {{ {trainer}, program: [{}], base: {}, precision: f32, micro_batch: 6, env: {{ CUDA_VISIBLE_DEVICES: '', AXOLOTL_DO_NOT_TRACK: '1' }} }}\n      {AT_ONCE}",
        program.display(),
        home.path("tiny").display()
    );
    let folder = home.path("adapters");
    let place = format!(
        "    adapters: {{ folder: {}, load: true }}\n",
        folder.display()
    );
    let project = project(&server, &backend, &place);
    project.edit("pipeline.yaml", "epochs: 2", "epochs: 6");
    let run = assert_first_loss(&project, first_loss);
    assert_eq!(answers(&project, &run).len(), 7);
    assert_eq!(adapters(&server).len(), 6);
}

/// Runs the project with all rows in each step: the first of its losses is `expected`.
fn assert_first_loss(project: &Project, expected: f64) -> Run {
    project.edit("pipeline.yaml", "batch_size: 4", "batch_size: 6");
    let run = project.run(&["--json", "pipeline.yaml"]).ok();
    let trained = run.ended("finetune");
    let path = trained["outputs"]["loss"]["path"].as_str().unwrap();
    let points: Value = serde_json::from_str(&project.read(path)).unwrap();
    let points = points.as_array().unwrap();
    let losses: Vec<f64> = points.iter().map(|p| p["loss"].as_f64().unwrap()).collect();
    assert!(
        losses.len() > 1 && (losses[0] - expected).abs() < 1e-4,
        "{losses:?}"
    );
    run
}
