//! Answers batches, one after the other: a few of their requests at a time, each let in like one
//! that a caller sends.

use std::collections::HashSet;
use std::io::Error;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;
use futures::stream::{self, StreamExt};
use serde_json::{Value, json};
use tokio::fs::File;
use tokio::io::AsyncWriteExt;
use tokio::sync::{Notify, mpsc};

use super::Batches;
use super::batch::{Batch, Shown, Status, reason};
use super::lines::{self, Line};
use super::queue::Queue;
use crate::serve::files::Files;
use crate::serve::kept::{new_id, now};
use crate::serve::openai::{Endpoint, batched};
use crate::serve::service::Service;

/// What finished files of answers are for.
const ANSWERS: &str = "batch_output";
/// Times that a batch is begun at most before one of its requests is answered: one that ends the
/// server each time is not begun for ever.
const STARTS: u32 = 3;
/// After this a batch whose answers could not be put together is tried to be ended again: a full disk
/// has room at some time.
const AGAIN: Duration = Duration::from_secs(30);

/// How the answering of a batch ended.
enum Ending {
    /// Every request has a line.
    Whole,
    /// It was asked to end.
    Cancelled,
    /// Its time is over.
    Expired,
    /// It cannot be answered, for these reasons.
    Failed(Vec<Value>),
}

impl Ending {
    /// The code and the message of the error of each request that has no answer.
    fn left(&self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::Whole | Self::Failed(_) => None,
            Self::Cancelled => Some(("batch_cancelled", "The batch was cancelled.")),
            Self::Expired => Some((
                "batch_expired",
                "This request could not be executed before the completion window expired.",
            )),
        }
    }
}

/// Where a batch's requests and answers lie.
#[derive(Clone)]
struct Paths {
    input: PathBuf,
    output: PathBuf,
    failures: PathBuf,
}

impl Paths {
    fn of(files: &Files, batch: &Batch) -> Self {
        Self {
            input: files.content(&batch.input),
            output: files.content(&batch.output),
            failures: files.content(&batch.failures),
        }
    }
}

/// Why a batch cannot be answered.
struct Broken(Vec<Value>);

impl From<Error> for Broken {
    fn from(error: Error) -> Self {
        let text = format!("its files cannot be read or written: {error}");
        Self(vec![reason("server_error", &text, None)])
    }
}

/// Answers what comes, as long as the process lives, once no other server does.
pub(in crate::serve) async fn work(service: Arc<Service>, batches: Arc<Batches>) {
    let waits = Arc::clone(&batches);
    let turn = tokio::task::spawn_blocking(move || waits.wait_for_turn());
    let hindrance = match turn.await {
        Ok(Ok(())) => None,
        Ok(Err(failure)) => Some(failure.to_string()),
        Err(error) => Some(error.to_string()),
    };
    if let Some(why) = hindrance {
        tracing::error!("this server answers no batches: {why}");
        return;
    }
    loop {
        let of = Arc::clone(&batches);
        // One that is cut off here ends with the process.
        let next = tokio::task::spawn_blocking(move || of.queue.next());
        let (batch, stop) = match next.await {
            Ok(next) => next,
            Err(error) => {
                tracing::error!("this server answers no batches any more: {error}");
                batches.let_go();
                return;
            }
        };
        let Some(ending) = answer(&service, &batches, &batch, &stop).await else {
            tracing::warn!("the batch {} waits for the next server", batch.id);
            batches.let_go();
            return;
        };
        end(&batches, &batch, &ending, AGAIN).await;
        batches.queue.idle();
    }
}

/// Runs `work` where blocking harms nobody.
async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(Error::other)?
}

/// Changes a batch where blocking harms nobody.
fn change(queue: &Queue, id: &str, how: impl FnOnce(&mut Batch)) {
    tokio::task::block_in_place(|| queue.change(id, how));
}

/// Answers a batch; none when nothing can be answered any more in this process.
async fn answer(
    service: &Arc<Service>,
    batches: &Batches,
    batch: &Batch,
    stop: &Notify,
) -> Option<Ending> {
    match go_on(service, batches, batch, stop).await {
        Ok(ending) => ending,
        Err(Broken(reasons)) => {
            tracing::warn!("the batch {} failed: {}", batch.id, json!(reasons));
            Some(Ending::Failed(reasons))
        }
    }
}

