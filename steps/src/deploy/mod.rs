//! `deploy`: writes the bundle, serves it, asks it the smoke rows, and acts on its target.
//!
//! | file | what |
//! |---|---|
//! | `mod` | the step and its params |
//! | `server` | a `flowrun serve` process |
//! | `smoke` | whether it answers as evaluated |
//! | `expect` | what else must hold |
//! | `canary` | the new bundle beside the one in use |
//! | `local` | the target `local`: leaves the server running |
//! | `targets` | files for other places to run |
//! | `ray`, `on_ray` | the target `ray-serve`: serves the files on a cluster; the way back |
//! | `versions` | deployed versions as they lie in the project |
//! | `package` | files as Ray takes them |

mod canary;
mod expect;
pub mod local;
pub mod on_ray;
pub(crate) mod package;
mod ray;
mod server;
mod smoke;
pub mod targets;
mod versions;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use flowrun_cache::ArtifactStore;
use flowrun_engine::step::{
    Cancel, Port, Step, StepContext, StepError, StepErrorKind, StepOutcome, World,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::answer::SamplingSpec;
use crate::bundle::{Bundle, Parts};
use crate::models::{ModelSpec, observe, settle};
use crate::program_file::ProgramFile;
use crate::rows::{read_json, write_json, write_jsonl};
use crate::schema_of;
use crate::scores::{ProgramScore, Scores};
use canary::{Canary, Compared};
use expect::Expect;
pub use ray::ClusterSpec;
use server::{Endpoint, Life, Server};
pub use smoke::Agreed;
use targets::Settings;

/// The environment variable with the key that a server's callers must give.
pub const API_KEY: &str = "FLOWRUN_API_KEY";

/// The step kind.
pub struct Deploy;

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// Name of what is deployed.
    #[schemars(regex(pattern = "^[a-z0-9][a-z0-9._-]*$"))]
    name: String,
    /// The model that the program asks.
    #[serde(default)]
    #[schemars(with = "Option<String>", extend("x-flowrun-ref" = "models"))]
    model: Option<ModelSpec>,
    /// How the model draws tokens; the same as where the scores were measured.
    #[serde(default)]
    sampling: SamplingSpec,
    /// What becomes of the bundle.
    #[serde(default)]
    target: Target,
    /// How it is to run elsewhere.
    #[serde(default)]
    settings: Settings,
    /// What it must answer before it is used.
    #[serde(default)]
    smoke: SmokeSpec,
    /// What else must hold before it is used.
    #[serde(default)]
    expect: Expect,
    /// Compares it, row by row, with the bundle in use; nothing is compared where there is none.
    #[serde(default)]
    canary: Option<Canary>,
    /// The folder of the bundle in use, for `expect` and `canary`; for the targets `local` and, on
    /// a cluster, `ray-serve` it is the one deployed there.
    #[serde(default)]
    against: Option<PathBuf>,
    /// Target `local`: the port to serve on; 0 takes a free one.
    #[serde(default)]
    port: u16,
    /// Targets `local` and, on a cluster, `ray-serve`: the folder of the project where what is
    /// deployed lies.
    #[serde(default = "deployed")]
    folder: PathBuf,
    /// Target `ray-serve`: the cluster to serve it on; without one, only its files are written.
    #[serde(default)]
    ray: Option<ClusterSpec>,
}

fn deployed() -> PathBuf {
    "deployed".into()
}

/// What becomes of a bundle.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Target {
    /// It is written and tested.
    #[default]
    Bundle,
    /// It is also served on this machine from then on.
    Local,
    /// Files for vLLM, with the program in front of it.
    Vllm,
    /// Files for Ray Serve; where a cluster is named, it is also served there from then on.
    RayServe,
    /// Manifests for Kubernetes.
    Kubernetes,
    /// A composition for Docker, with the image.
    DockerCompose,
    /// A container image.
    Dockerfile,
    /// A systemd unit.
    Systemd,
    /// A repository for the Hugging Face hub.
    HuggingFace,
}

