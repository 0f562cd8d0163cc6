//! `flowrun serve`: a deployed program and its model, or a base model with adapters, over HTTP.
//!
//! | file | what |
//! |---|---|
//! | `mod` | the command: opens what is to be served, listens, stops |
//! | `listener`, `steady` | connections; those whose client takes nothing |
//! | `routes` | which path does what |
//! | `guard` | who may ask |
//! | `limits` | what a request's body may be; counting requests |
//! | `service` | what answers, and how much may be asked at once |
//! | `predict`, `question` | `POST /predict`: the program; what it takes |
//! | `openai` | `/v1/…`: the models, in OpenAI's shapes |
//! | `files` | `/v1/files` |
//! | `batches` | `/v1/batches`: answers files of requests |
//! | `fine_tuning` | `/v1/fine_tuning/…`: trains adapters of the model |
//! | `orders` | what was ordered: batches, jobs |
//! | `kept`, `turn` | what outlives the server; which server goes on with it |
//! | `list` | lists in OpenAI's shape |
//! | `metrics`, `openapi`, `page.html` | for Prometheus, for generators of clients, for people |
//! | `problem` | errors, in OpenAI's shape |

mod batches;
mod files;
mod fine_tuning;
mod guard;
mod kept;
mod limits;
mod list;
mod listener;
mod metrics;
mod openai;
mod openapi;
mod orders;
mod predict;
mod problem;
mod question;
mod routes;
mod service;
mod steady;
mod turn;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use flowrun_cache::ArtifactStore;
use flowrun_engine::step::{Cancel, StepError, StepErrorKind, World};
use flowrun_lm::program::RowInput;
use flowrun_steps::answer::{Answerer, attach_encoders};
use flowrun_steps::bundle::{self, Bundle};
use flowrun_steps::deploy::API_KEY;
use flowrun_steps::models::weights::WeightsRef;
use flowrun_steps::models::{EmbeddedSpec, Host, ModelSpec};
use flowrun_steps::program_file::ProgramFile;
use flowrun_steps::serving::{Engine, EngineSpec};
use tokio::net::{TcpListener, TcpSocket};
use tokio::signal::unix::{SignalKind, signal};

use crate::args::{GlobalArgs, ServeArgs};
use crate::exit::{Exit, Failure};
use crate::surroundings;
use batches::Batches;
use fine_tuning::FineTuning;
use guard::Guard;
use metrics::Metrics;
use service::{About, Backend, Deployed, Limits, Service};

/// Connections that the system keeps until they are taken.
const BACKLOG: u32 = 1024;

/// Serves what is named until it is told to stop.
pub(crate) fn serve(args: &ServeArgs, global: &GlobalArgs) -> Result<Exit, Failure> {
    let bundle = bundle::is_bundle(&args.target);
    let root = if bundle {
        args.target.as_path()
    } else {
        Path::new(".")
    };
    let world = surroundings::world(root, global)?;
    let key = world.env.get(API_KEY).filter(|key| !key.is_empty());
    if !args.host.is_loopback() && key.is_none() {
        return Err(Failure::usage(format!(
            "{} can be reached from other machines: set {API_KEY}, the key that callers must give",
            args.host
        )));
    }
    let guard = Guard::new(key.map(String::as_str), args.host.is_loopback());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    // A port that is taken is found before a model is loaded.
    let listener = runtime.block_on(async { listen(args) })?;
    let service = match bundle {
        true => open_bundle(args, &world)?,
        false => open_model(args, &world)?,
    };
    let exit = runtime.block_on(run(args, global, listener, service, guard))?;
    // Calls that were given up are not waited for.
    runtime.shutdown_background();
    Ok(exit)
}

fn listen(args: &ServeArgs) -> Result<TcpListener, Failure> {
    let address = SocketAddr::new(args.host, args.port);
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    };
    let listener = socket.and_then(|socket| {
        socket.set_reuseaddr(true)?;
        // Two servers of one deployment, the old and the new, on one port.
        socket.set_reuseport(args.share_port)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    });
    listener.map_err(|e| {
        let text = format!("cannot listen on {address}: {e}; choose another --port");
        Failure::new(Exit::Internal, text)
    })
}

fn limits(args: &ServeArgs, batch: usize) -> Limits {
    Limits {
        batch: args.max_batch.unwrap_or(batch).max(1),
        queue: args.max_queue,
        answer: Duration::from_secs(args.timeout),
        read: Duration::from_secs(args.read_timeout),
        write: Duration::from_secs(args.write_timeout),
        drain: Duration::from_secs(args.drain),
    }
}

