//! A server on loopback that keeps what it was sent.

use std::io::{BufReader, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex};

use crate::http::{Request, listen};

/// The server; it listens as long as the tests run.
pub(crate) struct Receiver {
    pub(crate) url: String,
    sent: Arc<Mutex<Vec<Request>>>,
}

impl Receiver {
    /// `answer` gets how many requests came before, and the request; it gives status and body.
    /// Status 0: the server hangs up without an answer.
    pub(crate) fn start(
        answer: impl Fn(usize, &Request) -> (u16, String) + Send + Sync + 'static,
    ) -> Self {
        let sent = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&sent);
        let url = listen(move |stream| serve(stream, &kept, &answer));
        Self { url, sent }
    }

    /// All that was sent so far, in order.
    pub(crate) fn sent(&self) -> Vec<Request> {
        self.sent.lock().unwrap().clone()
    }
}

/// Answers the requests of a connection until the client closes it.
fn serve(
    stream: TcpStream,
    kept: &Mutex<Vec<Request>>,
    answer: &impl Fn(usize, &Request) -> (u16, String),
) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut writer = stream;
    while let Some(request) = Request::read(&mut reader) {
        let before = {
            let mut kept = kept.lock().unwrap();
            kept.push(request.clone());
            kept.len() - 1
        };
        let (status, body) = answer(before, &request);
        if status == 0 {
            return;
        }
        let head = format!(
            "HTTP/1.1 {status} Status\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n",
            body.len()
        );
        if writer.write_all((head + &body).as_bytes()).is_err() {
            return;
        }
    }
}