impl Target {
    /// The name of the files that it takes, if any.
    fn files(self) -> Option<&'static str> {
        match self {
            Self::Bundle | Self::Local => None,
            Self::Vllm => Some("vllm"),
            Self::RayServe => Some("ray-serve"),
            Self::Kubernetes => Some("kubernetes"),
            Self::DockerCompose => Some("docker-compose"),
            Self::Dockerfile => Some("dockerfile"),
            Self::Systemd => Some("systemd"),
            Self::HuggingFace => Some("hugging-face"),
        }
    }
}

/// What a bundle must answer before it is used.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct SmokeSpec {
    /// Rows to ask, spread over those that were scored.
    #[schemars(range(min = 1))]
    rows: usize,
    /// Share of them that must be answered as they were when scored.
    #[schemars(range(min = 0.0, max = 1.0))]
    agreement: f64,
}

impl Default for SmokeSpec {
    fn default() -> Self {
        Self {
            rows: 20,
            agreement: 1.0,
        }
    }
}

impl Step for Deploy {
    fn kind(&self) -> &'static str {
        "deploy"
    }
    fn version(&self) -> u32 {
        3
    }
    fn about(&self) -> &'static str {
        "Writes a bundle, serves it, checks that it answers as evaluated, and deploys it."
    }
    fn params_schema(&self) -> Value {
        schema_of::<Params>()
    }
    fn inputs(&self) -> Vec<Port> {
        vec![
            Port::new("program", "program", "The program."),
            Port::new("adapter", "adapter", "The checkpoint that answers.").optional(),
            Port::new("scores", "scores", "How it did on the test set."),
        ]
    }
    fn outputs(&self) -> Vec<Port> {
        vec![
            Port::new("bundle", "bundle", "All that `flowrun serve` needs."),
            Port::new(
                "files",
                "file",
                "What the target needs; says which bundle it is for.",
            ),
            Port::new(
                "differences",
                "file",
                "Rows that the canary answers otherwise.",
            ),
        ]
    }
    /// For the target `local` also what is being served now: a server that is gone or that serves
    /// something else is a reason to deploy again.
    fn observe(&self, params: &Value, world: &World) -> Result<BTreeMap<String, Value>, StepError> {
        let mut seen = observe(params, world)?;
        let params: Params = serde_json::from_value(params.clone())
            .map_err(|e| StepError::invalid(format!("params of `deploy`: {e}")))?;
        if params.target == Target::Local {
            seen.insert("serving".to_owned(), params.place(world).observe());
        }
        if let Some(cluster) = params.cluster() {
            let name = targets::dns_name(&params.name)?;
            seen.insert("serving".to_owned(), cluster.open(world)?.observe(&name));
        }
        if let Some(against) = &params.against {
            let digest = digest(&world.root.join(against))?;
            seen.insert("against".to_owned(), digest.into());
        }
        Ok(seen)
    }
    fn run(&self, ctx: &StepContext) -> Result<StepOutcome, StepError> {
        settle(ctx)?;
        let params: Params = ctx.params()?;
        let program = ProgramFile::load(&ctx.input("program")?.path)?;
        let scores: Scores = read_json(&ctx.input("scores")?.path)?;
        let folder = ctx.output("bundle");
        let parts = Parts {
            name: &params.name,
            program: &program,
            model: params.model.as_ref(),
            adapter: ctx.input_opt("adapter").map(|input| input.path.as_path()),
            sampling: params.sampling,
            scores: &scores,
            smoke_rows: params.smoke.rows,
            agreement: params.smoke.agreement,
        };
        let bundle = Bundle::write(&folder, &parts, &ctx.world)?;
        ctx.check_cancelled()?;
        let digest = digest(&folder)?;
        // What cannot be rendered is found before anything is served.
        let files = match params.target.files() {
            Some(name) => targets::render(name, &bundle, &params.settings, &ctx.world)?,
            None => Vec::new(),
        };
        let in_use = params.in_use(&ctx.world)?;
        let measured = in_use.as_ref().map(|bundle| &bundle.manifest.measured);
        params
            .expect
            .check_scores(&bundle.manifest.measured, measured)?;
        let tested = test(&params, &bundle, in_use.as_ref(), &scores.programs[0], ctx)?;
        targets::write(&files, &ctx.output("files"))?;
        let about = json!({
            "target": params.target, "name": params.name, "bundle": digest,
            "model": bundle.manifest.model_id,
        });
        std::fs::create_dir_all(ctx.output("files"))
            .map_err(|e| StepError::io(&ctx.output("files"), &e))?;
        write_json(&ctx.output("files").join("target.json"), &about)?;
        let mut outcome = StepOutcome::default()
            .metric("model", bundle.manifest.model_id.as_str())
            .metric("smoke", tested.agreed.to_string())
            .metric(
                "p95_ms",
                (tested.agreed.p95.as_secs_f64() * 1e4).round() / 10.0,
            );
        if let Some(compared) = &tested.compared {
            outcome = outcome.metric("canary", compared.to_string());
        }
        if params.target == Target::Local {
            let place = params.place(&ctx.world);
            let current = place.deploy(&folder, &digest, params.port, &ctx.world, &ctx.cancel)?;
            outcome = outcome
                .metric("url", current.url)
                .metric("stop", format!("kill {}", current.pid));
        }
        if let Some(cluster) = params.cluster() {
            let url = serve_on_ray(cluster, &params, &bundle, &digest, ctx)?;
            outcome = outcome.metric("url", url);
        }
        Ok(outcome)
    }
}

