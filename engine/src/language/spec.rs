//! [`PipelineSpec`]: the shape of a pipeline file. The one place that says which
//! fields there are; the JSON Schema for editors and for checking is made from it.
//!
//! Knows no meaning: names, ports and references are checked elsewhere.
//! Almost every field is optional, so that a file with a mistake in one of them
//! can still be checked for others.

use std::collections::BTreeMap;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::hook::HookEvent;

/// A pipeline file.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "flowrun pipeline")]
pub struct PipelineSpec {
    /// Name of the pipeline. Left out: the name of the file.
    pub name: Option<String>,
    /// One sentence for people.
    pub about: Option<String>,
    /// Values for `${{ params.x }}`, typed by their default; `--set x=1` changes one.
    #[schemars(with = "Option<Map<String, Value>>")]
    pub params: Option<BTreeMap<String, Value>>,
    /// Language models by name.
    #[schemars(with = "Option<Map<String, Value>>")]
    pub models: Option<BTreeMap<String, Value>>,
    /// Prompting programs by name.
    #[schemars(with = "Option<Map<String, Value>>")]
    pub programs: Option<BTreeMap<String, Value>>,
    /// Overlays by name, merged in with `--profile NAME`.
    pub profiles: Option<BTreeMap<String, ProfileSpec>>,
    /// Files merged underneath this one; a later file wins over an earlier one.
    pub include: Option<Vec<String>>,
    /// Named pools: how many of the steps that name a pool run at once.
    #[serde(default)]
    #[schemars(schema_with = "pools_schema")]
    pub pools: Option<BTreeMap<String, Value>>,
    /// Job systems by name, for steps whose `runner` names them.
    #[schemars(with = "Option<Map<String, Value>>")]
    pub runners: Option<BTreeMap<String, Value>>,
    /// Who is told that a run ended, by name.
    pub hooks: Option<BTreeMap<String, Option<HookSpec>>>,
    /// What programs of others are told of a run.
    pub tracking: Option<TrackingSpec>,
    /// Steps by name.
    pub steps: Option<BTreeMap<String, Option<StepSpec>>>,
}

/// An overlay: maps are merged, everything else is replaced, null takes out.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProfileSpec {
    /// One sentence for people.
    pub about: Option<String>,
    /// Other values of params.
    #[schemars(with = "Option<Map<String, Value>>")]
    pub params: Option<BTreeMap<String, Value>>,
    /// Changes of models.
    #[schemars(with = "Option<Map<String, Value>>")]
    pub models: Option<BTreeMap<String, Value>>,
    /// Changes of programs.
    #[schemars(with = "Option<Map<String, Value>>")]
    pub programs: Option<BTreeMap<String, Value>>,
    /// Other sizes of pools.
    #[serde(default)]
    #[schemars(schema_with = "pools_schema")]
    pub pools: Option<BTreeMap<String, Value>>,
    /// Changes of job systems.
    #[schemars(with = "Option<Map<String, Value>>")]
    pub runners: Option<BTreeMap<String, Value>>,
    /// Changes of hooks.
    pub hooks: Option<BTreeMap<String, Option<HookSpec>>>,
    /// Other words on tracking.
    pub tracking: Option<TrackingSpec>,
    /// Changes of steps.
    pub steps: Option<BTreeMap<String, Option<StepSpec>>>,
}

/// Who is told that a run ended: by a `command`, or by a `webhook`.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HookSpec {
    /// One sentence for people.
    pub about: Option<String>,
    /// When: `finished`, the run ended, well or not (when left out); `failed`, it did not end well.
    pub on: Option<Vec<HookEvent>>,
    /// A program and its arguments. It gets what happened as JSON on its standard input.
    pub command: Option<Vec<String>>,
    /// A server that is sent the same JSON.
    pub webhook: Option<WebhookSpec>,
    /// Environment variables that the command gets, and whose values `${NAME}` stands for in the
    /// URL and the headers. They never reach logs.
    pub secrets: Option<Vec<String>>,
    /// Longest time of the command, or of one try of a webhook: `10s`. `30s` when left out.
    pub timeout: Option<String>,
}

