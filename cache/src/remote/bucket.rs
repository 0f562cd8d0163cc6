//! [`Bucket`]: the place that a URL names, and the names of things in it.
//!
//! Credentials come from the variables that it is given, never from the URL.

use std::collections::BTreeMap;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::local::LocalFileSystem;
use object_store::multipart::MultipartStore;
use object_store::path::Path;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, RetryConfig};
use url::Url;

use super::RemoteError;
use super::policy::reason;
use crate::digest::Digest;

/// How long a server may take to be connected to.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// How long it may say nothing in the middle of an answer.
const SILENCE: Duration = Duration::from_secs(30);
/// How long one request may take; none moves more than [`super::PART`] bytes.
const REQUEST_WITHIN: Duration = Duration::from_secs(300);
/// How often a request that failed for want of a server is sent again.
const RETRIES: usize = 3;
/// How long after its start no request is sent again.
const RETRY_WITHIN: Duration = Duration::from_secs(15);

/// Variables that name a server of S3's.
const S3: [&str; 3] = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"];
/// Variables that name a server of Google's.
const GOOGLE: [&str; 1] = ["GOOGLE_BASE_URL"];
/// Variables that name a server of Azure's.
const AZURE: [&str; 2] = ["AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"];
/// The variable that names the account there, which the containers belong to.
const ACCOUNT: &str = "AZURE_STORAGE_ACCOUNT_NAME";

/// A folder in a store.
#[derive(Debug, Clone)]
pub(super) struct Bucket {
    pub(super) store: Arc<dyn ObjectStore>,
    /// Absent where large files are written by another way than parts: in a folder.
    pub(super) parts: Option<Arc<dyn Parts>>,
    prefix: Path,
    url: String,
    /// Tells apart what is kept locally about different remotes.
    pub(super) id: String,
}

/// A store that takes a large file in parts.
pub(super) trait Parts: MultipartStore + std::fmt::Debug {}
impl<T: MultipartStore + std::fmt::Debug> Parts for T {}

impl Bucket {
    /// Nothing is asked of a server yet.
    pub(super) fn open(
        text: &str,
        write: bool,
        env: &BTreeMap<String, String>,
    ) -> Result<Self, RemoteError> {
        let url = parse(text)?;
        let wrong = |e: object_store::Error| RemoteError::Url {
            url: text.to_owned(),
            reason: reason(&e),
        };
        let prefix = Path::from_url_path(url.path()).map_err(|e| wrong(e.into()))?;
        let vars = |prefix: &'static str| {
            let ours = env.iter().filter(move |(name, _)| name.starts_with(prefix));
            ours.map(|(name, value)| (name.to_ascii_lowercase(), value.clone()))
        };
        let plain = |names: &[&str]| {
            let mut endpoints = names.iter().filter_map(|name| env.get(*name));
            endpoints.any(|endpoint| endpoint.starts_with("http://"))
        };
        let client = |names: &[&str]| client().with_allow_http(plain(names));
        let mut bucket = match url.scheme() {
            "file" => {
                let folder = url.to_file_path().map_err(|()| RemoteError::Url {
                    url: text.to_owned(),
                    reason: "it names no folder of this machine".to_owned(),
                })?;
                Self::folder(&folder, write)?
            }
            "s3" | "s3a" => {
                let mut builder = AmazonS3Builder::new()
                    .with_url(text)
                    .with_client_options(client(&S3))
                    .with_retry(retry());
                for (name, value) in vars("AWS_") {
                    if let Ok(key) = name.parse::<AmazonS3ConfigKey>() {
                        builder = builder.with_config(key, value);
                    }
                }
                Self::of(builder.build().map_err(wrong)?)
            }
            "gs" => {
                let mut builder = GoogleCloudStorageBuilder::new()
                    .with_url(text)
                    .with_client_options(client(&GOOGLE))
                    .with_retry(retry());
                for (name, value) in vars("GOOGLE_") {
                    if let Ok(key) = name.parse() {
                        builder = builder.with_config(key, value);
                    }
                }
                Self::of(builder.build().map_err(wrong)?)
            }
            _ => {
                let mut builder = MicrosoftAzureBuilder::new()
                    .with_url(text)
                    .with_client_options(client(&AZURE))
                    .with_retry(retry());
                for (name, value) in vars("AZURE_") {
                    if let Ok(key) = name.parse() {
                        builder = builder.with_config(key, value);
                    }
                }
                Self::of(builder.build().map_err(wrong)?)
            }
        };
        if url.scheme() != "file" {
            bucket.prefix = prefix;
        }
        url.as_str()
            .trim_end_matches('/')
            .clone_into(&mut bucket.url);
        bucket.id = id(&bucket.url, url.scheme(), env);
        Ok(bucket)
    }

    fn of<S: ObjectStore + MultipartStore>(store: S) -> Self {
        let store = Arc::new(store);
        Self {
            parts: Some(Arc::<S>::clone(&store)),
            store,
            prefix: Path::default(),
            url: String::new(),
            id: String::new(),
        }
    }

    fn folder(folder: &FilePath, write: bool) -> Result<Self, RemoteError> {
        let made = match write {
            true => std::fs::create_dir_all(folder),
            false => Ok(()),
        };
        let unreachable = |reason| RemoteError::Unreachable {
            url: folder.display().to_string(),
            reason,
        };
        made.map_err(|e| unreachable(e.to_string()))?;
        let store =
            LocalFileSystem::new_with_prefix(folder).map_err(|e| unreachable(reason(&e)))?;
        Ok(Self {
            store: Arc::new(store),
            parts: None,
            prefix: Path::default(),
            url: String::new(),
            id: String::new(),
        })
    }

    /// In memory, for tests.
    #[cfg(test)]
    pub(super) fn memory() -> Self {
        Self {
            id: "memory".to_owned(),
            url: "memory://".to_owned(),
            ..Self::of(object_store::memory::InMemory::new())
        }
    }

    pub(super) fn is_folder(&self) -> bool {
        is_folder(&self.url)
    }

    /// Its URL, as people see it.
    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// Where an object lies, as in a cache folder.
    pub(super) fn object(&self, digest: &Digest) -> Path {
        let hex = digest.to_hex();
        self.at(&format!("objects/{}/{}", &hex[..2], &hex[2..]))
    }

    /// Where a result lies, as in a cache folder.
    pub(super) fn result(&self, key: &Digest) -> Path {
        let hex = key.to_hex();
        self.at(&format!("actions/{}/{}.json", &hex[..2], &hex[2..]))
    }

    /// Where a pack of answers lies.
    pub(super) fn pack(&self, digest: &Digest) -> Path {
        let hex = digest.to_hex();
        self.at(&format!("answers/{}/{}.log", &hex[..2], &hex[2..]))
    }

    /// Where a note of a job lies: `<id>/<name>`; of an id alone, the folder of its notes.
    pub(super) fn note(&self, name: &str) -> Path {
        self.at(&format!("jobs/{name}"))
    }

    /// Where a file lies that others look for by its name: `<folder>/<file>`.
    pub(super) fn file(&self, name: &str) -> Path {
        self.at(name)
    }

    /// The path on this machine of what lies there, if the store is a folder of it.
    pub(super) fn local(&self, path: &Path) -> Option<PathBuf> {
        Some(folder_of(&self.url)?.join(path.as_ref()))
    }

    /// The key of what lies there, if it is a result.
    pub(super) fn key_of(path: &Path) -> Option<Digest> {
        named(path, ".json")
    }

    /// The digest of what lies there, if it is a pack of answers.
    pub(super) fn pack_of(path: &Path) -> Option<Digest> {
        named(path, ".log")
    }

    /// The folder of all results.
    pub(super) fn results(&self) -> Path {
        self.at("actions")
    }

    /// The folder of all packs of answers.
    pub(super) fn packs(&self) -> Path {
        self.at("answers")
    }

    fn at(&self, name: &str) -> Path {
        name.split('/')
            .fold(self.prefix.clone(), |path, part| path.join(part))
    }
}

