//! The other end of a job: reads the request in its folder, does the work, and appends what it
//! has to say to the files there. The job system's own log gets the same, for people.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::folder::AttemptFolder;
use super::outpost::Goods;
use super::watch::BEAT;
use crate::run::Mask;
use crate::runner::exec::{ExecError, Host, Writer, work};
use crate::runner::process::GRACE;
use crate::runner::protocol::{Failure, PROTOCOL_VERSION, StepMessage, StepRequest};
use crate::sandbox::{Sandbox, local};
use crate::step::{Cancel, StepError, StepOutcome, StepReporter, TraceSpan};
use crate::warden::Warden;

/// At most four progress messages a second: each is a write to a shared folder.
const PROGRESS_EVERY: Duration = Duration::from_millis(250);

/// What a job is to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Request {
    /// The work of a step kind, with the step's own environment.
    Step {
        request: Box<StepRequest>,
        env: BTreeMap<String, String>,
    },
    /// A command.
    Command(CommandRequest),
}

/// A command and what it may see.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CommandRequest {
    /// [`PROTOCOL_VERSION`].
    pub(crate) protocol: u32,
    /// The shell command.
    pub(crate) command: String,
    /// Working folder, with `in/` and `out/`.
    pub(crate) folder: PathBuf,
    /// Variables, the locale included: it is in the action key. Those that only mean something on
    /// one machine are of the one where it runs.
    pub(crate) env: BTreeMap<String, String>,
}

/// Variables that travel beside the request: it may be read, they may not.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Environment {
    /// Those that the step names as secrets.
    pub(crate) secrets: BTreeMap<String, String>,
    /// Those that the runner's settings hand on.
    pub(crate) handed: BTreeMap<String, String>,
}

impl Environment {
    /// Hides the values that nobody may read.
    fn mask(&self) -> Mask {
        let likely = self.handed.values().filter(|v| Mask::is_likely(v));
        Mask::new(self.secrets.values().chain(likely).cloned())
    }

    fn variables(self) -> BTreeMap<String, String> {
        let mut variables = self.handed;
        variables.extend(self.secrets);
        variables
    }
}

impl Request {
    /// The same with other paths.
    pub(super) fn with_paths(self, map: &dyn Fn(&Path) -> PathBuf) -> Self {
        match self {
            Self::Command(request) => Self::Command(CommandRequest {
                folder: map(&request.folder),
                ..request
            }),
            Self::Step { mut request, env } => {
                let r = request.as_mut();
                let paths = [
                    &mut r.out_dir,
                    &mut r.work_dir,
                    &mut r.resume_path,
                    &mut r.run_path,
                    &mut r.actions,
                    &mut r.user_cache,
                    &mut r.root,
                ];
                let optional = [&mut r.completions, &mut r.distdir];
                let inputs = r.inputs.values_mut().flatten().map(|input| &mut input.path);
                let all = paths
                    .into_iter()
                    .chain(optional.into_iter().flatten())
                    .chain(inputs);
                all.for_each(|path| *path = map(path));
                Self::Step { request, env }
            }
        }
    }

    /// Somebody wants to hear of spans: a command has none.
    fn is_traced(&self) -> bool {
        match self {
            Self::Step { request, .. } => request.traced,
            Self::Command(_) => false,
        }
    }

    fn protocol(&self) -> u32 {
        match self {
            Self::Step { request, .. } => request.protocol,
            Self::Command(request) => request.protocol,
        }
    }
}

/// A job that this process has taken.
pub struct Post {
    folder: AttemptFolder,
    request: Request,
    environment: Environment,
}

impl Post {
    /// Takes the job in this folder; `None` when another process has it, or nobody wants it any
    /// more.
    ///
    /// # Errors
    /// [`ExecError`] when there is no job.
    pub fn take(folder: &Path) -> Result<Option<Self>, ExecError> {
        let folder = AttemptFolder::at(folder.to_owned());
        let request = folder.request().map_err(ExecError::NoJob)?;
        if folder.is_cancelled() || !folder.claim()? {
            return Ok(None);
        }
        Ok(Some(Self {
            environment: folder.take_environment(),
            folder,
            request,
        }))
    }

    /// A job that was taken otherwise, with its folder made.
    pub(super) fn of(folder: AttemptFolder, request: Request, environment: Environment) -> Self {
        Self {
            folder,
            request,
            environment,
        }
    }

    /// Where what this process prints should go.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn log(&self) -> std::io::Result<File> {
        File::options()
            .create(true)
            .append(true)
            .open(self.folder.log())
    }
}

/// Does the work of a job. `cancel` may be set from outside; `console` gets what people read;
/// `abandoned` is called when the work was asked to stop and does not. Returns whether it ended
/// well.
///
/// # Errors
/// [`ExecError`] when the response cannot be written; a step that fails is a response.
pub fn exec_job(
    host: Host,
    post: Post,
    cancel: &Cancel,
    console: impl Write + Send + 'static,
    abandoned: impl FnOnce() + Send + 'static,
) -> Result<bool, ExecError> {
    exec_with(host, post, cancel, console, abandoned, None)
}

