//! A server that is told that a run ended: one POST of the JSON, with a few more tries when the
//! server cannot be reached or is busy.

use std::time::Duration;

use flowrun_engine::hook::{Webhook, fill};
use reqwest::blocking::Client;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use reqwest::redirect::Policy;
use reqwest::{StatusCode, Url};

use super::Call;
use super::document::event_name;
use crate::address::{causes, is_loopback, shown};

/// First wait between two tries; doubles each time.
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// Longest wait between two tries.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// Sends what happened.
///
/// # Errors
/// When no try was answered with a status of success.
pub(super) fn post(call: &Call<'_>, webhook: &Webhook) -> Result<(), String> {
    let unknown = |name: String| format!("the secret `{name}` is not set");
    let filled = |text: &str| fill(text, |name| call.secret(name)).map_err(unknown);
    let url = Url::parse(filled(&webhook.url)?.trim())
        .map_err(|e| format!("what `url` stands for is no URL: {e}"))?;
    let shown = shown(&url);
    let loopback = is_loopback(&url);
    if call.world.offline && !loopback {
        return Err(format!("{shown} was not told, as no network may be used"));
    }
    let mut headers = HeaderMap::new();
    for (name, text) in &webhook.headers {
        let name = HeaderName::try_from(name.as_str())
            .map_err(|_| format!("`{name}` is not a name for a header"))?;
        let value = filled(text)?;
        let mut value = HeaderValue::from_str(value.trim())
            .map_err(|_| format!("the value of `{name}` cannot be sent in a header"))?;
        value.set_sensitive(true);
        headers.insert(name, value);
    }
    let own = [
        (CONTENT_TYPE, "application/json".to_owned()),
        (HeaderName::from_static("idempotency-key"), delivery(call)),
    ];
    for (name, value) in own {
        let value = HeaderValue::from_str(&value).map_err(|e| e.to_string())?;
        headers.entry(name).or_insert(value);
    }
    let client = client(call.hook.timeout, loopback)?;
    let body = call.body()?;
    let mut tries = 0;
    loop {
        let sent = client
            .post(url.clone())
            .headers(headers.clone())
            .body(body.clone())
            .send();
        tries += 1;
        let (why, may_pass) = match sent {
            Ok(answer) if answer.status().is_success() => return Ok(()),
            Ok(answer) => {
                let status = answer.status();
                (format!("{shown} answered {status}"), is_busy(status))
            }
            Err(error) => (format!("{shown}: {}", causes(error)), true),
        };
        if !may_pass || tries > webhook.retries {
            return Err(match tries {
                1 => why,
                _ => format!("{why} ({tries} tries)"),
            });
        }
        let wait = FIRST_WAIT.saturating_mul(1 << (tries - 1).min(16));
        std::thread::sleep(wait.min(LONGEST_WAIT));
    }
}

/// The same at every try, so that a server can tell that it was told already.
fn delivery(call: &Call<'_>) -> String {
    let event = event_name(call.event);
    format!("{}-{}-{event}", call.document.run(), call.name)
}

fn client(timeout: Duration, loopback: bool) -> Result<Client, String> {
    let client = Client::builder()
        .timeout(timeout)
        // Secrets go where they were meant to go.
        .redirect(Policy::none())
        .user_agent(concat!("flowrun/", env!("CARGO_PKG_VERSION")));
    let client = match loopback {
        true => client.no_proxy(),
        false => client,
    };
    client
        .build()
        .map_err(|e| format!("no client can be made: {}", causes(e)))
}

/// The server busy, or failing for now.
fn is_busy(status: StatusCode) -> bool {
    status.is_server_error()
        || status == StatusCode::TOO_MANY_REQUESTS
        || status == StatusCode::REQUEST_TIMEOUT
}
