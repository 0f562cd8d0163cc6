//! `flowrun serve --batches`: OpenAI's Batch API, asked by our own client and by hand.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::label_job::{all_there, project, run};
use crate::mount::Mount;
use crate::project::Project;
use crate::server::{Server, chat, client};
use crate::tiny::write_model;

const ROWS: usize = 40;

/// A server of the tiny model that answers batches, working in `home`.
fn start(home: &Project, more: &[&str]) -> Server {
    let mut command = home.command(&["serve", "tiny", "--batches", "kept"]);
    command.args(more).env_remove("FLOWRUN_API_KEY");
    Server::start(command)
}

fn home() -> Project {
    let home = Project::new();
    write_model(&home.path("tiny"), 1);
    home
}

fn upload(server: &Server, purpose: &str, bytes: Vec<u8>) -> (u16, Value) {
    let part = reqwest::blocking::multipart::Part::bytes(bytes);
    let form = reqwest::blocking::multipart::Form::new()
        .text("purpose", purpose.to_owned())
        .part("file", part.file_name("requests.jsonl"));
    let url = format!("{}/v1/files", server.url);
    let answer = client().post(url).multipart(form).send().unwrap();
    (answer.status().as_u16(), answer.json().unwrap())
}

/// Uploads requests; the file's id.
fn file(server: &Server, text: &str) -> String {
    let (status, file) = upload(server, "batch", text.as_bytes().to_vec());
    assert_eq!(status, 200, "{file}");
    file["id"].as_str().unwrap().to_owned()
}

/// A request for a chat of so many tokens.
fn request(name: &str, model: &str, tokens: u32) -> String {
    json!({
        "custom_id": name, "method": "POST", "url": "/v1/chat/completions",
        "body": chat(model, name, tokens),
    })
    .to_string()
}

fn order(file: &str) -> Value {
    json!({
        "input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h",
    })
}

/// Asks for a file to be deleted; the status of the answer.
fn deleted(server: &Server, id: &str) -> u16 {
    let url = format!("{}/v1/files/{id}", server.url);
    client().delete(url).send().unwrap().status().as_u16()
}

/// Orders a batch; its id.
fn ordered(server: &Server, text: &str) -> String {
    let batch = server.json("/v1/batches", &order(&file(server, text)));
    assert_eq!(batch["object"], "batch");
    batch["id"].as_str().unwrap().to_owned()
}

fn look(server: &Server, id: &str) -> Value {
    server.get(&format!("/v1/batches/{id}")).json().unwrap()
}

