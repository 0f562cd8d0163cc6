//! [`Endpoint`]: where requests go, worked out from `base_url`. Knows no HTTP.

use std::net::IpAddr;

use reqwest::Url;

const FORM: &str = "write it as `http://localhost:8000/v1`";

/// Where one call of an API goes.
#[derive(Debug, Clone)]
pub(super) struct Endpoint {
    pub(super) url: Url,
    /// For people: without query, which may hold a key.
    pub(super) shown: String,
    /// Whether it is on this machine, where no proxy leads.
    pub(super) loopback: bool,
}

impl Endpoint {
    /// `base_url` with `path` behind its own; a query stays.
    pub(super) fn new(base_url: &str, path: &[&str]) -> Result<Self, String> {
        let mut url = Url::parse(base_url.trim())
            .map_err(|e| format!("`base_url` is `{base_url}`: {e}; {FORM}"))?;
        if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
            return Err(format!("`base_url` is `{base_url}`; {FORM}"));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err("put no password into `base_url`; use `api_key_env`".to_owned());
        }
        url.set_fragment(None);
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(path);
        }
        let mut shown = url.clone();
        shown.set_query(None);
        Ok(Self {
            loopback: is_loopback(&url),
            shown: shown.to_string(),
            url,
        })
    }
}

fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost"
        || host.ends_with(".localhost")
        || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const CHAT: [&str; 2] = ["chat", "completions"];

    #[test]
    fn slashes_and_queries_are_minded() {
        for (base, url) in [
            ("http://h:1/v1", "http://h:1/v1/chat/completions"),
            ("http://h:1/v1/", "http://h:1/v1/chat/completions"),
            ("http://h:1", "http://h:1/chat/completions"),
            (
                "https://h/o?api-version=2",
                "https://h/o/chat/completions?api-version=2",
            ),
        ] {
            assert_eq!(Endpoint::new(base, &CHAT).unwrap().url.as_str(), url);
        }
        let shown = Endpoint::new("https://h/v1?key=secret", &CHAT)
            .unwrap()
            .shown;
        assert_eq!(shown, "https://h/v1/chat/completions");
    }

    #[test]
    fn what_is_no_server_is_refused() {
        for base in [
            "nonsense",
            "localhost:8000/v1",
            "file:///v1",
            "http://a:b@h/v1",
        ] {
            assert!(Endpoint::new(base, &CHAT).is_err(), "{base}");
        }
    }

    #[test]
    fn this_machine_is_known_by_all_its_names() {
        for host in ["localhost", "127.0.0.1", "127.1.2.3", "[::1]", "LOCALHOST"] {
            assert!(
                Endpoint::new(&format!("http://{host}/v1"), &CHAT)
                    .unwrap()
                    .loopback,
                "{host}"
            );
        }
        assert!(
            !Endpoint::new("http://localhost.example/v1", &CHAT)
                .unwrap()
                .loopback
        );
    }
}
