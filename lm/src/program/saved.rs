//! Programs on disk: our own [`SavedProgram`] (everything needed to rebuild one)
//! and DSPy's JSON (demos and prompts only; the code makes the program).

use super::{BuildError, Neighbours, Program, ProgramSpec};
use crate::adapter::Dialect;
use crate::example::Demo;
use crate::lineage::Lineage;
use crate::signature::{Field, Signature};
use crate::value::{Fields, Value};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The version that this code writes.
const VERSION: u32 = 1;

/// A program with its declaration, labels and demos.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedProgram {
    /// Version of this format.
    #[serde(deserialize_with = "known_version")]
    pub version: u32,
    /// The declaration.
    pub spec: ProgramSpec,
    /// The labels that it was built for.
    pub labels: Vec<String>,
    /// Predictor → its demos.
    pub demos: BTreeMap<String, Vec<Demo>>,
    /// Predictor → the rows that its demos are chosen from for each query.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub neighbours: BTreeMap<String, SavedNeighbours>,
    /// Predictor → instructions found by an optimizer, instead of the declared ones.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub instructions: BTreeMap<String, String>,
    /// The rows that its demos came from and that chose it; not known when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lineage: Option<Lineage>,
}

/// Rows with their vectors, and the encoder that made these.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedNeighbours {
    /// Demos for each query.
    pub k: usize,
    /// The sentence encoder: an entry of `models:`, pinned.
    pub embedder: serde_json::Value,
    /// The rows.
    pub rows: Vec<Demo>,
    /// A vector of length 1 for each.
    pub vectors: Vec<Vec<f32>>,
}

/// Why a saved program cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    /// Not JSON of the expected shape.
    #[error("not a saved program: {0}")]
    Json(#[from] serde_json::Error),
    /// Rows to choose demos from, without a vector each.
    #[error("saved predictor `{name}` has {rows} rows to choose demos from and {vectors} vectors")]
    Vectors {
        /// The predictor.
        name: String,
        /// Rows.
        rows: usize,
        /// Vectors.
        vectors: usize,
    },
    /// The declaration contradicts itself.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// A predictor that the other side does not have.
    #[error("saved program has no predictor `{name}`; it has {there:?}")]
    Predictor {
        /// The one looked for.
        name: String,
        /// The ones there.
        there: Vec<String>,
    },
    /// The saved signature has another number of fields.
    #[error("saved predictor `{name}` has {saved} fields where the program has {expected}")]
    Fields {
        /// The predictor.
        name: String,
        /// Fields in the file.
        saved: usize,
        /// Fields of the program.
        expected: usize,
    },
}

impl SavedProgram {
    /// What to save of a program that was built from `spec` and `labels`.
    pub fn new(spec: ProgramSpec, labels: Vec<String>, program: &Program) -> Self {
        Self {
            version: VERSION,
            spec,
            labels,
            demos: program.demos().into_iter().collect(),
            neighbours: BTreeMap::new(),
            instructions: BTreeMap::new(),
            lineage: None,
        }
    }

    /// The program with its demos; one that chooses demos for each query has yet to be given its
    /// encoder ([`Neighbours::embedder`]).
    ///
    /// # Errors
    /// When the declaration contradicts itself or the demos are another program's.
    pub fn build(&self) -> Result<Program, SavedError> {
        let mut program = self.spec.build(&self.labels)?;
        self.check(&program)?;
        for predictor in &mut program.predictors {
            if let Some(demos) = self.demos.get(&predictor.name) {
                predictor.demos.clone_from(demos);
            }
            if let Some(instructions) = self.instructions.get(&predictor.name) {
                predictor.signature.instructions.clone_from(instructions);
            }
            predictor.neighbours = self
                .neighbours
                .get(&predictor.name)
                .map(|saved| Neighbours {
                    k: saved.k,
                    rows: saved.rows.clone(),
                    vectors: saved.vectors.clone(),
                    embedder: None,
                });
        }
        Ok(program)
    }

    /// Whether all that is saved belongs to a predictor of the program.
    fn check(&self, program: &Program) -> Result<(), SavedError> {
        let there: Vec<String> = program.predictors.iter().map(|p| p.name.clone()).collect();
        let saved = self.demos.keys().chain(self.instructions.keys());
        let saved: BTreeSet<&String> = saved.chain(self.neighbours.keys()).collect();
        if let Some(name) = saved.into_iter().find(|name| !there.contains(name)) {
            let name = name.clone();
            return Err(SavedError::Predictor { name, there });
        }
        for (name, saved) in &self.neighbours {
            let (rows, vectors) = (saved.rows.len(), saved.vectors.len());
            if rows != vectors {
                let name = name.clone();
                return Err(SavedError::Vectors {
                    name,
                    rows,
                    vectors,
                });
            }
        }
        Ok(())
    }

