//! The OpenAPI document of this server, made from the types that it reads.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use flowrun_lm::program::RowInput;
use schemars::{JsonSchema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use super::openai::{Chat, Load, Text, Unload};
use super::question;
use super::service::Service;

pub(super) async fn document(State(service): State<Arc<Service>>) -> Json<Value> {
    Json(describe(&service.about.name, &service.about.inputs))
}

fn describe(name: &str, inputs: &[RowInput]) -> Value {
    let settings = SchemaSettings::openapi3();
    let mut types = settings.into_generator();
    let mut paths = Map::new();
    let get = |about: &str, kind: &str| {
        json!({"get": {
            "summary": about,
            "responses": {"200": {"description": "ok", "content": {kind: {}}}, "default": problem()},
        }})
    };
    for (path, about, kind) in [
        ("/", "A page for trying queries", "text/html"),
        ("/health", "What is served, and by which process", JSON),
        ("/health/live", "Whether the process works", JSON),
        ("/health/ready", "Whether it takes requests", JSON),
        (
            "/metrics",
            "Metrics for Prometheus",
            super::metrics::CONTENT_TYPE,
        ),
        ("/openapi.json", "This document", JSON),
        ("/v1/models", "The models", JSON),
    ] {
        paths.insert(path.to_owned(), get(about, kind));
    }
    let mut one = get("One model", JSON);
    one["get"]["parameters"] = json!([{
        "name": "id", "in": "path", "required": true, "schema": {"type": "string"},
    }]);
    paths.insert("/v1/models/{id}".to_owned(), one);
    let about = "The program's answer to one question";
    let answer = json!({"$ref": "#/components/schemas/Prediction"});
    let body = json!({"$ref": "#/components/schemas/Question"});
    insert(&mut paths, "/predict", about, body, JSON, answer.clone());
    let answers = json!({"type": "object", "required": ["predictions"], "properties": {
        "predictions": {"type": "array", "items": answer},
    }});
    let about = "The program's answers to several questions";
    let body = json!({"$ref": "#/components/schemas/Questions"});
    insert(&mut paths, "/predict/batch", about, body, JSON, answers);
    let about = "OpenAI's chat completions";
    post::<Chat>(
        &mut paths,
        &mut types,
        "/v1/chat/completions",
        about,
        JSON,
        json!({}),
    );
    let about = "OpenAI's completions";
    post::<Text>(
        &mut paths,
        &mut types,
        "/v1/completions",
        about,
        JSON,
        json!({}),
    );
    let text = json!({"type": "string"});
    let about = "Loads an adapter from an allowed folder";
    post::<Load>(
        &mut paths,
        &mut types,
        "/v1/load_lora_adapter",
        about,
        TEXT,
        text.clone(),
    );
    let about = "Unloads an adapter";
    post::<Unload>(
        &mut paths,
        &mut types,
        "/v1/unload_lora_adapter",
        about,
        TEXT,
        text,
    );
    super::files::openapi::describe(&mut paths);
    super::batches::openapi::describe(&mut paths, &mut types);
    super::fine_tuning::openapi::describe(&mut paths, &mut types);
    let mut schemas = types.take_definitions(true);
    schemas.insert("Question".to_owned(), question::schema(inputs));
    schemas.insert("Questions".to_owned(), questions(inputs));
    schemas.insert("Prediction".to_owned(), prediction());
    schemas.insert("Problem".to_owned(), problem_schema());
    json!({
        "openapi": "3.0.3",
        "info": {"title": name, "version": env!("CARGO_PKG_VERSION")},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        // The key is needed where the server was started with one.
        "security": [{}, {"key": []}],
    })
}

/// Adds an operation; `content` describes its request's body.
pub(super) fn add(
    paths: &mut Map<String, Value>,
    path: &str,
    method: &str,
    about: &str,
    content: Option<Value>,
) {
    let mut operation = json!({
        "summary": about,
        "responses": {"200": {"description": "ok"}, "default": problem()},
    });
    if let Some(content) = content {
        operation["requestBody"] = json!({"required": true, "content": content});
    }
    let entry = paths.entry(path.to_owned()).or_insert_with(|| json!({}));
    entry[method] = operation;
    if path.contains("{id}") {
        entry["parameters"] = json!([{
            "name": "id", "in": "path", "required": true, "schema": {"type": "string"},
        }]);
    }
}

/// Says how a list is asked for part by part.
pub(super) fn paged(paths: &mut Map<String, Value>, path: &str) {
    if let Some(list) = paths.get_mut(path) {
        list["get"]["parameters"] = json!([
            {"name": "after", "in": "query", "schema": {"type": "string"}},
            {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 0}},
        ]);
    }
}

