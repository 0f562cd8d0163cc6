//! A server on loopback that answers as Google's object store does over its XML API, as far as
//! the remote cache asks it: objects and ranges of them, writing only what is not there, lists in
//! pages, uploads in parts. Written after what `object_store` sends and reads; it takes any token.

use std::collections::BTreeMap;
use std::io::{BufReader, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex};

use flowrun_cache::Digest;

use crate::http::{Request, decoded, listen};
use crate::project::{Project, Run};

/// The bucket that there is.
pub(crate) const BUCKET: &str = "flow";
/// Objects of a page: a list of a few has several pages.
const PAGE: usize = 3;

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Vec<u8>>,
    /// Parts by upload and number.
    uploads: BTreeMap<String, BTreeMap<usize, Vec<u8>>>,
    begun: usize,
    /// Writes that were refused because something was there.
    refused: usize,
    /// Pages after a first one.
    pages: usize,
}

/// The server; it runs as long as the tests do.
pub(crate) struct Gcs {
    url: String,
    state: Arc<Mutex<State>>,
}

struct Answer {
    status: &'static str,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

impl Gcs {
    pub(crate) fn start() -> Self {
        let state: Arc<Mutex<State>> = Arc::default();
        let shared = Arc::clone(&state);
        let url = listen(move |stream| {
            serve(&stream, &shared);
        });
        Self { url, state }
    }

    /// Runs the binary in a project, told of this server.
    pub(crate) fn run(&self, project: &Project, args: &[&str]) -> Run {
        let mut command = project.command(args);
        command
            .env("GOOGLE_BASE_URL", &self.url)
            .env("GOOGLE_BEARER_TOKEN", "any");
        Run::of(command.output().unwrap())
    }

    /// Uploads in parts that were begun.
    pub(crate) fn begun(&self) -> usize {
        self.state.lock().unwrap().begun
    }

    /// Writes that were refused because something was there.
    pub(crate) fn refused(&self) -> usize {
        self.state.lock().unwrap().refused
    }

    /// Pages of lists that were asked for after a first one.
    pub(crate) fn pages(&self) -> usize {
        self.state.lock().unwrap().pages
    }

    /// Names of objects.
    pub(crate) fn objects(&self) -> Vec<String> {
        self.state.lock().unwrap().objects.keys().cloned().collect()
    }
}

/// Answers one request after the other; ends when the client goes.
fn serve(stream: &TcpStream, state: &Mutex<State>) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let mut writer = stream;
    loop {
        let request = Request::read(&mut reader)?;
        let answer = answer(&mut state.lock().unwrap(), &request);
        let mut head = format!("HTTP/1.1 {}\r\n", answer.status);
        for (name, value) in &answer.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str(&format!("Content-Length: {}\r\n\r\n", answer.body.len()));
        writer.write_all(head.as_bytes()).ok()?;
        if request.method != "HEAD" {
            writer.write_all(&answer.body).ok()?;
        }
        writer.flush().ok()?;
    }
}

fn answer(state: &mut State, request: &Request) -> Answer {
    let path = decoded(request.place().trim_start_matches('/'));
    let query = request.query();
    let (bucket, name) = path.split_once('/').unwrap_or((&path, ""));
    if bucket != BUCKET {
        return refusal("404 Not Found", "NoSuchBucket");
    }
    let upload = query.get("uploadId");
    match (request.method.as_str(), upload) {
        ("GET", None) if name.is_empty() => list(state, &query),
        ("GET" | "HEAD", None) => get(state, name, request.headers.get("range")),
        ("PUT", None) => put(state, name, request),
        ("DELETE", None) => match state.objects.remove(name) {
            Some(_) => plain("204 No Content", Vec::new()),
            None => refusal("404 Not Found", "NoSuchKey"),
        },
        ("POST", None) if query.contains_key("uploads") => {
            state.begun += 1;
            let id = format!("upload-{}", state.begun);
            state.uploads.insert(id.clone(), BTreeMap::new());
            xml(&format!(
                "<InitiateMultipartUploadResult><Bucket>{BUCKET}</Bucket><Key>{name}</Key><UploadId>{id}</UploadId></InitiateMultipartUploadResult>"
            ))
        }
        ("PUT", Some(id)) => put_part(state, id, query.get("partNumber"), &request.body),
        ("POST", Some(id)) => complete(state, id, name, &request.body),
        ("DELETE", Some(id)) => {
            state.uploads.remove(id);
            plain("204 No Content", Vec::new())
        }
        _ => refusal("405 Method Not Allowed", "MethodNotAllowed"),
    }
}

