//! The paths. Files and jobs are read and written off the threads that serve others.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Multipart, Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use serde::Deserialize;
use serde_json::{Value, json};

use super::FineTuning;
use super::files::PURPOSE;
use super::jobs::{Job, Order};
use crate::serve::problem::{Problem, Refused};
use crate::serve::service::Service;

/// Things that one answer lists where nothing is said.
const PAGE: usize = 20;

type Shared = State<Arc<Service>>;
type Answer = Result<Json<Value>, Problem>;

/// Which part of a list.
#[derive(Debug, Deserialize)]
pub(in crate::serve) struct Part {
    after: Option<String>,
    limit: Option<usize>,
}

/// Runs `work` where blocking harms nobody.
async fn with<T: Send + 'static>(
    service: Arc<Service>,
    work: impl FnOnce(&FineTuning) -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    let Some(tuning) = service.fine_tuning.clone() else {
        let text = "this server trains nothing; start it with --fine-tuning FOLDER";
        return Err(Problem::new(StatusCode::NOT_FOUND, text));
    };
    let done = tokio::task::spawn_blocking(move || work(&tuning)).await;
    done.map_err(|_| Problem::from(Refused::Down))?
}

/// A part of a list whose newest things come first.
fn page(all: Vec<Value>, part: &Part) -> Json<Value> {
    let id = |value: &Value| value["id"].as_str().map(str::to_owned);
    let after = part.after.as_ref();
    let start = after.and_then(|after| all.iter().position(|v| id(v).as_ref() == Some(after)));
    let start = start.map_or(0, |at| at + 1);
    let rest = all.len().saturating_sub(start);
    let limit = part.limit.unwrap_or(PAGE);
    let data: Vec<Value> = all.into_iter().skip(start).take(limit).collect();
    Json(json!({
        "object": "list", "has_more": rest > data.len(),
        "first_id": data.first().and_then(id), "last_id": data.last().and_then(id),
        "data": data,
    }))
}

/// `POST /v1/files`.
pub(in crate::serve) async fn upload(State(service): Shared, mut form: Multipart) -> Answer {
    let (mut file, mut purpose) = (None, None);
    let broken = |e: axum::extract::multipart::MultipartError| Problem::bad(e.body_text());
    while let Some(field) = form.next_field().await.map_err(broken)? {
        match field.name() {
            Some("file") => {
                let name = field.file_name().unwrap_or("file").to_owned();
                file = Some((name, field.bytes().await.map_err(broken)?));
            }
            Some("purpose") => purpose = Some(field.text().await.map_err(broken)?),
            other => {
                let name = other.unwrap_or_default();
                return Err(Problem::unsupported(&format!("the field `{name}`")));
            }
        }
    }
    if purpose.as_deref() != Some(PURPOSE) {
        return Err(Problem::bad(format!("`purpose` must be `{PURPOSE}`")).of("purpose"));
    }
    let (name, bytes) = file.ok_or_else(|| Problem::bad("`file` is missing").of("file"))?;
    let added = with(service, move |tuning| tuning.files.add(&name, &bytes)).await?;
    Ok(Json(json!(added)))
}

/// `GET /v1/files`.
pub(in crate::serve) async fn files(State(service): Shared, Query(part): Query<Part>) -> Answer {
    let all = with(service, |tuning| Ok(tuning.files.list())).await?;
    Ok(page(all.iter().map(|file| json!(file)).collect(), &part))
}

/// `GET /v1/files/{id}`.
pub(in crate::serve) async fn file(State(service): Shared, Path(id): Path<String>) -> Answer {
    let file = with(service, move |tuning| tuning.files.get(&id)).await?;
    Ok(Json(json!(file)))
}

/// `GET /v1/files/{id}/content`.
pub(in crate::serve) async fn file_content(
    State(service): Shared,
    Path(id): Path<String>,
) -> Result<impl IntoResponse, Problem> {
    let bytes = with(service, move |tuning| tuning.files.content(&id)).await?;
    Ok(([(header::CONTENT_TYPE, "application/jsonl")], bytes))
}

/// `DELETE /v1/files/{id}`.
pub(in crate::serve) async fn delete_file(
    State(service): Shared,
    Path(id): Path<String>,
) -> Answer {
    let of = id.clone();
    with(service, move |tuning| tuning.files.delete(&of)).await?;
    Ok(Json(json!({"id": id, "object": "file", "deleted": true})))
}

/// `POST /v1/fine_tuning/jobs`.
pub(in crate::serve) async fn create_job(
    State(service): Shared,
    order: Result<Json<Order>, JsonRejection>,
) -> Answer {
    let Json(order) = order?;
    let made = with(service, move |tuning| {
        tuning.files.get(&order.training_file).map_err(|_| {
            let text = format!("there is no file `{}` here", order.training_file);
            Problem::bad(text).of("training_file")
        })?;
        tuning.jobs.add(order)
    });
    Ok(Json(made.await?.object()))
}

/// `GET /v1/fine_tuning/jobs`.
pub(in crate::serve) async fn jobs(State(service): Shared, Query(part): Query<Part>) -> Answer {
    let all = with(service, |tuning| Ok(tuning.jobs.list())).await?;
    Ok(page(all.iter().map(Job::object).collect(), &part))
}

/// `GET /v1/fine_tuning/jobs/{id}`.
pub(in crate::serve) async fn job(State(service): Shared, Path(id): Path<String>) -> Answer {
    let job = with(service, move |tuning| tuning.jobs.get(&id)).await?;
    Ok(Json(job.object()))
}

/// `POST /v1/fine_tuning/jobs/{id}/cancel`.
pub(in crate::serve) async fn cancel(State(service): Shared, Path(id): Path<String>) -> Answer {
    let job = with(service, move |tuning| tuning.jobs.cancel(&id)).await?;
    Ok(Json(job.object()))
}

/// `GET /v1/fine_tuning/jobs/{id}/events`.
pub(in crate::serve) async fn events(
    State(service): Shared,
    Path(id): Path<String>,
    Query(part): Query<Part>,
) -> Answer {
    let job = with(service, move |tuning| tuning.jobs.get(&id)).await?;
    Ok(page(job.events.into_iter().rev().collect(), &part))
}

/// `GET /v1/fine_tuning/jobs/{id}/checkpoints`.
pub(in crate::serve) async fn checkpoints(
    State(service): Shared,
    Path(id): Path<String>,
    Query(part): Query<Part>,
) -> Answer {
    let job = with(service, move |tuning| tuning.jobs.get(&id)).await?;
    Ok(page(job.checkpoints.into_iter().rev().collect(), &part))
}
