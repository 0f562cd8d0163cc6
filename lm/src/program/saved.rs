//! [`SavedProgram`]: a program on disk, with everything needed to rebuild it.

use super::{BuildError, Neighbours, Program, ProgramSpec};
use crate::example::Demo;
use crate::lineage::Lineage;
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
}
