//! [`Streaming`]: an answer as server-sent events, each part as it comes.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Instant;

use axum::response::sse::{Event as Sent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use flowrun_steps::serving::{Ended, Event, Piece};
use futures::Stream;
use futures::stream::{self, StreamExt};
use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::{Choice, Frame, count, finish, timed, within};
use crate::serve::problem::{Problem, Refused};
use crate::serve::service::{Events, Service};

/// An answer that is sent as it comes.
pub(super) struct Streaming {
    pub(super) service: Arc<Service>,
    pub(super) frame: Frame,
    pub(super) usage: bool,
    pub(super) logprobs: bool,
    pub(super) deadline: Instant,
    pub(super) started: Instant,
}

/// What a stream does next.
struct Under {
    streaming: Streaming,
    heard: stream::BoxStream<'static, (usize, Option<Event>)>,
    choices: Vec<Choice>,
    open: usize,
    to_send: VecDeque<String>,
    done: bool,
    said_anything: bool,
    /// Its place is free when this is gone, or at the deadline: a client that does not read holds
    /// nothing but its connection.
    _over: oneshot::Sender<()>,
}

impl Streaming {
    /// A request that cannot be answered at all is an error, not a stream.
    pub(super) async fn respond(
        self,
        mut events: Vec<Events>,
        place: OwnedSemaphorePermit,
    ) -> Result<Response, Problem> {
        let first = match events.first_mut() {
            Some(first) => within(self.deadline, first.recv()).await,
            None => None,
        };
        let first = match timed(&self.service, first)? {
            Some(Event::End(Err(error))) => return Err(error.into()),
            None => return Err(Refused::Down.into()),
            Some(event) => event,
        };
        let count = events.len();
        let to_send = (0..count).filter_map(|index| self.frame.opening(index));
        let to_send = to_send.map(|chunk| self.text(chunk)).collect();
        let streams = events.into_iter().enumerate().map(|(index, events)| {
            let next = |mut events: Events| async move {
                let event = events.recv().await?;
                Some((event, events))
            };
            let events = stream::unfold(events, next).map(Some);
            // An end without an end event: the thread is gone.
            let events = events.chain(stream::once(async { None }));
            events.map(move |event| (index, event)).boxed()
        });
        let rest = stream::select_all(streams);
        let heard = stream::once(async move { (0, Some(first)) }).chain(rest);
        let (over, is_over) = oneshot::channel();
        let deadline = self.deadline;
        tokio::spawn(async move {
            within(deadline, is_over).await;
            drop(place);
        });
        let under = Under {
            streaming: self,
            heard: heard.boxed(),
            choices: (0..count).map(|_| Choice::default()).collect(),
            open: count,
            to_send,
            done: false,
            said_anything: false,
            _over: over,
        };
        Ok(Sse::new(under.stream())
            .keep_alive(KeepAlive::default())
            .into_response())
    }

    fn text(&self, mut chunk: Value) -> String {
        if self.usage && chunk.get("usage").is_none() {
            chunk["usage"] = Value::Null;
        }
        chunk.to_string()
    }
}

impl Under {
    fn stream(self) -> impl Stream<Item = Result<Sent, Infallible>> {
        stream::unfold(self, |mut under| async move {
            loop {
                if let Some(text) = under.to_send.pop_front() {
                    return Some((Ok(Sent::default().data(text)), under));
                }
                if under.done {
                    return None;
                }
                under.listen().await;
            }
        })
    }

    /// Waits for the next thing to send, up to the deadline.
    async fn listen(&mut self) {
        let heard = within(self.streaming.deadline, self.heard.next()).await;
        match heard {
            Some(Some((index, Some(Event::Piece(piece))))) => self.piece(index, piece),
            Some(Some((index, Some(Event::End(Ok(ended)))))) => self.end(index, ended),
            Some(Some((_, Some(Event::End(Err(error)))))) => self.break_off(error.into()),
            Some(Some((index, None))) if self.choices[index].ended.is_some() => {}
            Some(_) => self.break_off(Refused::Down.into()),
            None => {
                self.streaming.service.metrics.refused("timeout");
                self.break_off(Refused::TimedOut.into());
            }
        }
    }

    fn piece(&mut self, index: usize, piece: Piece) {
        if piece.text.is_empty() && (piece.token.is_none() || !self.streaming.logprobs) {
            return;
        }
        let at = self.choices[index].advance(&piece.text);
        let Streaming {
            frame,
            logprobs,
            started,
            service,
            ..
        } = &self.streaming;
        if !std::mem::replace(&mut self.said_anything, true) {
            service.metrics.first_token(started.elapsed());
        }
        let chunk = frame.chunk(index, &piece, None, logprobs.then_some(at));
        self.to_send.push_back(self.streaming.text(chunk));
    }

    fn end(&mut self, index: usize, ended: Ended) {
        let finish = finish(ended.finish);
        let chunk = self
            .streaming
            .frame
            .chunk(index, &Piece::default(), Some(finish), None);
        self.to_send.push_back(self.streaming.text(chunk));
        self.choices[index].ended = Some(ended);
        self.open -= 1;
        if self.open == 0 {
            count(&self.streaming.service, &self.choices);
            if self.streaming.usage {
                let frame = &self.streaming.frame;
                let mut last = frame.around(frame.chunk_object(), vec![]);
                last["usage"] = frame.usage(&self.choices);
                self.to_send.push_back(last.to_string());
            }
            self.to_send.push_back("[DONE]".to_owned());
            self.done = true;
        }
    }

    /// What was sent cannot be taken back; the client sees an error event in the stream.
    fn break_off(&mut self, problem: Problem) {
        self.to_send.push_back(problem.body().to_string());
        self.done = true;
    }
}

impl Drop for Under {
    fn drop(&mut self) {
        if !self.done {
            self.streaming.service.metrics.given_up();
        }
    }
}