fn open_bundle(args: &ServeArgs, world: &World) -> Result<Arc<Service>, Failure> {
    if args.fine_tuning.is_some() {
        return Err(Failure::usage(
            "`--fine-tuning` needs a base model, not a bundle",
        ));
    }
    if args.default_chat_template_kwargs.is_some() {
        return Err(Failure::usage(
            "`--default-chat-template-kwargs` needs a base model; a bundle has its own, those that \
             its checkpoint was trained with or else those of its model's entry",
        ));
    }
    let bundle = Bundle::open(&world.root).map_err(unusable)?;
    let manifest = &bundle.manifest;
    let about = About {
        name: manifest.name.clone(),
        model_id: manifest.model_id.clone(),
        digest: Some(ArtifactStore::address_of(&world.root)?.digest.to_hex()),
        label_field: bundle.program.label_field().to_owned(),
        inputs: bundle.program.row_inputs().map_err(unusable)?,
        labels: bundle.program.labels().to_vec(),
        closed: bundle.program.closed_labels().is_some(),
        ..about(args)
    };
    let metrics = Arc::new(Metrics::new());
    let cancel = Cancel::default();
    let host = Host {
        world,
        cancel: &cancel,
        completions: None,
        step: None,
    };
    let (backend, limits) = match (&manifest.model, &bundle.program) {
        (Some(ModelSpec::Embedded(spec)), ProgramFile::Prompt(_)) => {
            let limits = limits(args, spec.batch);
            let adapter = bundle.adapter().map_err(unusable)?;
            let pinned = adapter.map(|folder| (about.model_id.clone(), folder));
            let base_id = match &pinned {
                Some(_) => spec.weights.name(),
                None => about.model_id.clone(),
            };
            let engine = engine(args, spec, base_id, pinned, &limits, &metrics);
            let engine = Engine::open(engine, &host).map_err(unusable)?;
            let (saved, mut program) = bundle.program.prompt().map_err(unusable)?;
            attach_encoders(saved, &mut program, &host).map_err(unusable)?;
            let model = engine.model(&about.model_id);
            let program = Deployed {
                program: Arc::new(program),
                sampling: manifest.sampling.into(),
                model: model.map_err(|e| Failure::new(Exit::Internal, e.to_string()))?,
            };
            let program = Some(program);
            (Backend::Engine { engine, program }, limits)
        }
        _ => {
            if !args.adapters.is_empty() {
                return Err(Failure::usage(
                    "`--adapters` needs a model in this process, which this bundle has not",
                ));
            }
            let answerer: Answerer = bundle.answerer(&host).map_err(unusable)?;
            (Backend::Answerer(Arc::new(answerer)), limits(args, 32))
        }
    };
    let service = Service::new(backend, about, limits, metrics);
    Ok(Arc::new(service.batching(batches(args)?)))
}

fn open_model(args: &ServeArgs, world: &World) -> Result<Arc<Service>, Failure> {
    let is_model = match args.target.is_dir() {
        true => args.target.join("config.json").is_file(),
        false => args.target.is_file(),
    };
    if !is_model {
        return Err(unusable(
            StepError::invalid(format!(
                "{} is no bundle (it has no bundle.json) and no model (a GGUF file, or a folder with config.json)",
                args.target.display()
            ))
            .help("a `deploy` step writes bundles; publish its output `bundle` or take its path from `flowrun show`"),
        ));
    }
    let weights = WeightsRef {
        file: Some(std::path::absolute(&args.target)?),
        ..WeightsRef::default()
    };
    let base_id = args.name.clone().unwrap_or_else(|| weights.name());
    let spec = EmbeddedSpec {
        weights,
        batch: 32,
        prices: None,
        chat_template_kwargs: args
            .default_chat_template_kwargs
            .clone()
            .unwrap_or_default(),
    };
    let about = About {
        name: base_id.clone(),
        model_id: base_id.clone(),
        ..about(args)
    };
    let metrics = Arc::new(Metrics::new());
    let cancel = Cancel::default();
    let host = Host {
        world,
        cancel: &cancel,
        completions: None,
        step: None,
    };
    let limits = limits(args, spec.batch);
    let tuning = args.fine_tuning.as_deref();
    let tuning = tuning.map(|folder| FineTuning::open(folder, &base_id, &spec, world));
    let tuning = tuning.transpose()?;
    let engine = engine(args, &spec, base_id, None, &limits, &metrics);
    let engine = Engine::open(engine, &host).map_err(unusable)?;
    let backend = Backend::Engine {
        engine,
        program: None,
    };
    let service = Service::new(backend, about, limits, metrics);
    let service = service.training(tuning).batching(batches(args)?);
    Ok(Arc::new(service))
}

