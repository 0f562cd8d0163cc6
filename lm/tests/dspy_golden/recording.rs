//! The recordings: where they are, how they are read, and the tally of a comparison.

use flowrun_lm::adapter::Dialect;
use flowrun_lm::field_type::FieldType;
use flowrun_lm::program::{EXPERIMENTAL_REASONING_DESC, chain_of_thought};
use flowrun_lm::signature::{Field, Signature};
use flowrun_lm::value::Value;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// The tags of the versions in file names, with the dialects that claim to follow them.
pub(crate) const VERSIONS: [(&str, Dialect); 3] = [
    ("devft", Dialect::Dspy25Dev),
    ("v2.5.16", Dialect::Dspy25),
    ("v3.4.1", Dialect::Dspy3),
];

#[derive(Deserialize)]
pub(crate) struct Case<I> {
    pub(crate) id: String,
    #[serde(default)]
    pub(crate) tags: Vec<String>,
    pub(crate) input: I,
    pub(crate) expected: Value,
}

#[derive(Deserialize)]
struct File<I> {
    cases: Vec<Case<I>>,
}

/// The folder of the recordings.
pub(crate) fn folder() -> Option<PathBuf> {
    let beside = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/dspy-golden");
    let folder = std::env::var_os("DSPY_GOLDEN_DIR").map_or_else(|| beside.into(), PathBuf::from);
    if folder.is_dir() {
        return Some(folder);
    }
    skip(&format!(
        "no recordings of DSPy in `{}` (`DSPY_GOLDEN_DIR`)",
        folder.display()
    ));
    None
}

/// Says that something is not compared; fails where `FLOWRUN_REQUIRE_GOLDEN` is set.
pub(crate) fn skip(why: &str) {
    let required = std::env::var_os("FLOWRUN_REQUIRE_GOLDEN").is_some();
    assert!(!required, "{why}");
    say(&format!("skipped: {why}"));
}

fn cases<I: DeserializeOwned>(folder: &Path, set: &str, version: &str) -> Vec<Case<I>> {
    let ending = format!("_{set}.{version}.json");
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_string_lossy().ends_with(&ending))
        .collect();
    paths.sort();
    let read = |path: &PathBuf| {
        // Python writes NaN, which JSON does not know.
        let text = std::fs::read_to_string(path)
            .unwrap()
            .replace(": NaN", ": \"NaN\"");
        serde_json::from_str::<File<I>>(&text).unwrap().cases
    };
    paths.iter().flat_map(read).collect()
}

/// Compares every case of a set in every version; fails with the list of those that differ.
pub(crate) fn compare<I: DeserializeOwned>(
    set: &str,
    check: impl Fn(&Case<I>, Dialect) -> Result<(), String>,
) {
    let Some(folder) = folder() else {
        return;
    };
    let mut different = Vec::new();
    for (version, dialect) in VERSIONS {
        let cases = cases::<I>(&folder, set, version);
        if cases.is_empty() {
            skip(&format!("no recordings `{set}` of {version}"));
            continue;
        }
        let mut agree = 0;
        let mut optional = Vec::new();
        for case in &cases {
            let Err(why) = check(case, dialect) else {
                agree += 1;
                continue;
            };
            // What DSPy 3's JSON repair makes of broken text is not claimed.
            let list = if case.tags.iter().any(|tag| tag == "repair") {
                &mut optional
            } else {
                &mut different
            };
            list.push(format!(
                "{set} {version} {} {:?}: {why}",
                case.id, case.tags
            ));
        }
        say(&format!(
            "{set} {version}: {agree} of {} agree",
            cases.len()
        ));
        for case in &optional {
            say(&format!("  not claimed: {case}"));
        }
    }
    assert!(different.is_empty(), "{}", different.join("\n"));
}

/// Prints past the test harness, which keeps what passing tests print to itself.
pub(crate) fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// `Ok` when both are the same.
pub(crate) fn same<T: PartialEq + std::fmt::Debug>(
    what: &str,
    ours: &T,
    theirs: &T,
) -> Result<(), String> {
    if ours == theirs {
        return Ok(());
    }
    Err(format!("{what}: ours {ours:?}, DSPy's {theirs:?}"))
}

/// Part of a recorded dictionary.
pub(crate) fn get<'a>(value: &'a Value, key: &str) -> Option<&'a Value> {
    match value {
        Value::Dict(fields) => fields.get(key),
        _ => None,
    }
}

/// A recorded value as a Rust one.
pub(crate) fn read<T: DeserializeOwned>(value: &Value) -> T {
    serde_json::from_str(&serde_json::to_string(value).unwrap()).unwrap()
}

#[derive(Deserialize)]
pub(crate) struct RecordedSignature {
    instructions: Option<String>,
    #[serde(default)]
    cot: bool,
    inputs: Vec<RecordedField>,
    outputs: Vec<RecordedField>,
}

#[derive(Deserialize)]
struct RecordedField {
    name: String,
    #[serde(rename = "type")]
    ty: String,
    desc: Option<String>,
}

impl RecordedSignature {
    pub(crate) fn signature(&self, dialect: Dialect) -> Signature {
        let fields = |fields: &[RecordedField]| {
            let field = |field: &RecordedField| Field {
                desc: field.desc.clone(),
                ty: FieldType::from_annotation(&field.ty).unwrap(),
                ..Field::text(&field.name)
            };
            fields.iter().map(field).collect()
        };
        let signature = Signature::new(
            self.instructions.as_deref(),
            fields(&self.inputs),
            fields(&self.outputs),
        );
        if self.cot {
            chain_of_thought(signature, dialect, reasoning_desc(dialect, true))
        } else {
            signature
        }
    }
}

/// The description of `reasoning`, which depends on when a program was made in DSPy 2.5.
pub(crate) fn reasoning_desc(dialect: Dialect, before_model: bool) -> Option<&'static str> {
    (before_model && dialect != Dialect::Dspy3).then_some(EXPERIMENTAL_REASONING_DESC)
}
