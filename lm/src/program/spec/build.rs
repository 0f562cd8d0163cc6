//! From what a pipeline file declares to a [`Program`]; or what is wrong with it.

use super::{MajoritySpec, OutputSpec, OutputType, ProgramSpec, PromptSpec, StageSpec};
use crate::field_type::FieldType;
use crate::program::{LabelRule, Predictor, Program, REASONING, Votes, chain_of_thought};
use crate::signature::{Field, Signature};
use crate::value::list_repr;
use std::collections::BTreeSet;

/// What is wrong with a [`ProgramSpec`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BuildError {
    /// No inputs or no outputs.
    #[error("`{0}` must not be empty")]
    Empty(&'static str),
    /// A name that prompts cannot use.
    #[error("field name `{0}` must be letters, digits and underscores, not starting with a digit")]
    Name(String),
    /// Two fields of one name.
    #[error("field name `{0}` is used twice")]
    Twice(String),
    /// More than one label.
    #[error("outputs `{0}` and `{1}` both have type `label`; only one can")]
    Labels(String, String),
    /// `enum` without values.
    #[error("`enum` of field `{0}` must not be empty")]
    EmptyEnum(String),
    /// `reasoning_desc` on a program that gives no reasoning.
    #[error("`reasoning_desc` belongs to `chain_of_thought`; remove it or change the module")]
    ReasoningDesc,
    /// A stage without a module, or with two.
    #[error("stage `{0}` must have one of `predict` and `chain_of_thought`")]
    Stage(String),
    /// Stages or members in different formats.
    #[error("all prompts of a program must have the same `format`")]
    Formats,
    /// Programs that cannot vote.
    #[error("a `majority` takes prompts and stages, not another `majority` or a classifier")]
    Votes,
    /// A program without a prompt where one is needed.
    #[error("an `embedding_classifier` has no prompt: it is fitted on labelled rows")]
    NotPrompted,
    /// `constrain` without a place to do it.
    #[error("`constrain` needs the last output to have type `label`")]
    Constrain,
}

impl ProgramSpec {
    /// The program for these labels, without demos.
    ///
    /// # Errors
    /// When the declaration contradicts itself.
    pub fn build(&self, labels: &[String]) -> Result<Program, BuildError> {
        match self {
            Self::Predict(prompt) => prompt.build(labels, false),
            Self::ChainOfThought(prompt) => prompt.build(labels, true),
            Self::Stages(stages) => build_stages(stages, labels),
            Self::Majority(majority) => majority.build(labels),
            Self::EmbeddingClassifier(_) => Err(BuildError::NotPrompted),
        }
    }
}

impl StageSpec {
    /// Its prompt, and whether it reasons.
    pub(super) fn module(&self) -> Result<(&PromptSpec, bool), BuildError> {
        match (&self.predict, &self.chain_of_thought) {
            (Some(prompt), None) => Ok((prompt, false)),
            (None, Some(prompt)) => Ok((prompt, true)),
            _ => Err(BuildError::Stage(self.name.clone())),
        }
    }
}

fn build_stages(stages: &[StageSpec], labels: &[String]) -> Result<Program, BuildError> {
    let mut names = BTreeSet::new();
    let mut programs = Vec::with_capacity(stages.len());
    for stage in stages {
        if !is_identifier(&stage.name) {
            return Err(BuildError::Name(stage.name.clone()));
        }
        if !names.insert(&stage.name) {
            return Err(BuildError::Twice(stage.name.clone()));
        }
        let (prompt, reasons) = stage.module()?;
        let mut program = prompt.build(labels, reasons)?;
        for predictor in &mut program.predictors {
            predictor.name.clone_from(&stage.name);
        }
        programs.push(program);
    }
    joined(programs, "stages")
}

/// All predictors in one program.
fn joined(programs: Vec<Program>, what: &'static str) -> Result<Program, BuildError> {
    let dialect = programs.first().ok_or(BuildError::Empty(what))?.dialect;
    if programs.iter().any(|program| program.dialect != dialect) {
        return Err(BuildError::Formats);
    }
    let predictors = programs.into_iter().flat_map(|program| program.predictors);
    Ok(Program::new(dialect, predictors.collect()))
}

