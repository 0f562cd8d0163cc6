//! The rows that the recordings use, and the program of the notebook that they come from.

use super::recording::{folder, reasoning_desc, say};
use flowrun_lm::adapter::Dialect;
use flowrun_lm::example::Example;
use flowrun_lm::program::{Program, ProgramSpec};
use flowrun_lm::python_random::PythonRandom;
use flowrun_lm::value::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// banking77's rows of its 25 most frequent intents, split as the notebook does.
pub(crate) struct Banking77 {
    /// All labels, the most frequent first.
    pub(crate) labels: Vec<String>,
    /// Rows of each.
    pub(crate) counts: Vec<usize>,
    pub(crate) top25: Vec<String>,
    /// Rows of the 25, in the order of the file.
    pub(crate) filtered: Vec<Example>,
    /// The same of the test file, where it lies beside.
    pub(crate) test: Option<Vec<Example>>,
    /// Places in `filtered`, shuffled: first those of `train`, then those of `labeled`.
    pub(crate) order: Vec<usize>,
    pub(crate) train: Vec<Example>,
    pub(crate) labeled: Vec<Example>,
}

/// A label as the notebook cleans it.
pub(crate) fn clean(label: &str) -> String {
    label.to_lowercase().replace('?', "")
}

/// Rows of a file: text and label.
fn rows(path: &Path) -> Option<Vec<(String, String)>> {
    let mut reader = csv::Reader::from_path(path).ok()?;
    Some(reader.deserialize().map(Result::unwrap).collect())
}

/// The rows with one of these labels.
fn of_labels(rows: &[(String, String)], labels: &[String]) -> Vec<Example> {
    let rows = rows.iter().map(|(text, label)| (text, clean(label)));
    let known = rows.filter(|(_, label)| labels.contains(label));
    known
        .map(|(text, label)| {
            Example::of_texts(text, [("text", text.as_str()), ("label", label.as_str())])
        })
        .collect()
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
        let opened = places.into_iter().flatten().find_map(|path| {
            let train = rows(&path)?;
            Some((train, rows(&path.with_file_name("test.csv"))))
        });
        let Some((train, test)) = opened else {
            say("skipped: no train.csv of banking77 (`FLOWRUN_BANKING77`)");
            return None;
        };
        Some(Self::split(&train, test.as_deref()))
    }

    fn split(rows: &[(String, String)], test: Option<&[(String, String)]>) -> Self {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for (_, label) in rows {
            *counts.entry(clean(label)).or_default() += 1;
        }
        let mut ranked: Vec<(String, usize)> = counts.into_iter().collect();
        ranked.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        let (labels, counts): (Vec<String>, Vec<usize>) = ranked.into_iter().unzip();
        let top25 = labels[..25].to_vec();
        let filtered = of_labels(rows, &top25);
        let mut order: Vec<usize> = (0..filtered.len()).collect();
        PythonRandom::new(0).shuffle(&mut order);
        let mut train: Vec<Example> = order.iter().map(|at| filtered[*at].clone()).collect();
        let labeled = train.split_off(train.len() - 100);
        Self {
            test: test.map(|test| of_labels(test, &top25)),
            labels,
            counts,
            top25,
            filtered,
            order,
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
