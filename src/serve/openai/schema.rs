//! JSON Schemas with finitely many answers, as a closed list of JSON texts.
//!
//! A schema that allows anything else is refused: the model could not be held to it.

use serde_json::{Map, Value};

/// Answers at most.
const MOST: usize = 1000;

/// All JSON texts that `schema` allows, without spaces but those after `:` and `,` in objects
/// that models are used to.
///
/// # Errors
/// What in the schema has no finite list, and what is possible.
pub(super) fn answers(schema: &Value) -> Result<Vec<String>, String> {
    let Some(schema) = schema.as_object() else {
        return Err("`schema` is no object".to_owned());
    };
    let texts = if let Some(values) = schema.get("enum").and_then(Value::as_array) {
        values.iter().map(Value::to_string).collect()
    } else if let Some(value) = schema.get("const") {
        vec![value.to_string()]
    } else {
        match schema.get("type").and_then(Value::as_str) {
            Some("boolean") => vec!["true".to_owned(), "false".to_owned()],
            Some("null") => vec!["null".to_owned()],
            Some("object") => objects(schema)?,
            _ => {
                return Err(format!(
                    "{} allows answers without end; `enum`, `const`, booleans, and objects of \
                     these are supported",
                    Value::Object(schema.clone())
                ));
            }
        }
    };
    match texts.len() {
        0 => Err("the schema allows no answer".to_owned()),
        n if n > MOST => Err(format!(
            "the schema allows {n} answers, at most {MOST} are supported"
        )),
        _ => Ok(texts),
    }
}

/// Every combination of the properties' values.
fn objects(schema: &Map<String, Value>) -> Result<Vec<String>, String> {
    let empty = Map::new();
    let properties = schema.get("properties").and_then(Value::as_object);
    let mut all = vec![String::new()];
    for (name, property) in properties.unwrap_or(&empty) {
        let values = answers(property).map_err(|e| format!("`{name}`: {e}"))?;
        if all.len() * values.len() > MOST {
            return Err(format!("the schema allows more than {MOST} answers"));
        }
        let name = Value::String(name.clone());
        let with = |before: &String, value: &String| {
            let comma = if before.is_empty() { "" } else { ", " };
            format!("{before}{comma}{name}: {value}")
        };
        all = all
            .iter()
            .flat_map(|before| {
                values
                    .iter()
                    .map(|value| with(before, value))
                    .collect::<Vec<_>>()
            })
            .collect();
    }
    Ok(all
        .into_iter()
        .map(|inside| format!("{{{inside}}}"))
        .collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn closed_schemas_have_a_list() {
        assert_eq!(
            answers(&json!({"enum": ["a\"b", 1]})).unwrap(),
            ["\"a\\\"b\"", "1"]
        );
        let object = json!({"type": "object", "properties": {
            "label": {"type": "string", "enum": ["x", "y"]}, "sure": {"type": "boolean"},
        }});
        let all = answers(&object).unwrap();
        assert_eq!(all.len(), 4);
        assert_eq!(all[0], r#"{"label": "x", "sure": true}"#);
        for text in all {
            serde_json::from_str::<Value>(&text).unwrap();
        }
    }

    #[test]
    fn open_and_huge_ones_are_refused() {
        let open = json!({"type": "object", "properties": {"why": {"type": "string"}}});
        assert!(answers(&open).unwrap_err().starts_with("`why`"));
        assert!(answers(&json!({"enum": []})).is_err());
        assert!(answers(&json!([])).is_err());
        let many: Vec<usize> = (0..40).collect();
        let product = json!({"type": "object", "properties": {
            "a": {"enum": many}, "b": {"enum": many},
        }});
        assert!(answers(&product).is_err());
    }
}
