//! A server on loopback that answers as the Hugging Face hub does: revisions, small files by
//! itself, large ones by sending on to another server, gates, and the headers that say why it
//! refuses.

use std::collections::BTreeMap;
use std::io::{BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use flowrun_steps::download::sha256_of;
use serde_json::json;

use crate::http;

/// A file of this size or larger lies on the other server.
const LARGE: usize = 1000;

/// A token that has access to what is gated.
pub(crate) const MEMBER: &str = "hf_member";
/// A token without.
pub(crate) const STRANGER: &str = "hf_stranger";

/// What the hub saw of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Without the query; `content` before the sha256 of a large file.
    pub(crate) path: String,
    pub(crate) token: Option<String>,
    pub(crate) range: Option<String>,
}

type Files = BTreeMap<String, Vec<u8>>;

#[derive(Default)]
struct State {
    /// By the path of the repository: `datasets/org/rows`.
    branches: BTreeMap<(String, String), String>,
    commits: BTreeMap<(String, String), Files>,
    gated: Vec<String>,
    contents: Files,
    seen: Vec<Seen>,
    break_at: Option<usize>,
    stall_at: Option<usize>,
}

/// The two servers; they run as long as the tests do.
pub(crate) struct Hub {
    pub(crate) url: String,
    state: Arc<Mutex<State>>,
    scratch: tempfile::TempDir,
}

impl Hub {
    pub(crate) fn start() -> Self {
        let state: Arc<Mutex<State>> = Arc::default();
        let contents = listen(&state, |state, request, _| content(state, request));
        let hub = listen(&state, move |state, request, token| {
            answer(state, request, token, &contents)
        });
        Self {
            url: hub,
            state,
            scratch: tempfile::tempdir().unwrap(),
        }
    }

    /// Moves the branch `main` of a repository (`datasets/org/rows`) to a commit with these files.
    pub(crate) fn publish(&self, repo: &str, commit: &str, files: &[(&str, Vec<u8>)]) {
        let mut state = self.state();
        for (_, bytes) in files {
            state.contents.insert(self.sha256(bytes), bytes.clone());
        }
        let files = files.iter().cloned();
        let files: Files = files
            .map(|(name, bytes)| (name.to_owned(), bytes))
            .collect();
        let key = (repo.to_owned(), commit.to_owned());
        state.commits.insert(key, files);
        let branch = (repo.to_owned(), "main".to_owned());
        state.branches.insert(branch, commit.to_owned());
    }

    pub(crate) fn gate(&self, repo: &str) {
        self.state().gated.push(repo.to_owned());
    }

    /// The next answer with a large file's content breaks off after so many bytes.
    pub(crate) fn break_at(&self, bytes: usize) {
        self.state().break_at = Some(bytes);
    }

    /// The next answer with a large file's content stops after so many bytes, until the client goes.
    pub(crate) fn stall_at(&self, bytes: usize) {
        self.state().stall_at = Some(bytes);
    }