impl MajoritySpec {
    fn build(&self, labels: &[String]) -> Result<Program, BuildError> {
        let build = |(at, spec): (usize, &ProgramSpec)| {
            if matches!(
                spec,
                ProgramSpec::Majority(_) | ProgramSpec::EmbeddingClassifier(_)
            ) {
                return Err(BuildError::Votes);
            }
            let mut program = spec.build(labels)?;
            if self.programs.len() > 1 {
                for predictor in &mut program.predictors {
                    predictor.name = format!("{}_{at}", predictor.name);
                }
            }
            Ok(program)
        };
        let programs = self.programs.iter().enumerate().map(build);
        let programs = programs.collect::<Result<Vec<_>, _>>()?;
        let members = programs
            .iter()
            .map(|program| program.predictors.len())
            .collect();
        let mut program = joined(programs, "programs")?;
        program.votes = Some(Votes {
            members,
            samples: self.samples.max(1),
            temperature: self.temperature,
        });
        Ok(program)
    }
}

impl PromptSpec {
    fn build(&self, labels: &[String], reasons: bool) -> Result<Program, BuildError> {
        self.check(reasons)?;
        let fill = |text: &String| {
            text.replace("{labels}", &list_repr(labels))
                .replace("{n_labels}", &labels.len().to_string())
        };
        let field = |name: &str, desc: Option<&String>, ty| Field {
            name: name.to_owned(),
            desc: desc.map(fill),
            ty,
            prefix: None,
        };
        let inputs = self
            .inputs
            .iter()
            .map(|input| field(&input.name, input.desc.as_ref(), input.ty.field_type()))
            .collect();
        let outputs = self
            .outputs
            .iter()
            .map(|output| field(&output.name, output.desc.as_ref(), output.ty.field_type()))
            .collect();
        let instructions = self.instructions.as_ref().map(fill);
        let mut signature = Signature::new(instructions.as_deref(), inputs, outputs);
        if reasons {
            signature = chain_of_thought(signature, self.format, self.reasoning_desc.as_deref());
        }
        let adapter = self.adapter.adapter(self.format);
        let mut predictor = Predictor::new("predict", signature, adapter);
        predictor.sources = self
            .inputs
            .iter()
            .filter_map(|input| Some((input.name.clone(), input.from.clone()?)))
            .collect();
        predictor.label = self.label_output().map(|output| LabelRule {
            field: output.name.clone(),
            labels: labels.to_vec(),
            constrain: self.constrain,
        });
        Ok(Program::new(self.format, vec![predictor]))
    }

    fn check(&self, reasons: bool) -> Result<(), BuildError> {
        if self.inputs.is_empty() {
            return Err(BuildError::Empty("inputs"));
        }
        if self.outputs.is_empty() {
            return Err(BuildError::Empty("outputs"));
        }
        let mut seen = BTreeSet::new();
        if reasons {
            seen.insert(REASONING);
        }
        let inputs = self.inputs.iter().map(|input| input.name.as_str());
        for name in inputs.chain(self.outputs.iter().map(|output| output.name.as_str())) {
            if !is_identifier(name) {
                return Err(BuildError::Name(name.to_owned()));
            }
            if !seen.insert(name) {
                return Err(BuildError::Twice(name.to_owned()));
            }
        }
        let labels: Vec<&OutputSpec> = self
            .outputs
            .iter()
            .filter(|output| output.ty == OutputType::Label)
            .collect();
        if let [first, second, ..] = labels.as_slice() {
            return Err(BuildError::Labels(first.name.clone(), second.name.clone()));
        }
        let inputs = self.inputs.iter().map(|input| (&input.name, &input.ty));
        let outputs = self.outputs.iter().map(|output| (&output.name, &output.ty));
        if let Some((name, _)) = inputs.chain(outputs).find(|(_, ty)| ty.is_empty_enum()) {
            return Err(BuildError::EmptyEnum(name.clone()));
        }
        if self.reasoning_desc.is_some() && !reasons {
            return Err(BuildError::ReasoningDesc);
        }
        let label_is_last = self
            .outputs
            .last()
            .is_some_and(|output| output.ty == OutputType::Label);
        if self.constrain && !label_is_last {
            return Err(BuildError::Constrain);
        }
        Ok(())
    }
}

impl OutputType {
    fn field_type(&self) -> FieldType {
        match self {
            Self::Str | Self::Label => FieldType::Str,
            Self::Int => FieldType::Int,
            Self::Float => FieldType::Float,
            Self::Bool => FieldType::Bool,
            Self::Enum(values) => FieldType::one_of(values.iter().cloned()),
            Self::List(item) => FieldType::List(Box::new(item.field_type())),
            Self::Dict(item) => FieldType::Dict(Box::new(item.field_type())),
            Self::Optional(item) => FieldType::Optional(Box::new(item.field_type())),
            Self::Json => FieldType::Json,
        }
    }

    fn is_empty_enum(&self) -> bool {
        match self {
            Self::Enum(values) => values.is_empty(),
            Self::List(item) | Self::Dict(item) | Self::Optional(item) => item.is_empty_enum(),
            _ => false,
        }
    }
}