/// Serves the written files on a cluster, once they answer the smoke rows there.
fn serve_on_ray(
    spec: &ClusterSpec,
    params: &Params,
    bundle: &Bundle,
    digest: &str,
    ctx: &StepContext,
) -> Result<String, StepError> {
    let cluster = spec.open(&ctx.world)?;
    let package = ctx.work_dir.join("package.zip");
    let files = ctx.output("files");
    let version = ray::Version::pack(&files, &package)?;
    let place = params.place_on_ray(&ctx.world);
    let release = on_ray::Release {
        application: version.application(),
        bundle: digest.to_owned(),
        folder: place.keep(&files, &version.application())?,
        since: on_ray::now(),
    };
    let rows = bundle.smoke_rows()?;
    let told = |done, total| {
        ctx.reporter
            .progress(done, total, "rows", "smoke test on Ray");
    };
    let smoke = |endpoint: &Endpoint| {
        let agreement = params.smoke.agreement;
        let agreed = smoke::check(endpoint, &rows, agreement, &ctx.cancel, &told)?;
        params.expect.check_speed(&agreed)
    };
    let switch = || cluster.deploy(&version, &ctx.world, &ctx.cancel, &smoke);
    let (_, url) = place.record(spec, release, switch)?;
    Ok(url)
}

impl Params {
    /// The cluster to serve on, if any.
    fn cluster(&self) -> Option<&ClusterSpec> {
        self.ray
            .as_ref()
            .filter(|_| self.target == Target::RayServe)
    }

    fn place_on_ray(&self, world: &World) -> on_ray::Place {
        on_ray::Place::new(&world.root.join(&self.folder), &self.name)
    }

    fn place(&self, world: &World) -> local::Place {
        local::Place::new(&world.root.join(&self.folder), &self.name)
    }

    /// The bundle that is in use, where one is known.
    fn in_use(&self, world: &World) -> Result<Option<Bundle>, StepError> {
        if let Some(against) = &self.against {
            return Bundle::open(&world.root.join(against)).map(Some);
        }
        let deployed = match self.target {
            Target::Local => self.place(world).current().map(|current| current.folder),
            Target::RayServe => {
                let place = self.place_on_ray(world);
                let current = self.cluster().and_then(|ray| place.current_on(ray));
                current.map(|current| current.release.bundle_folder())
            }
            _ => None,
        };
        let there = deployed.filter(|folder| crate::bundle::is_bundle(folder));
        there.map(|folder| Bundle::open(&folder)).transpose()
    }
}

/// What serving the bundle for a moment showed.
struct Tested {
    agreed: Agreed,
    compared: Option<Compared>,
}

