//! `flowrun serve BUNDLE`: the deployed program and its model over HTTP.
//!
//! | file | what |
//! |---|---|
//! | `mod` | the command: opens the bundle, listens, stops |
//! | `queue` | requests wait here for the one thread that computes |
//! | `routes` | which path does what |
//! | `predict` | `POST /predict`: the program |
//! | `openai` | `/v1/…`: the model, in OpenAI's shapes |
//! | `guard` | who may ask |
//! | `problem` | errors, in OpenAI's shape |

mod guard;
mod openai;
mod predict;
mod problem;
mod queue;
mod routes;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use flowrun_cache::ArtifactStore;
use flowrun_engine::step::{Cancel, StepError, World};
use flowrun_steps::bundle::{Bundle, Manifest};
use flowrun_steps::deploy::API_KEY;
use flowrun_steps::models::Host;
use tokio::net::TcpListener;

use crate::args::{GlobalArgs, ServeArgs};
use crate::exit::{Exit, Failure};
use crate::surroundings;
use guard::Guard;
use queue::Queue;

/// What every handler knows.
pub(crate) struct Service {
    manifest: Manifest,
    label_field: String,
    digest: String,
    queue: Queue,
    started: u64,
}

/// Serves a bundle until it is told to stop.
pub(crate) fn serve(args: &ServeArgs, global: &GlobalArgs) -> Result<Exit, Failure> {
    let world = surroundings::world(&args.bundle, global)?;
    let key = world.env.get(API_KEY).filter(|key| !key.is_empty());
    if !args.host.is_loopback() && key.is_none() {
        return Err(Failure::usage(format!(
            "{} can be reached from other machines: set {API_KEY}, the key that callers must give",
            args.host
        )));
    }
    let guard = Guard::new(key.map(String::as_str), args.host.is_loopback());
    let service = open(&world)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(listen(args, global, service, guard))
}

fn open(world: &World) -> Result<Arc<Service>, Failure> {
    let bundle = Bundle::open(&world.root).map_err(unusable)?;
    let digest = ArtifactStore::address_of(&world.root)?.digest.to_hex();
    let cancel = Cancel::default();
    let host = Host {
        world,
        cancel: &cancel,
        completions: None,
    };
    let answerer = bundle.answerer(&host).map_err(unusable)?;
    let label_field = bundle.program.label_field().to_owned();
    let queue = Queue::start(answerer, label_field.clone())?;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    Ok(Arc::new(Service {
        manifest: bundle.manifest,
        label_field,
        digest,
        queue,
        started: now.map_or(0, |since| since.as_secs()),
    }))
}

fn unusable(error: StepError) -> Failure {
    let help = error.help.map(|help| format!("\n  help: {help}"));
    let text = format!("error: {}{}\n", error.message, help.unwrap_or_default());
    Failure::new(Exit::Invalid, text)
}

#[allow(clippy::print_stdout, clippy::print_stderr)]
async fn listen(
    args: &ServeArgs,
    global: &GlobalArgs,
    service: Arc<Service>,
    guard: Guard,
) -> Result<Exit, Failure> {
    let address = SocketAddr::new(args.host, args.port);
    let listener = TcpListener::bind(address).await.map_err(|e| {
        let text = format!("cannot listen on {address}: {e}; choose another --port");
        Failure::new(Exit::Internal, text)
    })?;
    let address = listener.local_addr()?;
    let url = format!("http://{address}");
    let Manifest { name, model_id, .. } = &service.manifest;
    if global.json {
        let event = serde_json::json!({
            "event": "serving", "url": url, "name": name, "model": model_id,
            "bundle": service.digest, "pid": std::process::id(),
        });
        println!("{event}");
    } else if !global.quiet {
        let host = shown(address);
        eprintln!("{name} ({model_id}) is served at http://{host}; Ctrl-C stops it");
        eprintln!(
            "  curl -s http://{host}/predict -H 'content-type: application/json' -d '{{\"text\": \"…\"}}'"
        );
    }
    let app = routes::app(service, guard);
    axum::serve(listener, app)
        .with_graceful_shutdown(told_to_stop(args.until_stdin_closes))
        .await?;
    Ok(Exit::Ok)
}

/// An address that a browser on this machine can use.
fn shown(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        ip if ip.is_unspecified() => IpAddr::from([127, 0, 0, 1]),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

/// Returns when the server is to stop: requests under way are finished first.
async fn told_to_stop(until_stdin_closes: bool) {
    use tokio::signal::unix::{SignalKind, signal};
    let signalled = async {
        let (Ok(mut interrupt), Ok(mut terminate)) = (
            signal(SignalKind::interrupt()),
            signal(SignalKind::terminate()),
        ) else {
            return std::future::pending().await;
        };
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    };
    tokio::select! {
        () = signalled => {}
        () = stdin_closed(), if until_stdin_closes => {}
    }
}

async fn stdin_closed() {
    let (tell, closed) = tokio::sync::oneshot::channel();
    // A thread of its own: the runtime would wait for a blocked one of its pool at the end.
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        let _ = tell.send(());
    });
    let _ = closed.await;
}
