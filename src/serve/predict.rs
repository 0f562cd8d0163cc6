//! `POST /predict`: the deployed program on one text.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use axum::http::StatusCode;
use flowrun_lm::example::Example;
use flowrun_lm::lm::LmError;
use flowrun_lm::program::RowError;
use flowrun_lm::value::Fields;
use flowrun_steps::bundle::UNKNOWN;
use serde::{Deserialize, Serialize};

use super::Service;
use super::problem::Problem;

/// The question.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Question {
    /// The text to sort.
    text: String,
}

/// The answer.
#[derive(Serialize)]
pub(super) struct Answer {
    /// The label; `unknown` when the model's answer could not be read.
    label: String,
    /// How sure the model is of the label, 0 to 1, where it says.
    #[serde(skip_serializing_if = "Option::is_none")]
    confidence: Option<f32>,
    /// Other fields of the program, such as `reasoning`.
    #[serde(flatten)]
    further: Fields,
    /// The model's answer as it came, where it could not be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    raw: Option<String>,
    /// The model that answered.
    model: String,
}

pub(super) async fn predict(
    State(service): State<Arc<Service>>,
    question: Result<Json<Question>, JsonRejection>,
) -> Result<Json<Answer>, Problem> {
    let Json(Question { text }) = question?;
    if text.trim().is_empty() {
        return Err(Problem::bad("`text` is empty").of("text"));
    }
    let row = Example::of_texts("request", [("text", text.as_str())]);
    let result = service.queue.predict(row).await?;
    let failed = |message| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, message);
    let result = result.map_err(failed)?;
    let model = service.manifest.model_id.clone();
    let unread = |raw: Option<String>| Answer {
        label: UNKNOWN.to_owned(),
        confidence: None,
        further: Fields::new(),
        raw,
        model: model.clone(),
    };
    match result.prediction {
        Ok(prediction) => {
            let mut further = prediction.fields;
            let label = further.shift_remove(&service.label_field);
            // What the answer says of itself is not to be shadowed by a field of the program.
            for name in ["label", "confidence", "raw", "model"] {
                further.shift_remove(name);
            }
            Ok(Json(match label {
                Some(label) => Answer {
                    label: label.to_python_str(),
                    confidence: result.confidence,
                    further,
                    raw: None,
                    model,
                },
                None => unread(result.raw),
            }))
        }
        Err(RowError::Parse { raw, .. }) => Ok(Json(unread(Some(raw)))),
        Err(RowError::Lm(LmError::Rejected(why))) => Err(Problem::bad(why).of("text")),
        Err(RowError::Lm(error)) => Err(Problem::new(StatusCode::BAD_GATEWAY, error.to_string())),
        Err(RowError::Other(why)) => Err(failed(why)),
    }
}
