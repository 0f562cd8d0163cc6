//! JSON Schemas for editors: of a pipeline file and of each step kind, made from
//! the Rust types and the vocabulary. Knows no files.

use std::sync::OnceLock;

use serde_json::{Map, Value, json};

use super::mismatch::Shape;
use super::spec::{DefinitionSpec, PipelineSpec};
use crate::runner::runner_schema;
use crate::step::Step;
use crate::vocabulary::Vocabulary;

/// The shape of a pipeline file, before names are known.
pub(crate) fn pipeline_shape() -> Result<&'static Shape, String> {
    static SHAPE: OnceLock<Result<Shape, String>> = OnceLock::new();
    let shape = SHAPE.get_or_init(|| Shape::new(schemars::schema_for!(PipelineSpec).to_value()));
    shape.as_ref().map_err(Clone::clone)
}

/// The shape of a step definition, before names are known.
pub(crate) fn definition_shape() -> Result<&'static Shape, String> {
    static SHAPE: OnceLock<Result<Shape, String>> = OnceLock::new();
    let shape = SHAPE.get_or_init(|| Shape::new(schemars::schema_for!(DefinitionSpec).to_value()));
    shape.as_ref().map_err(Clone::clone)
}

/// JSON Schema of a pipeline file, with the `with` and `in` of each step kind, for editors.
#[must_use]
pub fn pipeline_schema(vocabulary: &Vocabulary) -> Value {
    document(schemars::schema_for!(PipelineSpec).to_value(), vocabulary)
}

/// JSON Schema of a step definition, likewise.
#[must_use]
pub fn definition_schema(vocabulary: &Vocabulary) -> Value {
    document(schemars::schema_for!(DefinitionSpec).to_value(), vocabulary)
}

/// The schema of a file, with what the vocabulary knows put into it.
fn document(mut root: Value, vocabulary: &Vocabulary) -> Value {
    let mut defs = match root.get_mut("$defs").map(Value::take) {
        Some(Value::Object(defs)) => defs,
        _ => Map::new(),
    };
    allow_expressions(&mut root);
    defs.values_mut().for_each(allow_expressions);
    let mut tables = vec![("steps", "#/$defs/step")];
    if root.pointer("/properties/models").is_some() {
        embed(&mut defs, "model", vocabulary.model_schema.clone());
        embed(&mut defs, "program", vocabulary.program_schema.clone());
        tables.extend([("models", "#/$defs/model"), ("programs", "#/$defs/program")]);
    }
    let has_runners = root.pointer("/properties/runners").is_some();
    for (name, kind) in vocabulary.runners.iter().filter(|_| has_runners) {
        let def = format!("runner.{name}");
        embed(&mut defs, &def, runner_schema(kind.settings_schema()));
    }
    if has_runners {
        runners(&mut root, vocabulary);
    }
    let mut rules = vec![
        json!({ "$ref": "#/$defs/StepSpec" }),
        json!({ "properties": { "uses": { "anyOf": [
            { "enum": kinds(vocabulary) },
            {
                "type": "string",
                "pattern": "(/|\\.ya?ml$|\\$\\{\\{)",
                "description": "path of a step definition, relative to this file",
            },
        ] }, "runner": { "anyOf": [
            { "enum": runner_names(vocabulary) },
            { "$ref": "#/$defs/expression" },
        ] } } }),
    ];
    for (kind, step) in &vocabulary.steps {
        let with = format!("with.{kind}");
        embed(&mut defs, &with, step.params_schema());
        rules.push(rule(kind, step.as_ref()));
    }
    defs.insert("step".into(), json!({ "allOf": rules }));
    defs.insert(
        "expression".into(),
        json!({
            "type": "string",
            "pattern": "\\$\\{\\{",
            "description": "an expression over `params`, `item`, `models` and `run`",
        }),
    );
    if let Some(properties) = root.get_mut("properties").and_then(Value::as_object_mut) {
        for (name, of) in tables {
            let mut schema = json!({ "type": "object", "additionalProperties": { "$ref": of } });
            if let Some(about) = properties.get(name).and_then(|p| p.get("description")) {
                schema["description"] = about.clone();
            }
            properties.insert(name.into(), schema);
        }
    }
    root["$defs"] = Value::Object(defs);
    root
}

/// What a step may name as its `runner`.
fn runner_names(vocabulary: &Vocabulary) -> Vec<Value> {
    let here = [json!("inline"), json!("process"), Value::Null];
    let jobs = vocabulary.runners.keys().map(|name| json!(name));
    here.into_iter().chain(jobs).collect()
}

/// The job systems of a file, one field for each.
fn runners(root: &mut Value, vocabulary: &Vocabulary) {
    let names = vocabulary.runners.keys();
    let fields: Map<String, Value> = names
        .map(|name| {
            let schema = json!({ "$ref": format!("#/$defs/runner.{name}") });
            (name.clone(), schema)
        })
        .collect();
    if let Some(schema) = root.pointer_mut("/properties/runners") {
        let about = schema.get("description").cloned();
        *schema = json!({
            "type": ["object", "null"],
            "properties": fields,
            "additionalProperties": false,
        });
        if let Some(about) = about {
            schema["description"] = about;
        }
    }
}

