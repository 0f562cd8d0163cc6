//! Requests and answers on disk, one JSON object a line.
//!
//! Blocking. Invariant: a line of answers is whole, or it is taken away before others follow.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, ErrorKind, Result, Write};
use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::batch::reason;
use crate::serve::kept::new_id;
use crate::serve::limits::BODY;
use crate::serve::openai::Endpoint;

/// Requests of a batch at most, as at OpenAI.
const MOST: usize = 50_000;
/// Reasons that are told of a file that cannot be answered.
const REASONS: usize = 20;

/// A request.
#[derive(Debug, Deserialize)]
pub(super) struct Line {
    /// What the caller calls it.
    pub(super) custom_id: String,
    method: String,
    url: String,
    pub(super) body: Value,
}

#[derive(Deserialize)]
struct Named {
    custom_id: String,
}

/// The number of requests in a file, or why it cannot be answered.
pub(super) fn survey(input: &Path, endpoint: Endpoint) -> std::result::Result<usize, Vec<Value>> {
    let unread = |e: std::io::Error| {
        let text = format!("the file of requests cannot be read: {e}");
        vec![reason("invalid_file", &text, None)]
    };
    let file = File::open(input).map_err(unread)?;
    let (mut names, mut reasons) = (HashSet::new(), Vec::new());
    for (at, text) in BufReader::new(file).lines().enumerate() {
        let text = text.map_err(unread)?;
        if text.trim().is_empty() {
            continue;
        }
        match check(&text, endpoint) {
            Err((code, why)) => reasons.push(reason(code, &why, Some(at + 1))),
            Ok(line) if names.contains(&line.custom_id) => {
                let why = format!("an earlier line has the `custom_id` `{}`", line.custom_id);
                reasons.push(reason("duplicate_custom_id", &why, Some(at + 1)));
            }
            Ok(line) => {
                names.insert(line.custom_id);
            }
        }
        if reasons.len() >= REASONS {
            break;
        }
    }
    match names.len() {
        _ if !reasons.is_empty() => Err(reasons),
        0 => Err(vec![reason("empty_file", "the file has no requests", None)]),
        count if count > MOST => {
            let text = format!("the file has {count} requests, at most {MOST} are answered");
            Err(vec![reason("too_many_requests", &text, None)])
        }
        count => Ok(count),
    }
}

fn check(text: &str, endpoint: Endpoint) -> std::result::Result<Line, (&'static str, String)> {
    if text.len() > BODY {
        let why = format!("a request has at most {BODY} bytes");
        return Err(("too_large", why));
    }
    let line: Line = serde_json::from_str(text)
        .map_err(|e| ("invalid_json_line", format!("this line is no request: {e}")))?;
    if line.method != "POST" {
        let why = format!("`method` is `POST`, not `{}`", line.method);
        return Err(("invalid_method", why));
    }
    if line.url != endpoint.path() {
        let why = format!(
            "`url` is `{}` in this batch, not `{}`",
            endpoint.path(),
            line.url
        );
        return Err(("mismatched_endpoint", why));
    }
    if !line.body.is_object() {
        return Err(("invalid_request", "`body` is no object".to_owned()));
    }
    Ok(line)
}

/// The names of the requests that a file has lines of. What a kill cut off at its end is taken
/// away.
pub(super) fn answered(path: &Path) -> Result<HashSet<String>> {
    let file = match File::options().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(HashSet::new()),
        Err(e) => return Err(e),
    };
    let (mut names, mut line, mut whole) = (HashSet::new(), Vec::new(), 0);
    let mut reader = BufReader::new(file);
    loop {
        line.clear();
        let bytes = reader.read_until(b'\n', &mut line)?;
        if line.last() != Some(&b'\n') {
            break;
        }
        whole += bytes as u64;
        if let Ok(Named { custom_id }) = serde_json::from_slice(&line) {
            names.insert(custom_id);
        }
    }
    let file = reader.into_inner();
    if file.metadata()?.len() > whole {
        file.set_len(whole)?;
    }
    Ok(names)
}

/// Hands on the requests of a file but for those named in `done`, until nobody takes them.
pub(super) fn feed(input: &Path, done: &HashSet<String>, to: &mpsc::Sender<Line>) -> Result<()> {
    for text in BufReader::new(File::open(input)?).lines() {
        let text = text?;
        if text.trim().is_empty() {
            continue;
        }
        let line: Line = serde_json::from_str(&text).map_err(std::io::Error::other)?;
        if !done.contains(&line.custom_id) && to.blocking_send(line).is_err() {
            break;
        }
    }
    Ok(())
}

