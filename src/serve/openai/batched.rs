//! One request of a batch: answered as if it had been sent by itself, once there is room for it.

use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::answer;
use super::{Chat, Text};
use crate::serve::problem::Problem;
use crate::serve::service::Service;

/// The paths that batches may ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::serve) enum Endpoint {
    /// Chat completions.
    #[serde(rename = "/v1/chat/completions")]
    Chat,
    /// Completions of a text.
    #[serde(rename = "/v1/completions")]
    Text,
}

impl Endpoint {
    /// Every one.
    pub(in crate::serve) const ALL: [Self; 2] = [Self::Chat, Self::Text];

    /// Its path.
    pub(in crate::serve) fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Text => "/v1/completions",
        }
    }

    /// The one of a path.
    pub(in crate::serve) fn of(path: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|endpoint| endpoint.path() == path)
    }
}

/// The answer to a request's body.
pub(in crate::serve) async fn batched(
    service: &Arc<Service>,
    endpoint: Endpoint,
    body: Value,
) -> Result<Value, Problem> {
    let (wanted, asks) = match endpoint {
        Endpoint::Chat => parsed::<Chat>(body)?.read()?,
        Endpoint::Text => parsed::<Text>(body)?.read()?,
    };
    if wanted.stream {
        return Err(Problem::unsupported("`stream` in a batch").of("stream"));
    }
    answer::batched(service, wanted, asks).await
}

fn parsed<T: DeserializeOwned>(body: Value) -> Result<T, Problem> {
    serde_json::from_value(body).map_err(|e| Problem::bad(e.to_string()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_written_as_its_path() {
        for endpoint in Endpoint::ALL {
            let written = serde_json::to_value(endpoint).unwrap();
            assert_eq!(written, endpoint.path());
            assert_eq!(Endpoint::of(endpoint.path()), Some(endpoint));
        }
        assert_eq!(Endpoint::of("/v1/embeddings"), None);
    }
}