async fn go_on(
    service: &Arc<Service>,
    batches: &Batches,
    batch: &Batch,
    stop: &Notify,
) -> Result<Option<Ending>, Broken> {
    if batch.starts > STARTS {
        let text = format!("the server ended {STARTS} times when it began this batch");
        return Err(Broken(vec![reason("server_error", &text, None)]));
    }
    let (queue, files) = (&batches.queue, &batches.files);
    let paths = Paths::of(files, batch);
    let mut total = batch.counts.total;
    // One that was cancelled before its requests were read has none yet.
    if total == 0 {
        let (input, endpoint) = (paths.input.clone(), batch.endpoint);
        let surveyed = aside(move || Ok(lines::survey(&input, endpoint))).await?;
        total = surveyed.map_err(Broken)?;
    }
    let (completed, failed) = named(&paths).await?;
    let cancelling = queue
        .get(&batch.id)
        .is_ok_and(|b| b.status == Status::Cancelling);
    change(queue, &batch.id, |batch| {
        batch.counts.total = total;
        batch.counts.completed = completed.len();
        batch.counts.failed = failed.len();
        if batch.status == Status::Validating {
            batch.enter(Status::InProgress);
        }
    });
    let mut done = completed;
    done.extend(failed);
    let there = tokio::fs::try_exists(&paths.input).await?;
    let ending = match (cancelling, there) {
        (true, _) => Some(Ending::Cancelled),
        (false, true) => answer_rest(service, batches, batch, &paths, done, stop).await?,
        (false, false) if done.len() >= total => Some(Ending::Whole),
        // The answers that there are do not go with it.
        (false, false) => {
            let text = "its file of requests is gone; it ends with the answers that it has";
            tracing::warn!("the batch {}: {text}", batch.id);
            let gone = reason("invalid_file", text, None);
            change(queue, &batch.id, |batch| batch.errors.push(gone));
            Some(Ending::Expired)
        }
    };
    if matches!(ending, Some(Ending::Whole)) {
        change(queue, &batch.id, |batch| batch.enter(Status::Finalizing));
    }
    Ok(ending)
}

/// The names of the requests that have an answer, and of those that have an error. What was cut
/// off at the end of the files is taken away.
async fn named(paths: &Paths) -> Result<(HashSet<String>, HashSet<String>), Error> {
    let known = paths.clone();
    aside(move || {
        let completed = lines::answered(&known.output)?;
        Ok((completed, lines::answered(&known.failures)?))
    })
    .await
}

/// Lets callers see the files of answers and errors that have any.
async fn show(files: &Files, batch: &Batch, paths: &Paths) -> Result<Shown, Error> {
    let (files, of, paths) = (files.clone(), batch.clone(), paths.clone());
    aside(move || {
        let show = |path: &Path, id: &str, kind: &str| -> Result<bool, Error> {
            let there = lines::settle(path)?;
            if there {
                files.announce(id, &format!("{}_{kind}.jsonl", of.id), ANSWERS)?;
            }
            Ok(there)
        };
        Ok(Shown {
            output: show(&paths.output, &of.output, "output")?,
            failures: show(&paths.failures, &of.failures, "error")?,
        })
    })
    .await
}

/// Ends a batch, with the answers that it has. While these cannot be put together, or its end cannot
/// be written, it has not ended: they stay on the disk, and the next server goes on with it. Others
/// wait: a disk that is full would fail them.
async fn end(batches: &Batches, batch: &Batch, ending: &Ending, pause: Duration) {
    while let Err(error) = put_together(batches, batch, ending).await {
        tracing::warn!(
            "the batch {} cannot be ended: {error}; its answers wait on the disk",
            batch.id
        );
        tokio::time::sleep(pause).await;
    }
}

/// What is done already is not done again.
async fn put_together(batches: &Batches, batch: &Batch, ending: &Ending) -> Result<(), Error> {
    let paths = Paths::of(&batches.files, batch);
    if let Some((code, message)) = ending.left() {
        let of = paths.clone();
        aside(move || lines::give_up(&of.input, &of.output, &of.failures, code, message)).await?;
    }
    let (completed, failed) = named(&paths).await?;
    let shown = show(&batches.files, batch, &paths).await?;
    tokio::task::block_in_place(|| {
        batches.queue.try_change(&batch.id, |batch| {
            batch.counts.completed = completed.len();
            batch.counts.failed = failed.len();
            batch.shown = shown;
            match ending {
                Ending::Whole => batch.enter(Status::Completed),
                Ending::Cancelled => batch.enter(Status::Cancelled),
                Ending::Expired => batch.enter(Status::Expired),
                Ending::Failed(reasons) => batch.fail(reasons.clone()),
            }
        })
    })
}

