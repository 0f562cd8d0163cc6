//! [`WithAdapter`]: a checkpoint that its server may not have: not yet, or not any more. Its
//! adapter is put where the server reads adapters from, and the server told of it, when the first
//! call needs it: answers that are kept need no server.
//!
//! A server forgets adapters: it was started again, somebody unloaded one, it has room for so many.
//! Then it answers that there is no such model; it is given the adapter again, and asked again for
//! what it did not answer. Invariant: every request is told of once; one that was answered is not
//! sent again.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use flowrun_engine::step::Cancel;
use flowrun_lm::client::{Api, ApiError};
use flowrun_lm::lm::{Completion, Lm, LmError, OnAnswer, Request};
use serde_json::json;

use super::adapter_place::Place;

/// How often in a row a server is given an adapter, and answers nothing, before the call fails.
const FRUITLESS: u32 = 3;
/// How often a wait looks whether the run was asked to stop.
const LOOK_EVERY: Duration = Duration::from_millis(50);

type Answer = Result<Completion, LmError>;

/// Hears that a server had forgotten the adapter, and whether that is the first time.
pub(super) type OnForgotten = Box<dyn Fn(&str, bool) + Send + Sync>;

/// A checkpoint at a server.
pub(super) struct WithAdapter {
    /// Asks for it by its id.
    pub(super) client: Arc<dyn Lm>,
    /// The server's other calls.
    pub(super) api: Api,
    /// Its id at the server.
    pub(super) id: String,
    /// The checkpoint's folder.
    pub(super) from: PathBuf,
    /// Where the server reads it.
    pub(super) place: Place,
    /// How long, after it was given, the server may say that there is no such model before it looks
    /// again.
    pub(super) unseen_for: Duration,
    /// Whether to stop.
    pub(super) cancel: Cancel,
    /// Held while the server is given it.
    pub(super) given: Mutex<Given>,
    /// Hears when it is given it again.
    pub(super) on_forgotten: OnForgotten,
}

/// How the server was given an adapter so far.
#[derive(Debug, Default)]
pub(super) struct Given {
    /// How often; also where the adapter was found in its place.
    times: u64,
    last: Option<Instant>,
    /// It was told that the server had forgotten it.
    is_told: bool,
}

impl WithAdapter {
    /// Gives the server the adapter, unless somebody has since it was given for the `seen`th time, or
    /// it may not have seen the last one yet. How often it was given.
    fn give(&self, seen: u64) -> Result<u64, LmError> {
        let mut given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        let is_unseen = given
            .last
            .is_some_and(|last| last.elapsed() < self.unseen_for);
        if given.times == seen && !is_unseen {
            let is_new = self.place.put(&self.from)?;
            if let Place::Folder {
                to,
                seen_as,
                load: true,
            } = &self.place
            {
                self.tell(to, seen_as.as_deref())?;
            }
            given.times += 1;
            given.last = Some(Instant::now());
            if given.times > 1 && is_new {
                let text = format!(
                    "the server had forgotten `{}`: it was given the adapter again",
                    self.id
                );
                let is_told = std::mem::replace(&mut given.is_told, true);
                (self.on_forgotten)(&text, !is_told);
            }
        }
        Ok(given.times)
    }

    /// Tells the server of the adapter in `to`, which it sees as `seen_as`.
    fn tell(&self, to: &Path, seen_as: Option<&Path>) -> Result<(), LmError> {
        let here = std::path::absolute(to).unwrap_or_else(|_| to.to_owned());
        let path = seen_as.unwrap_or(&here);
        let body = json!({ "lora_name": self.id, "lora_path": path });
        match self.api.post(&["load_lora_adapter"], &body) {
            Ok(_) => Ok(()),
            // Of the same name is of the same values.
            Err(ApiError::Status { message, .. }) if message.contains("already been loaded") => {
                Ok(())
            }
            Err(ApiError::Cancelled) => Err(LmError::Cancelled),
            Err(error) if error.may_pass() => Err(LmError::Unavailable(error.to_string())),
            Err(error) => Err(LmError::Barred(format!(
                "{error}; the server does not take the adapter in {}",
                path.display()
            ))),
        }
    }

    /// Lets some of the time go by in which the server may not have seen it.
    fn wait(&self) -> Result<(), LmError> {
        let until = Instant::now() + self.unseen_for / FRUITLESS;
        loop {
            if self.cancel.is_cancelled() {
                return Err(LmError::Cancelled);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(LOOK_EVERY));
        }
    }

