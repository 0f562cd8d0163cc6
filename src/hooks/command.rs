//! A program that is told that a run ended: the JSON on its standard input, a few variables in
//! its environment, the project root as its folder. What it prints is kept with the run's record.

use std::collections::BTreeMap;
use std::io::{PipeReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use flowrun_engine::step::Cancel;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::Call;
use super::document::event_name;

/// Bytes of output that are kept.
const OUTPUT: usize = 1 << 20;
/// Bytes that are read beyond those, to see whether a secret goes on there; Linux lets no variable
/// be longer.
const BEYOND: usize = 128 << 10;
/// How long to listen for output once the program ended: what it left behind may hold the pipe.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Time between two looks at the program.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Runs the program to its end, or until its time is up.
///
/// # Errors
/// When it cannot be started, fails or takes too long.
pub(super) fn run(call: &Call<'_>, command: &[String]) -> Result<(), String> {
    let Some((program, arguments)) = command.split_first() else {
        return Err("there is no command".to_owned());
    };
    let body = call.body()?;
    let (output, ours) = std::io::pipe().map_err(|e| format!("no pipe can be made: {e}"))?;
    let theirs = ours
        .try_clone()
        .map_err(|e| format!("no pipe can be made: {e}"))?;
    let mut child = flowrun_engine::runner::start(
        Command::new(placed(program, &call.world.root))
            .args(arguments)
            .current_dir(&call.world.root)
            .env_clear()
            .envs(environment(call))
            .stdin(Stdio::piped())
            .stdout(ours)
            .stderr(theirs)
            .process_group(0),
    )
    .map_err(|e| format!("`{program}` cannot be started: {e}"))?;
    feed(&mut child, body);
    let output = Output::listen(output);
    let status = wait(&mut child, call.hook.timeout, call.cancel);
    let mask = call.mask();
    let mut said = output.take();
    said.truncate(mask.cut(&said, OUTPUT).unwrap_or(said.len()));
    let said = mask.apply(&String::from_utf8_lossy(&said));
    let log = keep(call, &said);
    let last = said.lines().rfind(|line| !line.trim().is_empty());
    let last = last.map(|line| format!(": {line}")).unwrap_or_default();
    let ended = match status {
        Ok(Some(status)) if status.success() => return Ok(()),
        Ok(Some(status)) => format!("`{program}` failed ({status}){last}"),
        Ok(None) => format!("`{program}` took longer than its `timeout`, and was ended{last}"),
        Err(e) => format!("cannot wait for `{program}`: {e}"),
    };
    Err(match log {
        Some(log) => format!("{ended} ({})", log.display()),
        None => ended,
    })
}

/// A path of the project; or a name, which is looked for in `PATH`.
fn placed(program: &str, root: &Path) -> PathBuf {
    match program.contains('/') {
        true => root.join(program),
        false => PathBuf::from(program),
    }
}

/// As a `run` step has it: nothing of the surroundings gets in but what programs need, and what
/// the hook names.
fn environment(call: &Call<'_>) -> BTreeMap<String, String> {
    let is_usual = |name: &str| matches!(name, "PATH" | "HOME" | "LANG") || name.starts_with("LC_");
    let usual = call.world.env.iter().filter(|(name, _)| is_usual(name));
    let mut env: BTreeMap<String, String> = usual.map(|(n, v)| (n.clone(), v.clone())).collect();
    let secrets = call.hook.secrets.iter();
    env.extend(secrets.filter_map(|name| Some((name.clone(), call.secret(name)?))));
    let document = call.document;
    let told = [
        ("FLOWRUN_HOOK", call.name.to_owned()),
        ("FLOWRUN_EVENT", event_name(call.event).to_owned()),
        ("FLOWRUN_RUN", document.run().to_owned()),
        ("FLOWRUN_PIPELINE", document.pipeline().to_owned()),
        ("FLOWRUN_STATUS", document.status.to_owned()),
        ("FLOWRUN_RUN_DIR", document.run_dir.display().to_string()),
    ];
    env.extend(told.map(|(name, value)| (name.to_owned(), value)));
    env
}

/// Writes to the program in a thread of its own: it may read late, or not at all.
fn feed(child: &mut Child, body: Vec<u8>) {
    if let Some(mut stdin) = child.stdin.take() {
        std::thread::spawn(move || {
            // A program that does not read has no use for it.
            let _ = stdin.write_all(&body);
        });
    }
}

/// What a program prints, as far as it was read.
struct Output {
    said: Arc<Mutex<Vec<u8>>>,
    /// Hears when the last holder of the pipe is gone.
    ended: Receiver<()>,
}

impl Output {
    /// Reads the pipe in a thread of its own.
    fn listen(mut pipe: PipeReader) -> Self {
        let said = Arc::new(Mutex::new(Vec::new()));
        let keeps = Arc::clone(&said);
        let (tell, ended) = channel();
        std::thread::spawn(move || {
            let mut chunk = [0; 8 << 10];
            while let Ok(n) = pipe.read(&mut chunk)
                && n > 0
            {
                let mut said = keeps.lock().unwrap_or_else(PoisonError::into_inner);
                let room = (OUTPUT + BEYOND).saturating_sub(said.len());
                said.extend_from_slice(&chunk[..n.min(room)]);
            }
            // It may have been given up.
            let _ = tell.send(());
        });
        Self { said, ended }
    }

    /// What was printed by a program that is gone.
    fn take(self) -> Vec<u8> {
        // What it left behind may hold the pipe longer.
        let _ = self.ended.recv_timeout(LAST_WORDS);
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *said)
    }
}

/// Waits for the program; `None` when its time was up, or flowrun is to end at once, and all that it
/// started was killed.
fn wait(
    child: &mut Child,
    limit: Duration,
    cancel: &Cancel,
) -> std::io::Result<Option<ExitStatus>> {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if started.elapsed() > limit || cancel.is_killed() {
            // It was not reaped yet, so its group's number is still its own.
            let _ = killpg(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL);
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Keeps what was printed, if anything was; the file.
fn keep(call: &Call<'_>, said: &str) -> Option<PathBuf> {
    if said.is_empty() {
        return None;
    }
    let folder = call.document.run_dir.join("hooks");
    let file = folder.join(format!("{}.log", call.name));
    std::fs::create_dir_all(&folder).ok()?;
    std::fs::write(&file, said).ok()?;
    Some(file)
}