/// Of the URL and the server that it is asked of.
fn id(url: &str, scheme: &str, env: &BTreeMap<String, String>) -> String {
    let first = |names: &[&str]| names.iter().find_map(|name| env.get(*name));
    let (endpoint, account) = match scheme {
        "file" => (None, None),
        "s3" | "s3a" => (first(&S3), None),
        "gs" => (first(&GOOGLE), None),
        _ => (first(&AZURE), env.get(ACCOUNT)),
    };
    let digest = match account {
        None => Digest::of_record("remote", &(url, endpoint)),
        Some(account) => Digest::of_record("remote", &(url, endpoint, account)),
    };
    digest.short()
}

/// The digest that a path is made of: two digits, the others, this ending.
fn named(path: &Path, ending: &str) -> Option<Digest> {
    let (folders, name) = path.as_ref().rsplit_once('/')?;
    let start = folders.rsplit('/').next()?;
    Digest::parse(&format!("{start}{}", name.strip_suffix(ending)?))
}

/// Whether a URL names a folder of this machine.
#[must_use]
pub fn is_folder(url: &str) -> bool {
    url.starts_with("file:")
}

/// The URL of a folder; `None` when its path is not absolute.
#[must_use]
pub fn folder_url(folder: &FilePath) -> Option<String> {
    Url::from_file_path(folder).ok().map(String::from)
}

/// The folder that a URL names; `None` when it names none of this machine.
#[must_use]
pub fn folder_of(url: &str) -> Option<PathBuf> {
    let url = Url::parse(url).ok().filter(|_| is_folder(url))?;
    url.to_file_path().ok()
}

