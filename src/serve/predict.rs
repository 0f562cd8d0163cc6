//! `POST /predict` and `POST /predict/batch`: the deployed program.
//!
//! A question that was let in always gets an answer: the label, or [`UNKNOWN`] with what the model
//! said instead. A text that is none of the program's labels is no label.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use flowrun_lm::lm::LmError;
use flowrun_lm::program::{RowError, RowResult};
use flowrun_lm::value::Fields;
use flowrun_steps::bundle::UNKNOWN;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::problem::Problem;
use super::question;
use super::service::Service;

/// Questions of one request at most.
const QUESTIONS: usize = 1000;

/// A question: the program's inputs.
type Object = Map<String, Value>;

/// Several questions: one of the two lists, of 1 to 1000 entries.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Questions {
    /// The texts to sort, for a program of one input.
    #[serde(default)]
    texts: Option<Vec<String>>,
    /// The program's inputs, one object a question.
    #[serde(default)]
    rows: Option<Vec<Object>>,
}

impl Questions {
    /// One object a question, with the name of the list that they were in.
    fn objects(self) -> Result<(&'static str, Vec<Object>), Problem> {
        let (name, objects) = match (self.texts, self.rows) {
            (Some(texts), None) => {
                let object = |text: String| Map::from_iter([("text".to_owned(), text.into())]);
                ("texts", texts.into_iter().map(object).collect())
            }
            (None, Some(rows)) => ("rows", rows),
            _ => return Err(Problem::bad("give either `texts` or `rows`").of("texts")),
        };
        match objects.len() {
            1..=QUESTIONS => Ok((name, objects)),
            _ => Err(Problem::bad(format!("`{name}` is 1 to {QUESTIONS} entries")).of(name)),
        }
    }
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
    /// Why there is no label.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    /// The model that answered.
    model: String,
}

pub(super) async fn predict(
    State(service): State<Arc<Service>>,
    question: Result<Json<Object>, JsonRejection>,
) -> Result<Json<Answer>, Problem> {
    let Json(question) = question?;
    let row = question::row(&service.about.inputs, question)?;
    let _place = service.admit(1)?;
    let mut results = service.run(vec![row]).await?;
    let result = results
        .pop()
        .ok_or_else(|| Problem::internal("the program gave no answer"))?;
    match &result.prediction {
        Err(RowError::Lm(error)) => Err(error.clone().into()),
        Err(RowError::Other(why)) => Err(Problem::internal(why.clone())),
        _ => Ok(Json(answer(&service, result))),
    }
}

/// One text that cannot be answered does not spoil the others: its answer says why.
pub(super) async fn batch(
    State(service): State<Arc<Service>>,
    questions: Result<Json<Questions>, JsonRejection>,
) -> Result<Json<Value>, Problem> {
    let Json(questions) = questions?;
    let (name, objects) = questions.objects()?;
    let mut rows = Vec::with_capacity(objects.len());
    for (at, object) in objects.into_iter().enumerate() {
        let row = question::row(&service.about.inputs, object);
        rows.push(row.map_err(|problem| problem.within(&format!("{name}[{at}]")))?);
    }
    let _places = service.admit_rows(rows.len())?;
    let results = service.run(rows).await?;
    let down = |result: &RowResult| {
        matches!(
            &result.prediction,
            Err(RowError::Lm(
                LmError::Unavailable(_)
                    | LmError::ServerError(_)
                    | LmError::Barred(_)
                    | LmError::NoModel(_)
                    | LmError::Cancelled
            ))
        )
    };
    if let Some(RowResult {
        prediction: Err(RowError::Lm(error)),
        ..
    }) = results.iter().find(|result| down(result))
    {
        return Err(error.clone().into());
    }
    let answers = results.into_iter().map(|result| answer(&service, result));
    let answers: Vec<Answer> = answers.collect();
    Ok(Json(json!({ "predictions": answers })))
}

fn answer(service: &Service, result: RowResult) -> Answer {
    let tokens = &result.tokens;
    // Those of a kept start are counted where the model is asked: results do not tell of them.
    service.metrics.tokens(tokens.prompt, 0, tokens.completion);
    let unread = |raw: Option<String>, error: Option<String>| Answer {
        label: UNKNOWN.to_owned(),
        confidence: None,
        further: Fields::new(),
        raw,
        error,
        model: service.about.model_id.clone(),
    };
    let answer = match result.prediction {
        Ok(prediction) => {
            let mut further = prediction.fields;
            let label = further.shift_remove(&service.about.label_field);
            // What the answer says of itself is not to be shadowed by a field of the program.
            for name in ["label", "confidence", "raw", "error", "model"] {
                further.shift_remove(name);
            }
            match label.map(|label| label.to_python_str()) {
                Some(label) if !service.about.allows(&label) => {
                    let why = format!("`{label}` is none of the program's labels");
                    unread(result.raw.or(Some(label)), Some(why))
                }
                Some(label) => Answer {
                    label,
                    confidence: result.confidence,
                    further,
                    raw: None,
                    error: None,
                    model: service.about.model_id.clone(),
                },
                None => unread(result.raw, None),
            }
        }
        Err(RowError::Parse { raw, reason }) => unread(Some(raw), Some(reason)),
        Err(RowError::Lm(error)) => unread(None, Some(error.to_string())),
        Err(RowError::Other(why)) => unread(None, Some(why)),
    };
    service.count_prediction(&answer.label, answer.confidence);
    answer
}