fn get(state: &State, name: &str, range: Option<&String>) -> Answer {
    let Some(bytes) = state.objects.get(name) else {
        return refusal("404 Not Found", "NoSuchKey");
    };
    let mut answer = plain("200 OK", bytes.clone());
    if let Some((from, to)) = range.and_then(|range| bounds(range)) {
        let to = to.min(bytes.len() - 1);
        answer.status = "206 Partial Content";
        answer.body = bytes[from..=to].to_vec();
        let part = format!("bytes {from}-{to}/{}", bytes.len());
        answer.headers.push(("Content-Range", part));
    }
    let written = "Thu, 01 Jan 2026 00:00:00 GMT".to_owned();
    answer.headers.push(("Last-Modified", written));
    answer.headers.push(("ETag", tag(bytes)));
    answer
}

/// `bytes=1-5`.
fn bounds(range: &str) -> Option<(usize, usize)> {
    let (from, to) = range.strip_prefix("bytes=")?.split_once('-')?;
    Some((from.parse().ok()?, to.parse().ok()?))
}

fn put(state: &mut State, name: &str, request: &Request) -> Answer {
    let once = request.headers.get("x-goog-if-generation-match");
    if once.is_some_and(|generation| generation == "0") && state.objects.contains_key(name) {
        state.refused += 1;
        return refusal("412 Precondition Failed", "PreconditionFailed");
    }
    let tag = tag(&request.body);
    state.objects.insert(name.to_owned(), request.body.clone());
    tagged(tag)
}

fn put_part(state: &mut State, id: &str, number: Option<&String>, part: &[u8]) -> Answer {
    let number = number.and_then(|number| number.parse().ok());
    match (state.uploads.get_mut(id), number) {
        (Some(parts), Some(number)) => {
            parts.insert(number, part.to_vec());
            tagged(tag(part))
        }
        _ => refusal("404 Not Found", "NoSuchUpload"),
    }
}

fn complete(state: &mut State, id: &str, name: &str, order: &[u8]) -> Answer {
    let Some(parts) = state.uploads.remove(id) else {
        return refusal("404 Not Found", "NoSuchUpload");
    };
    let order = String::from_utf8_lossy(order);
    if order.matches("<PartNumber>").count() != parts.len() {
        return refusal("400 Bad Request", "InvalidPart");
    }
    let whole: Vec<u8> = parts.into_values().flatten().collect();
    let tag = tag(&whole);
    state.objects.insert(name.to_owned(), whole);
    xml(&format!(
        "<CompleteMultipartUploadResult><Bucket>{BUCKET}</Bucket><Key>{name}</Key><ETag>{tag}</ETag></CompleteMultipartUploadResult>"
    ))
}

fn list(state: &mut State, query: &BTreeMap<String, String>) -> Answer {
    let prefix = query.get("prefix").cloned().unwrap_or_default();
    let after = query.get("continuation-token").cloned();
    state.pages += usize::from(after.is_some());
    let after = after.unwrap_or_default();
    let all = state.objects.iter();
    let mut all = all.filter(|(name, _)| name.starts_with(&prefix) && **name > after);
    let page: Vec<_> = all.by_ref().take(PAGE).collect();
    let mut text = "<ListBucketResult>".to_owned();
    for (name, bytes) in &page {
        text.push_str(&format!(
            "<Contents><Key>{name}</Key><Size>{}</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>{}</ETag></Contents>",
            bytes.len(),
            tag(bytes)
        ));
    }
    if let (Some((last, _)), true) = (page.last(), all.next().is_some()) {
        text.push_str(&format!(
            "<NextContinuationToken>{last}</NextContinuationToken>"
        ));
    }
    xml(&format!("{text}</ListBucketResult>"))
}

fn tag(bytes: &[u8]) -> String {
    Digest::of_bytes(bytes).short()
}

fn tagged(tag: String) -> Answer {
    let mut answer = plain("200 OK", Vec::new());
    answer.headers.push(("ETag", tag));
    answer
}

fn plain(status: &'static str, body: Vec<u8>) -> Answer {
    Answer {
        status,
        headers: Vec::new(),
        body,
    }
}

fn xml(text: &str) -> Answer {
    let mut answer = plain("200 OK", text.as_bytes().to_vec());
    answer
        .headers
        .push(("Content-Type", "application/xml".to_owned()));
    answer
}

fn refusal(status: &'static str, code: &str) -> Answer {
    let text = format!("<Error><Code>{code}</Code><Message>no.</Message></Error>");
    Answer {
        status,
        ..xml(&text)
    }
}
