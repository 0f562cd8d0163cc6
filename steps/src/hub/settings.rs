//! [`Settings`]: the user's settings of the hub, under the names that its own clients read.
//!
//! | variable | what |
//! |---|---|
//! | `HF_HUB_CACHE`, else `HF_HOME`/hub, else `huggingface/hub` in the user's caches | files |
//! | `HF_TOKEN`, else the file `HF_TOKEN_PATH`, else `HF_HOME`/token | who asks |
//! | `HF_ENDPOINT` | another server than huggingface.co |
//! | `HF_HUB_OFFLINE` | ask nothing |

use std::fmt;
use std::path::PathBuf;

use flowrun_engine::step::{Cancel, StepError, World};

/// Where the hub is unless `HF_ENDPOINT` says otherwise.
const ENDPOINT: &str = "https://huggingface.co";

/// What the user set.
#[derive(Debug)]
pub(super) struct Settings {
    /// The folder of repositories.
    pub(super) cache: PathBuf,
    /// URL of the hub, without a slash at its end.
    pub(super) endpoint: String,
    /// Who asks.
    pub(super) token: Option<Token>,
    /// What forbids asking, in words.
    pub(super) offline: Option<&'static str>,
    /// Only what is on this machine counts: nothing is asked for.
    pub(super) look_only: bool,
    /// Ends what is under way.
    pub(super) cancel: Cancel,
}

/// A token and where it is from.
pub(super) struct Token {
    value: String,
    /// For messages.
    pub(super) source: String,
}

impl Token {
    /// The value of the header `Authorization`.
    pub(super) fn bearer(&self) -> String {
        format!("Bearer {}", self.value)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token of {}", self.source)
    }
}

impl Settings {
    /// # Errors
    /// Invalid when the token or the endpoint cannot be one.
    pub(super) fn of(world: &World) -> Result<Self, StepError> {
        let token = token(world);
        if let Some(token) = &token
            && !token.value.bytes().all(|b| b.is_ascii_graphic())
        {
            let text = format!("the token in {} holds what no token does", token.source);
            return Err(StepError::invalid(text).help("set it anew: one word, `hf_…`"));
        }
        let endpoint = set(world, "HF_ENDPOINT").unwrap_or(ENDPOINT);
        let endpoint = endpoint.trim_end_matches('/');
        if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
            let text = format!("HF_ENDPOINT is `{endpoint}`, which is no http(s) URL");
            return Err(StepError::invalid(text).help(format!("for example {ENDPOINT}")));
        }
        Ok(Self {
            cache: cache_folder(world),
            endpoint: endpoint.to_owned(),
            token,
            offline: offline(world),
            look_only: world.look_only,
            cancel: world.cancel.clone(),
        })
    }
}

/// Where the hub's clients keep what they fetched.
pub(crate) fn cache_folder(world: &World) -> PathBuf {
    let named = set(world, "HF_HUB_CACHE").or_else(|| set(world, "HUGGINGFACE_HUB_CACHE"));
    match named {
        Some(folder) => expanded(folder, world),
        None => home(world).join("hub"),
    }
}

/// Whether the user has a token.
#[must_use]
pub fn has_token(world: &World) -> bool {
    token(world).is_some()
}

fn home(world: &World) -> PathBuf {
    match set(world, "HF_HOME") {
        Some(home) => expanded(home, world),
        // Beside this program's own folder in the user's caches.
        None => world.user_cache.with_file_name("huggingface"),
    }
}

fn token(world: &World) -> Option<Token> {
    for name in ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"] {
        if let Some(value) = set(world, name) {
            return Some(Token {
                value: value.to_owned(),
                source: name.to_owned(),
            });
        }
    }
    let file = set(world, "HF_TOKEN_PATH").map(|file| expanded(file, world));
    let file = file.unwrap_or_else(|| home(world).join("token"));
    let text = std::fs::read_to_string(&file).ok()?;
    let value = text.trim().to_owned();
    (!value.is_empty()).then(|| Token {
        value,
        source: format!("`{}`", file.display()),
    })
}

fn offline(world: &World) -> Option<&'static str> {
    if world.offline {
        return Some("`--offline`");
    }
    let value = set(world, "HF_HUB_OFFLINE")?.to_ascii_uppercase();
    ["1", "ON", "YES", "TRUE"]
        .contains(&value.as_str())
        .then_some("HF_HUB_OFFLINE")
}

/// The variable, unless it is empty.
fn set<'a>(world: &'a World, name: &str) -> Option<&'a str> {
    let value = world.env.get(name)?.trim();
    (!value.is_empty()).then_some(value)
}

/// A path in which `~` is the user's home, as the hub's clients have it.
fn expanded(path: &str, world: &World) -> PathBuf {
    match (path.strip_prefix("~/"), world.env.get("HOME")) {
        (Some(rest), Some(home)) => PathBuf::from(home).join(rest),
        _ => PathBuf::from(path),
    }
}
