//! An Azurite of this machine: Microsoft's own emulator of Azure's blob store. `FLOWRUN_AZURITE`
//! names its script `azurite-blob` (`npm install azurite`).

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::external::named;
use crate::project::{Project, Run};
use crate::server::free_port;

/// How long the server may take to come up.
const UP_WITHIN: Duration = Duration::from_secs(60);
/// An account that is made for the tests.
const ACCOUNT: &str = "team";
const KEY: &str = "dGhlIGtleSBvZiB0aGUgdGVzdHM=";
/// The container that is there.
pub(crate) const CONTAINER: &str = "flow";

/// Makes the container, with a request that is signed as Azure wants it.
const MAKE: &str = "
const [port, account, key, container] = process.argv.slice(1);
const date = new Date().toUTCString(), version = '2023-11-03';
const text = ['PUT', ...Array(11).fill(''), `x-ms-date:${date}`, `x-ms-version:${version}`,
  `/${account}/${account}/${container}`, 'restype:container'].join('\\n');
const signature = require('crypto').createHmac('sha256', Buffer.from(key, 'base64'))
  .update(text, 'utf8').digest('base64');
const headers = {'x-ms-date': date, 'x-ms-version': version,
  Authorization: `SharedKey ${account}:${signature}`};
fetch(`http://127.0.0.1:${port}/${account}/${container}?restype=container`,
  {method: 'PUT', headers}).then(async answer => {
    if (answer.status !== 201 && answer.status !== 409) {
      console.error(answer.status, await answer.text());
      process.exit(1);
    }
  }, error => { console.error(String(error.cause || error)); process.exit(1); });
";

/// A server with an empty container; killed when dropped.
pub(crate) struct Azurite {
    child: Child,
    port: u16,
    dir: tempfile::TempDir,
}

impl Azurite {
    /// One, where there is an Azurite.
    pub(crate) fn start() -> Option<Self> {
        let script = named("FLOWRUN_AZURITE", "Azurite")?;
        let (dir, port) = (tempfile::tempdir().unwrap(), free_port());
        let child = Command::new(script)
            .current_dir(dir.path())
            .args(["--blobHost", "127.0.0.1", "--blobPort", &port.to_string()])
            .args(["--location", ".", "--silent", "--disableTelemetry"])
            .env("AZURITE_ACCOUNTS", format!("{ACCOUNT}:{KEY}"))
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(dir.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        let mut azurite = Self { child, port, dir };
        azurite.wait();
        Some(azurite)
    }

    fn wait(&mut self) {
        let deadline = Instant::now() + UP_WITHIN;
        loop {
            let made = Command::new("node")
                .args(["-e", MAKE, &self.port.to_string(), ACCOUNT, KEY, CONTAINER])
                .output()
                .unwrap();
            if made.status.success() {
                return;
            }
            let log = std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            let said = String::from_utf8_lossy(&made.stderr).into_owned();
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "the server ended: {ended:?}\n{log}");
            assert!(Instant::now() < deadline, "no container: {said}\n{log}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Runs the binary in a project, with credentials for this server.
    pub(crate) fn run(&self, project: &Project, args: &[&str]) -> Run {
        Run::of(self.command(project, args).output().unwrap())
    }

    pub(crate) fn command(&self, project: &Project, args: &[&str]) -> Command {
        let mut command = project.command(args);
        let endpoint = format!("http://127.0.0.1:{}/{ACCOUNT}", self.port);
        command
            .env("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
            .env("AZURE_STORAGE_ACCOUNT_KEY", KEY)
            .env("AZURE_STORAGE_ENDPOINT", endpoint);
        command
    }
}

impl Drop for Azurite {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
