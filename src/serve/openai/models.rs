//! `/v1/models`, and vLLM's two paths for loading and unloading adapters.

use std::path::PathBuf;
use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use flowrun_steps::serving::{Engine, ModelEntry};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::serve::problem::{Problem, Refused};
use crate::serve::service::{Backend, Service};

/// `GET /v1/models`.
pub(in crate::serve) async fn models(
    State(service): State<Arc<Service>>,
) -> Result<Json<Value>, Problem> {
    let entries = entries(&service).await?;
    let data: Vec<Value> = entries.iter().map(|e| described(&service, e)).collect();
    Ok(Json(json!({ "object": "list", "data": data })))
}

/// `GET /v1/models/{id}`.
pub(in crate::serve) async fn model(
    State(service): State<Arc<Service>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, Problem> {
    let entries = entries(&service).await?;
    let entry = entries.iter().find(|entry| entry.id == id);
    let entry = entry.ok_or_else(|| Problem::no_model(&id))?;
    Ok(Json(described(&service, entry)))
}

/// Folders are read, so not on the thread that serves others.
async fn entries(service: &Arc<Service>) -> Result<Vec<ModelEntry>, Problem> {
    let service = Arc::clone(service);
    let entries = tokio::task::spawn_blocking(move || service.models()).await;
    entries.map_err(|_| Refused::Down.into())
}

fn described(service: &Service, entry: &ModelEntry) -> Value {
    json!({
        "id": entry.id, "object": "model", "created": service.about.started,
        "owned_by": "flowrun", "root": entry.parent.as_ref().unwrap_or(&entry.id),
        "parent": entry.parent, "loaded": entry.loaded,
    })
}

/// An adapter to load.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::serve) struct Load {
    /// The model id that it gets.
    lora_name: String,
    /// Its folder, inside one that the server was started with.
    lora_path: PathBuf,
    /// Whether it may replace what had the name.
    #[serde(default)]
    load_inplace: bool,
}

/// An adapter to unload.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::serve) struct Unload {
    /// Its model id.
    lora_name: String,
    /// vLLM's number of it; not used.
    #[serde(default, rename = "lora_int_id")]
    _number: Option<i64>,
}

/// `POST /v1/load_lora_adapter`.
pub(in crate::serve) async fn load(
    State(service): State<Arc<Service>>,
    load: Result<Json<Load>, JsonRejection>,
) -> Result<String, Problem> {
    let Json(load) = load?;
    let engine = engine(&service)?;
    let name = load.lora_name.clone();
    let loaded = tokio::task::spawn_blocking(move || {
        engine.load(&load.lora_name, &load.lora_path, load.load_inplace)
    });
    loaded.await.map_err(|_| Refused::Down)??;
    Ok(format!(
        "Success: LoRA adapter '{name}' added successfully."
    ))
}

/// `POST /v1/unload_lora_adapter`.
pub(in crate::serve) async fn unload(
    State(service): State<Arc<Service>>,
    unload: Result<Json<Unload>, JsonRejection>,
) -> Result<String, Problem> {
    let Json(Unload { lora_name, .. }) = unload?;
    let engine = engine(&service)?;
    let name = lora_name.clone();
    // It is looked for on disk.
    let unloaded = tokio::task::spawn_blocking(move || engine.unload(&name));
    unloaded.await.map_err(|_| Refused::Down)??;
    Ok(format!(
        "Success: LoRA adapter '{lora_name}' removed successfully."
    ))
}

fn engine(service: &Service) -> Result<Engine, Problem> {
    match &service.backend {
        Backend::Engine { engine, .. } if !service.about.adapters.is_empty() => Ok(engine.clone()),
        _ => {
            let text = "this server loads no adapters; start it with `--adapters FOLDER`";
            Err(Problem::new(StatusCode::FORBIDDEN, text))
        }
    }
}