/// A server that is sent what happened, by POST.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WebhookSpec {
    /// Where to: `https://…`; `${NAME}` stands for a secret's value.
    pub url: Option<String>,
    /// Further headers by name, likewise.
    pub headers: Option<BTreeMap<String, String>>,
    /// Further tries when the server cannot be reached or is busy; 2 when left out.
    #[schemars(range(max = 10))]
    pub retries: Option<u32>,
}

/// What programs of others are told of a run.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrackingSpec {
    /// What an MLflow server is told; `MLFLOW_TRACKING_URI` says where it is, and without it
    /// nothing is told.
    pub mlflow: Option<MlflowSpec>,
    /// Writes numbers and curves of each run as event files, which TensorBoard shows.
    pub tensorboard: Option<TensorBoardSpec>,
}

/// Event files for TensorBoard.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TensorBoardSpec {
    /// The folder for `tensorboard --logdir`, relative to the project; each run has a folder in it.
    pub folder: Option<String>,
}

/// What an MLflow server is told, besides params and metrics.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MlflowSpec {
    /// Name of the experiment. Left out: `MLFLOW_EXPERIMENT_NAME`, else the pipeline's name.
    pub experiment: Option<String>,
    /// Outputs that are sent as artifacts: `step.output`. The report is sent anyway.
    pub artifacts: Option<Vec<String>>,
    /// An output that becomes a version of a registered model when the run ends well.
    pub register: Option<RegisterSpec>,
}

/// An output that becomes a version of a registered model.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RegisterSpec {
    /// Name of the registered model.
    pub name: Option<String>,
    /// The output: `step.output`.
    pub output: Option<String>,
}

/// A step definition: a file that a step names with `uses: ./steps/clean.yaml`.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "flowrun step definition")]
pub struct DefinitionSpec {
    /// One sentence for people.
    pub about: Option<String>,
    /// Values for `${{ params.x }}`, typed by their default; `with` of a use changes them.
    /// One without a default (`n:`) must be given.
    #[schemars(with = "Option<Map<String, Value>>")]
    pub params: Option<BTreeMap<String, Value>>,
    /// Input ports: the type, or a map. The steps inside read one as `in.port`.
    #[serde(rename = "in")]
    #[serde(default)]
    #[schemars(schema_with = "ports_schema")]
    pub inputs: Option<BTreeMap<String, Value>>,
    /// Output port to the `step.output` inside that makes it.
    pub out: Option<BTreeMap<String, String>>,
    /// Steps by name.
    pub steps: Option<BTreeMap<String, Option<StepSpec>>>,
}

/// One step: `uses` or `run`.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StepSpec {
    /// One sentence for people.
    pub about: Option<String>,
    /// Step kind (`flowrun steps` lists them), or the path of a step definition, relative to
    /// this file: `./steps/clean.yaml`.
    pub uses: Option<String>,
    /// Shell command. Each port is an environment variable that holds its path.
    pub run: Option<String>,
    /// Input port to where it comes from: `step.output`, a list of them, or `{ file: path }`.
    #[serde(rename = "in")]
    #[serde(default)]
    #[schemars(schema_with = "inputs_schema")]
    pub inputs: Option<BTreeMap<String, Value>>,
    /// Params of the step kind.
    #[schemars(with = "Option<Map<String, Value>>")]
    pub with: Option<BTreeMap<String, Value>>,
    /// Of a `run` step: output port to the path that the command writes, under `out/`.
    pub out: Option<BTreeMap<String, String>>,
    /// Steps that must finish first, without data.
    pub needs: Option<Vec<String>>,
    /// Fan-out: variable to the list it walks; several are walked in step.
    /// `max_parallel` bounds how many items run at once.
    #[serde(default)]
    #[schemars(schema_with = "foreach_schema")]
    pub foreach: Option<BTreeMap<String, Value>>,
    /// Expression that must be true, else the step is skipped.
    pub when: Option<String>,
    /// Environment variables of the step; they are part of its key.
    #[serde(default)]
    #[schemars(schema_with = "env_schema")]
    pub env: Option<BTreeMap<String, Value>>,
    /// Environment variables whose values never reach keys or logs.
    pub secrets: Option<Vec<String>>,
    /// Retry of failures that may pass (network, busy server).
    pub retry: Option<RetrySpec>,
    /// Time limit of one attempt: `90s`, `30m`, `2h`.
    pub timeout: Option<String>,
    /// Demand on the machine.
    pub resources: Option<ResourcesSpec>,
    /// Named pool that bounds how many such steps run at once.
    pub pool: Option<String>,
    /// Where the step runs: `inline` in flowrun's own process, `process` in one of its own, which
    /// `resources.memory` bounds and whose crash fails the step alone, or the name of one of the
    /// `runners`.
    pub runner: Option<String>,
    /// Whether results are reused.
    pub cache: Option<CacheSpec>,
    /// Output port to a path in the project tree that is kept equal to it.
    pub publish: Option<BTreeMap<String, String>>,
    /// Conditions on the step's metrics (`accuracy >= 0.8`); one that fails ends the run.
    pub expect: Option<Vec<String>>,
}

