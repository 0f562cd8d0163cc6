//! Batches against a server of files and batches on loopback.
#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::folder::{KEPT, ORDER, Order};
use super::*;
use crate::client::tests::read_message;
use crate::lm::{Budget, Message, Role, Sampling, Spending};

/// What stands in a line for a text: `response` and `error`.
type Line = dyn Fn(usize, &str) -> Value + Send + Sync;

struct Server {
    url: String,
    inner: Arc<Inner>,
}

struct Inner {
    line: Box<Line>,
    /// Batches end.
    open: AtomicBool,
    /// They end as `failed`.
    failing: AtomicBool,
    /// Their files are gone.
    gone: AtomicBool,
    /// The lines of each file that came, which is the batch of the same number.
    files: Mutex<Vec<Vec<Value>>>,
    /// Batches that were made.
    made: AtomicUsize,
}

fn serve(line: impl Fn(usize, &str) -> Value + Send + Sync + 'static) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    let inner = Arc::new(Inner {
        line: Box::new(line),
        open: AtomicBool::new(true),
        failing: AtomicBool::new(false),
        gone: AtomicBool::new(false),
        files: Mutex::default(),
        made: AtomicUsize::new(0),
    });
    let shared = Arc::clone(&inner);
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let inner = Arc::clone(&shared);
            std::thread::spawn(move || while inner.serve(&stream).is_some() {});
        }
    });
    Server { url, inner }
}

impl Inner {
    fn serve(&self, mut stream: &TcpStream) -> Option<()> {
        let (head, body) = read_message(stream)?;
        let body = String::from_utf8(body).unwrap();
        let mut words = head.split(' ');
        let (method, path) = (words.next()?, words.next()?);
        let parts: Vec<&str> = path.split('/').skip(2).collect();
        let mut status = "200 OK";
        let reply = match (method, parts.as_slice()) {
            ("POST", ["files"]) => {
                let lines = body
                    .lines()
                    .filter_map(|line| serde_json::from_str::<Value>(line).ok());
                let lines: Vec<Value> = lines.filter(Value::is_object).collect();
                let mut files = self.files.lock().unwrap();
                files.push(lines);
                json!({"id": (files.len() - 1).to_string()}).to_string()
            }
            ("POST", ["batches"]) => {
                let order: Value = serde_json::from_str(&body).unwrap();
                self.made.fetch_add(1, Ordering::SeqCst);
                self.state(order["input_file_id"].as_str()?).to_string()
            }
            ("GET", ["batches", id]) => self.state(id).to_string(),
            ("GET", ["files", _, "content"]) if self.gone.load(Ordering::SeqCst) => {
                status = "404 Not Found";
                json!({"error": {"message": "no such file"}}).to_string()
            }
            // The same page again and again.
            ("GET", [list]) if list.starts_with("batches?") => {
                let others = json!([{"id": "other", "input_file_id": "none"}]);
                json!({"data": others, "has_more": true}).to_string()
            }
            ("GET", ["files", id, "content"]) => self.output(id.parse().unwrap()),
            _ => return None,
        };
        let length = reply.len();
        let text = format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\n\r\n{reply}");
        stream.write_all(text.as_bytes()).ok()
    }

    fn state(&self, id: &str) -> Value {
        if self.failing.load(Ordering::SeqCst) {
            let errors = json!({"data": [{"message": "too many tokens are enqueued"}]});
            return json!({"id": id, "status": "failed", "errors": errors});
        }
        match self.open.load(Ordering::SeqCst) {
            true => json!({"id": id, "status": "completed", "output_file_id": id}),
            false => json!({"id": id, "status": "in_progress"}),
        }
    }

    fn output(&self, number: usize) -> String {
        let lines = self.files.lock().unwrap()[number].clone();
        let answer = |line: &Value| {
            let text = line["body"]["messages"][0]["content"].as_str().unwrap();
            let mut answer = (self.line)(number, text);
            answer["custom_id"] = line["custom_id"].clone();
            format!("{answer}\n")
        };
        lines.iter().map(answer).collect()
    }
}