/// Writes an error for each request that has no answer; gives their number.
pub(super) fn give_up(
    input: &Path,
    output: &Path,
    failures: &Path,
    code: &str,
    message: &str,
) -> Result<usize> {
    let mut done = answered(output)?;
    done.extend(answered(failures)?);
    let input = match File::open(input) {
        Ok(input) => input,
        // Its owner has deleted it.
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(0),
        Err(e) => return Err(e),
    };
    let failures = File::options().create(true).append(true).open(failures)?;
    let mut failures = BufWriter::new(failures);
    let mut count = 0;
    for text in BufReader::new(input).lines() {
        let Ok(Named { custom_id }) = serde_json::from_str(&text?) else {
            continue;
        };
        if !done.contains(&custom_id) {
            let error = json!({"code": code, "message": message});
            let line = json!({
                "id": new_id("batch_req_"), "custom_id": custom_id, "response": null,
                "error": error,
            });
            writeln!(failures, "{line}")?;
            count += 1;
        }
    }
    failures.flush()?;
    Ok(count)
}

/// Whether a file of answers has any, all of them on the disk; an empty one goes.
pub(super) fn settle(path: &Path) -> Result<bool> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(e),
    };
    if file.metadata()?.len() == 0 {
        std::fs::remove_file(path)?;
        return Ok(false);
    }
    file.sync_all()?;
    Ok(true)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn request(name: &str) -> String {
        let url = Endpoint::Chat.path();
        json!({"custom_id": name, "method": "POST", "url": url, "body": {}}).to_string()
    }

    #[test]
    fn a_file_that_cannot_be_answered_says_where_and_why() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("in");
        let survey = |text: &str| {
            std::fs::write(&path, text).unwrap();
            survey(&path, Endpoint::Chat)
        };
        let (a, b) = (request("a"), request("b"));
        assert_eq!(survey(&format!("{a}\n\n{b}")), Ok(2));
        let elsewhere = a.replace("/chat/completions", "/embeddings");
        for (text, code, line) in [
            (format!("{a}\n{{"), "invalid_json_line", Some(2)),
            (format!("{a}\n{b}\n{a}\n"), "duplicate_custom_id", Some(3)),
            (a.replace("POST", "GET"), "invalid_method", Some(1)),
            (elsewhere, "mismatched_endpoint", Some(1)),
            (a.replace("{}", "[]"), "invalid_request", Some(1)),
            (format!("{a}{}", " ".repeat(BODY)), "too_large", Some(1)),
            ("\n".to_owned(), "empty_file", None),
        ] {
            let reasons = survey(&text).unwrap_err();
            assert_eq!(reasons.len(), 1, "{reasons:?}");
            assert_eq!(reasons[0]["code"], code);
            assert_eq!(reasons[0]["line"], json!(line), "{code}");
        }
        assert_eq!(survey(&"{\n".repeat(99)).unwrap_err().len(), REASONS);
        let gone = super::survey(&dir.path().join("gone"), Endpoint::Chat);
        assert_eq!(gone.unwrap_err()[0]["code"], "invalid_file");
    }

    #[test]
    fn what_a_kill_cut_off_is_asked_again() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let requests: Vec<String> = ["a", "b", "c"].map(request).to_vec();
        std::fs::write(at("in"), requests.join("\n")).unwrap();
        std::fs::write(at("out"), "{\"custom_id\": \"a\"}\n{\"custom_id\": \"b\"").unwrap();
        let done = answered(&at("out")).unwrap();
        assert_eq!(done, HashSet::from(["a".to_owned()]));
        let whole = std::fs::read_to_string(at("out")).unwrap();
        assert_eq!(whole, "{\"custom_id\": \"a\"}\n");
        let (send, mut lines) = mpsc::channel(9);
        feed(&at("in"), &done, &send).unwrap();
        drop(send);
        let fed = std::iter::from_fn(|| lines.blocking_recv());
        let fed: Vec<String> = fed.map(|line| line.custom_id).collect();
        assert_eq!(fed, ["b", "c"]);

        let given_up = || give_up(&at("in"), &at("out"), &at("err"), "batch_expired", "late");
        assert_eq!(given_up().unwrap(), 2);
        assert_eq!(given_up().unwrap(), 0, "each has one line");
        let names = HashSet::from(["b".to_owned(), "c".to_owned()]);
        assert_eq!(answered(&at("err")).unwrap(), names);
        assert!(settle(&at("err")).unwrap() && !settle(&at("none")).unwrap());
        std::fs::write(at("none"), "").unwrap();
        assert!(!settle(&at("none")).unwrap() && !at("none").exists());
    }
}
