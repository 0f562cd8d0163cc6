//! What a request's body may be: whole, small, and in time. And what is counted of every request.

use std::sync::Arc;
use std::time::Instant;

use axum::body::{Body, to_bytes};
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tokio::sync::Semaphore;

use super::problem::Problem;
use super::service::Service;

/// Bytes of a request at most, unless it is a file.
pub(super) const BODY: usize = 1 << 20;
/// Files that are taken in at once, each until it is kept; others wait, within the time that a
/// request has to come.
static UPLOADS: Semaphore = Semaphore::const_new(4);

/// Reads the body before anything else is done about it, so that a slow client holds nothing but
/// its connection.
pub(super) async fn whole_body(
    State(service): State<Arc<Service>>,
    request: Request,
    next: Next,
) -> Response {
    let (parts, body) = request.into_parts();
    let upload = service.keeps_files() && parts.uri.path() == super::routes::UPLOAD;
    let most = match upload {
        true => super::files::FILE,
        false => BODY,
    };
    let length = parts.headers.get(header::CONTENT_LENGTH);
    let length = length.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| length > most as u64) {
        return too_large(&service, most);
    }
    let whole = async {
        // The semaphore is never closed.
        let place = match upload {
            true => UPLOADS.acquire().await.ok(),
            false => None,
        };
        (to_bytes(body, most).await, place)
    };
    match tokio::time::timeout(service.limits.read, whole).await {
        // A file is in memory until it is kept, and has its place for as long.
        Ok((Ok(bytes), _place)) => {
            next.run(Request::from_parts(parts, Body::from(bytes)))
                .await
        }
        Ok((Err(error), _)) if error.to_string().contains("length limit") => {
            too_large(&service, most)
        }
        Ok((Err(_), _)) => closing(Problem::bad("the request broke off")),
        Err(_) => {
            service.metrics.refused("slow_request");
            let text = "the request did not come in time";
            closing(Problem::new(StatusCode::REQUEST_TIMEOUT, text))
        }
    }
}

fn too_large(service: &Service, most: usize) -> Response {
    service.metrics.refused("too_large");
    let text = format!("a request has at most {most} bytes");
    closing(Problem::new(StatusCode::PAYLOAD_TOO_LARGE, text))
}

/// The rest of the body is not waited for.
fn closing(problem: Problem) -> Response {
    let mut response = problem.into_response();
    let close = HeaderValue::from_static("close");
    response.headers_mut().insert(header::CONNECTION, close);
    response
}

/// Counts a request whose client goes away while it is under way.
struct Under<'a>(Option<&'a Service>);

impl Drop for Under<'_> {
    fn drop(&mut self) {
        if let Some(service) = self.0 {
            service.metrics.given_up();
        }
    }
}

/// Counts and times every request. Logs neither keys nor texts.
pub(super) async fn counted(
    State(service): State<Arc<Service>>,
    request: Request,
    next: Next,
) -> Response {
    let path = known(
        request
            .extensions()
            .get::<MatchedPath>()
            .map(MatchedPath::as_str),
    );
    let started = Instant::now();
    let mut under = Under(Some(&service));
    let response = next.run(request).await;
    under.0 = None;
    let (status, took) = (response.status().as_u16(), started.elapsed());
    service.metrics.request(path, status, took);
    tracing::debug!(path, status, ms = took.as_millis(), "request");
    response
}

/// The route, out of those that there are: what a caller makes up is not a series of its own.
fn known(matched: Option<&str>) -> &'static str {
    let routes = super::routes::PATHS.iter().copied();
    matched
        .and_then(|matched| routes.into_iter().find(|route| *route == matched))
        .unwrap_or("other")
}