impl Server {
    /// Requests in each batch.
    fn batches(&self) -> Vec<usize> {
        let files = self.inner.files.lock().unwrap();
        files.iter().map(Vec::len).collect()
    }

    /// A client of a run in this folder, which may be stopped once there is a batch.
    fn client(&self, folder: &Path, ledger: Option<Ledger>, told: Told, stopped: bool) -> Batched {
        let spec = json!({"base_url": self.url, "model": "m", "batch": true});
        let spec: OpenAiSpec = serde_json::from_value(spec).unwrap();
        let inner = Arc::clone(&self.inner);
        let is_stopped = move || stopped && inner.made.load(Ordering::SeqCst) > 0;
        let api = Api::new(&spec, None, Arc::new(is_stopped)).unwrap();
        Batched::new(&spec, api, folder.to_owned(), ledger, told)
    }

    fn ask(&self, folder: &Path, texts: &[&str]) -> Vec<Result<String, LmError>> {
        ask(&self.client(folder, None, unheard(), false), texts)
    }

    /// Orders a batch of these and is stopped while it waits.
    fn order(&self, folder: &Path, texts: &[&str]) {
        self.inner.open.store(false, Ordering::SeqCst);
        let answers = ask(&self.client(folder, None, unheard(), true), texts);
        assert_eq!(answers, vec![Err(LmError::Cancelled); texts.len()]);
        assert!(folder.join(ORDER).exists());
        self.inner.open.store(true, Ordering::SeqCst);
    }
}

fn unheard() -> Told {
    Box::new(|_, _, _| {})
}

fn requests(texts: &[&str]) -> Vec<Request> {
    let request = |text: &&str| Request {
        messages: vec![Message {
            role: Role::User,
            content: (*text).to_owned(),
        }],
        sampling: Sampling::default(),
        choices: None,
    };
    texts.iter().map(request).collect()
}

fn ask(client: &Batched, texts: &[&str]) -> Vec<Result<String, LmError>> {
    let answers = client.complete(&requests(texts), &|_, _| {});
    let text = |answer: Answer| answer.map(|answer| answer.text);
    answers.into_iter().map(text).collect()
}

