//! The paths. Jobs are read and written off the threads that serve others.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use serde_json::Value;

use super::FineTuning;
use super::jobs::JobOrder;
use crate::serve::list::{Part, page};
use crate::serve::orders::Order;
use crate::serve::problem::{Problem, Refused};
use crate::serve::service::Service;

type Shared = State<Arc<Service>>;
type Answer = Result<Json<Value>, Problem>;

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

/// `POST /v1/fine_tuning/jobs`.
pub(in crate::serve) async fn create_job(
    State(service): Shared,
    order: Result<Json<JobOrder>, JsonRejection>,
) -> Answer {
    let Json(order) = order?;
    let made = with(service, move |tuning| {
        let file = tuning.files.get(&order.training_file);
        if file.is_ok_and(|file| file.purpose == super::PURPOSE) {
            let job = order.job(&tuning.base_id)?;
            return tuning.jobs.add(job, |_| Ok(()));
        }
        let text = format!("there is no file `{}` of chats here", order.training_file);
        Err(Problem::bad(text).of("training_file"))
    });
    Ok(Json(made.await?.object()))
}

/// `GET /v1/fine_tuning/jobs`.
pub(in crate::serve) async fn jobs(State(service): Shared, Query(part): Query<Part>) -> Answer {
    let all = with(service, |tuning| Ok(tuning.jobs.objects())).await?;
    page(all, &part)
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
    page(job.events.into_iter().rev().collect(), &part)
}

/// `GET /v1/fine_tuning/jobs/{id}/checkpoints`.
pub(in crate::serve) async fn checkpoints(
    State(service): Shared,
    Path(id): Path<String>,
    Query(part): Query<Part>,
) -> Answer {
    let job = with(service, move |tuning| tuning.jobs.get(&id)).await?;
    page(job.checkpoints.into_iter().rev().collect(), &part)
}