fn wait(until: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !until() {
        assert!(Instant::now() < deadline, "it did not come in time");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits for the end of a batch.
fn ended(server: &Server, id: &str) -> Value {
    let ends = ["completed", "failed", "expired", "cancelled"];
    wait(|| ends.contains(&look(server, id)["status"].as_str().unwrap()));
    look(server, id)
}

/// The lines of a file, which has each name once.
fn lines(server: &Server, id: &Value) -> BTreeMap<String, Value> {
    let id = id.as_str().unwrap();
    let text = server.get(&format!("/v1/files/{id}/content"));
    let text = text.text().unwrap();
    let named = |line: &str| {
        let line: Value = serde_json::from_str(line).unwrap();
        (line["custom_id"].as_str().unwrap().to_owned(), line)
    };
    let all: BTreeMap<String, Value> = text.lines().map(named).collect();
    assert_eq!(all.len(), text.lines().count());
    all
}

#[test]
fn our_own_client_hears_what_it_hears_one_by_one() {
    let home = home();
    let server = start(&home, &[]);
    let url = format!("{}/v1", server.url);
    let labelled = |more: &str| -> BTreeSet<(String, String)> {
        let project = project(ROWS, &url, "tiny", more);
        run(&project).ok();
        all_there(&project, ROWS);
        let rows = project.read("rows.jsonl");
        let row = |line: &str| {
            let row: Value = serde_json::from_str(line).unwrap();
            let text = |name: &str| row[name].as_str().unwrap().to_owned();
            (text("text"), text("label"))
        };
        rows.lines().map(row).collect()
    };
    let batched = labelled(", batch: true");
    assert_eq!(batched.len(), ROWS);
    let listed: Value = server.get("/v1/batches").json().unwrap();
    let batches = listed["data"].as_array().unwrap();
    assert_eq!(batches.len(), 1);
    assert_eq!(batches[0]["status"], "completed");
    let counts = json!({"total": ROWS, "completed": ROWS, "failed": 0});
    assert_eq!(batches[0]["request_counts"], counts);
    assert_eq!(lines(&server, &batches[0]["output_file_id"]).len(), ROWS);
    assert_eq!(batches[0]["error_file_id"], Value::Null);
    assert_eq!(labelled(""), batched);
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn a_batch_outlives_its_servers_and_no_answer_is_made_twice() {
    const TOKENS: u32 = 1000;
    let home = home();
    let server = start(&home, &["--max-batch", "2"]);
    let requests: Vec<String> = (0..ROWS)
        .map(|row| request(&format!("row {row}"), "tiny", TOKENS))
        .collect();
    let id = ordered(&server, &requests.join("\n"));
    let completed = |server: &Server| {
        let batch = look(server, &id);
        batch["request_counts"]["completed"].as_u64().unwrap()
    };
    wait(|| completed(&server) >= 2);
    assert_eq!(server.stop(), Some(0));

    let server = start(&home, &["--max-batch", "2"]);
    wait(|| completed(&server) >= 5);
    server.signal("-KILL");
    drop(server);

    let server = start(&home, &["--max-batch", "2"]);
    let batch = ended(&server, &id);
    assert_eq!(batch["status"], "completed", "{batch}");
    let counts = json!({"total": ROWS, "completed": ROWS, "failed": 0});
    assert_eq!(batch["request_counts"], counts);
    let answers = lines(&server, &batch["output_file_id"]);
    assert_eq!(answers.len(), ROWS);
    for answer in answers.values() {
        assert_eq!(answer["response"]["status_code"], 200);
        let usage = &answer["response"]["body"]["usage"];
        assert_eq!(usage["completion_tokens"], TOKENS);
    }
    let generated = server.metric("flowrun_generated_tokens_total");
    let rest = (ROWS - 5) as f64 * f64::from(TOKENS);
    assert!(generated > 0.0 && generated <= rest, "{generated}");
}

#[test]
fn others_are_answered_beside_a_batch_and_a_cancelled_one_computes_no_further() {
    let home = home();
    let server = start(&home, &["--max-batch", "2", "--max-queue", "1"]);
    let requests: Vec<String> = (0..6)
        .map(|row| request(&format!("row {row}"), "tiny", 20_000))
        .collect();
    let id = ordered(&server, &requests.join("\n"));
    server.wait_for("flowrun_running", 1.0);
    for _ in 0..5 {
        let answer = server.json("/v1/chat/completions", &chat("tiny", "hello", 4));
        assert_eq!(answer["usage"]["completion_tokens"], 4);
    }
    // One request of a batch at a time, where two rows are computed together.
    server.wait_for("flowrun_running", 1.0);
    let batch = look(&server, &id);
    assert_eq!(batch["status"], "in_progress", "{batch}");
    assert_eq!(batch["output_file_id"], Value::Null);

    let asked = server.json(&format!("/v1/batches/{id}/cancel"), &json!({}));
    assert!(asked["cancelling_at"].is_u64(), "{asked}");
    let batch = ended(&server, &id);
    assert_eq!(batch["status"], "cancelled");
    server.wait_for("flowrun_running", 0.0);
    let left = lines(&server, &batch["error_file_id"]);
    let codes = left.values().map(|line| &line["error"]["code"]);
    assert!(codes.clone().all(|code| code == "batch_cancelled"));
    let done = batch["request_counts"]["completed"].as_u64().unwrap();
    assert_eq!(codes.count() as u64 + done, 6);
    assert!(done < 6, "{batch}");
    // The next one is answered.
    let id = ordered(&server, &request("next", "tiny", 3));
    assert_eq!(ended(&server, &id)["status"], "completed");
}

#[test]
fn what_cannot_be_answered_says_why() {
    let home = home();
    let server = start(&home, &[]);
    let good = request("good", "tiny", 3);
    let id = file(&server, &good);
    for (changes, param) in [
        (
            json!({"input_file_id": "file-000000000000000000000000"}),
            "input_file_id",
        ),
        (json!({"input_file_id": "../up"}), "input_file_id"),
        (json!({"endpoint": "/v1/embeddings"}), "endpoint"),
        (json!({"completion_window": "1h"}), "completion_window"),
    ] {
        let mut body = order(&id);
        let fields = changes.as_object().unwrap().clone();
        body.as_object_mut().unwrap().extend(fields);
        let (status, error) = server.problem("/v1/batches", &body);
        assert_eq!((status, &error["param"]), (400, &json!(param)), "{error}");
    }
    let mut unknown = order(&id);
    unknown["priority"] = "high".into();
    let (status, error) = server.problem("/v1/batches", &unknown);
    assert_eq!(status, 400);
    assert!(error["message"].as_str().unwrap().contains("priority"));
    assert_eq!(server.get("/v1/batches/batch_1").status(), 404);
    assert_eq!(upload(&server, "vision", vec![b'x']).0, 400);
    assert_eq!(upload(&server, "fine-tune", vec![b'x']).0, 404);

    // A line that is none: nothing is answered, and the line is named.
    let id = ordered(&server, &format!("{good}\nno json\n"));
    let batch = ended(&server, &id);
    assert_eq!(batch["status"], "failed");
    assert_eq!(batch["errors"]["data"][0]["line"], 2);
    assert_eq!(batch["errors"]["data"][0]["code"], "invalid_json_line");
    assert_eq!(batch["output_file_id"], Value::Null);

    // A request that cannot be answered does not spoil the others.
    let mut streamed: Value = serde_json::from_str(&request("streamed", "tiny", 3)).unwrap();
    streamed["body"]["stream"] = true.into();
    let other = request("other", "another", 3);
    let id = ordered(&server, &format!("{good}\n{other}\n{streamed}\n"));
    let batch = ended(&server, &id);
    assert_eq!(batch["status"], "completed");
    let counts = json!({"total": 3, "completed": 1, "failed": 2});
    assert_eq!(batch["request_counts"], counts);
    let answers = lines(&server, &batch["output_file_id"]);
    assert_eq!(answers["good"]["response"]["status_code"], 200);
    let errors = lines(&server, &batch["error_file_id"]);
    let answer = |name: &str| errors[name]["response"].clone();
    assert_eq!(answer("other")["status_code"], 404);
    let error = answer("other")["body"]["error"].clone();
    assert_eq!(error["code"], "model_not_found");
    assert_eq!(answer("streamed")["status_code"], 400);
    // As does the same request by itself.
    let (status, alone) = server.problem("/v1/chat/completions", &chat("another", "other", 3));
    assert_eq!((status, alone), (404, error));

    // A file that was answered may be deleted, its answers stay.
    let input = batch["input_file_id"].as_str().unwrap();
    assert_eq!(deleted(&server, input), 200);
    assert_eq!(server.get(&format!("/v1/files/{input}")).status(), 404);
    assert_eq!(lines(&server, &batch["output_file_id"]).len(), 1);

    // Only the files that are asked for, in the order that is asked for.
    let listed = |more: &str| -> Vec<Value> {
        let path = format!("/v1/files?purpose=batch_output{more}");
        let list: Value = server.get(&path).json().unwrap();
        let files = list["data"].as_array().unwrap().iter();
        files.map(|file| file["id"].clone()).collect()
    };
    let newest_first = listed("");
    let mut oldest_first = listed("&order=asc");
    let both = ["output_file_id", "error_file_id"].map(|name| batch[name].clone());
    assert_eq!(newest_first.len(), both.len());
    assert!(both.iter().all(|id| newest_first.contains(id)));
    oldest_first.reverse();
    assert_eq!(oldest_first, newest_first);
    assert_eq!(listed("&order=desc&limit=1"), newest_first[..1]);
    for (path, param) in [
        ("/v1/files?order=up", json!("order")),
        ("/v1/files?limit=many", Value::Null),
        ("/v1/batches?limit=many", Value::Null),
        ("/v1/batches?after=batch_gone", json!("after")),
    ] {
        let refused = server.get(path);
        assert_eq!(refused.status(), 400, "{path}");
        let body: Value = refused.json().unwrap();
        assert_eq!(body["error"]["type"], "invalid_request_error", "{path}");
        assert_eq!(body["error"]["param"], param, "{path}");
    }
    let no_form = server.ask("/v1/files", &json!({}));
    assert_eq!(no_form.status(), 400);
    let body: Value = no_form.json().unwrap();
    assert!(body["error"]["message"].is_string(), "{body}");
}

#[test]
fn a_line_of_many_answers_leaves_room_for_others() {
    let home = home();
    // As many places as the line asks for answers.
    let server = start(&home, &["--max-batch", "2", "--max-queue", "6"]);
    let ordered = |texts: &[&str], answers: u32, tokens: u32| {
        let line = json!({
            "custom_id": "many", "method": "POST", "url": "/v1/completions",
            "body": {
                "model": "tiny", "prompt": texts, "n": answers, "temperature": 0,
                "max_tokens": tokens,
            },
        });
        let mut order = order(&file(&server, &line.to_string()));
        order["endpoint"] = "/v1/completions".into();
        let batch = server.json("/v1/batches", &order);
        batch["id"].as_str().unwrap().to_owned()
    };
    let id = ordered(&["a", "b", "c", "d"], 2, 20_000);
    server.wait_for("flowrun_running", 1.0);
    for _ in 0..3 {
        let answer = server.json("/v1/chat/completions", &chat("tiny", "hello", 4));
        assert_eq!(answer["usage"]["completion_tokens"], 4);
    }
    server.json(&format!("/v1/batches/{id}/cancel"), &json!({}));
    ended(&server, &id);

    let texts = ["hello", "good morning", "bye"];
    let id = ordered(&texts, 2, 4);
    let batch = ended(&server, &id);
    assert_eq!(batch["status"], "completed", "{batch}");
    let answers = lines(&server, &batch["output_file_id"]);
    let body = &answers["many"]["response"]["body"];
    let alone =
        json!({"model": "tiny", "prompt": texts, "n": 2, "temperature": 0, "max_tokens": 4});
    let alone = server.json("/v1/completions", &alone);
    let choices = body["choices"].as_array().unwrap();
    let indexes: Vec<u64> = choices
        .iter()
        .map(|c| c["index"].as_u64().unwrap())
        .collect();
    assert_eq!(indexes, [0, 1, 2, 3, 4, 5]);
    for name in ["prompt_tokens", "completion_tokens"] {
        assert_eq!(body["usage"][name], alone["usage"][name], "{name}");
    }
}

/// A batch that was cut off after some of its answers, by the end of its server.
fn cut_off(home: &Project) -> String {
    let server = start(home, &["--max-batch", "2"]);
    let requests: Vec<String> = (0..ROWS)
        .map(|row| request(&format!("row {row}"), "tiny", 1000))
        .collect();
    let id = ordered(&server, &requests.join("\n"));
    wait(|| look(&server, &id)["request_counts"]["completed"].as_u64() >= Some(2));
    let input = look(&server, &id)["input_file_id"].clone();
    assert_eq!(
        deleted(&server, input.as_str().unwrap()),
        409,
        "it is needed"
    );
    server.signal("-KILL");
    id
}

#[test]
fn a_batch_that_cannot_go_on_keeps_its_answers() {
    type Spoil = fn(&Project, Value);
    let ends_its_servers: Spoil = |home, mut record| {
        record["starts"] = 3.into();
        let name = format!("kept/batches/{}.json", record["id"].as_str().unwrap());
        home.write(&name, &record.to_string());
    };
    let loses_its_requests: Spoil = |home, record| {
        let name = format!("kept/files/{}.jsonl", record["input"].as_str().unwrap());
        std::fs::remove_file(home.path(&name)).unwrap();
    };
    for (spoil, status) in [
        (ends_its_servers, "failed"),
        (loses_its_requests, "expired"),
    ] {
        let home = home();
        let id = cut_off(&home);
        let record = home.read(&format!("kept/batches/{id}.json"));
        spoil(&home, serde_json::from_str(&record).unwrap());
        let server = start(&home, &["--max-batch", "2"]);
        let batch = ended(&server, &id);
        assert_eq!(batch["status"], status, "{batch}");
        let why = &batch["errors"]["data"][0]["message"];
        assert!(why.is_string(), "{batch}");
        let answers = lines(&server, &batch["output_file_id"]);
        assert!(answers.len() >= 2, "{batch}");
        assert_eq!(batch["request_counts"]["completed"], answers.len());
    }
}

#[test]
fn a_second_server_on_the_folder_waits_for_its_turn() {
    const FEW: usize = 10;
    let home = home();
    let first = start(&home, &["--max-batch", "2"]);
    let requests: Vec<String> = (0..FEW)
        .map(|row| request(&format!("row {row}"), "tiny", 1000))
        .collect();
    let id = ordered(&first, &requests.join("\n"));
    first.wait_for("flowrun_running", 1.0);

    let second = start(&home, &[]);
    // It shows what the first one does, answers others, and takes orders.
    assert_eq!(look(&second, &id)["request_counts"]["total"], FEW);
    let answer = second.json("/v1/chat/completions", &chat("tiny", "hello", 4));
    assert_eq!(answer["usage"]["completion_tokens"], 4);
    let path = format!("/v1/batches/{id}/cancel");
    let (status, error) = second.problem(&path, &json!({}));
    assert_eq!((status, &error["code"]), (409, &json!("not_in_charge")));
    let own = ordered(&second, &request("own", "tiny", 3));

    let batch = ended(&first, &id);
    let counts = json!({"total": FEW, "completed": FEW, "failed": 0});
    assert_eq!(batch["request_counts"], counts);
    // The first one answers what the second one was asked for, though nobody names it there. No
    // request was answered twice.
    let batch = ended(&second, &own);
    assert_eq!(batch["status"], "completed", "{batch}");
    assert_eq!(lines(&second, &batch["output_file_id"]).len(), 1);
    assert!(second.metric("flowrun_generated_tokens_total") <= 4.0);
    let listed: Value = first.get("/v1/batches").json().unwrap();
    assert_eq!(listed["data"].as_array().unwrap().len(), 2);

    // One that is under way when the first one ends is for the second one.
    let requests: Vec<String> = (0..ROWS)
        .map(|row| request(&format!("row {row}"), "tiny", 1000))
        .collect();
    let last = ordered(&second, &requests.join("\n"));
    wait(|| look(&second, &last)["status"] == "in_progress");
    assert_eq!(first.stop(), Some(0));
    let batch = ended(&second, &last);
    assert_eq!(batch["request_counts"]["completed"], ROWS, "{batch}");
    assert_eq!(lines(&second, &batch["output_file_id"]).len(), ROWS);
    assert!(second.metric("flowrun_generated_tokens_total") > 4.0);
    assert_eq!(look(&second, &id)["request_counts"], counts);
    assert_eq!(second.stop(), Some(0));
}

#[test]
fn a_full_disk_loses_no_answer_however_long_it_is_full() {
    for killed in [false, true] {
        let home = home();
        let Some(disk) = Mount::tmpfs(&home.path("kept"), "size=2m") else {
            return;
        };
        let mut server = start(&home, &["--max-batch", "2"]);
        let requests: Vec<String> = (0..ROWS)
            .map(|row| request(&format!("row {row}"), "tiny", 1000))
            .collect();
        let id = ordered(&server, &requests.join("\n"));
        wait(|| look(&server, &id)["request_counts"]["completed"].as_u64() >= Some(2));
        let filler = home.path("kept/filler");
        let mut file = std::fs::File::create(&filler).unwrap();
        while file.write_all(&[0; 4096]).is_ok() {}
        drop(file);
        // The next answers have no place, and those that there are cannot be announced.
        server.hear("its answers wait on the disk");
        let batch = look(&server, &id);
        assert_eq!(batch["status"], "in_progress", "{batch}");
        if killed {
            server.signal("-KILL");
            drop(server);
            std::fs::remove_file(filler).unwrap();
            server = start(&home, &["--max-batch", "2"]);
        } else {
            std::fs::remove_file(filler).unwrap();
        }
        let batch = ended(&server, &id);
        let answers = lines(&server, &batch["output_file_id"]);
        assert_eq!(batch["request_counts"]["completed"], answers.len());
        if killed {
            assert_eq!(batch["status"], "completed", "{batch}");
            assert_eq!(answers.len(), ROWS);
        } else {
            assert_eq!(batch["status"], "failed", "{batch}");
            assert!(answers.len() >= 2, "{batch}");
            let why = batch["errors"]["data"][0]["message"].as_str().unwrap();
            assert!(why.contains("cannot be read or written"), "{why}");
        }
        assert_eq!(server.stop(), Some(0));
        drop(disk);
    }
}

#[test]
fn a_client_that_does_not_read_its_answer_is_hung_up_on() {
    const BYTES: usize = 48 << 20;
    let home = home();
    let server = start(&home, &["--write-timeout", "1"]);
    let (status, file) = upload(&server, "batch", vec![b'x'; BYTES]);
    assert_eq!(status, 200, "{file}");
    let path = format!("/v1/files/{}/content", file["id"].as_str().unwrap());
    let mut stream = server.connect();
    let head = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    server.wait_for("flowrun_refused_total{reason=\"slow_reader\"}", 1.0);
    // Another gets all of it.
    assert_eq!(server.get(&path).bytes().unwrap().len(), BYTES);
    drop(stream);
    assert_eq!(server.stop(), Some(0));
}
