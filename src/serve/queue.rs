//! [`Queue`]: requests wait here for the one thread that computes. What waits when the thread is
//! free is computed together, so a busy server works in batches.
//!
//! Bounded: when it is full, callers are told so at once. A request whose caller went away before
//! its turn is not computed.

use std::time::Duration;

use flowrun_lm::example::Example;
use flowrun_lm::lm::{Completion, Lm, LmError, Request};
use flowrun_lm::program::RowResult;
use flowrun_steps::answer::Answerer;
use tokio::sync::{mpsc, oneshot};

/// Requests that wait at most.
const CAPACITY: usize = 256;
/// Requests that are computed together at most.
const BATCH: usize = 32;
/// How long a request may take, its time in the queue included.
const TIMEOUT: Duration = Duration::from_secs(120);

/// What the program gives for a text.
type Predicted = Result<RowResult, String>;
/// What the model gives for a chat.
type Completed = Result<Completion, LmError>;

enum Job {
    Predict(Example, oneshot::Sender<Predicted>),
    Complete(Request, oneshot::Sender<Completed>),
}

impl Job {
    fn is_given_up(&self) -> bool {
        match self {
            Self::Predict(_, reply) => reply.is_closed(),
            Self::Complete(_, reply) => reply.is_closed(),
        }
    }
}

/// Why a request was not computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// Too many are waiting.
    Full,
    /// It took too long.
    TimedOut,
    /// The thread that computes is gone.
    Down,
    /// The bundle's program asks no language model.
    NoModel,
}

/// Requests on their way.
pub(super) struct Queue {
    jobs: mpsc::Sender<Job>,
    has_model: bool,
}

impl Queue {
    /// Starts the thread that computes.
    pub(super) fn start(answerer: Answerer, label_field: String) -> std::io::Result<Self> {
        let (jobs, waiting) = mpsc::channel(CAPACITY);
        let has_model = matches!(answerer, Answerer::Prompt { .. });
        std::thread::Builder::new()
            .name("answers".to_owned())
            .spawn(move || work(waiting, &answerer, &label_field))?;
        Ok(Self { jobs, has_model })
    }

    /// Whether requests are answered.
    pub(super) fn is_up(&self) -> bool {
        !self.jobs.is_closed()
    }

    /// Whether there is a language model.
    pub(super) fn has_model(&self) -> bool {
        self.has_model
    }

    /// Runs the program on a row.
    pub(super) async fn predict(&self, row: Example) -> Result<Predicted, Refused> {
        let (reply, answer) = oneshot::channel();
        self.ask(Job::Predict(row, reply), answer).await
    }

    /// Asks the model.
    pub(super) async fn complete(&self, request: Request) -> Result<Completed, Refused> {
        if !self.has_model {
            return Err(Refused::NoModel);
        }
        let (reply, answer) = oneshot::channel();
        self.ask(Job::Complete(request, reply), answer).await
    }

    async fn ask<T>(&self, job: Job, answer: oneshot::Receiver<T>) -> Result<T, Refused> {
        use mpsc::error::TrySendError;
        self.jobs.try_send(job).map_err(|error| match error {
            TrySendError::Full(_) => Refused::Full,
            TrySendError::Closed(_) => Refused::Down,
        })?;
        match tokio::time::timeout(TIMEOUT, answer).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(_)) => Err(Refused::Down),
            Err(_) => Err(Refused::TimedOut),
        }
    }
}

fn work(mut waiting: mpsc::Receiver<Job>, answerer: &Answerer, label_field: &str) {
    while let Some(first) = waiting.blocking_recv() {
        let mut batch = vec![first];
        while batch.len() < BATCH
            && let Ok(job) = waiting.try_recv()
        {
            batch.push(job);
        }
        let (mut rows, mut chats) = ((Vec::new(), Vec::new()), (Vec::new(), Vec::new()));
        for job in batch.into_iter().filter(|job| !job.is_given_up()) {
            match job {
                Job::Predict(row, reply) => {
                    rows.0.push(row);
                    rows.1.push(reply);
                }
                Job::Complete(request, reply) => {
                    chats.0.push(request);
                    chats.1.push(reply);
                }
            }
        }
        predict(answerer, label_field, &rows.0, rows.1);
        complete(answerer, &chats.0, chats.1);
    }
}

// A reply that nobody waits for any more is dropped.

fn predict(
    answerer: &Answerer,
    label_field: &str,
    rows: &[Example],
    replies: Vec<oneshot::Sender<Predicted>>,
) {
    if rows.is_empty() {
        return;
    }
    match answerer.run(rows, label_field, &|_| {}) {
        Ok(results) => {
            for (reply, result) in replies.into_iter().zip(results) {
                let _ = reply.send(Ok(result));
            }
        }
        Err(error) => {
            for reply in replies {
                let _ = reply.send(Err(error.message.clone()));
            }
        }
    }
}

fn complete(answerer: &Answerer, requests: &[Request], replies: Vec<oneshot::Sender<Completed>>) {
    let Answerer::Prompt { lm, .. } = answerer else {
        return;
    };
    if requests.is_empty() {
        return;
    }
    let answers = lm.complete(requests, &|_, _| {});
    for (reply, answer) in replies.into_iter().zip(answers) {
        let _ = reply.send(answer);
    }
}
