//! [`ParamDoc`]: what a step kind's `with` may say, read from its JSON Schema: a line for each
//! param, those of nested objects by their dotted path.

use serde_json::{Map, Value};

/// Nested objects are followed so far.
const DEEPEST: usize = 3;

/// One param.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ParamDoc {
    /// `lora.rank`.
    pub(crate) path: String,
    /// `integer`, `"linear" | "constant"`, `name in models`.
    pub(crate) ty: String,
    /// `required`, `default 8`, `optional`.
    pub(crate) need: String,
    /// What it means.
    pub(crate) about: String,
}

/// The params of a schema, required ones first, then by name.
pub(crate) fn param_docs(schema: &Value) -> Vec<ParamDoc> {
    let mut docs = Vec::new();
    walk(schema, schema, "", 0, &mut docs);
    docs
}

fn walk(schema: &Value, root: &Value, path: &str, depth: usize, docs: &mut Vec<ParamDoc>) {
    let none = Map::new();
    let properties = schema["properties"].as_object().unwrap_or(&none);
    let required: Vec<&str> = schema["required"]
        .as_array()
        .map(|names| names.iter().filter_map(Value::as_str).collect())
        .unwrap_or_default();
    let mut names: Vec<&String> = properties.keys().collect();
    names.sort_by_key(|name| (!required.contains(&name.as_str()), name.as_str()));
    for name in names {
        let given = &properties[name];
        let param = resolve(given, root);
        let path = match path {
            "" => name.clone(),
            outer => format!("{outer}.{name}"),
        };
        let is_required = required.contains(&name.as_str());
        let nested = param["properties"].is_object();
        docs.push(ParamDoc {
            ty: type_of(given, param, root),
            need: need(given, is_required, nested),
            about: about(given, param),
            path: path.clone(),
        });
        if nested && depth < DEEPEST {
            walk(param, root, &path, depth + 1, docs);
        }
    }
}

fn need(given: &Value, is_required: bool, nested: bool) -> String {
    match given.get("default") {
        _ if is_required => "required".to_owned(),
        // The defaults of its parts stand with them.
        Some(default) if !default.is_null() && !nested => format!("default {default}"),
        _ => "optional".to_owned(),
    }
}

fn about(given: &Value, param: &Value) -> String {
    let text = given["description"]
        .as_str()
        .or(param["description"].as_str());
    let words: Vec<&str> = text.unwrap_or_default().split_whitespace().collect();
    words.join(" ")
}

/// What a `$ref`, or the one alternative besides null, stands for.
fn resolve<'a>(schema: &'a Value, root: &'a Value) -> &'a Value {
    if let Some(name) = schema["$ref"].as_str() {
        let pointer = name.trim_start_matches('#');
        return root.pointer(pointer).map_or(schema, |s| resolve(s, root));
    }
    let all = schema["anyOf"].as_array().or(schema["allOf"].as_array());
    let mut real = all.into_iter().flatten().filter(|s| s["type"] != "null");
    match (real.next(), real.next()) {
        (Some(only), None) => resolve(only, root),
        _ => schema,
    }
}

fn type_of(given: &Value, param: &Value, root: &Value) -> String {
    if let Some(table) = given["x-flowrun-ref"].as_str() {
        return format!("name in `{table}`");
    }
    let choices = choices(param);
    if !choices.is_empty() {
        return choices.join(" | ");
    }
    match &param["type"] {
        Value::String(ty) if ty == "array" => {
            let items = resolve(&param["items"], root);
            format!("list of {}", type_of(&param["items"], items, root))
        }
        Value::String(ty) => ty.clone(),
        Value::Array(types) => {
            let names = types.iter().filter_map(Value::as_str);
            names
                .filter(|ty| *ty != "null")
                .collect::<Vec<_>>()
                .join(" or ")
        }
        _ => "any".to_owned(),
    }
}

/// The values of an enumeration.
fn choices(param: &Value) -> Vec<String> {
    let listed = param["enum"].as_array().into_iter().flatten();
    let one_of = param["oneOf"].as_array().into_iter().flatten();
    let consts = one_of.filter_map(|alternative| alternative.get("const"));
    listed
        .chain(consts)
        .filter(|value| !value.is_null())
        .map(Value::to_string)
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn nested_params_have_their_path_type_and_default() {
        let schema = json!({
            "required": ["model"],
            "properties": {
                "epochs": { "type": "integer", "default": 1, "description": "Passes\nover all rows." },
                "lora": { "$ref": "#/$defs/Lora", "default": { "rank": 16 } },
                "model": { "type": "string", "x-flowrun-ref": "models" },
                "schedule": { "anyOf": [{ "$ref": "#/$defs/Schedule" }, { "type": "null" }] },
                "stops": { "type": ["array", "null"], "items": { "type": "string" } },
            },
            "$defs": {
                "Lora": { "description": "Shape.", "properties": { "rank": { "type": "integer", "default": 16 } } },
                "Schedule": { "oneOf": [{ "const": "linear" }, { "const": "constant" }] },
            },
        });
        let lines: Vec<String> = param_docs(&schema)
            .iter()
            .map(|d| format!("{}: {}, {}. {}", d.path, d.ty, d.need, d.about))
            .collect();
        assert_eq!(
            lines,
            [
                "model: name in `models`, required. ",
                "epochs: integer, default 1. Passes over all rows.",
                "lora: any, optional. Shape.",
                "lora.rank: integer, default 16. ",
                "schedule: \"linear\" | \"constant\", optional. ",
                "stops: array, optional. "
            ]
        );
    }
}
