//! The paths. Files are read and written off the threads that serve others.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Multipart, Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures::stream;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;

use super::{FileObject, Files};
use crate::serve::list::{Part, page};
use crate::serve::problem::{Problem, Refused};
use crate::serve::service::Service;
use crate::serve::{batches, fine_tuning};

/// Bytes of a file that are sent at once.
const PIECE: usize = 64 << 10;

type Shared = State<Arc<Service>>;
type Answer = Result<Json<Value>, Problem>;

/// Runs `work` on the folders of files, where blocking harms nobody.
async fn with<T: Send + 'static>(
    service: &Service,
    work: impl FnOnce(&[Files]) -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    let folders = service.files();
    if folders.is_empty() {
        let text = "this server keeps no files; start it with --batches FOLDER or \
                    --fine-tuning FOLDER";
        return Err(Problem::new(StatusCode::NOT_FOUND, text));
    }
    let done = tokio::task::spawn_blocking(move || work(&folders)).await;
    done.map_err(|_| Problem::from(Refused::Down))?
}

/// The folder that a file is in.
fn find<'a>(folders: &'a [Files], id: &str) -> Result<(&'a Files, FileObject), Problem> {
    let mut last = Problem::internal("there is no folder of files");
    for files in folders {
        match files.get(id) {
            Ok(object) => return Ok((files, object)),
            Err(problem) => last = problem,
        }
    }
    Err(last)
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
    let (name, bytes) = file.ok_or_else(|| Problem::bad("`file` is missing").of("file"))?;
    let absent = |what: &str, option: &str| {
        let text = format!("this server {what}; start it with {option} FOLDER");
        Problem::new(StatusCode::NOT_FOUND, text)
    };
    let added = match purpose.as_deref() {
        Some(fine_tuning::PURPOSE) => {
            let tuning = service.fine_tuning.clone();
            let tuning = tuning.ok_or_else(|| absent("trains nothing", "--fine-tuning"))?;
            tokio::task::spawn_blocking(move || tuning.upload(&name, &bytes)).await
        }
        Some(batches::PURPOSE) => {
            let batches = service.batches.clone();
            let batches = batches.ok_or_else(|| absent("takes no batches", "--batches"))?;
            tokio::task::spawn_blocking(move || batches.upload(&name, &bytes)).await
        }
        _ => {
            let (train, batch) = (fine_tuning::PURPOSE, batches::PURPOSE);
            let text = format!("`purpose` must be `{batch}` or `{train}`");
            return Err(Problem::bad(text).of("purpose"));
        }
    };
    let added = added.map_err(|_| Problem::from(Refused::Down))??;
    Ok(Json(json!(added)))
}

/// Which files are listed.
#[derive(Debug, Deserialize)]
pub(in crate::serve) struct Listing {
    purpose: Option<String>,
    /// `asc` or `desc`, by the time that they were made at; the newest first when left out.
    order: Option<String>,
    after: Option<String>,
    limit: Option<usize>,
}

/// `GET /v1/files`.
pub(in crate::serve) async fn files(
    State(service): Shared,
    Query(listing): Query<Listing>,
) -> Answer {
    let oldest_first = match listing.order.as_deref() {
        Some("asc") => true,
        None | Some("desc") => false,
        Some(other) => {
            let text = format!("`order` is `asc` or `desc`, not `{other}`");
            return Err(Problem::bad(text).of("order"));
        }
    };
    let purpose = listing.purpose;
    let listed = with(&service, move |folders| {
        let mut all: Vec<FileObject> = folders.iter().flat_map(Files::list).collect();
        all.retain(|file| {
            purpose
                .as_ref()
                .is_none_or(|purpose| *purpose == file.purpose)
        });
        all.sort_by(|a, b| (b.created_at, &b.id).cmp(&(a.created_at, &a.id)));
        if oldest_first {
            all.reverse();
        }
        Ok(all)
    });
    let all = listed.await?;
    let part = Part {
        after: listing.after,
        limit: listing.limit,
    };
    page(all.iter().map(|file| json!(file)).collect(), &part)
}

/// `GET /v1/files/{id}`.
pub(in crate::serve) async fn file(State(service): Shared, Path(id): Path<String>) -> Answer {
    let found = with(&service, move |folders| {
        find(folders, &id).map(|(_, file)| file)
    });
    Ok(Json(json!(found.await?)))
}

/// `GET /v1/files/{id}/content`. A large one is never in memory as a whole.
pub(in crate::serve) async fn file_content(
    State(service): Shared,
    Path(id): Path<String>,
) -> Result<Response, Problem> {
    let found = with(&service, move |folders| {
        find(folders, &id).map(|(files, _)| files.content(&id))
    });
    let path: PathBuf = found.await?;
    let broken = |e: std::io::Error| Problem::internal(e.to_string());
    let file = tokio::fs::File::open(&path).await;
    let file = file.map_err(|e| match e.kind() {
        // It was deleted just now, or its deletion was cut off.
        ErrorKind::NotFound => Problem::new(StatusCode::NOT_FOUND, "this file has no content"),
        _ => broken(e),
    })?;
    let length = file.metadata().await.map_err(broken)?.len();
    let pieces = stream::unfold(Some(file), |file| async move {
        let mut file = file?;
        let mut piece = vec![0u8; PIECE];
        match file.read(&mut piece).await {
            Ok(0) => None,
            Ok(count) => {
                piece.truncate(count);
                Some((Ok(piece), Some(file)))
            }
            // The client sees an answer that is too short.
            Err(error) => Some((Err(error), None)),
        }
    });
    let headers = [
        (header::CONTENT_TYPE, "application/jsonl".to_owned()),
        (header::CONTENT_LENGTH, length.to_string()),
    ];
    Ok((headers, Body::from_stream(pieces)).into_response())
}

/// `DELETE /v1/files/{id}`.
pub(in crate::serve) async fn delete(State(service): Shared, Path(id): Path<String>) -> Answer {
    let (of, needed) = (id.clone(), Arc::clone(&service));
    let deleted = with(&service, move |folders| {
        let batches = needed.batches.as_ref();
        let tuning = needed.fine_tuning.as_ref();
        let by = if batches.is_some_and(|batches| batches.needs(&of)) {
            Some("batch")
        } else if tuning.is_some_and(|tuning| tuning.needs(&of)) {
            Some("job")
        } else {
            None
        };
        if let Some(by) = by {
            let text = format!(
                "a {by} that has not ended needs the file `{of}`; cancel the {by}, or wait for \
                 its end"
            );
            return Err(Problem::new(StatusCode::CONFLICT, text).code("file_in_use"));
        }
        find(folders, &of)?.0.delete(&of)
    });
    deleted.await?;
    Ok(Json(json!({"id": id, "object": "file", "deleted": true})))
}