    /// Asks for `requests`; tells of all answers but those that the server lacks the model for.
    fn ask(&self, requests: &[Request], tell: &OnAnswer<'_>) -> Vec<Answer> {
        let told = |index: usize, answer: &Answer| {
            if !is_lacking(answer) {
                tell(index, answer);
            }
        };
        self.client.complete(requests, &told)
    }
}

/// The server has no such model.
fn is_lacking(answer: &Answer) -> bool {
    matches!(answer, Err(LmError::NoModel(_)))
}

impl Lm for WithAdapter {
    fn id(&self) -> &str {
        self.client.id()
    }

    fn bar(&self, why: &LmError) {
        self.client.bar(why);
    }

    fn complete(&self, requests: &[Request], on_answer: &OnAnswer<'_>) -> Vec<Answer> {
        let mut seen = match self.give(0) {
            Ok(given) => given,
            Err(error) => return refused(requests.len(), &error, on_answer),
        };
        let mut answers = self.ask(requests, on_answer);
        let mut fruitless = 0;
        loop {
            let lacking = answers.iter().enumerate().filter(|(_, a)| is_lacking(a));
            let open: Vec<usize> = lacking.map(|(index, _)| index).collect();
            if open.is_empty() {
                return answers;
            }
            let told = |place: usize, answer: &Answer| on_answer(open[place], answer);
            let again: Vec<Answer> = match self.wait().and_then(|()| self.give(seen)) {
                Err(error) => refused(open.len(), &error, &told),
                Ok(given) => {
                    seen = given;
                    let asked: Vec<Request> = open.iter().map(|i| requests[*i].clone()).collect();
                    self.ask(&asked, &told)
                }
            };
            // How a round ends is known after it.
            fruitless = match again.iter().all(is_lacking) {
                true => fruitless + 1,
                false => 0,
            };
            if fruitless == FRUITLESS {
                for (place, answer) in again.iter().enumerate() {
                    told(place, answer);
                }
            }
            for (index, answer) in open.iter().zip(again) {
                answers[*index] = answer;
            }
            if fruitless == FRUITLESS {
                return answers;
            }
        }
    }
}

