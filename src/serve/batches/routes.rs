//! The paths. Batches are read and written off the threads that serve others.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use serde_json::Value;

use super::batch::BatchOrder;
use super::{Batches, PURPOSE};
use crate::serve::list::{Part, page};
use crate::serve::orders::Order;
use crate::serve::problem::{Problem, Refused};
use crate::serve::service::Service;

type Shared = State<Arc<Service>>;
type Answer = Result<Json<Value>, Problem>;

/// Runs `work` where blocking harms nobody.
async fn with<T: Send + 'static>(
    service: Arc<Service>,
    work: impl FnOnce(&Batches) -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    let Some(batches) = service.batches.clone() else {
        let text = "this server takes no batches; start it with --batches FOLDER";
        return Err(Problem::new(StatusCode::NOT_FOUND, text));
    };
    let done = tokio::task::spawn_blocking(move || work(&batches)).await;
    done.map_err(|_| Problem::from(Refused::Down))?
}

/// `POST /v1/batches`.
pub(in crate::serve) async fn create(
    State(service): Shared,
    order: Result<Json<BatchOrder>, JsonRejection>,
) -> Answer {
    let Json(order) = order?;
    let made = with(service, move |batches| {
        let file = batches.files.get(&order.input_file_id);
        if file.is_ok_and(|file| file.purpose == PURPOSE) {
            return batches.queue.order(order, &batches.files);
        }
        let text = format!(
            "there is no file `{}` of requests here",
            order.input_file_id
        );
        Err(Problem::bad(text).of("input_file_id"))
    });
    Ok(Json(made.await?.object()))
}

/// `GET /v1/batches`.
pub(in crate::serve) async fn batches(State(service): Shared, Query(part): Query<Part>) -> Answer {
    let all = with(service, |batches| Ok(batches.queue.objects())).await?;
    page(all, &part)
}

/// `GET /v1/batches/{id}`.
pub(in crate::serve) async fn batch(State(service): Shared, Path(id): Path<String>) -> Answer {
    let batch = with(service, move |batches| batches.queue.get(&id)).await?;
    Ok(Json(batch.object()))
}

/// `POST /v1/batches/{id}/cancel`.
pub(in crate::serve) async fn cancel(State(service): Shared, Path(id): Path<String>) -> Answer {
    let batch = with(service, move |batches| batches.queue.cancel(&id)).await?;
    Ok(Json(batch.object()))
}