    /// Keeps what a program's demos are chosen from, with the encoder of its vectors.
    pub fn keep_neighbours(&mut self, program: &Program, embedder: &serde_json::Value) {
        for predictor in &program.predictors {
            if let Some(neighbours) = &predictor.neighbours {
                let saved = SavedNeighbours {
                    k: neighbours.k,
                    embedder: embedder.clone(),
                    rows: neighbours.rows.clone(),
                    vectors: neighbours.vectors.clone(),
                };
                self.neighbours.insert(predictor.name.clone(), saved);
            }
        }
    }

    /// Keeps instructions that are not the declared ones.
    ///
    /// # Errors
    /// When the declaration contradicts itself.
    pub fn keep_instructions(&mut self, program: &Program) -> Result<(), SavedError> {
        let declared = self.spec.build(&self.labels)?;
        for (predictor, declared) in program.predictors.iter().zip(&declared.predictors) {
            if predictor.signature.instructions != declared.signature.instructions {
                let found = predictor.signature.instructions.clone();
                self.instructions.insert(predictor.name.clone(), found);
            }
        }
        Ok(())
    }
}

/// Refuses what other code wrote, wherever a saved program is read.
fn known_version<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    match u32::deserialize(deserializer)? {
        VERSION => Ok(VERSION),
        other => Err(D::Error::custom(format!(
            "saved program has version {other}; this flowrun reads version {VERSION}"
        ))),
    }
}

/// What DSPy's `program.save()` writes, without its `metadata`. Predictors keep their names; in
/// DSPy 3 one that reasons is called `<name>.predict`, being inside a `ChainOfThought`.
pub fn to_dspy_json(program: &Program) -> Value {
    let predictors = program.predictors.iter().map(|predictor| {
        let demos = predictor.demos.iter().map(demo_value).collect();
        let signature = signature_value(&predictor.signature);
        let entry = |name: &str, value| (name.to_owned(), value);
        let empty = || Value::List(Vec::new());
        let common = [
            entry("traces", empty()),
            entry("train", empty()),
            entry("demos", Value::List(demos)),
            entry("signature", signature.clone()),
        ];
        let fields: Fields = match program.dialect {
            Dialect::Dspy3 => common
                .into_iter()
                .chain([entry("lm", Value::Null)])
                .collect(),
            Dialect::Dspy25 | Dialect::Dspy25Dev => [entry("lm", Value::Null)]
                .into_iter()
                .chain(common)
                .chain(
                    is_chain(&predictor.signature).then(|| entry("extended_signature", signature)),
                )
                .collect(),
        };
        (
            dspy_name(program.dialect, &predictor.name, &predictor.signature),
            Value::Dict(fields),
        )
    });
    Value::Dict(predictors.collect())
}

fn is_chain(signature: &Signature) -> bool {
    signature
        .outputs
        .first()
        .is_some_and(|field| field.name == super::REASONING)
}

fn dspy_name(dialect: Dialect, name: &str, signature: &Signature) -> String {
    if dialect == Dialect::Dspy3 && is_chain(signature) {
        format!("{name}.predict")
    } else {
        name.to_owned()
    }
}

fn demo_value(demo: &Demo) -> Value {
    let mut fields = Fields::new();
    if demo.augmented {
        fields.insert("augmented".to_owned(), Value::Bool(true));
    }
    fields.extend(demo.fields.clone());
    Value::Dict(fields)
}

fn signature_value(signature: &Signature) -> Value {
    let field = |field: &Field| {
        Value::Dict(Fields::from([
            ("prefix".to_owned(), Value::Str(field.full_prefix())),
            ("description".to_owned(), Value::Str(field.full_desc())),
        ]))
    };
    Value::Dict(Fields::from([
        (
            "instructions".to_owned(),
            Value::Str(signature.instructions.clone()),
        ),
        (
            "fields".to_owned(),
            Value::List(signature.fields().map(field).collect()),
        ),
    ]))
}

#[derive(Deserialize)]
struct DspyPredictor {
    #[serde(default)]
    demos: Vec<Demo>,
    signature: Option<DspySignature>,
    extended_signature: Option<DspySignature>,
}

#[derive(Deserialize)]
struct DspySignature {
    instructions: String,
    fields: Vec<DspyField>,
}

#[derive(Deserialize)]
struct DspyField {
    prefix: String,
    description: String,
}

/// Loads DSPy's JSON into a program of the same shape, as DSPy's `program.load()` does: demos,
/// and instructions, descriptions and prefixes (which `dspy-2.5-dev` leaves as they are). The
/// only predictor of a file may have any name.
///
/// # Errors
/// When the text is something else or is not of the program's shape.
pub fn load_dspy_json(program: &mut Program, text: &str) -> Result<(), SavedError> {
    let mut saved = read_dspy_predictors(text)?;
    let alone = program.predictors.len() == 1 && saved.len() == 1;
    let dialect = program.dialect;
    for predictor in &mut program.predictors {
        let suffixed = format!("{}.predict", predictor.name);
        let key = saved
            .keys()
            .find(|key| alone || **key == predictor.name || **key == suffixed)
            .cloned();
        let Some(found) = key.and_then(|key| saved.shift_remove(&key)) else {
            let there = saved.into_keys().collect();
            return Err(SavedError::Predictor {
                name: predictor.name.clone(),
                there,
            });
        };
        predictor.demos = found.demos;
        let Some(signature) = found.extended_signature.or(found.signature) else {
            continue;
        };
        if dialect != Dialect::Dspy25Dev {
            take_signature(&mut predictor.signature, signature, &predictor.name)?;
        }
    }
    Ok(())
}