/// The URL, if it names a place of a kind that is known, and no more than that.
pub(super) fn parse(text: &str) -> Result<Url, RemoteError> {
    let wrong = |reason: &str| RemoteError::Url {
        url: hidden(text),
        reason: reason.to_owned(),
    };
    let url = Url::parse(text).map_err(|e| wrong(&e.to_string()))?;
    if !matches!(
        url.scheme(),
        "file" | "s3" | "s3a" | "gs" | "az" | "azure" | "abfs" | "abfss"
    ) {
        return Err(wrong("no such kind of store is known"));
    }
    // `abfss://container@account.host/` has a name there, no secret.
    let azure = url.scheme().starts_with("abfs");
    if url.password().is_some() || (!url.username().is_empty() && !azure) {
        return Err(wrong("credentials come from environment variables"));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(wrong("nothing may follow the path"));
    }
    if url.scheme() != "file" && url.host_str().is_none_or(str::is_empty) {
        return Err(wrong("it names no bucket"));
    }
    Ok(url)
}

/// The URL without what may be a secret.
fn hidden(text: &str) -> String {
    match Url::parse(text) {
        Ok(mut url) => {
            let _ = url.set_password(None);
            let _ = url.set_username("");
            url.set_query(None);
            url.to_string()
        }
        Err(_) => text.to_owned(),
    }
}

fn client() -> ClientOptions {
    ClientOptions::new()
        .with_connect_timeout(CONNECT_WITHIN)
        .with_read_timeout(SILENCE)
        .with_timeout(REQUEST_WITHIN)
}

fn retry() -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(2),
            base: 2.0,
        },
        max_retries: RETRIES,
        retry_timeout: RETRY_WITHIN,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn refused(url: &str) -> String {
        let error = Bucket::open(url, true, &BTreeMap::new()).unwrap_err();
        error.to_string()
    }

    #[test]
    fn a_url_names_a_place_and_holds_no_secret() {
        for (url, part) in [
            ("shared", "relative URL"),
            ("https://example.org/x", "no such kind"),
            ("s3:///x", "no bucket"),
            ("s3://b/x?versionId=1", "nothing may follow"),
        ] {
            assert!(refused(url).contains(part), "{url}: {}", refused(url));
        }
        let text = refused("s3://AK:SECRET@bucket/x");
        assert!(text.contains("environment variables"), "{text}");
        assert!(!text.contains("SECRET"), "{text}");
    }

    #[test]
    fn a_url_of_a_folder_leads_back_to_it() {
        let folder = FilePath::new("/mnt/team a");
        let url = folder_url(folder).unwrap();
        assert_eq!(folder_of(&url).as_deref(), Some(folder));
        for none in ["s3://b/x", "/mnt", "file://host"] {
            assert_eq!(folder_of(none), None, "{none}");
        }
    }

    #[test]
    fn each_kind_of_store_opens_and_things_lie_below_its_path() {
        let env = BTreeMap::from(
            [
                ("AWS_ACCESS_KEY_ID", "AK"),
                ("AWS_SECRET_ACCESS_KEY", "SK"),
                ("AWS_ENDPOINT_URL", "http://127.0.0.1:1"),
                ("AZURE_STORAGE_ACCOUNT_NAME", "name"),
                ("AZURE_STORAGE_ACCOUNT_KEY", "a2V5"),
                ("GOOGLE_BEARER_TOKEN", "token"),
            ]
            .map(|(k, v)| (k.to_owned(), v.to_owned())),
        );
        let digest = Digest::of_bytes(b"x");
        let hex = digest.to_hex();
        for url in ["s3://b/team a/x", "gs://b/team a/x", "az://c/team a/x/"] {
            let bucket = Bucket::open(url, true, &env).unwrap();
            assert_eq!(
                bucket.object(&digest).to_string(),
                format!("team a/x/objects/{}/{}", &hex[..2], &hex[2..])
            );
            assert!(bucket.parts.is_some());
        }
        let dir = tempfile::tempdir().unwrap();
        let url = format!("file://{}/new/one", dir.path().display());
        let folder = Bucket::open(&url, true, &env).unwrap();
        assert_eq!(folder.url(), url);
        assert_eq!(
            folder.result(&digest).to_string(),
            format!("actions/{}/{}.json", &hex[..2], &hex[2..])
        );
        assert_eq!(Bucket::key_of(&folder.result(&digest)), Some(digest));
        assert_eq!(Bucket::key_of(&folder.object(&digest)), None);
        assert_eq!(Bucket::pack_of(&folder.pack(&digest)), Some(digest));
        let absent = format!("file://{}/absent", dir.path().display());
        assert!(matches!(
            Bucket::open(&absent, false, &env),
            Err(RemoteError::Unreachable { .. })
        ));
        assert!(!dir.path().join("absent").exists());
        for (url, name) in [
            ("s3://b/x", "AWS_ENDPOINT_URL"),
            ("gs://b/x", "GOOGLE_BASE_URL"),
            ("az://c/x", "AZURE_STORAGE_ENDPOINT"),
            ("az://c/x", "AZURE_STORAGE_ACCOUNT_NAME"),
        ] {
            let mut other = env.clone();
            other.insert(name.to_owned(), "http://h".to_owned());
            let id = |env| id(url, url.split(':').next().unwrap(), env);
            assert_eq!(id(&env), Bucket::open(url, true, &env).unwrap().id);
            assert_ne!(id(&env), id(&other), "another server is another remote");
        }
    }
}