fn answered(text: &str) -> Value {
    let body = json!({
        "choices": [{"message": {"content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2},
    });
    json!({"response": {"status_code": 200, "body": body}, "error": null})
}

fn expired() -> Value {
    let error = json!({"code": "batch_expired", "message": "This request expired."});
    json!({"response": null, "error": error})
}

fn ok(texts: &[&str]) -> Vec<Result<String, LmError>> {
    texts.iter().map(|text| Ok((*text).to_owned())).collect()
}

fn ledger(folder: &Path, tokens: u64) -> Ledger {
    let budget = Budget {
        usd: None,
        tokens: Some(tokens),
    };
    Ledger::open(&folder.join("ledger"), budget, None).unwrap()
}

#[test]
fn answers_to_others_are_kept_until_they_are_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let server = serve(|_, text| answered(text));
    server.order(folder.path(), &["a", "b", "c"]);
    // Another call comes first, also one that has nothing in that order.
    assert_eq!(server.ask(folder.path(), &["d"]), ok(&["d"]));
    assert_eq!(server.batches(), [3, 1]);
    assert_eq!(server.ask(folder.path(), &["b"]), ok(&["b"]));
    assert_eq!(server.ask(folder.path(), &["c", "a"]), ok(&["c", "a"]));
    assert_eq!(server.batches(), [3, 1], "nothing is ordered twice");
    assert!(!folder.path().join(KEPT).exists());
    assert!(!folder.path().join(ORDER).exists());
}

#[test]
fn what_an_old_order_left_out_is_ordered_anew() {
    let folder = tempfile::tempdir().unwrap();
    let server = serve(|batch, text| match (batch, text) {
        (0, "late" | "later") => expired(),
        _ => answered(text),
    });
    server.order(folder.path(), &["a", "late", "later"]);
    let answers = server.ask(folder.path(), &["late", "a"]);
    assert_eq!(answers, ok(&["late", "a"]));
    assert_eq!(server.batches(), [3, 1]);
    // Errors are not kept.
    assert!(!folder.path().join(KEPT).exists());
    assert_eq!(server.ask(folder.path(), &["later"]), ok(&["later"]));
}

#[test]
fn what_the_own_order_left_out_has_no_answer() {
    let folder = tempfile::tempdir().unwrap();
    let server = serve(|batch, text| match (batch, text) {
        (0, "late") => expired(),
        _ => answered(text),
    });
    let answers = server.ask(folder.path(), &["a", "late"]);
    assert_eq!(answers[0], Ok("a".to_owned()));
    assert!(matches!(&answers[1], Err(LmError::Unavailable(why)) if why.contains("expired")));
    assert_eq!(server.ask(folder.path(), &["late"]), ok(&["late"]));
    assert_eq!(server.batches(), [2, 1]);
}

#[test]
fn answers_that_could_not_be_kept_are_still_at_the_server() {
    let folder = tempfile::tempdir().unwrap();
    let server = serve(|_, text| answered(text));
    let client = server.client(folder.path(), None, unheard(), false);
    let full = LmError::Barred("the disk is full".to_owned());
    let answers = client.complete(&requests(&["a", "b"]), &|_, _| client.bar(&full));
    assert!(answers.iter().all(Result::is_ok), "{answers:?}");
    assert!(folder.path().join(ORDER).exists());
    assert_eq!(ask(&client, &["c"]), [Err(full.clone())]);
    // The next run has them without another order.
    assert_eq!(server.ask(folder.path(), &["a", "b"]), ok(&["a", "b"]));
    assert_eq!(server.batches(), [2]);
    assert!(!folder.path().join(ORDER).exists());
}

#[test]
fn a_batch_whose_answers_are_gone_is_ordered_anew() {
    let folder = tempfile::tempdir().unwrap();
    let server = serve(|_, text| answered(text));
    server.order(folder.path(), &["a"]);
    server.inner.gone.store(true, Ordering::SeqCst);
    // The new order's answers are gone too: that is no reason to wait for either for ever.
    let answers = server.ask(folder.path(), &["a"]);
    let Err(LmError::Unavailable(why)) = &answers[0] else {
        unreachable!("{answers:?}");
    };
    assert!(why.contains("are gone from the server"), "{why}");
    assert!(!folder.path().join(ORDER).exists());
    server.inner.gone.store(false, Ordering::SeqCst);
    assert_eq!(server.ask(folder.path(), &["a"]), ok(&["a"]));
    assert_eq!(server.batches(), [1, 1, 1]);
}

#[test]
fn a_list_without_end_is_not_read_without_end() {
    let folder = tempfile::tempdir().unwrap();
    let server = serve(|_, text| answered(text));
    let client = server.client(folder.path(), None, unheard(), false);
    let unheard_of = Order {
        file: "f".to_owned(),
        batch: None,
    };
    client.folder.write_order(&unheard_of).unwrap();
    assert_eq!(ask(&client, &["a"]), ok(&["a"]));
    assert_eq!(server.batches(), [1]);
}

#[test]
fn a_file_is_as_large_as_its_server_takes() {
    let most = |url: &str| {
        let spec = json!({"base_url": url, "model": "m"});
        most_bytes(&serde_json::from_value(spec).unwrap())
    };
    assert_eq!(most("https://api.openai.com/v1"), 190 << 20);
    assert_eq!(most("http://127.0.0.1:8000/v1"), 60 << 20);
}

#[test]
fn a_refused_batch_costs_nothing_and_blocks_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let server = serve(|_, text| answered(text));
    server.inner.failing.store(true, Ordering::SeqCst);
    // Room for one request.
    let room = || Some(ledger(folder.path(), 1100));
    let client = server.client(folder.path(), room(), unheard(), false);
    let answers = ask(&client, &["a"]);
    let Err(LmError::Barred(why)) = &answers[0] else {
        unreachable!("{answers:?}");
    };
    assert!(
        why.contains("refused the batch") && why.contains("enqueued"),
        "{why}"
    );
    assert!(!folder.path().join(ORDER).exists());
    server.inner.failing.store(false, Ordering::SeqCst);
    let client = server.client(folder.path(), room(), unheard(), false);
    assert_eq!(ask(&client, &["a"]), ok(&["a"]));
}

#[test]
fn an_old_order_that_was_refused_is_placed_anew() {
    let folder = tempfile::tempdir().unwrap();
    let server = serve(|_, text| answered(text));
    server.order(folder.path(), &["a"]);
    server.inner.failing.store(true, Ordering::SeqCst);
    let answers = server.ask(folder.path(), &["a"]);
    assert!(matches!(&answers[0], Err(LmError::Barred(_))));
    assert_eq!(server.batches(), [1, 1]);
    server.inner.failing.store(false, Ordering::SeqCst);
    assert_eq!(server.ask(folder.path(), &["a"]), ok(&["a"]));
    assert_eq!(server.batches(), [1, 1, 1]);
}

#[test]
fn what_came_and_cannot_be_used_is_paid_for() {
    let folder = tempfile::tempdir().unwrap();
    let server = serve(|_, text| {
        let (status, body) = match text {
            "counted" => (200, json!({"choices": [], "usage": {"prompt_tokens": 7}})),
            "uncounted" => (200, json!({"choices": []})),
            "withheld" => (400, json!({"error": {"code": "content_filter"}})),
            _ => (500, json!({"error": {"message": "broken"}})),
        };
        json!({"response": {"status_code": status, "body": body}, "error": null})
    });
    let spent = |texts: &[&str]| {
        let folder = folder.path().join(texts[0]);
        std::fs::create_dir_all(&folder).unwrap();
        let client = server.client(&folder, Some(ledger(&folder, 10_000)), unheard(), false);
        ask(&client, texts);
        ledger(&folder, 10_000).stuck(Spending::default()).unwrap()
    };
    let told = |tokens: u64| {
        format!(
            "{tokens} of 10000 tokens were used or are held back and one more request may need 0"
        )
    };
    assert_eq!(spent(&["counted"]), told(7));
    assert_eq!(spent(&["withheld"]), told(0));
    assert_eq!(spent(&["broken"]), told(0));
    // Its bytes, 32 for the template and `max_tokens`.
    assert_eq!(spent(&["uncounted"]), told(9 + 32 + 1000));
}

#[test]
fn a_budget_that_another_batch_holds_back_is_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let server = serve(|_, text| answered(text));
    let other = ledger(folder.path(), 1100);
    let need = Spending {
        prompt: 100,
        completion: 0,
    };
    let held = other.take(need).unwrap().unwrap();
    let (sender, heard) = std::sync::mpsc::channel();
    let told = move |_: u64, _: u64, text: &str| {
        // Nobody listens any more once it goes on.
        let _ = sender.send(text.to_owned());
    };
    let own = Some(ledger(folder.path(), 1100));
    let client = server.client(folder.path(), own, Box::new(told), false);
    let answers = std::thread::scope(|scope| {
        let asking = scope.spawn(|| ask(&client, &["a"]));
        let text = heard.recv().unwrap();
        assert!(text.starts_with("waits for other batches"), "{text}");
        assert_eq!(server.batches(), Vec::<usize>::new());
        held.refused();
        asking.join().unwrap()
    });
    assert_eq!(answers, ok(&["a"]));
}
