//! JSON Schemas with finitely many answers, as a closed list of JSON texts.
//!
//! | taken | |
//! |---|---|
//! | `enum`, `const`, `boolean`, `null` | |
//! | `integer` | with `minimum` and `maximum` (or their exclusive forms) |
//! | `object` | its `properties`, all of them, in the order of their names |
//! | `array` | with `maxItems` |
//! | `anyOf`, `oneOf`, a list of types, `$ref` into `$defs` | of these |
//!
//! A schema that allows anything else is refused: the model could not be held to it.

use std::cell::Cell;
use std::collections::HashSet;

use serde_json::{Map, Value};

/// Answers at most.
const MOST: usize = 1000;
/// Schemas within schemas; a `$ref` may lead to itself.
const DEEP: usize = 16;
/// Schemas that are looked at, and KiB or dozens of the texts that are made of them: references may
/// lead to one many times, and whoever is answered waits meanwhile.
const LOOKS: usize = 10_000;
/// Bytes of all answers together at most.
const BYTES: usize = 1 << 20;

/// All JSON texts that `schema` allows, without spaces but those after `:` and `,` in objects
/// and lists that models are used to.
///
/// # Errors
/// What in the schema has no finite list, and what is possible.
pub(super) fn answers(schema: &Value) -> Result<Vec<String>, String> {
    let root = Root {
        schema,
        looks: Cell::new(0),
    };
    let texts = root.answers(schema, 0)?;
    match texts.is_empty() {
        true => Err("the schema allows no answer".to_owned()),
        false => Ok(texts),
    }
}

/// The whole schema, which `$ref` points into.
struct Root<'a> {
    schema: &'a Value,
    looks: Cell<usize>,
}

impl Root<'_> {
    fn answers(&self, schema: &Value, depth: usize) -> Result<Vec<String>, String> {
        self.look(1)?;
        let texts = self.listed(schema, depth)?;
        self.look((texts.len() >> 6) + (length(&texts) >> 10))?;
        Ok(texts)
    }

    fn listed(&self, schema: &Value, depth: usize) -> Result<Vec<String>, String> {
        let Some(schema) = schema.as_object() else {
            return Err("`schema` is no object".to_owned());
        };
        if depth > DEEP {
            return Err(format!("schemas lie more than {DEEP} deep in each other"));
        }
        let given = schema.get("enum").and_then(Value::as_array);
        let given = given.map(Vec::as_slice);
        if let Some(values) = given.or_else(|| schema.get("const").map(std::slice::from_ref)) {
            return bounded(values.iter().map(Value::to_string).collect());
        }
        if let Some(path) = schema.get("$ref").and_then(Value::as_str) {
            let found = path
                .strip_prefix('#')
                .and_then(|at| self.schema.pointer(at));
            let found =
                found.ok_or_else(|| format!("`$ref`: there is no `{path}` in the schema"))?;
            return self.answers(found, depth + 1);
        }
        let any = schema.get("anyOf").or_else(|| schema.get("oneOf"));
        if let Some(all) = any.and_then(Value::as_array) {
            return self.any(all.iter().map(|one| self.answers(one, depth + 1)));
        }
        match schema.get("type") {
            Some(Value::String(kind)) => self.typed(kind, schema, depth),
            Some(Value::Array(kinds)) => {
                let kinds = kinds.iter().filter_map(Value::as_str);
                self.any(kinds.map(|kind| self.typed(kind, schema, depth)))
            }
            _ => Err(open(schema)),
        }
    }

    fn look(&self, more: usize) -> Result<(), String> {
        self.looks.set(self.looks.get() + more);
        match self.looks.get() > LOOKS {
            true => Err(format!(
                "the schema leads to more than {LOOKS} schemas, or KiB of answers on the way"
            )),
            false => Ok(()),
        }
    }

    /// What one of several schemas allows; what two allow is there once.
    fn any(
        &self,
        all: impl Iterator<Item = Result<Vec<String>, String>>,
    ) -> Result<Vec<String>, String> {
        let (mut texts, mut seen) = (Vec::new(), HashSet::new());
        for more in all {
            for text in more? {
                if seen.insert(text.clone()) {
                    texts.push(text);
                }
            }
            texts = bounded(texts)?;
        }
        Ok(texts)
    }

    fn typed(
        &self,
        kind: &str,
        schema: &Map<String, Value>,
        depth: usize,
    ) -> Result<Vec<String>, String> {
        match kind {
            "boolean" => Ok(vec!["true".to_owned(), "false".to_owned()]),
            "null" => Ok(vec!["null".to_owned()]),
            "integer" => integers(schema),
            "object" => self.objects(schema, depth),
            "array" => self.arrays(schema, depth),
            _ => Err(open(schema)),
        }
    }

    /// Every combination of the properties' values.
    fn objects(&self, schema: &Map<String, Value>, depth: usize) -> Result<Vec<String>, String> {
        let properties = schema.get("properties").and_then(Value::as_object);
        let properties = properties.filter(|all| !all.is_empty());
        let mut all = vec![String::new()];
        for (name, property) in properties.ok_or_else(|| open(schema))? {
            let values = self.answers(property, depth + 1);
            let values = values.map_err(|why| format!("`{name}`: {why}"))?;
            let name = Value::String(name.clone());
            let values: Vec<String> = values
                .iter()
                .map(|value| format!("{name}: {value}"))
                .collect();
            all = self.extended(&all, &values)?;
        }
        Ok(all.iter().map(|inside| format!("{{{inside}}}")).collect())
    }

    /// Every list of as many items as are allowed.
    fn arrays(&self, schema: &Map<String, Value>, depth: usize) -> Result<Vec<String>, String> {
        let (Some(items), Some(most)) = (
            schema.get("items"),
            schema.get("maxItems").and_then(Value::as_u64),
        ) else {
            return Err(open(schema));
        };
        let least = schema.get("minItems").and_then(Value::as_u64).unwrap_or(0);
        if least.max(most) > MOST as u64 {
            return Err(format!("a list has at most {MOST} items here"));
        }
        let values = self.answers(items, depth + 1);
        let values = values.map_err(|why| format!("`items`: {why}"))?;
        let (mut all, mut of_length) = (Vec::new(), vec![String::new()]);
        for length in 0..=most {
            if length > 0 {
                of_length = self.extended(&of_length, &values)?;
            }
            if length >= least {
                all.extend(of_length.iter().map(|inside| format!("[{inside}]")));
                all = bounded(all)?;
            }
        }
        Ok(all)
    }

    /// All of `before`, each with all of `values` after it.
    fn extended(&self, before: &[String], values: &[String]) -> Result<Vec<String>, String> {
        if before.len().saturating_mul(values.len()) > MOST {
            return Err(format!("the schema allows more than {MOST} answers"));
        }
        let bytes = length(before) * values.len() + (length(values) + 2) * before.len();
        if bytes > BYTES {
            return Err(too_long());
        }
        self.look(bytes >> 10)?;
        let mut all = Vec::with_capacity(before.len() * values.len());
        for start in before {
            let comma = if start.is_empty() { "" } else { ", " };
            all.extend(values.iter().map(|value| format!("{start}{comma}{value}")));
        }
        Ok(all)
    }
}

