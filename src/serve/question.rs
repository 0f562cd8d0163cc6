//! What `POST /predict` takes: the deployed program's inputs as a JSON object. A program with one
//! input also takes it as `text`, whatever its name.

use std::collections::BTreeMap;

use flowrun_lm::example::Example;
use flowrun_lm::field_type::FieldType;
use flowrun_lm::program::RowInput;
use flowrun_lm::value::{Fields, Value as Given};
use serde_json::{Map, Value, json};

use super::problem::Problem;

/// The name that a program's only input may always have.
const TEXT: &str = "text";

/// The object as a row.
///
/// # Errors
/// 400, with the field: one that is missing, unknown, given twice, of another type or an empty
/// text.
pub(super) fn row(inputs: &[RowInput], given: Map<String, Value>) -> Result<Example, Problem> {
    let mut columns: BTreeMap<&str, Given> = BTreeMap::new();
    for (name, value) in given {
        let Some(input) = input(inputs, &name) else {
            let text = format!(
                "`{name}` is no input of the program, which {}",
                takes(inputs)
            );
            return Err(Problem::bad(text).of(name));
        };
        let value: Given = serde_json::from_value(value)
            .map_err(|e| Problem::bad(format!("`{name}`: {e}")).of(name.as_str()))?;
        input
            .check(&value)
            .map_err(|why| Problem::bad(format!("`{name}`: {why}")).of(name.as_str()))?;
        let empty = value.as_str().is_some_and(|text| text.trim().is_empty());
        if empty && inputs.len() == 1 {
            return Err(Problem::bad(format!("`{name}` is empty")).of(name));
        }
        if columns.insert(&input.column, value).is_some() {
            return Err(Problem::bad(format!("`{name}` is given twice")).of(name));
        }
    }
    let mut fields = Fields::new();
    for input in inputs {
        let value = match (columns.remove(input.column.as_str()), &input.ty) {
            (Some(value), _) => value,
            (None, FieldType::Optional(_)) => Given::Null,
            (None, _) => {
                let name = shown(inputs, input);
                let text = format!("`{name}` is missing; the program {}", takes(inputs));
                return Err(Problem::bad(text).of(name));
            }
        };
        fields.insert(input.column.clone(), value);
    }
    Ok(Example {
        id: "request".to_owned(),
        fields,
    })
}

/// The input of that name: by its field, else by its column.
fn input<'a>(inputs: &'a [RowInput], name: &str) -> Option<&'a RowInput> {
    let named = inputs.iter().find(|input| input.name == name);
    named
        .or_else(|| inputs.iter().find(|input| input.column == name))
        .or(match inputs {
            [only] if name == TEXT => Some(only),
            _ => None,
        })
}

/// The name that callers are told.
fn shown<'a>(inputs: &[RowInput], input: &'a RowInput) -> &'a str {
    match inputs {
        [_] => TEXT,
        _ => &input.name,
    }
}

fn takes(inputs: &[RowInput]) -> String {
    let names = inputs.iter().map(|input| shown(inputs, input));
    let names: Vec<String> = names.map(|name| format!("`{name}`")).collect();
    format!("takes {}", names.join(", "))
}

/// Names and types, for people and pages.
pub(super) fn describe(inputs: &[RowInput]) -> Value {
    let one = |input: &RowInput| {
        json!({
            "name": shown(inputs, input),
            "desc": input.desc,
            "schema": input.ty.json_schema(false),
        })
    };
    inputs.iter().map(one).collect()
}

/// The object's schema.
pub(super) fn schema(inputs: &[RowInput]) -> Value {
    let property = |input: &RowInput| {
        let schema = serde_json::to_value(input.ty.json_schema(false)).unwrap_or_default();
        let schema = match (schema, &input.desc) {
            (Value::Object(mut schema), Some(desc)) => {
                schema.insert("description".to_owned(), desc.as_str().into());
                Value::Object(schema)
            }
            (schema, _) => schema,
        };
        (shown(inputs, input).to_owned(), schema)
    };
    let must = |input: &&RowInput| !matches!(input.ty, FieldType::Optional(_));
    let properties: Map<String, Value> = inputs.iter().map(property).collect();
    let required: Vec<&str> = (inputs.iter().filter(must))
        .map(|input| shown(inputs, input))
        .collect();
    let mut schema = json!({
        "type": "object", "additionalProperties": false, "properties": properties,
    });
    // OpenAPI 3.0 allows no empty list.
    if !required.is_empty() {
        schema["required"] = required.into();
    }
    schema
}

/// A question to try, as JSON: texts are `…`, the rest is yet to be filled in.
pub(super) fn sample(inputs: &[RowInput]) -> String {
    let one = |input: &RowInput| {
        let value = match input.ty {
            FieldType::Str => json!("…"),
            _ => Value::Null,
        };
        (shown(inputs, input).to_owned(), value)
    };
    Value::Object(inputs.iter().map(one).collect()).to_string()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn two() -> Vec<RowInput> {
        let optional = FieldType::Optional(Box::new(FieldType::Int));
        vec![
            RowInput {
                column: "text".to_owned(),
                ..RowInput::text("query")
            },
            RowInput::text("channel"),
            RowInput {
                ty: optional,
                ..RowInput::text("age")
            },
        ]
    }

    fn ask(inputs: &[RowInput], question: &Value) -> Result<Value, Value> {
        row(inputs, question.as_object().unwrap().clone())
            .map(|row| serde_json::to_value(row.fields).unwrap())
            .map_err(|problem| problem.body()["error"].clone())
    }

    #[test]
    fn inputs_go_by_field_or_column_and_the_only_one_by_text() {
        let expected = json!({"text": "q", "channel": "app", "age": null});
        for name in ["query", "text"] {
            let question = json!({name: "q", "channel": "app"});
            assert_eq!(ask(&two(), &question).unwrap(), expected);
        }
        let one = [RowInput::text("intent")];
        for name in ["intent", "text"] {
            assert_eq!(
                ask(&one, &json!({name: "q"})).unwrap(),
                json!({"intent": "q"})
            );
        }
    }

    #[test]
    fn what_is_wrong_names_its_field() {
        for (question, field, why) in [
            (json!({"query": "q"}), "channel", "`channel` is missing"),
            (
                json!({"query": "q", "chanel": "app"}),
                "chanel",
                "is no input",
            ),
            (json!({"query": "q", "text": "q"}), "text", "given twice"),
            (
                json!({"query": 1, "channel": "app"}),
                "query",
                "is not a valid str",
            ),
            (
                json!({"query": "q", "channel": "app", "age": "old"}),
                "age",
                "int",
            ),
        ] {
            let problem = ask(&two(), &question).unwrap_err();
            assert_eq!(problem["param"], field, "{problem}");
            assert!(
                problem["message"].as_str().unwrap().contains(why),
                "{problem}"
            );
        }
        let empty = ask(&[RowInput::text("text")], &json!({"text": " "}));
        assert_eq!(empty.unwrap_err()["message"], "`text` is empty");
    }
}