/// Answers the requests that have no line yet.
async fn answer_rest(
    service: &Arc<Service>,
    batches: &Batches,
    batch: &Batch,
    paths: &Paths,
    done: HashSet<String>,
    stop: &Notify,
) -> Result<Option<Ending>, Broken> {
    let (mut output, mut failures) = (open(&paths.output).await?, open(&paths.failures).await?);
    // As many as are answered at once are read ahead, and no more.
    let (send, requests) = mpsc::channel(1);
    let input = paths.input.clone();
    let reader = aside(move || lines::feed(&input, &done, &send));
    let reader = tokio::spawn(reader);
    let requests = stream::unfold(requests, |mut requests| async move {
        let line: Line = requests.recv().await?;
        Some((line, requests))
    });
    let (asked, endpoint) = (Arc::clone(service), batch.endpoint);
    let answers = requests
        .map(move |line| answer_one(Arc::clone(&asked), endpoint, line))
        .buffer_unordered(service.limits.batched());
    let mut answers = pin!(answers);
    let left = batch.expires_at().saturating_sub(now());
    let mut expiry = pin!(tokio::time::sleep(Duration::from_secs(left)));
    loop {
        let answer = tokio::select! {
            answer = answers.next() => answer,
            () = stop.notified() => return Ok(Some(Ending::Cancelled)),
            () = &mut expiry => return Ok(Some(Ending::Expired)),
        };
        let Some((status, line)) = answer else {
            break;
        };
        // No fault of the request's: it is asked again by the next server.
        if status.is_server_error() && !service.is_up() {
            return Ok(None);
        }
        let failed = match status {
            StatusCode::OK => false,
            StatusCode::SERVICE_UNAVAILABLE => return Ok(None),
            _ => true,
        };
        let file = if failed { &mut failures } else { &mut output };
        file.write_all(line.as_bytes()).await?;
        file.flush().await?;
        tokio::task::block_in_place(|| batches.queue.count(&batch.id, failed));
    }
    reader.await.map_err(Error::other)??;
    Ok(Some(Ending::Whole))
}

/// Lines are added at its end.
async fn open(path: &Path) -> Result<File, Error> {
    let mut options = tokio::fs::OpenOptions::new();
    options.create(true).append(true).open(path).await
}

/// The status of a request's answer, and the line that tells of it.
async fn answer_one(
    service: Arc<Service>,
    endpoint: Endpoint,
    request: Line,
) -> (StatusCode, String) {
    if service.is_draining() {
        // Only what callers wait for is finished.
        std::future::pending::<()>().await;
    }
    let (status, body) = match batched(&service, endpoint, request.body).await {
        Ok(body) => (StatusCode::OK, body),
        Err(problem) => (problem.status(), problem.body()),
    };
    let line = json!({
        "id": new_id("batch_req_"), "custom_id": request.custom_id, "error": null,
        "response": {
            "status_code": status.as_u16(), "request_id": new_id("req_"), "body": body,
        },
    });
    (status, format!("{line}\n"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::serve::orders::Order;

    const WHOLE: &str = "{\"custom_id\": \"a\"}\n";

    fn block_on<T>(work: impl Future<Output = T>) -> T {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(work)
    }

    /// The batches of a folder, one of them with an answer and the half of one.
    fn cut_off(folder: &Path) -> (Batches, Batch) {
        let batches = Batches::open(folder).unwrap();
        let order = json!({"input_file_id": "file-1", "endpoint": "/v1/completions",
            "completion_window": "24h"});
        let order = serde_json::from_value(order).unwrap();
        let batch = batches.queue.order(order, &batches.files).unwrap();
        let output = batches.files.content(&batch.output);
        // A full disk cut off the second line.
        std::fs::write(output, format!("{WHOLE}{{\"custom_")).unwrap();
        (batches, batch)
    }

    fn failed() -> Ending {
        Ending::Failed(vec![reason("server_error", "the disk is full", None)])
    }

    #[test]
    fn a_batch_that_fails_shows_the_answers_that_it_has() {
        let dir = tempfile::tempdir().unwrap();
        let (batches, batch) = cut_off(dir.path());
        block_on(end(&batches, &batch, &failed(), AGAIN));
        let batch = batches.queue.get(&batch.id).unwrap();
        assert_eq!(batch.status, Status::Failed);
        assert_eq!((batch.counts.completed, batch.counts.failed), (1, 0));
        let object = batch.object();
        assert_eq!(object["output_file_id"], batch.output);
        assert_eq!(object["error_file_id"], Value::Null);
        assert!(batches.files.get(&batch.output).is_ok());
        let output = std::fs::read_to_string(batches.files.content(&batch.output));
        assert_eq!(output.unwrap(), WHOLE);
    }

    #[test]
    fn one_whose_answers_cannot_be_shown_has_not_ended_until_they_can() {
        for (ending, status) in [
            (failed(), Status::Failed),
            (Ending::Whole, Status::Completed),
            (Ending::Cancelled, Status::Cancelled),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let (batches, batch) = cut_off(dir.path());
            // No file takes the place of a folder that has one.
            let note = batches.files.content(&batch.output).with_extension("json");
            std::fs::create_dir_all(note.join("in the way")).unwrap();
            let clear = async {
                let refused = put_together(&batches, &batch, &ending).await;
                assert!(refused.is_err());
                assert!(!batches.queue.get(&batch.id).unwrap().has_ended());
                std::fs::remove_dir_all(&note).unwrap();
            };
            let pause = Duration::from_millis(1);
            block_on(async { tokio::join!(clear, end(&batches, &batch, &ending, pause)) });
            let kept = batches.queue.get(&batch.id).unwrap();
            assert_eq!(kept.status, status);
            assert!(kept.shown.output && batches.files.get(&batch.output).is_ok());
            // So the next server has it.
            drop(batches);
            let batches = Batches::open(dir.path()).unwrap();
            assert_eq!(batches.queue.get(&batch.id).unwrap().status, status);
        }
    }
}