fn integers(schema: &Map<String, Value>) -> Result<Vec<String>, String> {
    let bounds = ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"];
    if let Some(name) = bounds.iter().find(|name| {
        let given = schema.get(**name);
        given.is_some_and(|value| whole(value).is_none())
    }) {
        return Err(format!("`{name}` of integers is a whole number here"));
    }
    let bound = |name: &str| schema.get(name).and_then(whole);
    // Of two bounds on one side the stricter one holds.
    let least = [
        bound("minimum"),
        bound("exclusiveMinimum").and_then(|n| n.checked_add(1)),
    ];
    let most = [
        bound("maximum"),
        bound("exclusiveMaximum").and_then(|n| n.checked_sub(1)),
    ];
    let (Some(least), Some(most)) = (
        least.into_iter().flatten().max(),
        most.into_iter().flatten().min(),
    ) else {
        return Err(open(schema));
    };
    if most
        .checked_sub(least)
        .is_none_or(|more| more >= MOST as i64)
    {
        return Err(format!("the schema allows more than {MOST} answers"));
    }
    let step = bound("multipleOf").unwrap_or(1).max(1);
    let all = (least..=most).filter(|number| number % step == 0);
    Ok(all.map(|number| number.to_string()).collect())
}

/// A whole number, also where it is written `3.0`.
fn whole(value: &Value) -> Option<i64> {
    let float = || {
        value
            .as_f64()
            .filter(|n| n.fract() == 0.0 && n.abs() < 1e15)
    };
    value.as_i64().or_else(|| float().map(|n| n as i64))
}

fn length(texts: &[String]) -> usize {
    texts.iter().map(String::len).sum()
}

fn bounded(texts: Vec<String>) -> Result<Vec<String>, String> {
    match texts.len() > MOST {
        true => Err(format!("the schema allows more than {MOST} answers")),
        false if length(&texts) > BYTES => Err(too_long()),
        false => Ok(texts),
    }
}

fn too_long() -> String {
    format!("the answers that the schema allows have more than {BYTES} bytes together")
}