/// The error as the answer to all.
fn refused(requests: usize, error: &LmError, on_answer: &OnAnswer<'_>) -> Vec<Answer> {
    let answers: Vec<Answer> = (0..requests).map(|_| Err(error.clone())).collect();
    for (index, answer) in answers.iter().enumerate() {
        on_answer(index, answer);
    }
    answers
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::sync::atomic::{AtomicUsize, Ordering};

    use flowrun_engine::step::World;
    use flowrun_lm::client::{OpenAi, OpenAiSpec};
    use flowrun_lm::lm::{Message, Role, Sampling};
    use serde_json::Value;

    use super::super::Host;
    use super::*;
    use crate::checkpoint::{ADAPTER_CONFIG, ADAPTER_VALUES};

    /// A server that forgets its adapter after so many answers.
    #[derive(Default)]
    struct Server {
        /// So many times it is given the adapter and does not have it.
        deaf: usize,
        forgets_after: usize,
        state: Mutex<State>,
    }

    #[derive(Default)]
    struct State {
        loaded: bool,
        loads: usize,
        /// Since it was loaded.
        answers: usize,
        /// By question.
        answered: BTreeMap<String, usize>,
    }

    impl Server {
        fn start(forgets_after: usize) -> (Arc<Self>, String) {
            Self::start_deaf(0, forgets_after)
        }

        fn start_deaf(deaf: usize, forgets_after: usize) -> (Arc<Self>, String) {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let url = format!("http://{}/v1", listener.local_addr().unwrap());
            let server = Arc::new(Self {
                deaf,
                forgets_after,
                state: Mutex::default(),
            });
            let own = Arc::clone(&server);
            std::thread::spawn(move || {
                for stream in listener.incoming().map_while(Result::ok) {
                    let server = Arc::clone(&own);
                    std::thread::spawn(move || {
                        let mut reader = BufReader::new(stream.try_clone().unwrap());
                        while server.serve(&mut reader, &stream).is_some() {}
                    });
                }
            });
            (server, url)
        }

        fn serve(&self, reader: &mut BufReader<TcpStream>, mut stream: &TcpStream) -> Option<()> {
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") {
                (reader.read_line(&mut head).ok()? > 0).then_some(())?;
            }
            let lower = head.to_lowercase();
            let length = lower
                .lines()
                .find_map(|l| l.strip_prefix("content-length: "))?;
            let mut body = vec![0_u8; length.trim().parse().ok()?];
            reader.read_exact(&mut body).ok()?;
            let body: Value = serde_json::from_slice(&body).ok()?;
            let (status, answer) = match head.contains("load_lora_adapter") {
                true => self.load(),
                false => self.answer(&body),
            };
            let text = answer.to_string();
            let head = format!(
                "HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n",
                text.len()
            );
            stream.write_all((head + &text).as_bytes()).ok()
        }

        fn load(&self) -> (u16, Value) {
            let mut state = self.state.lock().unwrap();
            if state.loaded {
                let told = "the adapter has already been loaded";
                return (400, json!({"error": {"message": told}}));
            }
            state.loads += 1;
            state.loaded = state.loads > self.deaf;
            state.answers = 0;
            (200, json!("Success"))
        }

        fn answer(&self, body: &Value) -> (u16, Value) {
            let mut state = self.state.lock().unwrap();
            if !state.loaded {
                let error = json!({"message": "no such model", "code": "model_not_found"});
                return (404, json!({"error": error}));
            }
            let text = body["messages"][0]["content"].as_str().unwrap().to_owned();
            *state.answered.entry(text.clone()).or_default() += 1;
            state.answers += 1;
            state.loaded = state.answers < self.forgets_after;
            (
                200,
                json!({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}),
            )
        }
    }

    fn adapted(url: &str, folder: &Path) -> WithAdapter {
        let spec = json!({"base_url": url, "model": "m", "concurrency": 2});
        let spec: OpenAiSpec = serde_json::from_value(spec).unwrap();
        let from = folder.join("checkpoint");
        std::fs::create_dir_all(&from).unwrap();
        let going_on = || -> flowrun_lm::client::Cancelled { Arc::new(|| false) };
        WithAdapter {
            client: Arc::new(OpenAi::new(&spec, None, going_on()).unwrap()),
            api: Api::new(&spec, None, going_on()).unwrap(),
            id: "m:one".to_owned(),
            from,
            place: Place::Folder {
                to: folder.join("adapters/one"),
                seen_as: None,
                load: true,
            },
            unseen_for: Duration::ZERO,
            cancel: Cancel::default(),
            given: Mutex::default(),
            on_forgotten: Box::new(|_, _| {}),
        }
    }

    fn ask(lm: &WithAdapter, texts: &[&str]) -> (Vec<Answer>, Vec<usize>) {
        let request = |text: &&str| Request {
            messages: vec![Message {
                role: Role::User,
                content: (*text).to_owned(),
            }],
            sampling: Sampling::default(),
            choices: None,
        };
        let requests: Vec<Request> = texts.iter().map(request).collect();
        let told = Mutex::new(vec![0; texts.len()]);
        let answers = lm.complete(&requests, &|index, _| told.lock().unwrap()[index] += 1);
        (answers, told.into_inner().unwrap())
    }

    const TEXTS: [&str; 9] = ["a", "b", "c", "d", "e", "f", "g", "h", "i"];

    #[test]
    fn a_server_that_forgets_is_given_the_adapter_again() {
        let folder = tempfile::tempdir().unwrap();
        let (server, url) = Server::start(2);
        let lm = adapted(&url, folder.path());
        let (answers, told) = ask(&lm, &TEXTS);
        for (answer, text) in answers.iter().zip(TEXTS) {
            assert_eq!(answer.as_ref().unwrap().text, text);
        }
        assert_eq!(told, vec![1; TEXTS.len()]);
        let state = server.state.lock().unwrap();
        assert!(state.answered.values().all(|times| *times == 1));
        // Nine answers, two after each load.
        assert_eq!((state.answered.len(), state.loads), (9, 5));
    }

    #[test]
    fn a_server_that_answers_in_the_last_round_is_asked_for_the_rest() {
        let folder = tempfile::tempdir().unwrap();
        // The third round is the first that gives something, and not all.
        let (server, url) = Server::start_deaf(3, 2);
        let lm = adapted(&url, folder.path());
        let (answers, told) = ask(&lm, &TEXTS);
        assert!(answers.iter().all(Result::is_ok), "{answers:?}");
        assert_eq!(told, vec![1; TEXTS.len()]);
        let state = server.state.lock().unwrap();
        assert!(state.answered.values().all(|times| *times == 1));
    }

    #[test]
    fn threads_that_ask_at_once_load_it_once() {
        let folder = tempfile::tempdir().unwrap();
        let (server, url) = Server::start(usize::MAX);
        let lm = adapted(&url, folder.path());
        ask(&lm, &["before"]);
        server.state.lock().unwrap().loaded = false;
        std::thread::scope(|scope| {
            for text in TEXTS {
                let lm = &lm;
                scope.spawn(move || assert!(ask(lm, &[text]).0[0].is_ok()));
            }
        });
        let state = server.state.lock().unwrap();
        assert_eq!(state.loads, 2);
        assert!(state.answered.values().all(|times| *times == 1));
    }

    #[test]
    fn a_server_that_keeps_none_is_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let (server, url) = Server::start(0);
        let lm = adapted(&url, folder.path());
        // It answers one after each load, and none is left out.
        let (answers, told) = ask(&lm, &TEXTS);
        assert!(answers.iter().all(Result::is_ok));
        assert_eq!(told, vec![1; TEXTS.len()]);
        assert_eq!(server.state.lock().unwrap().loads, 9);

        let (loses, url) = Server::start(usize::MAX);
        let mut lm = adapted(&url, folder.path());
        // It is told of nothing, so it never has it.
        lm.place = Place::Folder {
            to: folder.path().join("adapters/one"),
            seen_as: None,
            load: false,
        };
        let (answers, told) = ask(&lm, &TEXTS);
        assert!(answers.iter().all(is_lacking), "{answers:?}");
        assert_eq!(told, vec![1; TEXTS.len()]);
        assert!(loses.state.lock().unwrap().answered.is_empty());
    }

    #[test]
    fn a_store_is_given_it_again_only_when_it_lost_it() {
        let folder = tempfile::tempdir().unwrap();
        let mut lm = adapted("http://127.0.0.1:1/v1", folder.path());
        for file in [ADAPTER_VALUES, ADAPTER_CONFIG] {
            std::fs::write(lm.from.join(file), file).unwrap();
        }
        let (world, cancel) = (World::default(), Cancel::default());
        let host = Host {
            world: &world,
            cancel: &cancel,
            completions: None,
            step: None,
        };
        let bucket = folder.path().join("bucket");
        let entry = json!({ "url": format!("file://{}", bucket.display()) });
        let entry = serde_json::from_value(entry).unwrap();
        lm.place = Place::of(&entry, "m", "one", &host).unwrap();
        let warnings = Arc::new(AtomicUsize::new(0));
        let own = Arc::clone(&warnings);
        lm.on_forgotten = Box::new(move |_, is_first| {
            assert_eq!(own.fetch_add(1, Ordering::SeqCst) == 0, is_first);
        });
        let values = bucket.join("one").join(ADAPTER_VALUES);
        lm.unseen_for = Duration::from_secs(3600);
        assert_eq!(lm.give(0).unwrap(), 1);
        std::fs::remove_file(&values).unwrap();
        // The server may say for a while that there is none: no reason to look into the store.
        assert_eq!(lm.give(1).unwrap(), 1);
        assert!(!values.exists());
        lm.unseen_for = Duration::ZERO;
        for (seen, told) in [(1, 1), (2, 1)] {
            assert_eq!(lm.give(seen).unwrap(), seen + 1);
            assert!(values.exists());
            assert_eq!(warnings.load(Ordering::SeqCst), told);
        }
        std::fs::remove_file(&values).unwrap();
        assert_eq!(lm.give(3).unwrap(), 4);
        assert_eq!(warnings.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn a_run_that_stops_does_not_wait_for_a_server_that_has_not_seen_it() {
        let folder = tempfile::tempdir().unwrap();
        let (_server, url) = Server::start_deaf(usize::MAX, 1);
        let mut lm = adapted(&url, folder.path());
        lm.unseen_for = Duration::from_secs(3600);
        lm.cancel.cancel();
        let (answers, told) = ask(&lm, &TEXTS);
        let stopped = |answer: &Answer| matches!(answer, Err(LmError::Cancelled));
        assert!(answers.iter().all(stopped), "{answers:?}");
        assert_eq!(told, vec![1; TEXTS.len()]);
    }
}