/// The same; `goods` are fetched before the work, and delivered after it, where the folder is not
/// shared.
pub(super) fn exec_with(
    mut host: Host,
    post: Post,
    cancel: &Cancel,
    console: impl Write + Send + 'static,
    abandoned: impl FnOnce() + Send + 'static,
    goods: Option<&Goods>,
) -> Result<bool, ExecError> {
    let Post {
        folder,
        request,
        environment,
    } = post;
    let messages = File::options()
        .create(true)
        .append(true)
        .open(folder.messages())?;
    let response_is_kept = messages.try_clone()?;
    let ended = beat(folder.clone(), cancel.clone(), abandoned);
    let teller = Arc::new(Teller {
        writer: Writer::new(messages, PROGRESS_EVERY, request.is_traced()),
        console: Mutex::new(Box::new(console)),
        mask: environment.mask(),
    });
    let reporter: Arc<dyn StepReporter> = Arc::clone(&teller) as Arc<dyn StepReporter>;
    let fetched = goods.map_or(Ok(()), Goods::fetch);
    let work_on = || match request {
        _ if request.protocol() != PROTOCOL_VERSION => Err(StepError::failed(format!(
            "the job runs with protocol {PROTOCOL_VERSION}, but was asked in {}",
            request.protocol()
        ))
        .help("use one version of flowrun everywhere")),
        Request::Step { request, env } => {
            host.env.extend(environment.variables());
            host.env.extend(env);
            let shared = goods.map(|goods| (&goods.remote, goods.store()));
            work(host, *request, &reporter, cancel.clone(), shared)
        }
        Request::Command(request) => {
            let mut env = local(&host.env);
            env.extend(environment.variables());
            env.extend(request.env);
            let warden = Warden::within(folder.path());
            Sandbox {
                command: &request.command,
                folder: &request.folder,
                env,
                timeout: None,
                warden: &warden,
            }
            .run(cancel, &reporter)
            .map(|()| StepOutcome::default())
        }
    };
    let result = fetched.and_then(|()| work_on());
    if goods.is_some() {
        // The work has stopped if it was asked to. What it made may be large: who carries it shows
        // life by itself, and looks whether it is still wanted.
        let _ = ended.send(());
    }
    let delivered = goods.map_or(Ok(()), |goods| goods.deliver(result.is_ok()));
    let result = result.and_then(|outcome| delivered.map(|()| outcome));
    let well = result.is_ok();
    let response = match result {
        Ok(outcome) => StepMessage::Done(StepOutcome {
            metrics: teller.mask.metrics(outcome.metrics),
            ..outcome
        }),
        Err(error) => {
            teller.say(&format!("failed: {error}"));
            let hide = |text: &str| teller.mask.apply(text);
            StepMessage::Failed(Failure {
                kind: error.kind,
                message: hide(&error.message),
                help: error.help.as_deref().map(hide),
            })
        }
    };
    teller.writer.write(&response)?;
    response_is_kept.sync_data()?;
    // Nobody waits for it any more when the work was abandoned, or its end was told before.
    let _ = ended.send(());
    Ok(well)
}

/// Shows that this process is at work, and asks it to stop when its folder says so.
fn beat(
    folder: AttemptFolder,
    cancel: Cancel,
    abandoned: impl FnOnce() + Send + 'static,
) -> Sender<()> {
    let (ended, hears) = channel();
    std::thread::spawn(move || {
        let mut count = 0;
        while !cancel.is_cancelled() {
            folder.beat(count);
            count += 1;
            if hears.recv_timeout(BEAT) != Err(RecvTimeoutError::Timeout) {
                return;
            }
            if folder.is_cancelled() {
                cancel.cancel();
            }
        }
        if hears.recv_timeout(GRACE) == Err(RecvTimeoutError::Timeout) {
            abandoned();
        }
    });
    ended
}

/// Tells the runner, and people who look at the job system's log.
struct Teller {
    writer: Writer,
    console: Mutex<Box<dyn Write + Send>>,
    /// The runner hides secrets by itself; the files here and the console need it too.
    mask: Mask,
}

impl Teller {
    fn say(&self, text: &str) {
        let mut console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        // The job system may have closed it.
        let _ = writeln!(console, "{}", self.mask.apply(text));
    }
}

impl StepReporter for Teller {
    fn progress(&self, done: u64, total: u64, unit: &str, text: &str) {
        let text = self.mask.apply(text);
        self.writer.progress(done, total, unit, &text);
    }

    fn warning(&self, text: &str) {
        self.writer.warning(&self.mask.apply(text));
        self.say(&format!("warning: {text}"));
    }

    fn log(&self, text: &str) {
        self.writer.log(&self.mask.apply(text));
        self.say(text);
    }

    fn traces(&self) -> bool {
        self.writer.traces()
    }

    fn span(&self, span: TraceSpan) {
        self.writer.span(span);
    }

    fn cut(&self, line: &[u8], at: usize) -> Option<usize> {
        self.mask.cut(line, at)
    }
}