const JSON: &str = "application/json";
const TEXT: &str = "text/plain";

fn post<T: JsonSchema>(
    paths: &mut Map<String, Value>,
    types: &mut SchemaGenerator,
    path: &str,
    about: &str,
    kind: &str,
    answer: Value,
) {
    let body = types.subschema_for::<T>().to_value();
    insert(paths, path, about, body, kind, answer);
}

fn insert(
    paths: &mut Map<String, Value>,
    path: &str,
    about: &str,
    body: Value,
    kind: &str,
    answer: Value,
) {
    let operation = json!({"post": {
        "summary": about,
        "requestBody": {"required": true, "content": {JSON: {"schema": body}}},
        "responses": {
            "200": {"description": "ok", "content": {kind: {"schema": answer}}},
            "default": problem(),
        },
    }});
    paths.insert(path.to_owned(), operation);
}

fn problem() -> Value {
    json!({"description": "an error, in OpenAI's shape",
        "content": {JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}}})
}

fn problem_schema() -> Value {
    let text = json!({"type": "string", "nullable": true});
    json!({"type": "object", "required": ["error"], "properties": {"error": {
        "type": "object", "required": ["message", "type"],
        "properties": {
            "message": {"type": "string"}, "type": {"type": "string"},
            "param": text, "code": text,
        },
    }}})
}

/// Either list; texts only where the program has one input.
fn questions(inputs: &[RowInput]) -> Value {
    let list = |name: &str, items: Value| {
        json!({"type": "object", "required": [name], "additionalProperties": false,
            "properties": {
                (name): {"type": "array", "minItems": 1, "maxItems": 1000, "items": items},
            },
        })
    };
    let rows = list("rows", json!({"$ref": "#/components/schemas/Question"}));
    match inputs {
        [_] => json!({"oneOf": [list("texts", json!({"type": "string"})), rows]}),
        _ => rows,
    }
}

fn prediction() -> Value {
    json!({"type": "object", "required": ["label", "model"], "additionalProperties": true,
        "properties": {
            "label": {"type": "string",
                "description": "one of the program's labels, or `unknown` when the model's answer could not be read or is none of them"},
            "confidence": {"type": "number", "minimum": 0, "maximum": 1},
            "raw": {"type": "string", "description": "the model's answer, where it could not be read"},
            "error": {"type": "string", "description": "why there is no label"},
            "model": {"type": "string"},
        },
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_path_is_described_and_every_reference_leads_somewhere() {
        let document = describe("test", &[RowInput::text("text")]);
        let described: Vec<String> = document["paths"]
            .as_object()
            .unwrap()
            .keys()
            .map(|path| path.replace("/models/{id}", "/models/{*id}"))
            .collect();
        let mut there: Vec<&str> = super::super::routes::PATHS.to_vec();
        there.sort_unstable();
        let mut described: Vec<&str> = described.iter().map(String::as_str).collect();
        described.sort_unstable();
        assert_eq!(described, there);
        for path in ["/v1/files", "/v1/batches", "/v1/fine_tuning/jobs"] {
            let parameters = document["paths"][path]["get"]["parameters"].to_string();
            assert!(parameters.contains("after"), "{path}: {parameters}");
        }
        let text = document.to_string();
        for reference in text.split("\"$ref\":\"#/").skip(1) {
            let place = format!("/{}", reference.split('"').next().unwrap());
            assert!(document.pointer(&place).is_some(), "{place}");
        }
    }
}
