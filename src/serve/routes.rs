//! Which path does what.

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, State};
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse};
use axum::routing::{get, post};
use axum::{Json, Router, middleware};
use serde_json::{Value, json};

use super::guard::{self, Guard};
use super::problem::{Problem, Refused, shaped};
use super::service::Service;
use super::{batches, files, fine_tuning, limits, metrics, openai, openapi, predict, question};

const PAGE: &str = include_str!("page.html");
/// The page's own script and style, requests to this server, and nothing else.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; \
                      connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Every path, as the metrics and the OpenAPI document name it.
pub(super) const PATHS: [&str; 25] = [
    "/",
    "/predict",
    "/predict/batch",
    "/health",
    "/health/live",
    "/health/ready",
    "/metrics",
    "/openapi.json",
    "/v1/models",
    "/v1/models/{*id}",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    UPLOAD,
    "/v1/files/{id}",
    "/v1/files/{id}/content",
    "/v1/batches",
    "/v1/batches/{id}",
    "/v1/batches/{id}/cancel",
    "/v1/fine_tuning/jobs",
    "/v1/fine_tuning/jobs/{id}",
    "/v1/fine_tuning/jobs/{id}/cancel",
    "/v1/fine_tuning/jobs/{id}/events",
    "/v1/fine_tuning/jobs/{id}/checkpoints",
];
/// The path that takes files.
pub(super) const UPLOAD: &str = "/v1/files";

/// The whole server.
pub(super) fn app(service: Arc<Service>, guard: Guard) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/predict", post(predict::predict))
        .route("/predict/batch", post(predict::batch))
        .route("/health", get(health))
        .route("/health/live", get(live))
        .route("/health/ready", get(ready))
        .route("/metrics", get(measured))
        .route("/openapi.json", get(openapi::document))
        .route("/v1/models", get(openai::models))
        .route("/v1/models/{*id}", get(openai::model))
        .route("/v1/chat/completions", post(openai::chat))
        .route("/v1/completions", post(openai::text))
        .route("/v1/load_lora_adapter", post(openai::load))
        .route("/v1/unload_lora_adapter", post(openai::unload))
        .merge(file_paths())
        .merge(batch_paths())
        .merge(fine_tuning_paths())
        .fallback(async || Problem::new(StatusCode::NOT_FOUND, "there is no such path"))
        .method_not_allowed_fallback(async || {
            let status = StatusCode::METHOD_NOT_ALLOWED;
            Problem::new(status, "this path takes another method")
        })
        .layer(middleware::map_response(shaped))
        .layer(middleware::from_fn_with_state(
            Arc::clone(&service),
            limits::whole_body,
        ))
        .layer(middleware::from_fn_with_state(
            Arc::new(guard),
            guard::check,
        ))
        .layer(middleware::from_fn_with_state(
            Arc::clone(&service),
            limits::counted,
        ))
        .with_state(service)
}

fn file_paths() -> Router<Arc<Service>> {
    let limit = DefaultBodyLimit::max(files::FILE);
    let all = get(files::files).post(files::upload);
    Router::new()
        .route(UPLOAD, all.layer(limit))
        .route("/v1/files/{id}", get(files::file).delete(files::delete))
        .route("/v1/files/{id}/content", get(files::file_content))
}

fn batch_paths() -> Router<Arc<Service>> {
    let all = get(batches::batches).post(batches::create);
    Router::new()
        .route("/v1/batches", all)
        .route("/v1/batches/{id}", get(batches::batch))
        .route("/v1/batches/{id}/cancel", post(batches::cancel))
}

fn fine_tuning_paths() -> Router<Arc<Service>> {
    use fine_tuning::{cancel, checkpoints, create_job, events, job, jobs};
    const JOBS: &str = "/v1/fine_tuning/jobs";
    Router::new()
        .route(JOBS, get(jobs).post(create_job))
        .route(&format!("{JOBS}/{{id}}"), get(job))
        .route(&format!("{JOBS}/{{id}}/cancel"), post(cancel))
        .route(&format!("{JOBS}/{{id}}/events"), get(events))
        .route(&format!("{JOBS}/{{id}}/checkpoints"), get(checkpoints))
}

async fn page() -> impl IntoResponse {
    let headers = [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    (headers, Html(PAGE))
}

async fn measured(State(service): State<Arc<Service>>) -> Result<impl IntoResponse, Problem> {
    let text = service.metrics.text(&service);
    let text = text.map_err(|e| Problem::internal(e.to_string()))?;
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text))
}

/// What is served, and by which process.
async fn health(State(service): State<Arc<Service>>) -> Result<Json<Value>, Problem> {
    check_up(&service)?;
    let about = &service.about;
    let status = if service.is_draining() {
        "draining"
    } else {
        "ok"
    };
    Ok(Json(json!({
        "status": status,
        "name": about.name,
        "model": about.model_id,
        "bundle": about.digest,
        "pid": std::process::id(),
        "inputs": question::describe(&about.inputs),
    })))
}

/// Whether to let the process live.
async fn live(State(service): State<Arc<Service>>) -> Result<Json<Value>, Problem> {
    check_up(&service)?;
    Ok(Json(json!({ "status": "ok" })))
}

/// Whether to send it requests.
async fn ready(State(service): State<Arc<Service>>) -> Result<Json<Value>, Problem> {
    check_up(&service)?;
    match service.is_draining() {
        true => Err(Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "the server is about to end",
        )),
        false => Ok(Json(json!({ "status": "ok" }))),
    }
}

fn check_up(service: &Service) -> Result<(), Problem> {
    match service.is_up() {
        true => Ok(()),
        false => Err(Refused::Down.into()),
    }
}
