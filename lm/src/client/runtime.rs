//! [`Runtime`]: the thread that waits for servers. Knows nothing of what is asked.
//!
//! Invariant: it may be dropped anywhere, also by an async task that is its last owner.

/// Runs async work for those who wait for it.
#[derive(Debug)]
pub(super) struct Runtime {
    /// Gone only while this is dropped.
    inner: Option<tokio::runtime::Runtime>,
}

impl Drop for Runtime {
    /// It must not be waited for where the last owner may be an async task.
    fn drop(&mut self) {
        if let Some(inner) = self.inner.take() {
            inner.shutdown_background();
        }
    }
}

impl Runtime {
    /// # Errors
    /// When this machine gives no threads, in words.
    pub(super) fn new(name: &str) -> Result<Self, String> {
        let inner = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name(name)
            .enable_all()
            .build()
            .map_err(|e| format!("no async runtime: {e}"))?;
        Ok(Self { inner: Some(inner) })
    }

    /// Runs `work` on this thread until it is done; `None` only while this is dropped. From within
    /// an async task it panics.
    pub(super) fn block_on<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        Some(self.inner.as_ref()?.block_on(work))
    }
}
