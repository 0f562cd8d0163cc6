//! Which path does what.

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router, middleware};
use serde_json::{Value, json};

use super::guard::{self, Guard};
use super::problem::Problem;
use super::{Service, openai, predict};

/// Bytes of a request at most.
const BODY_LIMIT: usize = 1 << 20;

/// The whole server.
pub(super) fn app(service: Arc<Service>, guard: Guard) -> Router {
    Router::new()
        .route("/predict", post(predict::predict))
        .route("/health", get(health))
        .route("/v1/models", get(openai::models))
        .route("/v1/models/{*id}", get(openai::model))
        .route("/v1/chat/completions", post(openai::chat))
        .fallback(async || Problem::new(StatusCode::NOT_FOUND, "there is no such path"))
        .method_not_allowed_fallback(async || {
            let status = StatusCode::METHOD_NOT_ALLOWED;
            Problem::new(status, "this path takes another method")
        })
        .with_state(service)
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .layer(middleware::from_fn_with_state(
            Arc::new(guard),
            guard::check,
        ))
}

async fn health(State(service): State<Arc<Service>>) -> Result<Json<Value>, Problem> {
    if !service.queue.is_up() {
        return Err(super::queue::Refused::Down.into());
    }
    Ok(Json(json!({
        "status": "ok",
        "name": service.manifest.name,
        "model": service.manifest.model_id,
        "bundle": service.digest,
        "pid": std::process::id(),
    })))
}