    /// The requests since the last call.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.state().seen)
    }

    pub(crate) fn sha256(&self, bytes: &[u8]) -> String {
        sha256(self.scratch.path(), bytes)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

fn sha256(scratch: &Path, bytes: &[u8]) -> String {
    let file = tempfile::NamedTempFile::new_in(scratch).unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    sha256_of(file.path()).unwrap()
}

/// A request, as far as it matters.
struct Request {
    method: String,
    path: String,
    range: Option<usize>,
}

struct Answer {
    status: &'static str,
    headers: Vec<String>,
    body: Vec<u8>,
    /// Bytes of the body that are sent.
    sent: usize,
    /// The connection stays open after them.
    stalls: bool,
}

impl Answer {
    fn new(status: &'static str, headers: &[String], body: Vec<u8>) -> Self {
        Self {
            status,
            headers: headers.to_vec(),
            sent: body.len(),
            stalls: false,
            body,
        }
    }

    fn refusal(status: &'static str, code: &str, message: &str) -> Self {
        let mut headers = vec![format!("X-Error-Message: {message}")];
        if !code.is_empty() {
            headers.push(format!("X-Error-Code: {code}"));
        }
        Self::new(status, &headers, Vec::new())
    }
}

/// Starts a server; gives its URL.
fn listen(
    state: &Arc<Mutex<State>>,
    answer: impl Fn(&mut State, &Request, Option<&str>) -> Answer + Send + Sync + 'static,
) -> String {
    let state = Arc::clone(state);
    http::listen(move |stream| {
        serve(&stream, &state, &answer);
    })
}

/// One request a connection.
fn serve(
    mut stream: &TcpStream,
    state: &Mutex<State>,
    answer: &dyn Fn(&mut State, &Request, Option<&str>) -> Answer,
) -> Option<()> {
    let sent = http::Request::read(&mut BufReader::new(stream))?;
    let path = sent.place().to_owned();
    let token = sent.headers.get("authorization");
    let token = token.map(|value| value.trim_start_matches("Bearer ").to_owned());
    let range = sent.headers.get("range").cloned();
    let from = range.as_deref().and_then(|range| {
        let from = range.strip_prefix("bytes=")?.strip_suffix('-')?;
        from.parse().ok()
    });
    let request = Request {
        method: sent.method,
        path: path.clone(),
        range: from,
    };
    let answer = {
        let mut state = state.lock().unwrap();
        let answer = answer(&mut state, &request, token.as_deref());
        state.seen.push(Seen { path, token, range });
        answer
    };
    let mut text = format!("HTTP/1.1 {}\r\n", answer.status);
    for header in &answer.headers {
        text.push_str(&format!("{header}\r\n"));
    }
    let length = answer.body.len();
    text.push_str(&format!(
        "Content-Length: {length}\r\nConnection: close\r\n\r\n"
    ));
    stream.write_all(text.as_bytes()).ok()?;
    if request.method != "HEAD" {
        stream.write_all(&answer.body[..answer.sent]).ok()?;
    }
    if answer.stalls {
        let _ = stream.read(&mut [0]);
    }
    Some(())
}

/// The server of large files' contents.
fn content(state: &mut State, request: &Request) -> Answer {
    let sha256 = request.path.trim_start_matches("/content/");
    let Some(bytes) = state.contents.get(sha256) else {
        return Answer::new("404 Not Found", &[], Vec::new());
    };
    let total = bytes.len();
    let mut answer = match request.range {
        Some(from) if from >= total => Answer::new("416 Range Not Satisfiable", &[], Vec::new()),
        Some(from) => {
            let range = format!("Content-Range: bytes {from}-{}/{total}", total - 1);
            Answer::new("206 Partial Content", &[range], bytes[from..].to_vec())
        }
        None => Answer::new("200 OK", &[], bytes.clone()),
    };
    if let Some(at) = state.break_at.take() {
        answer.sent = at.min(answer.body.len());
    }
    if let Some(at) = state.stall_at.take() {
        answer.sent = at.min(answer.body.len());
        answer.stalls = true;
    }
    answer
}

/// The hub itself.
fn answer(state: &mut State, request: &Request, token: Option<&str>, contents: &str) -> Answer {
    if token.is_some_and(|token| token != MEMBER && token != STRANGER) {
        let message = "Invalid credentials in Authorization header";
        return Answer::refusal("401 Unauthorized", "", message);
    }
    let path = request.path.trim_start_matches('/');
    if let Some((repo, revision)) = path
        .strip_prefix("api/")
        .and_then(|path| path.split_once("/revision/"))
    {
        let repo = repo.trim_start_matches("models/");
        if !state.commits.keys().any(|(name, _)| name == repo) {
            let status = match token {
                None => "401 Unauthorized",
                Some(_) => "404 Not Found",
            };
            return Answer::refusal(status, "RepoNotFound", "Repository not found");
        }
        let key = (repo.to_owned(), revision.to_owned());
        return match state.branches.get(&key) {
            Some(commit) => {
                let info = json!({"id": repo, "sha": commit}).to_string();
                Answer::new("200 OK", &[], info.into_bytes())
            }
            None => {
                let message = format!("Invalid rev id: {revision}");
                Answer::refusal("404 Not Found", "RevisionNotFound", &message)
            }
        };
    }
    let Some((repo, rest)) = path.split_once("/resolve/") else {
        return Answer::new("404 Not Found", &[], Vec::new());
    };
    if state.gated.iter().any(|gated| gated == repo) && token != Some(MEMBER) {
        let status = match token {
            None => "401 Unauthorized",
            Some(_) => "403 Forbidden",
        };
        let message = format!("Access to {repo} is restricted");
        return Answer::refusal(status, "GatedRepo", &message);
    }
    let (commit, file) = rest.split_once('/').unwrap_or((rest, ""));
    let key = (repo.to_owned(), commit.to_owned());
    let Some(files) = state.commits.get(&key) else {
        return Answer::refusal("404 Not Found", "RevisionNotFound", "Invalid rev id");
    };
    let Some(bytes) = files.get(file) else {
        return Answer::refusal("404 Not Found", "EntryNotFound", "Entry not found");
    };
    let scratch = std::env::temp_dir();
    let sha256 = sha256(&scratch, bytes);
    let commit = format!("X-Repo-Commit: {commit}");
    if bytes.len() < LARGE {
        // Git's ids are as long.
        let etag = format!("ETag: \"{}\"", &sha256[..40]);
        return Answer::new("200 OK", &[commit, etag], bytes.clone());
    }
    let headers = [
        commit,
        format!("X-Linked-ETag: \"{sha256}\""),
        format!("X-Linked-Size: {}", bytes.len()),
        format!("Location: {contents}/content/{sha256}"),
    ];
    Answer::new("302 Found", &headers, Vec::new())
}
