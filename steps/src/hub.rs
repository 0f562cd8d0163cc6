//! Files of the Hugging Face hub, through its own client and cache.

use std::path::PathBuf;

use flowrun_engine::step::{StepError, StepErrorKind, World};
use hf_hub::api::sync::{ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};

/// A file of a data set.
///
/// # Errors
/// Transient when it is not in the hub's cache and the hub cannot be reached; invalid when the hub
/// has no such file, or not for this user; unseen when it would have to be fetched and the world is
/// only looked at.
pub fn dataset_file(
    repo: &str,
    revision: &str,
    file: &str,
    world: &World,
) -> Result<PathBuf, StepError> {
    fetch(
        Repo::with_revision(repo.into(), RepoType::Dataset, revision.into()),
        file,
        world,
    )
}

/// A file of a model.
///
/// # Errors
/// As [`dataset_file`].
pub fn model_file(
    repo: &str,
    revision: &str,
    file: &str,
    world: &World,
) -> Result<PathBuf, StepError> {
    fetch(
        Repo::with_revision(repo.into(), RepoType::Model, revision.into()),
        file,
        world,
    )
}

/// Where the hub's client keeps what it fetched.
pub(crate) fn cache_folder(world: &World) -> PathBuf {
    let home = world.env.get("HF_HOME").map(PathBuf::from);
    home.unwrap_or_else(|| world.user_cache.join("huggingface"))
        .join("hub")
}

fn fetch(repo: Repo, file: &str, world: &World) -> Result<PathBuf, StepError> {
    let cache = Cache::new(cache_folder(world));
    if let Some(path) = cache.repo(repo.clone()).get(file) {
        return Ok(path);
    }
    let name = format!("{}/{file}", repo.url());
    let unavailable = |why: String| {
        StepError::new(
            StepErrorKind::Transient,
            format!("`{name}` cannot be had: {why}"),
        )
        .help("for a gated repository, accept its licence and set HF_TOKEN")
    };
    if world.offline {
        return Err(unavailable(
            "it is not in the cache and `--offline` is set".to_owned(),
        ));
    }
    if world.look_only {
        return Err(StepError::unseen(&name));
    }
    let mut builder = ApiBuilder::from_cache(cache)
        .with_progress(false)
        .with_retries(2);
    if let Some(token) = world.env.get("HF_TOKEN") {
        builder = builder.with_token(Some(token.clone()));
    }
    if let Some(endpoint) = world.env.get("HF_ENDPOINT") {
        builder = builder.with_endpoint(endpoint.clone());
    }
    let api = builder.build().map_err(|e| unavailable(e.to_string()))?;
    api.repo(repo)
        .get(file)
        .map_err(|error| match refusal(&error) {
            Some(status) => {
                StepError::invalid(format!("`{name}` cannot be had: the hub says {status}")).help(
                    "check the names of repository, revision and file; for a private or gated \
             repository, accept its licence and set HF_TOKEN",
                )
            }
            None => unavailable(error.to_string()),
        })
}

/// The status by which the hub says no, whoever asks again; none for what may pass.
fn refusal(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::TooManyRetries(error) => refusal(error),
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(status) => {
                let final_one = (400..500).contains(&status) && ![407, 408, 429].contains(&status);
                final_one.then_some(status)
            }
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::*;

    /// What is said of a hub that answers everything with `status`.
    fn error_of(status: &'static str) -> StepError {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        // Ends with the test's process; a client may ask more than once.
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let _ = stream.read(&mut [0; 4096]);
                let head = "Content-Length: 0\r\nConnection: close";
                let _ = write!(stream, "HTTP/1.1 {status}\r\n{head}\r\n\r\n");
            }
        });
        let dir = tempfile::tempdir().unwrap();
        let endpoint = ("HF_ENDPOINT".to_owned(), format!("http://{address}"));
        let world = World {
            user_cache: dir.path().to_path_buf(),
            env: [endpoint].into_iter().collect(),
            ..World::default()
        };
        model_file("owner/name", "main", "config.json", &world).unwrap_err()
    }

    #[test]
    fn what_the_hub_refuses_is_not_taken_for_an_outage() {
        for (status, text) in [("404 Not Found", "404"), ("401 Unauthorized", "401")] {
            let error = error_of(status);
            assert_eq!(error.kind, StepErrorKind::Invalid, "{}", error.message);
            assert!(error.message.contains(text), "{}", error.message);
        }
        for status in ["429 Too Many Requests", "503 Service Unavailable"] {
            let error = error_of(status);
            assert_eq!(error.kind, StepErrorKind::Transient, "{}", error.message);
        }
    }
}