/// Retry with exponential backoff.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RetrySpec {
    /// Further attempts after the first.
    #[schemars(range(max = 100))]
    pub times: Option<u32>,
    /// First wait; doubles each time. `1s` when left out.
    pub backoff: Option<String>,
}

/// Demand on the machine.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ResourcesSpec {
    /// CPU cores.
    #[schemars(range(min = 0))]
    pub cpu: Option<f64>,
    /// Memory: `512MB`, `4GB`, `4GiB`.
    pub memory: Option<String>,
    /// GPUs.
    #[schemars(range(min = 0))]
    pub gpu: Option<f64>,
    /// Others that the job system of the step's `runner` knows by name.
    #[serde(default)]
    #[schemars(schema_with = "amounts_schema")]
    pub custom: Option<BTreeMap<String, Value>>,
}

/// Whether results are reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum CacheSpec {
    /// A result with the same key is taken.
    Reuse,
    /// The step runs every time.
    Never,
}

fn source_schema() -> Value {
    serde_json::json!({
        "oneOf": [
            {"type": "string", "description": "`step.output` or `${{ item.x }}`"},
            {
                "type": "object",
                "description": "a file or folder of the project",
                "properties": {"file": {"type": "string"}},
                "required": ["file"],
                "additionalProperties": false
            }
        ]
    })
}

fn inputs_schema(_: &mut SchemaGenerator) -> Schema {
    let one = source_schema();
    let [text, file] = [&one["oneOf"][0], &one["oneOf"][1]];
    json_schema!({
        "type": ["object", "null"],
        "additionalProperties": {
            "oneOf": [text, file, {"type": "array", "items": one, "minItems": 1}]
        }
    })
}

fn foreach_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": ["object", "null"],
        "properties": {"max_parallel": {"type": "integer", "minimum": 1}},
        "additionalProperties": {
            "oneOf": [
                {"type": "string", "description": "`step.output` or `${{ params.x }}`"},
                {"type": "array", "description": "outputs or plain values"}
            ]
        }
    })
}

fn env_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": ["object", "null"],
        "additionalProperties": {"type": ["string", "number", "boolean"]}
    })
}

fn pools_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": ["object", "null"],
        "additionalProperties": {"type": "integer", "minimum": 1}
    })
}

fn amounts_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": ["object", "null"],
        "additionalProperties": {"type": "number", "minimum": 0}
    })
}

fn ports_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": ["object", "null"],
        "additionalProperties": {
            "oneOf": [
                {"type": "string", "description": "type of the artifact, or `any`"},
                {
                    "type": "object",
                    "properties": {
                        "type": {"type": "string", "description": "type of the artifact, or `any`"},
                        "about": {"type": "string", "description": "one sentence for people"},
                        "optional": {"type": "boolean", "description": "may be left out"},
                        "many": {"type": "boolean", "description": "takes a list"}
                    },
                    "required": ["type"],
                    "additionalProperties": false
                }
            ]
        }
    })
}
