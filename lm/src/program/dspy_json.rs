//! DSPy's JSON of a program: demos and prompts only; the code makes the program.

use super::{Program, SavedError};
use crate::adapter::Dialect;
use crate::example::Demo;
use crate::signature::{Field, Signature};
use crate::value::{Fields, Value};
use serde::Deserialize;

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

/// The file that DSPy's `program.load()` reads. DSPy 3 asks for `metadata` with the versions of its
/// dependencies, which it compares with its own; there are none to compare.
///
/// # Errors
/// When a value cannot be written as JSON.
pub fn dspy_file(program: &Program) -> Result<String, SavedError> {
    let mut json = to_dspy_json(program);
    if let (Dialect::Dspy3, Value::Dict(fields)) = (program.dialect, &mut json) {
        let none = Value::Dict(Fields::new());
        let metadata = Fields::from([("dependency_versions".to_owned(), none)]);
        fields.insert("metadata".to_owned(), Value::Dict(metadata));
    }
    Ok(serde_json::to_string_pretty(&json)? + "\n")
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
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;
    use crate::program::ProgramSpec;

    fn program(dialect: Dialect) -> Program {
        let spec: ProgramSpec = serde_json::from_str(
            r#"{"chain_of_thought": {"instructions": "Sort.", "inputs": [{"name": "text"}],
                "outputs": [{"name": "label", "type": "label"}]}}"#,
        )
        .unwrap();
        let mut program = spec.build(&["a".to_owned()]).unwrap();
        program.dialect = dialect;
        program.predictors[0].demos = vec![
            serde_json::from_str(
                r#"{"augmented": true, "text": "t", "reasoning": "r", "label": "a"}"#,
            )
            .unwrap(),
        ];
        program
    }

    #[test]
    fn dspy_files_round_trip() {
        for dialect in [Dialect::Dspy25, Dialect::Dspy3] {
            let program = program(dialect);
            let text = dspy_file(&program).unwrap();
            assert_eq!(text.contains("\"metadata\""), dialect == Dialect::Dspy3);
            let mut other = self::program(dialect);
            other.predictors[0].demos.clear();
            other.predictors[0].signature.instructions.clear();
            load_dspy_json(&mut other, &text).unwrap();
            assert_eq!(other.predictors[0].demos, program.predictors[0].demos);
            assert_eq!(other.predictors[0].signature.instructions, "Sort.");
        }
    }

    #[test]
    fn the_development_branch_takes_demos_and_leaves_its_signature() {
        let text = serde_json::to_string(&to_dspy_json(&program(Dialect::Dspy25))).unwrap();
        let mut other = program(Dialect::Dspy25Dev);
        other.predictors[0].demos.clear();
        other.predictors[0].signature.instructions = "Mine.".to_owned();
        load_dspy_json(&mut other, &text).unwrap();
        assert_eq!(other.predictors[0].demos.len(), 1);
        assert_eq!(other.predictors[0].signature.instructions, "Mine.");
    }

    #[test]
    fn files_of_another_shape_are_refused_by_name() {
        let program = program(Dialect::Dspy25);
        let text = serde_json::to_string(&to_dspy_json(&program)).unwrap();

        let mut two = program.clone();
        let mut second = two.predictors[0].clone();
        second.name = "other".to_owned();
        two.predictors.push(second);
        match load_dspy_json(&mut two, &text) {
            Err(SavedError::Predictor { name, there }) => {
                assert_eq!(name, "other");
                assert_eq!(there, Vec::<String>::new(), "the only one was taken before");
            }
            other => panic!("{other:?}"),
        }

        let mut longer = program.clone();
        let output = longer.predictors[0].signature.outputs[1].clone();
        longer.predictors[0].signature.outputs.push(output);
        match load_dspy_json(&mut longer, &text) {
            Err(SavedError::Fields {
                saved, expected, ..
            }) => assert_eq!((saved, expected), (3, 4)),
            other => panic!("{other:?}"),
        }

        for text in ["", "[", r#"{"predict": {"demos": 1}}"#] {
            let read = load_dspy_json(&mut program.clone(), text);
            assert!(matches!(read, Err(SavedError::Json(_))), "{text}");
        }
    }
}
