//! Connections: taken, bounded, and finished before the server ends.
//!
//! HTTP/1.1 alone: it can be held to a time for a request's head from the first byte on.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::service::Service;
use super::steady::Steady;

/// Open connections at most; more wait until one closes.
const CONNECTIONS: usize = 512;
/// Bytes of a request's head at most.
const HEAD: usize = 32 << 10;
/// After an error of the system (such as too many open files) before the next try.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves `app` until `stop` ends; then finishes what is under way, for no longer than the
/// service's limit, or until `at_once` ends. Returns whether everything was finished.
pub(super) async fn serve(
    listener: TcpListener,
    app: Router,
    service: Arc<Service>,
    stop: impl Future<Output = ()>,
    at_once: impl Future<Output = ()>,
) -> bool {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let open = GracefulShutdown::new();
    let mut stop = std::pin::pin!(stop);
    loop {
        tokio::select! {
            (stream, place) = accept(&listener, &places) => {
                connect(stream, place, app.clone(), &service, &open);
            }
            () = &mut stop => break,
        }
    }
    service.drain();
    drop(listener);
    tokio::select! {
        () = open.shutdown() => true,
        () = tokio::time::sleep(service.limits.drain) => false,
        () = at_once => false,
    }
}

async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> (TcpStream, Option<OwnedSemaphorePermit>) {
    // The semaphore is never closed.
    let place = Arc::clone(places).acquire_owned().await.ok();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return (stream, place),
            Err(error) => {
                tracing::warn!("a connection cannot be taken: {error}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

fn connect(
    stream: TcpStream,
    place: Option<OwnedSemaphorePermit>,
    app: Router,
    service: &Arc<Service>,
    open: &GracefulShutdown,
) {
    // Tokens are small; waiting to fill a packet would only delay them.
    let _ = stream.set_nodelay(true);
    let metrics = Arc::clone(&service.metrics);
    let stream = Steady::new(stream, service.limits.write, Arc::clone(&metrics));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(service.limits.read)
        .max_buf_size(HEAD)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(app));
    let connection = open.watch(connection);
    metrics.connected();
    tokio::spawn(async move {
        // What goes wrong here is a client's doing: it left, or sent no HTTP.
        if let Err(error) = connection.await {
            tracing::debug!("a connection ended: {error}");
        }
        metrics.disconnected();
        drop(place);
    });
}
