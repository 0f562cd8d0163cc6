//! The other end of a runner: does the work that one request asks for.
//!
//! Knows its own vocabulary and environment, and no pipeline. Invariant: once the request was
//! read, the last line written is a response, unless the process itself ends.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use flowrun_cache::{ActionCache, ArtifactStore, CompletionCache, RemoteCache};

use super::process::GRACE;
use super::protocol::{PROTOCOL_VERSION, StepMessage, StepRequest};
use super::{Inline, Runner};
use crate::step::{Cancel, StepContext, StepError, StepOutcome, StepReporter, TraceSpan, World};
use crate::vocabulary::Vocabulary;

/// At most twenty progress messages a second.
const PROGRESS_EVERY: Duration = Duration::from_millis(50);

/// Spans of an attempt that are told: those of a job lie in a file until they are read.
const SPANS: usize = 100_000;

/// Bytes of a line of output from which on it is cut: this end does not know what is to be
/// hidden, so a line is sent whole, and the runner cuts it.
const LINE: usize = 1 << 20;

/// What the process that does the work has of its own.
pub struct Host {
    /// The step kinds.
    pub vocabulary: Vocabulary,
    /// The environment.
    pub env: BTreeMap<String, String>,
    /// This program.
    pub exe: PathBuf,
}

/// Why there is no work to do.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// Standard input is no request.
    #[error("there is no request on standard input ({0}); `flowrun` starts this command itself")]
    NoRequest(String),
    /// A folder holds no job.
    #[error("there is no job ({0}); `flowrun` starts this command itself")]
    NoJob(String),
    /// The response cannot be written.
    #[error("the response cannot be written: {0}")]
    Lost(#[from] std::io::Error),
}

/// Reads a request from `input`, does the work and writes messages to `output`. When `input`
/// ends before the work does, the work is asked to stop; `abandoned` is called when it does not.
///
/// # Errors
/// [`ExecError`]; a step that fails is a response.
pub fn exec(
    host: Host,
    input: impl Read + Send + 'static,
    output: impl Write + Send + 'static,
    abandoned: impl FnOnce() + Send + 'static,
) -> Result<(), ExecError> {
    let mut input = BufReader::new(input);
    let mut line = String::new();
    let no_request = |e: String| ExecError::NoRequest(e);
    input
        .read_line(&mut line)
        .map_err(|e| no_request(e.to_string()))?;
    let request: StepRequest =
        serde_json::from_str(&line).map_err(|e| no_request(e.to_string()))?;
    let cancel = Cancel::default();
    let ended = watch(input, cancel.clone(), abandoned);
    let writer = Arc::new(Writer::new(output, PROGRESS_EVERY, request.traced));
    let reporter: Arc<dyn StepReporter> = Arc::clone(&writer) as Arc<dyn StepReporter>;
    let response = match work(host, request, &reporter, cancel, None) {
        Ok(outcome) => StepMessage::Done(outcome),
        Err(error) => StepMessage::Failed(error.into()),
    };
    // Nobody waits for it any more when the work was abandoned.
    let _ = ended.send(());
    Ok(writer.write(&response)?)
}

/// Asks the work to stop once `input` ends.
fn watch(
    mut input: impl Read + Send + 'static,
    cancel: Cancel,
    abandoned: impl FnOnce() + Send + 'static,
) -> Sender<()> {
    let (ended, hears) = channel();
    std::thread::spawn(move || {
        // Whatever else is sent has no meaning; an error is an end as well.
        let _ = std::io::copy(&mut input, &mut std::io::sink());
        cancel.cancel();
        if hears.recv_timeout(GRACE) == Err(RecvTimeoutError::Timeout) {
            abandoned();
        }
    });
    ended
}