/// The predictors in a DSPy file, fields in order; `metadata` is skipped.
fn read_dspy_predictors(
    text: &str,
) -> Result<indexmap::IndexMap<String, DspyPredictor>, SavedError> {
    let Value::Dict(whole) = serde_json::from_str(text)? else {
        return Ok(indexmap::IndexMap::new());
    };
    whole
        .iter()
        .filter(|(name, _)| *name != "metadata")
        .map(|(name, value)| {
            // Through text, because a `serde_json::Value` would lose the order of the fields.
            let predictor = serde_json::from_str(&serde_json::to_string(value)?)?;
            Ok((name.clone(), predictor))
        })
        .collect()
}

fn take_signature(
    signature: &mut Signature,
    saved: DspySignature,
    name: &str,
) -> Result<(), SavedError> {
    let expected = signature.fields().count();
    if saved.fields.len() != expected {
        let saved = saved.fields.len();
        return Err(SavedError::Fields {
            name: name.to_owned(),
            saved,
            expected,
        });
    }
    signature.instructions = saved.instructions;
    let Signature {
        inputs, outputs, ..
    } = signature;
    for (field, saved) in inputs.iter_mut().chain(outputs).zip(saved.fields) {
        field.desc = Some(saved.description);
        field.prefix = Some(saved.prefix);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn saved() -> SavedProgram {
        let spec: ProgramSpec = serde_json::from_str(
            r#"{"chain_of_thought": {"instructions": "Sort.", "inputs": [{"name": "text"}],
                "outputs": [{"name": "label", "type": "label"}]}}"#,
        )
        .unwrap();
        let labels = vec!["a".to_owned()];
        let mut program = spec.build(&labels).unwrap();
        program.predictors[0].demos = vec![
            serde_json::from_str(
                r#"{"augmented": true, "text": "t", "reasoning": "r", "label": "a"}"#,
            )
            .unwrap(),
        ];
        SavedProgram::new(spec, labels, &program)
    }

    fn read(text: &str) -> Result<SavedProgram, serde_json::Error> {
        serde_json::from_str(text)
    }

    #[test]
    fn a_saved_program_is_rebuilt_with_its_demos() {
        let saved = saved();
        let again = read(&serde_json::to_string(&saved).unwrap()).unwrap();
        assert_eq!(again, saved);
        assert_eq!(again.build().unwrap().predictors[0].demos.len(), 1);
    }

    #[test]
    fn version_1_stays_readable() {
        let text = r#"{"version": 1,
            "spec": {"predict": {"adapter": "compact", "format": "dspy-2.5",
                "inputs": [{"name": "intent", "from": "text"}],
                "outputs": [{"name": "label", "type": "label"}], "constrain": true}},
            "labels": ["a", "b"], "demos": {"predict": [{"text": "t", "label": "a"}]}}"#;
        let program = read(text).unwrap().build().unwrap();
        assert!(!program.predictors[0].demos[0].augmented);
    }

    #[test]
    fn unknown_versions_and_predictors_are_refused() {
        let text = serde_json::to_string(&saved()).unwrap();
        let error = read(&text.replace("\"version\":1", "\"version\":2")).unwrap_err();
        let said = "saved program has version 2; this flowrun reads version 1";
        assert!(error.to_string().starts_with(said), "{error}");
        let mut other = saved();
        other.instructions.insert("other".into(), String::new());
        assert!(matches!(other.build(), Err(SavedError::Predictor { .. })));
        let mut short = saved();
        let neighbours = SavedNeighbours {
            k: 1,
            embedder: serde_json::Value::Null,
            rows: vec![Demo::default()],
            vectors: Vec::new(),
        };
        short.neighbours.insert("predict".into(), neighbours);
        assert!(matches!(short.build(), Err(SavedError::Vectors { .. })));
        let mut saved = saved();
        saved.demos.insert("other".into(), Vec::new());
        assert!(matches!(saved.build(), Err(SavedError::Predictor { .. })));
    }

    #[test]
    fn dspy_files_round_trip() {
        for dialect in [Dialect::Dspy25, Dialect::Dspy3] {
            let mut program = saved().build().unwrap();
            program.dialect = dialect;
            let text = serde_json::to_string(&to_dspy_json(&program)).unwrap();
            let mut other = saved().spec.build(&[]).unwrap();
            other.dialect = dialect;
            other.predictors[0].signature.instructions.clear();
            load_dspy_json(&mut other, &text).unwrap();
            assert_eq!(other.predictors[0].demos, program.predictors[0].demos);
            assert_eq!(other.predictors[0].signature.instructions, "Sort.");
        }
    }
}