fn batches(args: &ServeArgs) -> Result<Option<Batches>, Failure> {
    args.batches.as_deref().map(Batches::open).transpose()
}

fn engine<'a>(
    args: &ServeArgs,
    model: &'a EmbeddedSpec,
    base_id: String,
    pinned: Option<(String, PathBuf)>,
    limits: &Limits,
    metrics: &Arc<Metrics>,
) -> EngineSpec<'a> {
    let metrics = Arc::clone(metrics);
    EngineSpec {
        model,
        base_id,
        pinned,
        folders: folders(args),
        keep: args.max_adapters,
        batch: limits.batch,
        queue: limits.queue,
        on_step: Box::new(move |step| metrics.step(step.rows, step.took)),
    }
}

fn about(args: &ServeArgs) -> About {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    About {
        name: String::new(),
        model_id: String::new(),
        digest: None,
        label_field: String::new(),
        inputs: vec![RowInput::text("text")],
        labels: Vec::new(),
        closed: false,
        started: now.map_or(0, |since| since.as_secs()),
        adapters: folders(args),
    }
}

/// The folders that adapters may come from.
fn folders(args: &ServeArgs) -> Vec<PathBuf> {
    let trained = args.fine_tuning.as_deref().map(FineTuning::adapters);
    args.adapters.iter().cloned().chain(trained).collect()
}

/// What is served must be usable as it is: whatever is wrong with it is wrong input.
fn unusable(error: StepError) -> Failure {
    StepError {
        kind: StepErrorKind::Invalid,
        ..error
    }
    .into()
}

#[allow(clippy::print_stdout, clippy::print_stderr)]
async fn run(
    args: &ServeArgs,
    global: &GlobalArgs,
    listener: TcpListener,
    service: Arc<Service>,
    guard: Guard,
) -> Result<Exit, Failure> {
    let address = listener.local_addr()?;
    // Before anyone is told: a signal that follows is not to be lost.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    tell(address, global, &service);
    let (told, mut told_again) = tokio::sync::watch::channel(0u32);
    let until_stdin_closes = args.until_stdin_closes;
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                () = stdin_closed(), if until_stdin_closes && *told.borrow() == 0 => {}
            }
            told.send_modify(|times| *times += 1);
        }
    });
    let mut first = told_again.clone();
    // The sender lives as long as the process.
    let stop = async move {
        let _ = first.wait_for(|times| *times >= 1).await;
    };
    let at_once = async move {
        let _ = told_again.wait_for(|times| *times >= 2).await;
    };
    if let Some(batches) = &service.batches {
        // It ends with the process; what it has not answered by then, the next one answers.
        tokio::spawn(batches::work(Arc::clone(&service), Arc::clone(batches)));
    }
    let app = routes::app(Arc::clone(&service), guard);
    let finished = listener::serve(listener, app, Arc::clone(&service), stop, at_once).await;
    if let Some(batches) = &service.batches {
        batches.put_down();
    }
    if let Some(tuning) = &service.fine_tuning {
        tuning.put_down();
    }
    if !finished && !global.quiet {
        eprintln!("stopped before every request was answered");
    }
    Ok(Exit::Ok)
}

#[allow(clippy::print_stdout, clippy::print_stderr)]
fn tell(address: SocketAddr, global: &GlobalArgs, service: &Service) {
    let About {
        name,
        model_id,
        digest,
        ..
    } = &service.about;
    if global.json {
        let event = serde_json::json!({
            "event": "serving", "url": format!("http://{address}"), "name": name,
            "model": model_id, "bundle": digest, "pid": std::process::id(),
        });
        println!("{event}");
    } else if !global.quiet {
        let host = shown(address);
        eprintln!("{name} ({model_id}) is served at http://{host}; Ctrl-C stops it");
        if digest.is_some() {
            eprintln!(
                "  curl -s http://{host}/predict -H 'content-type: application/json' -d '{}'",
                question::sample(&service.about.inputs)
            );
        }
    }
}

/// An address that a browser on this machine can use.
fn shown(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        ip if ip.is_unspecified() => IpAddr::from([127, 0, 0, 1]),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

async fn stdin_closed() {
    let (tell, closed) = tokio::sync::oneshot::channel();
    // A thread of its own: the runtime would wait for a blocked one of its pool at the end.
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        let _ = tell.send(());
    });
    let _ = closed.await;
}
