//! A proxy on loopback before an S3 server: it refuses what it is told to, or breaks off an answer.

use std::collections::BTreeMap;
use std::io::{BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::http::{Request, listen};

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// 503, and the server sees nothing.
    SlowDown,
    /// 500 once the request was read; the server sees nothing.
    InternalError,
    /// The body of a good answer breaks off in its middle.
    Cut,
}

/// The proxy; it runs as long as the tests do.
pub(crate) struct S3Proxy {
    pub(crate) url: String,
    faults: Arc<AtomicUsize>,
    calm: Arc<AtomicBool>,
}

impl S3Proxy {
    /// `plan` gets each request, and how many there were with its method, path and query, this one
    /// included.
    pub(crate) fn before(
        server: &str,
        plan: impl Fn(&Request, usize) -> Option<Fault> + Send + Sync + 'static,
    ) -> Self {
        let server = server.strip_prefix("http://").unwrap().to_owned();
        let asked: Mutex<BTreeMap<(String, String), usize>> = Mutex::default();
        let (faults, calm) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let (count, over) = (Arc::clone(&faults), Arc::clone(&calm));
        let url = listen(move |client| {
            let choose = |request: &Request| {
                let mut asked = asked.lock().unwrap();
                let place = (request.method.clone(), request.path.clone());
                let times = asked.entry(place).or_default();
                *times += 1;
                plan(request, *times).filter(|_| !over.load(Ordering::SeqCst))
            };
            // A client may go at any moment.
            let _ = serve(&client, &server, choose, &count);
        });
        Self { url, faults, calm }
    }

    /// From here on everything is passed on.
    pub(crate) fn calm(&self) {
        self.calm.store(true, Ordering::SeqCst);
    }

    /// Requests that were spoilt.
    pub(crate) fn faults(&self) -> usize {
        self.faults.load(Ordering::SeqCst)
    }
}

/// One request a connection.
fn serve(
    mut client: &TcpStream,
    server: &str,
    choose: impl FnOnce(&Request) -> Option<Fault>,
    faults: &AtomicUsize,
) -> Option<()> {
    let request = Request::read(&mut BufReader::new(client))?;
    let fault = choose(&request);
    let refusal = match fault {
        Some(Fault::SlowDown) => Some((503, "SlowDown", "Please reduce your request rate.")),
        Some(Fault::InternalError) => Some((500, "InternalError", "Please try again.")),
        Some(Fault::Cut) | None => None,
    };
    if let Some((status, code, message)) = refusal {
        faults.fetch_add(1, Ordering::SeqCst);
        let body = match request.method.as_str() {
            "HEAD" => String::new(),
            _ => format!("<Error><Code>{code}</Code><Message>{message}</Message></Error>"),
        };
        let head = format!(
            "HTTP/1.1 {status} Refused\r\ncontent-type: application/xml\r\n\
             content-length: {}\r\nconnection: close\r\n\r\n",
            body.len()
        );
        return client.write_all((head + &body).as_bytes()).ok();
    }
    let answer = passed_on(&request, server)?;
    let part = match fault {
        Some(Fault::Cut) => half(&answer),
        _ => None,
    };
    if part.is_some() {
        faults.fetch_add(1, Ordering::SeqCst);
    }
    client.write_all(part.unwrap_or(&answer)).ok()
}

/// The server's whole answer. What is signed of the request stays as it was.
fn passed_on(request: &Request, server: &str) -> Option<Vec<u8>> {
    let mut head = format!("{} {} HTTP/1.1\r\n", request.method, request.path);
    for (name, value) in &request.headers {
        if !["connection", "transfer-encoding"].contains(&name.as_str()) {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
    }
    if request.headers.contains_key("transfer-encoding") {
        head.push_str(&format!("content-length: {}\r\n", request.body.len()));
    }
    head.push_str("connection: close\r\n\r\n");
    let mut stream = TcpStream::connect(server).ok()?;
    stream.write_all(head.as_bytes()).ok()?;
    stream.write_all(&request.body).ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    Some(answer)
}

/// A good answer up to the middle of its body, if it has one.
fn half(answer: &[u8]) -> Option<&[u8]> {
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n")? + 4;
    let body = answer.len() - end;
    let spoils = answer.starts_with(b"HTTP/1.1 2") && body > 0;
    spoils.then(|| &answer[..end + body / 2])
}
