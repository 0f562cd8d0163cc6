//! What people are told of a server that was called: never a path, a query or a password, which
//! may be secret.

use std::net::IpAddr;

use reqwest::Url;

/// The server without the path, which may be a secret.
pub(crate) fn shown(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{}://{host}:{port}", url.scheme()),
        None => format!("{}://{host}", url.scheme()),
    }
}

/// The server is on this machine, where no proxy leads.
pub(crate) fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// What went wrong, down to its cause, without the URL.
pub(crate) fn causes(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(why) = cause {
        text = format!("{text}: {why}");
        cause = why.source();
    }
    text
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_shown_without_what_may_be_secret() {
        for (url, server, loopback) in [
            (
                "https://u:p@chat.example/hooks/s3cret?k=v",
                "https://chat.example",
                false,
            ),
            ("http://127.0.0.1:8000/x", "http://127.0.0.1:8000", true),
            ("http://[::1]:8000/x", "http://[::1]:8000", true),
            ("http://localhost/x", "http://localhost", true),
        ] {
            let url = Url::parse(url).unwrap();
            assert_eq!(
                (shown(&url).as_str(), is_loopback(&url)),
                (server, loopback)
            );
        }
    }
}