/// Does the work of a request. `shared` is a cache of several machines, and the store for what is
/// sent there: answers and parts of the work are looked for in it, where this machine has a cache
/// of its own.
pub(super) fn work(
    host: Host,
    request: StepRequest,
    reporter: &Arc<dyn StepReporter>,
    cancel: Cancel,
    shared: Option<(&Arc<RemoteCache>, &ArtifactStore)>,
) -> Result<StepOutcome, StepError> {
    if request.protocol != PROTOCOL_VERSION {
        let text = format!(
            "the step runs with protocol {PROTOCOL_VERSION}, but was asked in {}",
            request.protocol
        );
        return Err(StepError::failed(text).help("use one version of flowrun everywhere"));
    }
    let step = host.vocabulary.steps.get(&request.kind);
    let Some(step) = step.filter(|s| s.version() == request.version).cloned() else {
        let text = format!(
            "there is no step kind `{}` of version {} where the step runs",
            request.kind, request.version
        );
        return Err(StepError::failed(text).help("use one version of flowrun everywhere"));
    };
    limit_memory(request.memory, reporter.as_ref());
    let completions = match &request.completions {
        Some(folder) => {
            CompletionCache::open(folder.clone()).map_err(|e| StepError::failed(e.to_string()))?
        }
        None => CompletionCache::in_memory(),
    };
    let mut actions = ActionCache::open(request.actions);
    if let Some((remote, store)) = shared {
        let stopped = cancel.clone();
        completions.share(remote, move || stopped.is_cancelled());
        actions = actions.shared_through(remote, store);
    }
    let inputs = request.inputs.into_iter();
    let ctx = StepContext {
        step: request.step,
        params: request.params,
        observed: request.observed,
        world: World {
            offline: request.offline,
            look_only: false,
            distdir: request.distdir,
            user_cache: request.user_cache,
            root: request.root,
            exe: host.exe,
            env: host.env,
            cancel: cancel.clone(),
        },
        inputs: inputs
            .map(|(port, list)| (port, list.into_iter().map(Into::into).collect()))
            .collect(),
        out_dir: request.out_dir,
        work_dir: request.work_dir,
        resume_path: request.resume_path,
        run_path: request.run_path,
        started_at: request.started_at,
        completions: Arc::new(completions),
        actions,
        finished: request.finished.into(),
        reporter: Arc::clone(reporter),
        cancel,
    };
    Inline.run(step.as_ref(), &ctx)
}

/// Bounds the memory that this process may ask for. What is only mapped (weights) is not
/// counted: the system can drop it.
fn limit_memory(bytes: u64, reporter: &dyn StepReporter) {
    if bytes == 0 {
        return;
    }
    #[cfg(target_os = "linux")]
    let bounded =
        nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_DATA, bytes, bytes);
    #[cfg(not(target_os = "linux"))]
    let bounded: Result<(), &str> = Err("this system has no such bound");
    if let Err(error) = bounded {
        reporter.warning(&format!(
            "`resources.memory` does not bound the step: {error}"
        ));
    }
}

/// Writes what the step reports as messages.
pub(super) struct Writer {
    output: Mutex<Box<dyn Write + Send>>,
    /// Progress is told at most once in this time.
    every: Duration,
    /// Whether spans are wanted.
    traced: bool,
    /// Spans that were told.
    spans: AtomicUsize,
    /// When progress was last told.
    told: Mutex<Option<Instant>>,
}

impl Writer {
    pub(super) fn new(output: impl Write + Send + 'static, every: Duration, traced: bool) -> Self {
        Self {
            output: Mutex::new(Box::new(output)),
            every,
            traced,
            spans: AtomicUsize::new(0),
            told: Mutex::new(None),
        }
    }

    pub(super) fn write(&self, message: &StepMessage) -> std::io::Result<()> {
        let mut line = serde_json::to_string(message)?;
        line.push('\n');
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        output.write_all(line.as_bytes())?;
        output.flush()
    }

    /// Nobody listens any more once the runner is gone; the end of input says so too.
    fn tell(&self, message: &StepMessage) {
        let _ = self.write(message);
    }
}

impl StepReporter for Writer {
    fn progress(&self, done: u64, total: u64, unit: &str, text: &str) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let soon = told.is_some_and(|at| at.elapsed() < self.every);
        if soon && done != total {
            return;
        }
        *told = Some(Instant::now());
        drop(told);
        self.tell(&StepMessage::Progress {
            done,
            total,
            unit: unit.to_owned(),
            text: text.to_owned(),
        });
    }

    fn warning(&self, text: &str) {
        self.tell(&StepMessage::Warning(text.to_owned()));
    }

    fn log(&self, text: &str) {
        self.tell(&StepMessage::Log(text.to_owned()));
    }

    fn traces(&self) -> bool {
        self.traced
    }

    fn span(&self, span: TraceSpan) {
        if self.traced && self.spans.fetch_add(1, Ordering::Relaxed) < SPANS {
            self.tell(&StepMessage::Span(span));
        }
    }

    fn cut(&self, line: &[u8], _: usize) -> Option<usize> {
        (line.len() >= LINE).then_some(line.len())
    }
}
