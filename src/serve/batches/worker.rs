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
use super::batch::{Batch, Status, reason};
use super::lines::{self, Line};
use super::queue::Queue;
use crate::serve::kept::{new_id, now};
use crate::serve::openai::{Endpoint, batched};
use crate::serve::service::Service;

/// What finished files of answers are for.
const ANSWERS: &str = "batch_output";

/// How the answering of a batch ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// Every request has a line.
    Whole,
    /// It was asked to end.
    Cancelled,
    /// Its time is over.
    Expired,
    /// Nothing can be answered any more in this process.
    Down,
}

/// Where a batch's requests and answers lie.
#[derive(Clone)]
struct Paths {
    input: PathBuf,
    output: PathBuf,
    failures: PathBuf,
}

/// Why a batch cannot be answered.
struct Broken(Vec<Value>);

impl From<Error> for Broken {
    fn from(error: Error) -> Self {
        let text = format!("its files cannot be read or written: {error}");
        Self(vec![reason("server_error", &text, None)])
    }
}

/// Answers what comes, as long as the process lives.
pub(in crate::serve) async fn work(service: Arc<Service>, batches: Arc<Batches>) {
    loop {
        let (batch, stop) = batches.queue.next().await;
        match answer(&service, &batches, &batch, &stop).await {
            Ok(Ending::Down) => {
                tracing::warn!("the batch {} waits for the next server", batch.id);
                return;
            }
            Ok(_) => {}
            Err(Broken(reasons)) => {
                tracing::warn!("the batch {} failed: {}", batch.id, json!(reasons));
                change(&batches.queue, &batch.id, |batch| batch.fail(reasons));
            }
        }
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

async fn answer(
    service: &Arc<Service>,
    batches: &Batches,
    batch: &Batch,
    stop: &Notify,
) -> Result<Ending, Broken> {
    let (queue, files) = (&batches.queue, &batches.files);
    let paths = Paths {
        input: files.content(&batch.input),
        output: files.content(&batch.output),
        failures: files.content(&batch.failures),
    };
    let mut total = batch.counts.total;
    if batch.status == Status::Validating {
        let (input, endpoint) = (paths.input.clone(), batch.endpoint);
        let surveyed = aside(move || Ok(lines::survey(&input, endpoint))).await?;
        total = surveyed.map_err(Broken)?;
    }
    let known = paths.clone();
    let (completed, failed) = aside(move || {
        let completed = lines::answered(&known.output)?;
        Ok((completed, lines::answered(&known.failures)?))
    })
    .await?;
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
    let ending = match cancelling {
        true => Ending::Cancelled,
        false => {
            let mut done = completed;
            done.extend(failed);
            answer_rest(service, batches, batch, &paths, done, stop).await?
        }
    };
    let (code, message, last) = match ending {
        Ending::Down => return Ok(ending),
        Ending::Whole => ("", "", Status::Completed),
        Ending::Cancelled => (
            "batch_cancelled",
            "The batch was cancelled.",
            Status::Cancelled,
        ),
        Ending::Expired => (
            "batch_expired",
            "This request could not be executed before the completion window expired.",
            Status::Expired,
        ),
    };
    if ending == Ending::Whole {
        change(queue, &batch.id, |batch| batch.enter(Status::Finalizing));
    }
    let of = paths.clone();
    let (given_up, output, failures) = aside(move || {
        let given_up = match ending {
            Ending::Whole => 0,
            _ => lines::give_up(&of.input, &of.output, &of.failures, code, message)?,
        };
        let (output, failures) = (lines::settle(&of.output)?, lines::settle(&of.failures)?);
        Ok((given_up, output, failures))
    })
    .await?;
    let (store, of) = (files.clone(), batch.clone());
    aside(move || {
        for (there, id, kind) in [
            (output, &of.output, "output"),
            (failures, &of.failures, "error"),
        ] {
            if there {
                store.announce(id, &format!("{}_{kind}.jsonl", of.id), ANSWERS)?;
            }
        }
        Ok(())
    })
    .await?;
    change(queue, &batch.id, |batch| {
        batch.counts.failed += given_up;
        batch.shown.output = output;
        batch.shown.failures = failures;
        batch.enter(last);
    });
    Ok(ending)
}

/// Answers the requests that have no line yet.
async fn answer_rest(
    service: &Arc<Service>,
    batches: &Batches,
    batch: &Batch,
    paths: &Paths,
    done: HashSet<String>,
    stop: &Notify,
) -> Result<Ending, Broken> {
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
            () = stop.notified() => return Ok(Ending::Cancelled),
            () = &mut expiry => return Ok(Ending::Expired),
        };
        let Some((status, line)) = answer else {
            break;
        };
        let failed = match status {
            StatusCode::OK => false,
            // No fault of the request's: it is asked again by the next server.
            StatusCode::SERVICE_UNAVAILABLE => return Ok(Ending::Down),
            _ => true,
        };
        let file = if failed { &mut failures } else { &mut output };
        file.write_all(line.as_bytes()).await?;
        file.flush().await?;
        batches.queue.count(&batch.id, failed);
    }
    reader.await.map_err(Error::other)??;
    Ok(Ending::Whole)
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
