//! [`Prefix`]: a folder of a store, in which other programs find files by their names.
//!
//! Knows nothing of results, nor of objects by their digests. Invariant: files are written in the
//! order in which they are given, each whole or not at all; so who sees the last one sees all.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use object_store::path::Path;
use object_store::{MultipartUpload, ObjectStoreExt, PutPayload};
use tokio::runtime::Runtime;
use tokio::sync::Mutex;

use super::bucket::{self, Bucket};
use super::depot;
use super::download::blocking;
use super::multipart::piece;
use super::policy::Refusal;
use super::upload::Unsent;
use super::{DepotError, PART, RemoteError};
use crate::completion::LOOK_EVERY;
use crate::digest::Digest;
use crate::error::CacheError;

/// How long a store may take to forget the parts of a file that is not wanted any more.
const FORGETTING: Duration = Duration::from_secs(2);

/// The file that is on its way in parts; locked while parts are sent.
type UnderWay = Arc<Mutex<Option<Box<dyn MultipartUpload>>>>;

/// A folder of a store that others read.
pub struct Prefix {
    bucket: Bucket,
    runtime: Option<Runtime>,
}

impl std::fmt::Debug for Prefix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Prefix({})", self.url())
    }
}

impl Drop for Prefix {
    fn drop(&mut self) {
        // As with `RemoteCache`: it may be dropped on a thread that must not wait.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Prefix {
    /// Why `url` names no folder of a store; nothing is asked of the store.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(url: &str) -> Result<(), String> {
        bucket::parse(url).map(drop).map_err(|error| match error {
            RemoteError::Url { reason, .. } => reason,
            error => error.to_string(),
        })
    }

    /// Opens it, with the credentials and endpoints in the variables `env`. No server is asked
    /// anything yet.
    ///
    /// # Errors
    /// [`DepotError::There`] when the URL or the variables are wrong, or a folder cannot be made.
    pub fn open(url: &str, env: &BTreeMap<String, String>) -> Result<Self, DepotError> {
        let opened = Bucket::open(url, true, env)
            .and_then(|bucket| super::runtime().map(|runtime| (bucket, runtime)));
        let (bucket, runtime) = opened.map_err(|error| unusable(url, error))?;
        Ok(Self {
            bucket,
            runtime: Some(runtime),
        })
    }

    /// Its URL.
    #[must_use]
    pub fn url(&self) -> &str {
        self.bucket.url()
    }

    /// Has `files` lie in its folder `name`, under the names that they have here and in this order.
    /// One that is there with the same digest stays as it is, any other is replaced. How many were
    /// written; `None` when `stop` came first. May be called wherever work waits for it.
    ///
    /// # Errors
    /// [`DepotError::Here`] when a file cannot be read, [`DepotError::There`] when the store refuses.
    pub fn put(
        &self,
        name: &str,
        files: &[PathBuf],
        stop: &dyn Fn() -> bool,
    ) -> Result<Option<usize>, DepotError> {
        let Some(runtime) = &self.runtime else {
            // Only while it is dropped.
            return Ok(None);
        };
        // Steps ask from threads that serve runtimes of their own, which must not wait for another.
        let (tell, hear) = channel();
        let (bucket, name, files) = (self.bucket.clone(), name.to_owned(), files.to_vec());
        let under_way = UnderWay::default();
        let theirs = Arc::clone(&under_way);
        let task = runtime.spawn(async move {
            // Who asked may have stopped waiting.
            let _ = tell.send(put_all(&bucket, &name, &files, &theirs).await);
        });
        loop {
            match hear.recv_timeout(LOOK_EVERY) {
                Ok(put) => return put.map(Some).map_err(|unsent| self.failed(unsent)),
                Err(RecvTimeoutError::Timeout) if stop() => {
                    task.abort();
                    forget(runtime, under_way);
                    return Ok(None);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    let why = "its transfer ended early".to_owned();
                    return Err(self.failed(Unsent::There(Refusal::Unreachable(why))));
                }
            }
        }
    }