/// Serves the bundle, and asks it what it must answer.
fn test(
    params: &Params,
    bundle: &Bundle,
    in_use: Option<&Bundle>,
    score: &ProgramScore,
    ctx: &StepContext,
) -> Result<Tested, StepError> {
    let serve = |bundle: &Bundle, logs: &str| {
        let logs = ctx.work_dir.join(logs);
        std::fs::create_dir_all(&logs).map_err(|e| StepError::io(&logs, &e))?;
        let (life, world) = (Life::OfThisStep, &ctx.world);
        Server::start(&bundle.folder, 0, &logs, life, world, &ctx.cancel)
    };
    let progress = |what: &'static str| {
        move |done: u64, total: u64| ctx.reporter.progress(done, total, "rows", what)
    };
    let server = serve(bundle, "new")?;
    let rows = bundle.smoke_rows()?;
    let told = progress("smoke test");
    let agreement = params.smoke.agreement;
    let agreed = smoke::check(&server.endpoint, &rows, agreement, &ctx.cancel, &told)
        .map_err(|error| with_last_words(error, &server))?;
    params.expect.check_speed(&agreed)?;
    let compared = match (&params.canary, in_use) {
        (Some(canary), Some(in_use)) => {
            let other = serve(in_use, "deployed")?;
            let told = progress("canary");
            let (new, old) = (&server.endpoint, &other.endpoint);
            let compared = canary.compare(score, new, old, &ctx.cancel, &told)?;
            other.stop();
            ctx.reporter.log(&compared.to_string());
            for difference in &compared.differences {
                ctx.reporter.log(&json!(difference).to_string());
            }
            canary.check(&compared)?;
            Some(compared)
        }
        _ => None,
    };
    server.stop();
    let none = Vec::new();
    let differences = compared.as_ref().map_or(&none, |c| &c.differences);
    write_jsonl(&ctx.output("differences"), differences)?;
    Ok(Tested { agreed, compared })
}

fn with_last_words(error: StepError, server: &Server) -> StepError {
    let log = server.last_words();
    match error.kind {
        StepErrorKind::Gate if !log.is_empty() => StepError {
            message: format!("{}; the server's log ends with: {log}", error.message),
            ..error
        },
        _ => error,
    }
}

fn digest(folder: &Path) -> Result<String, StepError> {
    ArtifactStore::address_of(folder)
        .map(|address| address.digest.to_hex())
        .map_err(|e| StepError::failed(e.to_string()))
}

/// Whether the server at `url` answers; with a bundle, whether it answers as many of its smoke rows
/// as they were answered when scored as the bundle was admitted with.
///
/// # Errors
/// Gate when it does not.
pub fn check(url: &str, bundle: Option<&Path>, world: &World) -> Result<Option<Agreed>, StepError> {
    let endpoint = Endpoint::new(url, world)?;
    if server::health(&endpoint.url).is_none() {
        let text = format!("{url} does not answer as `flowrun serve` does");
        return Err(StepError::new(StepErrorKind::Gate, text));
    }
    let Some(folder) = bundle else {
        return Ok(None);
    };
    let bundle = Bundle::open(folder)?;
    let (rows, agreement) = (bundle.smoke_rows()?, bundle.manifest.agreement);
    let cancel = Cancel::default();
    smoke::check(&endpoint, &rows, agreement, &cancel, &|_, _| {}).map(Some)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::bundle::test_bundle;

    #[test]
    fn the_bundle_in_use_on_a_cluster_is_one_of_that_cluster() {
        let dir = tempfile::tempdir().unwrap();
        let world = World {
            root: dir.path().to_owned(),
            ..World::default()
        };
        let params = |dashboard: &str| -> Params {
            let ray = json!({ "dashboard": dashboard });
            let params = json!({ "name": "intents", "target": "ray-serve", "ray": ray });
            serde_json::from_value(params).unwrap()
        };
        let here = params("http://one:8265");
        let folder = dir.path().join("deployed/intents/ray/intents-1");
        let model = json!({ "provider": "openai", "base_url": "http://x/v1", "model": "m" });
        test_bundle(&folder.join("bundle"), model, dir.path());
        let release = on_ray::Release {
            application: "intents-1".to_owned(),
            bundle: "1".to_owned(),
            folder,
            since: 1,
        };
        let place = here.place_on_ray(&world);
        let recorded = place.record(here.cluster().unwrap(), release, || Ok(()));
        recorded.unwrap();
        assert!(here.in_use(&world).unwrap().is_some());
        let elsewhere = params("http://two:8265");
        assert!(elsewhere.in_use(&world).unwrap().is_none());
    }

    #[test]
    fn every_target_of_the_list_is_one_of_the_step() {
        for target in &targets::TARGETS {
            let named: Target = serde_json::from_value(target.name.into()).unwrap();
            assert_eq!(named.files(), Some(target.name));
        }
    }
}
