//! [`Guard`]: who may ask. A key where one is set, and on loopback only requests that were meant
//! for this machine (DNS rebinding makes a browser send others).

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderName, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::problem::Problem;

/// Names by which a machine calls itself.
const OWN_NAMES: [&str; 3] = ["localhost", "127.0.0.1", "[::1]"];

/// Paths that need no key: probes, and the page, which asks for the key.
const OPEN: [&str; 4] = ["/", "/health", "/health/live", "/health/ready"];

/// From where a browser says that a page sends a request (Fetch Metadata, W3C).
const FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// Who may ask.
pub(super) struct Guard {
    /// Of the key: hashes are compared in constant time, whatever the lengths of the keys.
    key: Option<blake3::Hash>,
    loopback: bool,
}

impl Guard {
    pub(super) fn new(key: Option<&str>, loopback: bool) -> Self {
        let key = key.map(|key| blake3::hash(key.as_bytes()));
        Self { key, loopback }
    }

    fn check(&self, request: &Request) -> Result<(), Problem> {
        let header = |name| request.headers().get(name)?.to_str().ok();
        // HTTP/2 names the host in the URI.
        let host = header(header::HOST).or_else(|| request.uri().authority().map(|a| a.as_str()));
        if self.loopback && !host.is_some_and(is_own_name) {
            return Err(Problem::new(
                StatusCode::FORBIDDEN,
                "this server answers requests for localhost only",
            ));
        }
        // A page may send forms to other sites, uploads among them, without being let to read.
        let foreign = match header(header::ORIGIN) {
            Some(origin) => !host.is_some_and(|host| is_of(origin, host)),
            None => matches!(header(FETCH_SITE), Some("cross-site" | "same-site")),
        };
        if foreign && !request.method().is_safe() {
            return Err(Problem::new(
                StatusCode::FORBIDDEN,
                "this server takes no requests from pages of other sites",
            ));
        }
        // Health probes and browsers carry no key, and learn nothing that needs one.
        let open = OPEN.contains(&request.uri().path());
        let Some(key) = self.key.filter(|_| !open) else {
            return Ok(());
        };
        let given = header(header::AUTHORIZATION).and_then(|value| value.strip_prefix("Bearer "));
        match given {
            Some(given) if blake3::hash(given.trim().as_bytes()) == key => Ok(()),
            _ => Err(Problem::new(
                StatusCode::UNAUTHORIZED,
                "give the server's key: `Authorization: Bearer KEY`",
            )
            .code("invalid_api_key")),
        }
    }
}

/// Whether an origin, `http://host:port`, is of the host that was asked.
fn is_of(origin: &str, host: &str) -> bool {
    let (_, name) = origin.split_once("://").unwrap_or(("", origin));
    name.eq_ignore_ascii_case(host)
}

fn is_own_name(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    OWN_NAMES.iter().any(|own| own.eq_ignore_ascii_case(name))
}

/// Lets through what the guard allows.
pub(super) async fn check(
    State(guard): State<Arc<Guard>>,
    request: Request,
    next: Next,
) -> Response {
    match guard.check(&request) {
        Ok(()) => next.run(request).await,
        Err(problem) => problem.into_response(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use axum::body::Body;

    fn asks(guard: &Guard, path: &str, host: &str, key: Option<&str>) -> bool {
        let mut request = Request::builder().uri(path).header("host", host);
        if let Some(key) = key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        guard.check(&request.body(Body::empty()).unwrap()).is_ok()
    }

    #[test]
    fn only_the_key_opens() {
        let guard = Guard::new(Some("secret"), false);
        assert!(asks(&guard, "/predict", "bank.example", Some("secret")));
        assert!(!asks(&guard, "/predict", "bank.example", Some("secre")));
        assert!(!asks(&guard, "/predict", "bank.example", None));
        assert!(asks(&guard, "/health", "bank.example", None));
    }

    #[test]
    fn a_page_of_another_site_sends_nothing() {
        let guard = Guard::new(None, true);
        let sent = |method: &str, name: &str, value: &str| {
            let request = Request::builder().method(method).uri("/v1/files");
            let request = request.header("host", "localhost:8000").header(name, value);
            guard.check(&request.body(Body::empty()).unwrap()).is_ok()
        };
        assert!(sent("POST", "origin", "http://localhost:8000"));
        assert!(sent("POST", "sec-fetch-site", "same-origin"));
        assert!(sent("GET", "sec-fetch-site", "cross-site"), "a link");
        for origin in ["https://evil.example", "null", "http://localhost:8001"] {
            assert!(!sent("POST", "origin", origin), "{origin}");
        }
        assert!(!sent("POST", "sec-fetch-site", "cross-site"));
        assert!(!sent("DELETE", "sec-fetch-site", "same-site"));
    }

    #[test]
    fn a_page_of_another_site_cannot_reach_loopback() {
        let guard = Guard::new(None, true);
        assert!(!asks(&guard, "/predict", "evil.example:8000", None));
        for own in [
            "localhost:8000",
            "127.0.0.1:8000",
            "[::1]:8000",
            "localhost",
        ] {
            assert!(asks(&guard, "/predict", own, None), "{own}");
        }
    }
}