    fn failed(&self, unsent: Unsent) -> DepotError {
        match unsent {
            Unsent::Here(error) => error.into(),
            Unsent::There(refusal) => depot::refused(self.url(), refusal),
        }
    }
}

/// Why a store cannot be opened. What is wrong with the URL is told of the URL without its secrets.
fn unusable(url: &str, error: RemoteError) -> DepotError {
    let (url, reason) = match error {
        RemoteError::Url { url, reason } | RemoteError::Unreachable { url, reason } => {
            (url, reason)
        }
        RemoteError::Threads(error) => (url.to_owned(), error.to_string()),
    };
    DepotError::There {
        url,
        reason,
        passes: false,
    }
}

/// Has the parts removed of the file that was on its way when its transfer was ended: nobody puts
/// them together, and they cost their room.
fn forget(runtime: &Runtime, under_way: UnderWay) {
    let (tell, hear) = channel();
    runtime.spawn(async move {
        // It is free once the transfer is gone.
        if let Some(upload) = &mut *under_way.lock().await {
            let _ = upload.abort().await;
        }
        let _ = tell.send(());
    });
    let _ = hear.recv_timeout(FORGETTING);
}

/// How many were written.
async fn put_all(
    bucket: &Bucket,
    folder: &str,
    files: &[PathBuf],
    under_way: &UnderWay,
) -> Result<usize, Unsent> {
    let mut written = 0;
    for file in files {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        let path = bucket.file(&format!("{folder}/{name}"));
        written += usize::from(put(bucket, &path, file, under_way).await?);
    }
    Ok(written)
}

/// Whether it was written: else it is there.
async fn put(
    bucket: &Bucket,
    path: &Path,
    file: &FilePath,
    under_way: &UnderWay,
) -> Result<bool, Unsent> {
    let unread = |error| CacheError::io(file, error);
    let here = file.to_owned();
    let read = move || {
        let open = File::open(&here)?;
        let size = open.metadata()?.len();
        Ok::<_, std::io::Error>((open, size, Digest::of_file(&here)?))
    };
    let (open, size, digest) = blocking(read).await.map_err(unread)?;
    if is_there(bucket, path, size, digest).await? {
        return Ok(false);
    }
    let open = Arc::new(open);
    if size <= PART {
        let bytes = piece(open, 0, size).await.map_err(unread)?;
        bucket.store.put(path, PutPayload::from(bytes)).await?;
        return Ok(true);
    }
    let mut under_way = under_way.lock().await;
    let begun = bucket.store.put_multipart(path).await?;
    let upload = under_way.insert(begun);
    let sent = send_parts(&mut **upload, file, &open, size).await;
    if sent.is_err() {
        // Parts that nobody puts together cost their room.
        let _ = upload.abort().await;
    }
    *under_way = None;
    sent.map(|()| true)
}

async fn send_parts(
    upload: &mut dyn MultipartUpload,
    file: &FilePath,
    open: &Arc<File>,
    size: u64,
) -> Result<(), Unsent> {
    let mut at = 0;
    while at < size {
        let length = PART.min(size - at);
        let bytes = piece(Arc::clone(open), at, length).await;
        let bytes = bytes.map_err(|error| CacheError::io(file, error))?;
        upload.put_part(PutPayload::from(bytes)).await?;
        at += length;
    }
    upload.complete().await?;
    Ok(())
}

