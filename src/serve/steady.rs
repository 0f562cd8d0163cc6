//! [`Steady`]: a connection that breaks when its client takes nothing of what there is for it.
//!
//! Knows no HTTP. Invariant: what cannot be written waits for no longer than the bound since the
//! last byte that could.

use std::io::{Error, ErrorKind, IoSlice, Result};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep};

use super::metrics::Metrics;

/// A client's connection.
pub(super) struct Steady {
    stream: TcpStream,
    bound: Duration,
    /// Runs while the client takes nothing.
    stalled: Option<Pin<Box<Sleep>>>,
    metrics: Arc<Metrics>,
}

impl Steady {
    pub(super) fn new(stream: TcpStream, bound: Duration, metrics: Arc<Metrics>) -> Self {
        Self {
            stream,
            bound,
            stalled: None,
            metrics,
        }
    }

    /// What a write came to; an error once writes have waited for too long.
    fn within_bound(
        &mut self,
        cx: &mut Context<'_>,
        written: Poll<Result<usize>>,
    ) -> Poll<Result<usize>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let bound = self.bound;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(bound)));
        match stalled.as_mut().poll(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(()) => {
                self.stalled = None;
                self.metrics.refused("slow_reader");
                let text = format!("the client took nothing for {} s", bound.as_secs());
                Poll::Ready(Err(Error::new(ErrorKind::TimedOut, text)))
            }
        }
    }
}

impl AsyncRead for Steady {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, to)
    }
}

impl AsyncWrite for Steady {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.within_bound(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, parts);
        self.within_bound(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    /// Two ends of a connection; the first is bounded.
    async fn pair(bound: Duration) -> (Steady, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let client = TcpStream::connect(address).await.unwrap();
        let (server, _) = listener.accept().await.unwrap();
        let metrics = Arc::new(Metrics::new());
        (Steady::new(server, bound, metrics), client)
    }

    fn run(work: impl Future<Output = ()>) {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_all().build().unwrap().block_on(work);
    }

    #[test]
    fn a_client_that_takes_nothing_breaks_the_connection() {
        run(async {
            let (mut server, _client) = pair(Duration::from_millis(50)).await;
            let piece = vec![0u8; 1 << 20];
            let error = loop {
                if let Err(error) = server.write_all(&piece).await {
                    break error;
                }
            };
            assert_eq!(error.kind(), ErrorKind::TimedOut);
        });
    }

    #[test]
    fn one_that_takes_gets_all() {
        run(async {
            let (mut server, mut client) = pair(Duration::from_secs(60)).await;
            let count = 32 << 20;
            let sent = tokio::spawn(async move {
                server.write_all(&vec![7u8; count]).await.unwrap();
                server.shutdown().await.unwrap();
            });
            let mut all = Vec::new();
            client.read_to_end(&mut all).await.unwrap();
            assert_eq!(all.len(), count);
            sent.await.unwrap();
        });
    }
}
