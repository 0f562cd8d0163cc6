//! [`ProgramSpec`]: a program as a pipeline file declares it. Checked and built
//! into a [`Program`](super::Program) once the labels are known; knows no model.

mod build;

pub use build::BuildError;

use crate::adapter::{AdapterKind, Dialect};
use crate::classifier::ClassifierSpec;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A program, by the module that it is made of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProgramSpec {
    /// One prompt: inputs in, outputs out (DSPy's `Predict`).
    Predict(PromptSpec),
    /// One prompt that asks for a `reasoning` before the outputs (DSPy's `ChainOfThought`).
    ChainOfThought(PromptSpec),
    /// Prompts one after another: each sees the row's columns and what the ones before it gave.
    Stages(Vec<StageSpec>),
    /// The answer that most of several programs, or of several draws of one, agree on; its
    /// confidence is the share that agrees.
    Majority(MajoritySpec),
    /// Sentence vectors and a classifier fitted on labelled rows. Calls no language model.
    EmbeddingClassifier(ClassifierSpec),
}

/// One prompt of several: exactly one of the two modules.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StageSpec {
    /// Names it in saved programs.
    pub name: String,
    /// Inputs in, outputs out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predict: Option<PromptSpec>,
    /// The same with a `reasoning` first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chain_of_thought: Option<PromptSpec>,
}

/// Programs that vote.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MajoritySpec {
    /// The programs; one is enough when it is asked several times.
    pub programs: Vec<ProgramSpec>,
    /// Answers of each program for a row.
    #[serde(default = "one")]
    #[schemars(range(min = 1))]
    pub samples: usize,
    /// Temperature of the draws, when `samples` is more than 1.
    #[serde(default = "draw_temperature")]
    pub temperature: f64,
}

fn one() -> usize {
    1
}

fn draw_temperature() -> f64 {
    0.7
}

/// The prompt of a program.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PromptSpec {
    /// Prompt format: `chat` has a header for every field, `compact` as few tokens as possible.
    #[serde(default)]
    pub adapter: AdapterKind,
    /// Whose prompt bytes and optimizer rules to follow.
    #[serde(default)]
    pub format: Dialect,
    /// The task. `{labels}` becomes the list of labels, `{n_labels}` their count. Without it the
    /// prompt just names the fields.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instructions: Option<String>,
    /// What is given.
    pub inputs: Vec<InputSpec>,
    /// What is asked for, in the order in which it is to be answered.
    pub outputs: Vec<OutputSpec>,
    /// Description of `reasoning` (`chain_of_thought` only); none is printed without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning_desc: Option<String>,
    /// Whether to ask the model to answer with one of the labels and nothing else.
    #[serde(default)]
    pub constrain: bool,
}

/// An input of a prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct InputSpec {
    /// Name in the prompt.
    pub name: String,
    /// Description in the prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desc: Option<String>,
    /// Column of the row that it is taken from; the name when not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// Type of the values.
    #[serde(default, rename = "type", skip_serializing_if = "OutputType::is_text")]
    pub ty: OutputType,
}

/// An output of a prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OutputSpec {
    /// Name in the prompt.
    pub name: String,
    /// Description in the prompt; `{labels}` and `{n_labels}` work here too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desc: Option<String>,
    /// Type of the answer.
    #[serde(default, rename = "type")]
    pub ty: OutputType,
}

/// Type of a field.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OutputType {
    /// Text.
    #[default]
    Str,
    /// Whole number.
    Int,
    /// Number.
    Float,
    /// True or false.
    Bool,
    /// One of the pipeline's labels. Prompts show it as text; answers are lower-cased, trimmed,
    /// and their spaces become underscores.
    Label,
    /// One of the given texts.
    Enum(Vec<String>),
    /// List of a type.
    List(Box<OutputType>),
    /// Dictionary from texts to a type.
    Dict(Box<OutputType>),
    /// The type, or nothing.
    Optional(Box<OutputType>),
    /// Any JSON value.
    Json,
}

impl ProgramSpec {
    /// The prompt whose outputs are the answer, for programs that have one: of stages the last, of
    /// members that vote the first one's.
    pub fn prompt(&self) -> Option<&PromptSpec> {
        match self {
            Self::Predict(prompt) | Self::ChainOfThought(prompt) => Some(prompt),
            Self::Stages(stages) => stages.last()?.module().ok().map(|(prompt, _)| prompt),
            Self::Majority(majority) => majority.programs.first()?.prompt(),
            Self::EmbeddingClassifier(_) => None,
        }
    }

    /// Whether the last answer starts with a rationale.
    pub fn reasons(&self) -> bool {
        match self {
            Self::ChainOfThought(_) => true,
            Self::Stages(stages) => stages.last().is_some_and(|s| s.chain_of_thought.is_some()),
            Self::Majority(majority) => majority.programs.first().is_some_and(Self::reasons),
            Self::Predict(_) | Self::EmbeddingClassifier(_) => false,
        }
    }
}

impl PromptSpec {
    /// The output of type `label`, if any.
    pub fn label_output(&self) -> Option<&OutputSpec> {
        self.outputs
            .iter()
            .find(|output| output.ty == OutputType::Label)
    }
}

impl OutputType {
    /// Whether it is the default.
    fn is_text(&self) -> bool {
        *self == Self::Str
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_keys_are_refused() {
        let json = r#"{"predict": {"inputs": [], "outputs": [], "temperature": 1}}"#;
        assert!(serde_json::from_str::<ProgramSpec>(json).is_err());
        let json =
            r#"{"predict": {"inputs": [], "outputs": [{"name": "x", "type": {"enum": ["a"]}}]}}"#;
        assert!(serde_json::from_str::<ProgramSpec>(json).is_ok());
    }
}