/// Whether the store has this content under that path.
async fn is_there(
    bucket: &Bucket,
    path: &Path,
    size: u64,
    digest: Digest,
) -> Result<bool, Refusal> {
    let missing = |refusal| match refusal {
        Refusal::Missing => Ok(false),
        refusal => Err(refusal),
    };
    match bucket.store.head(path).await.map_err(Refusal::from) {
        Ok(meta) if meta.size == size => {}
        Ok(_) => return Ok(false),
        Err(refusal) => return missing(refusal),
    }
    let mut hasher = blake3::Hasher::new();
    let mut at = 0;
    while at < size {
        let range = at..size.min(at + PART);
        at = range.end;
        let bytes = match bucket.store.get_range(path, range).await {
            Ok(bytes) => bytes,
            // It may have been removed meanwhile.
            Err(error) => return missing(Refusal::from(error)),
        };
        hasher.update(&bytes);
    }
    Ok(hasher.finalize().as_bytes() == digest.as_bytes())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    const FILES: [&str; 2] = ["weights", "config"];

    fn going_on() -> bool {
        false
    }

    fn write(folder: &FilePath, weights: &[u8]) -> Vec<PathBuf> {
        std::fs::create_dir_all(folder).unwrap();
        std::fs::write(folder.join("weights"), weights).unwrap();
        std::fs::write(folder.join("config"), "{}").unwrap();
        FILES.map(|name| folder.join(name)).to_vec()
    }

    fn in_memory() -> Prefix {
        Prefix {
            bucket: Bucket::memory(),
            runtime: Some(super::super::runtime().unwrap()),
        }
    }

    fn wait<T>(prefix: &Prefix, work: impl Future<Output = T>) -> T {
        prefix.runtime.as_ref().unwrap().block_on(work)
    }

    fn content(prefix: &Prefix, name: &str) -> Vec<u8> {
        let path = prefix.bucket.file(name);
        let read = async {
            let got = prefix.bucket.store.get(&path).await.unwrap();
            got.bytes().await.unwrap().to_vec()
        };
        wait(prefix, read)
    }

    /// What changes when a file is written anew.
    fn mark(prefix: &Prefix, name: &str) -> String {
        let path = prefix.bucket.file(name);
        let meta = wait(prefix, prefix.bucket.store.head(&path)).unwrap();
        format!("{:?} {:?}", meta.last_modified, meta.e_tag)
    }

    fn files_are_put_once(prefix: &Prefix) {
        let dir = tempfile::tempdir().unwrap();
        // As large as goes in parts, and as small as does not.
        for size in [9 << 20, 3, 0] {
            let weights = vec![1_u8; size];
            let name = format!("of-{size}");
            let files = write(dir.path(), &weights);
            assert_eq!(prefix.put(&name, &files, &going_on).unwrap(), Some(2));
            let of = |file: &str| format!("{name}/{file}");
            assert_eq!(content(prefix, &of("weights")), weights);
            assert_eq!(content(prefix, &of("config")), b"{}");
            let before = FILES.map(|file| mark(prefix, &of(file)));
            assert_eq!(prefix.put(&name, &files, &going_on).unwrap(), Some(0));
            assert_eq!(before, FILES.map(|file| mark(prefix, &of(file))));
            // Others of that name and length are no reason to leave it.
            let path = prefix.bucket.file(&of("weights"));
            let damaged = PutPayload::from(vec![0_u8; size]);
            wait(prefix, prefix.bucket.store.put(&path, damaged)).unwrap();
            let differs = usize::from(size > 0);
            let put = prefix.put(&name, &files, &going_on).unwrap();
            assert_eq!(put, Some(differs));
            assert_eq!(content(prefix, &of("weights")), weights);
        }
    }

    #[test]
    fn files_are_put_unless_they_are_there() {
        files_are_put_once(&in_memory());
        let dir = tempfile::tempdir().unwrap();
        let url = format!("file://{}/not/yet", dir.path().display());
        files_are_put_once(&Prefix::open(&url, &BTreeMap::new()).unwrap());
        assert!(dir.path().join("not/yet/of-3/weights").is_file());
    }

    #[test]
    fn what_fails_is_told_and_what_is_not_wanted_any_more_is_left() {
        let prefix = in_memory();
        let dir = tempfile::tempdir().unwrap();
        let mut files = write(dir.path(), b"x");
        files.insert(0, dir.path().join("absent"));
        let error = prefix.put("name", &files, &going_on).unwrap_err();
        assert!(matches!(error, DepotError::Here(_)), "{error}");
        assert!(error.to_string().contains("absent"), "{error}");
        // Nothing after it was written.
        let path = prefix.bucket.file("name/config");
        assert!(wait(&prefix, prefix.bucket.store.head(&path)).is_err());

        // A server that takes connections and says nothing.
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let env = [
            ("AWS_ACCESS_KEY_ID", "AK".to_owned()),
            ("AWS_SECRET_ACCESS_KEY", "SK".to_owned()),
            (
                "AWS_ENDPOINT_URL",
                format!("http://{}", silent.local_addr().unwrap()),
            ),
        ];
        let env = env.map(|(name, value)| (name.to_owned(), value)).into();
        let remote = Prefix::open("s3://bucket/adapters", &env).unwrap();
        let put = remote.put("name", &files[1..], &|| true).unwrap();
        assert_eq!(put, None);
    }

    /// A store that takes the first part of a file and never says so; whether it was asked for that
    /// part, and whether it was told to forget it.
    fn stuck() -> (String, Arc<[AtomicBool; 2]>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::new([AtomicBool::new(false), AtomicBool::new(false)]);
        let own = Arc::clone(&seen);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let seen = Arc::clone(&own);
                std::thread::spawn(move || while answer(&stream, &seen).is_some() {});
            }
        });
        (url, seen)
    }

    /// One request; `None` at the end.
    fn answer(mut stream: &TcpStream, seen: &[AtomicBool; 2]) -> Option<()> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).ok()?;
            head.extend(byte);
        }
        let head = String::from_utf8(head).ok()?;
        let begun = "<InitiateMultipartUploadResult><Bucket>b</Bucket><Key>k</Key>\
            <UploadId>id</UploadId></InitiateMultipartUploadResult>";
        let (status, body) = match head.split(' ').next()? {
            "HEAD" => ("404 Not Found", ""),
            "POST" => ("200 OK", begun),
            "PUT" => {
                seen[0].store(true, Ordering::SeqCst);
                // Until the client goes.
                let _ = std::io::copy(&mut stream, &mut std::io::sink());
                return None;
            }
            "DELETE" => {
                seen[1].store(true, Ordering::SeqCst);
                ("204 No Content", "")
            }
            _ => return None,
        };
        let length = match status.starts_with("204") {
            true => String::new(),
            false => format!("content-length: {}\r\n", body.len()),
        };
        let text = format!("HTTP/1.1 {status}\r\n{length}\r\n{body}");
        stream.write_all(text.as_bytes()).ok()
    }

    #[test]
    fn parts_of_what_is_not_wanted_any_more_are_forgotten() {
        let (url, seen) = stuck();
        let dir = tempfile::tempdir().unwrap();
        let files = write(dir.path(), &vec![1; 9 << 20]);
        let env = [
            ("AWS_ACCESS_KEY_ID", "AK".to_owned()),
            ("AWS_SECRET_ACCESS_KEY", "SK".to_owned()),
            ("AWS_ENDPOINT_URL", url),
        ];
        let env = env.map(|(name, value)| (name.to_owned(), value)).into();
        let remote = Prefix::open("s3://bucket/adapters", &env).unwrap();
        let is_sending = || seen[0].load(Ordering::SeqCst);
        assert_eq!(remote.put("name", &files, &is_sending).unwrap(), None);
        assert!(seen[1].load(Ordering::SeqCst));
    }

    #[test]
    fn a_url_is_looked_at_before_anything_is_asked() {
        for good in ["s3://b/x", "gs://b", "az://c/x", "file:///folder"] {
            assert_eq!(Prefix::check(good), Ok(()), "{good}");
        }
        for bad in ["/folder", "https://h/x", "s3://", "s3://AK:SECRET@b/x"] {
            let reason = Prefix::check(bad).unwrap_err();
            assert!(!reason.contains("SECRET"), "{reason}");
            let error = Prefix::open(bad, &BTreeMap::new()).unwrap_err();
            assert!(matches!(&error, DepotError::There { .. }), "{error}");
            assert!(!error.to_string().contains("SECRET"), "{error}");
            assert!(!error.passes());
        }
    }
}