fn is_identifier(name: &str) -> bool {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    name.chars().all(word) && name.chars().next().is_some_and(|c| !c.is_numeric())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn spec(json: &str) -> ProgramSpec {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn labels_fill_the_instructions() {
        let spec = spec(
            r#"{"chain_of_thought": {"instructions": "One of {n_labels}:\n{labels}",
                "inputs": [{"name": "intent", "from": "text"}],
                "outputs": [{"name": "label", "desc": "of the {n_labels}", "type": "label"}],
                "constrain": true}}"#,
        );
        let program = spec.build(&["a".into(), "b".into()]).unwrap();
        let predictor = &program.predictors[0];
        assert_eq!(predictor.signature.instructions, "One of 2:\n['a', 'b']");
        let names: Vec<&str> = predictor
            .signature
            .fields()
            .map(|field| field.name.as_str())
            .collect();
        assert_eq!(names, ["intent", "reasoning", "label"]);
        assert_eq!(
            predictor.signature.outputs[1].desc.as_deref(),
            Some("of the 2")
        );
        assert_eq!(predictor.sources["intent"], "text");
        assert_eq!(predictor.label.as_ref().unwrap().labels, ["a", "b"]);
    }

    #[test]
    fn fields_are_typed() {
        let spec = spec(
            r#"{"predict": {"inputs": [{"name": "tags", "type": {"list": "str"}}],
                "outputs": [{"name": "score", "type": {"optional": "float"}},
                    {"name": "kind", "type": {"enum": ["a", "b"]}}, {"name": "more", "type": "json"},
                    {"name": "sure", "type": "bool"}]}}"#,
        );
        let program = spec.build(&[]).unwrap();
        let shown: Vec<String> = (program.predictors[0].signature.fields())
            .map(|field| field.ty.annotation(true))
            .collect();
        let expected = [
            "list[str]",
            "Union[float, NoneType]",
            "Literal['a', 'b']",
            "Any",
            "bool",
        ];
        assert_eq!(shown, expected);
        let again: ProgramSpec =
            serde_json::from_str(&serde_json::to_string(&spec).unwrap()).unwrap();
        assert_eq!(again, spec);
    }

    #[test]
    fn stages_and_members_keep_their_names() {
        let stages = r#"{"stages": [
            {"name": "topic", "predict": {"inputs": [{"name": "text"}], "outputs": [{"name": "topic"}]}},
            {"name": "label", "chain_of_thought": {"inputs": [{"name": "text"}, {"name": "topic"}],
                "outputs": [{"name": "label", "type": "label"}]}}]}"#;
        let names = |program: &Program| -> Vec<String> {
            program.predictors.iter().map(|p| p.name.clone()).collect()
        };
        let program = spec(stages).build(&["a".into()]).unwrap();
        assert_eq!(names(&program), ["topic", "label"]);
        assert!(spec(stages).reasons() && program.label().is_some());
        let majority = format!(
            r#"{{"majority": {{"programs": [{stages}, {{"predict": {{"inputs": [{{"name": "text"}}],
                "outputs": [{{"name": "label", "type": "label"}}]}}}}]}}}}"#
        );
        let program = spec(&majority).build(&["a".into()]).unwrap();
        assert_eq!(names(&program), ["topic_0", "label_0", "predict_1"]);
        assert_eq!(program.votes.unwrap().members, [2, 1]);
        let nested = format!(r#"{{"majority": {{"programs": [{majority}]}}}}"#);
        assert_eq!(spec(&nested).build(&[]).unwrap_err(), BuildError::Votes);
        let neither = spec(r#"{"stages": [{"name": "x"}]}"#);
        assert_eq!(
            neither.build(&[]).unwrap_err(),
            BuildError::Stage("x".into())
        );
    }

    #[test]
    fn contradictions_are_refused() {
        let build = |json: &str| spec(json).build(&[]).unwrap_err();
        assert_eq!(
            build(r#"{"predict": {"inputs": [], "outputs": [{"name": "x"}]}}"#),
            BuildError::Empty("inputs")
        );
        assert_eq!(
            build(
                r#"{"chain_of_thought": {"inputs": [{"name": "a"}], "outputs": [{"name": "reasoning"}]}}"#
            ),
            BuildError::Twice("reasoning".into())
        );
        assert_eq!(
            build(r#"{"predict": {"inputs": [{"name": "a b"}], "outputs": [{"name": "x"}]}}"#),
            BuildError::Name("a b".into())
        );
        assert_eq!(
            build(
                r#"{"predict": {"inputs": [{"name": "a"}], "outputs": [{"name": "x"}], "constrain": true}}"#
            ),
            BuildError::Constrain
        );
    }
}
