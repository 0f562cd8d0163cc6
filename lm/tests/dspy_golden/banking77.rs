//! The rows that the recordings use, and the program of the notebook that they come from.

use super::recording::{folder, reasoning_desc, say};
use flowrun_lm::adapter::Dialect;
use flowrun_lm::example::Example;
use flowrun_lm::program::{Program, ProgramSpec};
use flowrun_lm::python_random::PythonRandom;
use flowrun_lm::value::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// banking77's rows of its 25 most frequent intents, split as the notebook does.
pub(crate) struct Banking77 {
    pub(crate) labels: Vec<String>,
    pub(crate) top25: Vec<String>,
    pub(crate) train: Vec<Example>,
    pub(crate) labeled: Vec<Example>,
}

impl Banking77 {
    pub(crate) fn load() -> Option<Self> {
        let folder = folder()?;
        let workspace = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared"));
        let places = [
            std::env::var_os("FLOWRUN_BANKING77").map(PathBuf::from),
            Some(folder.join("../dist/banking77/train.csv")),
            Some(workspace.join("dist/banking77/train.csv")),
        ];
        let opened = (places.into_iter().flatten()).find_map(|p| csv::Reader::from_path(p).ok());
        let Some(mut reader) = opened else {
            say("skipped: no train.csv of banking77 (`FLOWRUN_BANKING77`)");
            return None;
        };
        let rows: Vec<(String, String)> = reader.deserialize().map(Result::unwrap).collect();
        Some(Self::split(&rows))
    }

    fn split(rows: &[(String, String)]) -> Self {
        let clean = |label: &str| label.to_lowercase().replace('?', "");
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for (_, label) in rows {
            *counts.entry(clean(label)).or_default() += 1;
        }
        let mut ranked: Vec<(String, usize)> = counts.into_iter().collect();
        ranked.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        let labels: Vec<String> = ranked.into_iter().map(|(name, _)| name).collect();
        let top25 = labels[..25].to_vec();
        let mut train: Vec<Example> = rows
            .iter()
            .map(|(text, label)| (text.as_str(), clean(label)))
            .filter(|(_, label)| top25.contains(label))
            .map(|(text, label)| {
                Example::of_texts(text, [("text", text), ("label", label.as_str())])
            })
            .collect();
        PythonRandom::new(0).shuffle(&mut train);
        let labeled = train.split_off(train.len() - 100);
        Self {
            labels,
            top25,
            train,
            labeled,
        }
    }

    /// The row with this text.
    pub(crate) fn row(&self, text: &str) -> Example {
        let found = self.train.iter().find(|row| row.text("text") == Some(text));
        found.unwrap().clone()
    }

    /// What the recordings say of the data, file by file.
    pub(crate) fn facts() -> Vec<Value> {
        let Some(folder) = folder() else {
            return Vec::new();
        };
        let entries = std::fs::read_dir(folder).unwrap();
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.retain(|path| path.to_string_lossy().ends_with("_i_data.json"));
        paths.sort();
        let read =
            |path: &PathBuf| serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        paths.iter().map(read).collect()
    }
}

/// The notebook's program; `before_model`: made while no model was set.
pub(crate) fn seed_program(labels: &[String], dialect: Dialect, before_model: bool) -> Program {
    let mut spec: ProgramSpec = serde_json::from_str(
        r#"{"chain_of_thought": {
            "instructions": "As a part of a banking issue traiging system, classify the intent of a natural language query into one of the {n_labels} labels.\nThe intent should exactly match one of the following:\n{labels}",
            "inputs": [{"name": "intent", "desc": "Intent of the query", "from": "text"}],
            "outputs": [{"name": "label", "type": "label",
                "desc": "Type of the intent; Should just be one of the {n_labels} labels with no other text"}]}}"#,
    )
    .unwrap();
    if let ProgramSpec::ChainOfThought(prompt) = &mut spec {
        prompt.format = dialect;
        prompt.reasoning_desc = reasoning_desc(dialect, before_model).map(str::to_owned);
    }
    let mut program = spec.build(labels).unwrap();
    program.predictors[0].name = "intent_classifier".to_owned();
    program
}
