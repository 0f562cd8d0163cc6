//! `/v1/…`: the models in the shapes of OpenAI's API, so that its clients work unmodified. What
//! cannot be done is refused, never quietly left out.
//!
//! | file | what |
//! |---|---|
//! | `chat` | `POST /v1/chat/completions` |
//! | `text` | `POST /v1/completions` |
//! | `drawing` | what both say about drawing tokens |
//! | `schema` | JSON Schemas with finitely many answers, as choices |
//! | `answer` | answers, whole and streamed |
//! | `batched` | one request of a batch |
//! | `models` | `/v1/models`, and loading and unloading of adapters |

mod answer;
mod batched;
mod chat;
mod drawing;
mod models;
mod schema;
mod text;

pub(super) use batched::{Endpoint, batched};
pub(super) use chat::{Chat, chat};
pub(super) use models::{Load, Unload, load, model, models, unload};
pub(super) use text::{Text, text};
