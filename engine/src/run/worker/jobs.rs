//! What makes the attempt of an action the errand of a job system.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use flowrun_cache::remote::folder_of;
use flowrun_cache::{Cache, Depot, RemoteCache, RemoteOptions};

use super::Worker;
use super::inputs::names;
use crate::expansion::ActionRequest;
use crate::lookup::Keyed;
use crate::pipeline::{CachePolicy, Pipeline};
use crate::runner::protocol::{PROTOCOL_VERSION, StepRequest};
use crate::runner::{
    CommandRequest, Environment, Errand, JobRunner, Remote, Request, ShippedInput, Through, Way,
};
use crate::sandbox::locale;
use crate::step::{Cancel, Step, StepContext, StepError, StepOutcome, StepReporter, World};

/// Beginnings of the names of variables that open a remote store.
const STORES: [&str; 3] = ["AWS_", "AZURE_", "GOOGLE_"];

/// The job systems of a run, each opened when it is first needed.
pub(super) struct Remotes {
    all: BTreeMap<String, (JobRunner, OnceLock<Result<Remote, StepError>>)>,
    cache: Arc<Cache>,
    /// The remote of the run.
    remote: Option<Arc<RemoteCache>>,
    /// The same for the files of jobs, once there is such a job.
    depot: OnceLock<Result<Arc<Depot>, StepError>>,
}

/// One attempt, as far as step kinds and commands have it in common.
pub(super) struct Trip<'a> {
    pub(super) remote: &'a Remote,
    pub(super) request: &'a ActionRequest,
    pub(super) keyed: &'a Keyed,
    /// Folder with `in/` and `out/`.
    pub(super) place: &'a Path,
    pub(super) cancel: &'a Cancel,
    pub(super) reporter: &'a Arc<dyn StepReporter>,
}

impl Remotes {
    pub(super) fn new(
        pipeline: &Pipeline,
        cache: &Arc<Cache>,
        remote: Option<Arc<RemoteCache>>,
    ) -> Self {
        let all = pipeline.runners.iter();
        let all = all.map(|(name, runner)| (name.clone(), (runner.clone(), OnceLock::new())));
        Self {
            all: all.collect(),
            cache: Arc::clone(cache),
            remote,
            depot: OnceLock::new(),
        }
    }

    /// # Errors
    /// When it cannot be opened.
    pub(super) fn get(&self, name: &str, world: &World) -> Result<&Remote, StepError> {
        let Some((runner, opened)) = self.all.get(name) else {
            // A checked pipeline names none that it lacks.
            return Err(StepError::invalid(format!("there is no runner `{name}`")));
        };
        let opened = opened.get_or_init(|| {
            let way = match runner.settings.through {
                Through::Folder => None,
                Through::Remote => {
                    let way = self.way(name, world)?;
                    if let Some(folder) = folder_of(way.depot.url()) {
                        runner.kind.sees(&runner.own, &folder)?;
                    }
                    Some(way)
                }
            };
            let system = runner.kind.open(&runner.own, world)?;
            let root = std::path::absolute(&world.root).unwrap_or_else(|_| world.root.clone());
            let settings = runner.settings.clone();
            Ok(Remote::new(system, settings, &world.exe, &root, way))
        });
        opened.as_ref().map_err(Clone::clone)
    }

    fn way(&self, name: &str, world: &World) -> Result<Way, StepError> {
        let depot = self.depot(world).map_err(|error| StepError {
            message: format!(
                "`runners.{name}` says `through: remote`, but {}",
                error.message
            ),
            ..error
        })?;
        let opens = |name: &&String| STORES.iter().any(|start| name.starts_with(start));
        Ok(Way {
            depot,
            cache: Arc::clone(&self.cache),
            variables: world.env.keys().filter(opens).cloned().collect(),
        })
    }

    /// The remote store of the run, for the files of jobs.
    ///
    /// # Errors
    /// When the run has none, or only reads it.
    pub(super) fn depot(&self, world: &World) -> Result<Arc<Depot>, StepError> {
        let opened = self.depot.get_or_init(|| {
            let Some(remote) = &self.remote else {
                return Err(StepError::invalid("the run has no remote cache").help(
                    "name one with `--remote`, FLOWRUN_REMOTE or in .flowrun.yaml; a bucket is not used with `--offline`",
                ));
            };
            if remote.is_read_only() {
                return Err(StepError::invalid("nothing may be written to the remote cache")
                    .help("leave out `--remote-read-only`"));
            }
            let options = RemoteOptions {
                url: remote.url().to_owned(),
                read_only: false,
                env: world.env.clone(),
            };
            let depot = Depot::open(&options, self.cache.dir());
            depot
                .map(Arc::new)
                .map_err(|error| StepError::failed(error.to_string()))
        });
        opened.clone()
    }
}

impl Trip<'_> {
    /// Has a step kind's work done.
    pub(super) fn step(
        &self,
        worker: &Worker,
        step: &dyn Step,
        ctx: &StepContext,
    ) -> Result<StepOutcome, StepError> {
        let request = StepRequest::new(step, ctx, self.request.node.resources.memory);
        let request = Request::Step {
            request: Box::new(request),
            env: self.request.env.clone(),
        };
        self.go(worker, request)
    }

    /// Has a command run. `env` holds the variables of its ports and its own.
    pub(super) fn command(
        &self,
        worker: &Worker,
        env: BTreeMap<String, String>,
    ) -> Result<StepOutcome, StepError> {
        // As the key has it: the worker may have another.
        let mut whole = locale(&worker.lookup.world.env);
        whole.extend(env);
        let request = CommandRequest {
            protocol: PROTOCOL_VERSION,
            command: self.request.command.clone().unwrap_or_default(),
            folder: self.place.to_owned(),
            env: whole,
        };
        self.go(worker, Request::Command(request))
    }

    fn go(&self, worker: &Worker, request: Request) -> Result<StepOutcome, StepError> {
        let run = worker.run_dir.file_name().and_then(|name| name.to_str());
        self.remote.run(&Errand {
            step: &self.request.id,
            run: run.unwrap_or_default(),
            timeout: self.request.node.timeout,
            key: self.keyed.key,
            afresh: self.keyed.replaces || self.request.node.cache == CachePolicy::Never,
            folder: worker.cache.job_path(&self.keyed.key),
            place: self.place,
            inputs: self.inputs(),
            saved: worker.cache.partial_path(&self.keyed.key),
            request,
            environment: self.environment(worker),
            resources: &self.request.node.resources,
            cancel: self.cancel,
            reporter: self.reporter,
        })
    }

    /// The artifacts that [`Worker::link_inputs`] placed.
    fn inputs(&self) -> Vec<ShippedInput> {
        let ports = self.keyed.inputs.iter();
        let all = ports.flat_map(|(port, inputs)| names(port, inputs));
        all.map(|(name, artifact, _)| ShippedInput {
            path: format!("in/{name}"),
            artifact: artifact.clone(),
        })
        .collect()
    }

    /// Secrets of the step, and what the runner's settings name.
    fn environment(&self, worker: &Worker) -> Environment {
        let env = &worker.lookup.world.env;
        let those = |names: &[String]| {
            let names = names.iter();
            names
                .filter_map(|name| Some((name.clone(), env.get(name)?.clone())))
                .collect()
        };
        Environment {
            secrets: those(&self.request.node.secrets),
            handed: those(self.remote.handed()),
        }
    }
}