/// What holds for a step of one kind.
fn rule(kind: &str, step: &dyn Step) -> Value {
    json!({
        "if": { "properties": { "uses": { "const": kind } }, "required": ["uses"] },
        "then": {
            "description": step.about(),
            "properties": {
                "with": { "$ref": format!("#/$defs/with.{kind}") },
                "in": { "properties": ports(step), "additionalProperties": false },
                "out": false,
            }
        }
    })
}

/// JSON Schema of the `with` of a step kind, with its ports and version noted beside it.
#[must_use]
pub fn step_schema(step: &dyn Step) -> Value {
    let mut schema = match step.params_schema() {
        Value::Object(schema) => schema,
        _ => Map::new(),
    };
    let dialect = json!("https://json-schema.org/draft/2020-12/schema");
    schema.entry("$schema").or_insert(dialect);
    schema.insert("title".into(), json!(step.kind()));
    schema.insert("description".into(), json!(step.about()));
    schema.insert("x-flowrun-version".into(), json!(step.version()));
    schema.insert("x-flowrun-inputs".into(), json!(step.inputs()));
    schema.insert("x-flowrun-outputs".into(), json!(step.outputs()));
    Value::Object(schema)
}

fn kinds(vocabulary: &Vocabulary) -> Vec<Value> {
    vocabulary
        .steps
        .keys()
        .map(|k| json!(k))
        .chain([Value::Null])
        .collect()
}

fn ports(step: &dyn Step) -> Map<String, Value> {
    let port = |port: &crate::step::Port| {
        let list = if port.many { "list of " } else { "" };
        json!({ "description": format!("{} ({list}`{}`)", port.about, port.ty) })
    };
    step.inputs()
        .iter()
        .map(|p| (p.name.clone(), port(p)))
        .collect()
}

/// Puts a schema among the definitions, its own definitions beside it under longer names.
fn embed(defs: &mut Map<String, Value>, name: &str, mut schema: Value) {
    if schema.is_null() {
        schema = json!({});
    }
    let inner = schema.as_object_mut().and_then(|s| {
        s.remove("$schema");
        s.remove("$defs")
    });
    if let Some(Value::Object(inner)) = inner {
        for (key, mut schema) in inner {
            rename(&mut schema, name);
            allow_expressions(&mut schema);
            defs.insert(format!("{name}.{key}"), schema);
        }
    }
    rename(&mut schema, name);
    allow_expressions(&mut schema);
    defs.insert(name.to_owned(), schema);
}

/// Points every `$ref` within an embedded schema at its new place.
fn rename(schema: &mut Value, name: &str) {
    match schema {
        Value::Object(map) => {
            if let Some(Value::String(reference)) = map.get_mut("$ref") {
                if let Some(rest) = reference.strip_prefix("#/$defs/") {
                    *reference = format!("#/$defs/{name}.{rest}");
                } else if reference == "#" {
                    *reference = format!("#/$defs/{name}");
                }
            }
            map.values_mut().for_each(|v| rename(v, name));
        }
        Value::Array(items) => items.iter_mut().for_each(|v| rename(v, name)),
        _ => {}
    }
}

/// Lets an expression stand wherever a value of another type than text is asked for.
fn allow_expressions(schema: &mut Value) {
    let Some(map) = schema.as_object_mut() else {
        return;
    };
    for key in ["properties", "additionalProperties", "items"] {
        match map.get_mut(key) {
            Some(Value::Object(inner)) if key == "properties" => {
                inner.values_mut().for_each(allow_here);
            }
            Some(inner) if inner.is_object() => allow_here(inner),
            _ => {}
        }
    }
    for key in ["oneOf", "anyOf", "allOf", "prefixItems"] {
        if let Some(Value::Array(branches)) = map.get_mut(key) {
            branches.iter_mut().for_each(allow_expressions);
        }
    }
}

fn allow_here(schema: &mut Value) {
    allow_expressions(schema);
    if schema.get("const").is_some() || takes_any_text(schema) {
        return;
    }
    let about = schema.get("description").cloned();
    let inner = schema.take();
    *schema = json!({ "anyOf": [inner, { "$ref": "#/$defs/expression" }] });
    if let (Some(about), Some(map)) = (about, schema.as_object_mut()) {
        map.insert("description".into(), about);
    }
}

fn takes_any_text(schema: &Value) -> bool {
    let Some(map) = schema.as_object() else {
        return true;
    };
    let limits = [
        "enum",
        "pattern",
        "format",
        "minLength",
        "maxLength",
        "$ref",
        "oneOf",
        "anyOf",
    ];
    if limits.iter().any(|key| map.contains_key(*key)) {
        return false;
    }
    match map.get("type") {
        None => true,
        Some(Value::String(ty)) => ty == "string",
        Some(Value::Array(types)) => types.iter().any(|t| t == "string"),
        Some(_) => false,
    }
}