fn open(schema: &Map<String, Value>) -> String {
    format!(
        "{} allows answers without end; taken are `enum`, `const`, booleans, null, integers with \
         `minimum` and `maximum`, arrays with `maxItems`, and objects, `anyOf` and `$ref` of these",
        Value::Object(schema.clone())
    )
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
    fn what_is_bounded_is_closed() {
        let list = |schema: Value| answers(&schema).unwrap();
        let number = json!({"type": "integer", "minimum": -1, "exclusiveMaximum": 3});
        assert_eq!(list(number), ["-1", "0", "1", "2"]);
        let either = json!({"anyOf": [{"enum": ["a"]}, {"type": "null"}, {"const": "a"}]});
        assert_eq!(list(either), ["\"a\"", "null"]);
        let kinds = json!({"type": ["boolean", "null"]});
        assert_eq!(list(kinds), ["true", "false", "null"]);
        let array =
            json!({"type": "array", "items": {"enum": [1, 2]}, "minItems": 1, "maxItems": 2});
        assert_eq!(
            list(array),
            ["[1]", "[2]", "[1, 1]", "[1, 2]", "[2, 1]", "[2, 2]"]
        );
        // As pydantic writes an `Enum` in a model.
        let model = json!({
            "$defs": {"Intent": {"enum": ["card", "pin"], "title": "Intent", "type": "string"}},
            "properties": {"intent": {"$ref": "#/$defs/Intent"}, "sure": {"type": "boolean"}},
            "required": ["intent", "sure"], "title": "Answer", "type": "object",
        });
        assert_eq!(list(model)[0], r#"{"intent": "card", "sure": true}"#);
    }

    #[test]
    fn what_would_not_end_or_fit_is_refused_at_once() {
        let long = "x".repeat(100_000);
        let list = |items: Value, least: u64, most: u64| json!({"type": "array", "items": items, "minItems": least, "maxItems": most});
        let twice: Vec<Value> = (0..5_000)
            .map(|_| json!({"$ref": "#/$defs/long"}))
            .collect();
        for (schema, why) in [
            (
                list(json!({"const": 1}), 1_000_000_000, 1_000_000_000),
                "at most 1000 items",
            ),
            (list(json!({"enum": []}), 0, u64::MAX), "at most 1000 items"),
            (list(json!({"const": long}), 0, 900), "bytes together"),
            (
                json!({"$defs": {"long": {"const": long}}, "anyOf": twice}),
                "more than 10000",
            ),
        ] {
            let said = answers(&schema).unwrap_err();
            assert!(said.contains(why), "{said}");
        }
        assert_eq!(answers(&list(json!({"enum": []}), 0, 900)).unwrap(), ["[]"]);
        let both = json!({"type": "integer", "minimum": 0.0, "exclusiveMinimum": 3, "maximum": 5});
        assert_eq!(answers(&both).unwrap(), ["4", "5"]);
    }

    #[test]
    fn what_has_no_end_says_why() {
        for (schema, why) in [
            (json!({"type": "string"}), "without end"),
            (json!({"type": "integer", "minimum": 0}), "without end"),
            (
                json!({"type": "number", "minimum": 0, "maximum": 1}),
                "without end",
            ),
            (
                json!({"type": "array", "items": {"const": 1}}),
                "without end",
            ),
            (json!({"type": "object"}), "without end"),
            (
                json!({"type": "integer", "minimum": 0, "maximum": 1_000_000}),
                "more than 1000",
            ),
            (
                json!({"type": "integer", "minimum": i64::MIN, "maximum": i64::MAX}),
                "more than",
            ),
            (
                json!({"type": "array", "items": {"enum": [1, 2]}, "maxItems": 90}),
                "more than",
            ),
            (json!({"$ref": "#/$defs/gone"}), "there is no"),
            (json!({"$ref": "#"}), "deep in each other"),
            (
                json!({"type": "array", "items": {"const": 1}, "maxItems": u64::MAX}),
                "at most 1000 items",
            ),
        ] {
            let said = answers(&schema).unwrap_err();
            assert!(said.contains(why), "{schema}: {said}");
        }
        // Small to write, without end to follow.
        let fan = |to: usize| vec![json!({"$ref": format!("#/$defs/{to}")}); 50];
        let level = |at: usize| (at.to_string(), json!({"anyOf": fan(at + 1)}));
        let mut defs: Map<String, Value> = (0..7).map(level).collect();
        defs.insert("7".to_owned(), json!({"const": 1}));
        let said = answers(&json!({"$defs": defs, "$ref": "#/$defs/0"})).unwrap_err();
        assert!(said.contains("more than 10000 schemas"), "{said}");
        // Many short texts, made again and again.
        let many: Vec<usize> = (0..MOST).collect();
        let again = vec![json!({"$ref": "#/$defs/many"}); 5_000];
        let schema = json!({"$defs": {"many": {"enum": many}}, "anyOf": again});
        let said = answers(&schema).unwrap_err();
        assert!(said.contains("more than 10000 schemas"), "{said}");
        let once = json!({"$defs": {"many": {"enum": many}}, "anyOf": again[..2]});
        assert_eq!(answers(&once).unwrap().len(), MOST);
        // A list that is long before it is long enough.
        let list = json!({"type": "array", "minItems": MOST, "maxItems": MOST,
            "items": {"const": "x".repeat(1000)}});
        assert!(answers(&list).is_err());
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
