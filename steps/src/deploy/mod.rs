//! `deploy`: writes the bundle, serves it, asks it the smoke rows, and acts on its target.
//!
//! | file | what |
//! |---|---|
//! | `mod` | the step and its params |
//! | `server` | a `flowrun serve` process |
//! | `smoke` | whether it answers as evaluated |
//! | `local` | the target `local`: leaves the server running |

mod local;
mod server;
mod smoke;

use std::collections::BTreeMap;
use std::path::PathBuf;

use flowrun_cache::ArtifactStore;
use flowrun_engine::step::{Port, Step, StepContext, StepError, StepOutcome, World};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::answer::SamplingSpec;
use crate::bundle::{Bundle, Parts};
use crate::models::{ModelSpec, observe};
use crate::program_file::ProgramFile;
use crate::rows::read_json;
use crate::schema_of;
use crate::scores::Scores;
use server::{Life, Server};

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
    /// What it must answer before it is used.
    #[serde(default)]
    smoke: SmokeSpec,
    /// Target `local`: the port to serve on; 0 takes a free one.
    #[serde(default)]
    port: u16,
    /// Target `local`: the folder of the project where deployed bundles lie.
    #[serde(default = "deployed")]
    folder: PathBuf,
}

fn deployed() -> PathBuf {
    "deployed".into()
}

/// What becomes of a bundle.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Target {
    /// It is written and tested.
    #[default]
    Bundle,
    /// It is also served on this machine from then on.
    Local,
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
        1
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
        vec![Port::new(
            "bundle",
            "bundle",
            "All that `flowrun serve` needs.",
        )]
    }
    /// For the target `local` also what is being served now: a server that is gone or that serves
    /// something else is a reason to deploy again.
    fn observe(&self, params: &Value, world: &World) -> Result<BTreeMap<String, Value>, StepError> {
        let mut seen = observe(params, world)?;
        let params: Params = serde_json::from_value(params.clone())
            .map_err(|e| StepError::invalid(format!("params of `deploy`: {e}")))?;
        if params.target == Target::Local {
            seen.insert(
                "serving".to_owned(),
                local::Place::of(&params, world).observe(),
            );
        }
        Ok(seen)
    }
    fn run(&self, ctx: &StepContext) -> Result<StepOutcome, StepError> {
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
        };
        let bundle = Bundle::write(&folder, &parts, &ctx.world)?;
        ctx.check_cancelled()?;
        let server = Server::start(
            &folder,
            0,
            &ctx.work_dir,
            Life::OfThisStep,
            &ctx.world,
            &ctx.cancel,
        )?;
        let agreed = smoke::check(&server, &bundle, params.smoke.agreement, ctx)?;
        server.stop();
        let outcome = StepOutcome::default()
            .metric("model", bundle.manifest.model_id.as_str())
            .metric("smoke", agreed.to_string());
        match params.target {
            Target::Bundle => Ok(outcome),
            Target::Local => {
                let digest = ArtifactStore::address_of(&folder)
                    .map_err(|e| StepError::failed(e.to_string()))?
                    .digest;
                let place = local::Place::of(&params, &ctx.world);
                let current = place.deploy(&folder, &digest.to_hex(), params.port, ctx)?;
                Ok(outcome
                    .metric("url", current.url)
                    .metric("stop", format!("kill {}", current.pid)))
            }
        }
    }
}
