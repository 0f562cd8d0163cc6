//! `POST /v1/completions`: texts that a model goes on with as they are, without a chat template.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use axum::response::Response;
use flowrun_steps::serving::{Ask, Prompt};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

use super::answer::{Kind, Wanted, answer};
use super::drawing::{Drawing, OneOrMany, StreamOptions, refuse_unknown};
use crate::serve::problem::Problem;
use crate::serve::service::Service;

/// OpenAI's default for tokens of an answer.
const MAX_TOKENS: u32 = 16;
/// Alternatives of a token at most, as at OpenAI.
const LOGPROBS: usize = 5;
/// Prompts of one request at most.
const PROMPTS: usize = 64;

/// A text to go on with.
#[derive(Deserialize, JsonSchema)]
pub(in crate::serve) struct Text {
    /// The model's id, one of `GET /v1/models`.
    model: String,
    /// The text, or several; not tokens. Each begins with the model's begin token where the
    /// model's files ask for one, unless it spells that.
    prompt: OneOrMany,
    temperature: Option<f64>,
    top_p: Option<f64>,
    max_tokens: Option<u32>,
    /// Answers to each prompt.
    n: Option<usize>,
    seed: Option<i64>,
    stop: Option<OneOrMany>,
    /// Alternatives of each token to tell.
    logprobs: Option<usize>,
    #[serde(default)]
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    #[serde(flatten)]
    further: serde_json::Map<String, Value>,
}

impl Text {
    /// What is wanted, and what the model is asked for it.
    pub(super) fn read(mut self) -> Result<(Wanted, Vec<Ask>), Problem> {
        let prompts = match &self.prompt {
            OneOrMany::One(_) => 1,
            OneOrMany::Many(prompts) => prompts.len(),
        };
        let wanted = Wanted {
            kind: Kind::Text,
            model: std::mem::take(&mut self.model),
            prompts,
            stream: self.stream.unwrap_or(false),
            usage: self
                .stream_options
                .as_ref()
                .is_some_and(|options| options.include_usage),
        };
        Ok((wanted, self.asks()?))
    }

    fn asks(self) -> Result<Vec<Ask>, Problem> {
        refuse_unknown(&self.further)?;
        let prompts = self.prompt.into_vec();
        if prompts.is_empty() || prompts.len() > PROMPTS {
            return Err(Problem::bad(format!("`prompt` is 1 to {PROMPTS} texts")).of("prompt"));
        }
        if self.logprobs.is_some_and(|count| count > LOGPROBS) {
            return Err(Problem::bad(format!("`logprobs` is from 0 to {LOGPROBS}")).of("logprobs"));
        }
        let drawing = Drawing {
            temperature: self.temperature,
            top_p: self.top_p,
            max_tokens: self.max_tokens.unwrap_or(MAX_TOKENS),
            n: self.n,
            seed: self.seed,
            stop: self.stop,
        };
        let (samplings, top_p) = drawing.samplings()?;
        let mut asks = Vec::with_capacity(prompts.len() * samplings.len());
        for prompt in prompts {
            asks.extend(samplings.iter().map(|sampling| Ask {
                prompt: Prompt::Text(prompt.clone()),
                chat_template_kwargs: BTreeMap::new(),
                sampling: sampling.clone(),
                top_p,
                logprobs: self.logprobs,
                choices: None,
            }));
        }
        Ok(asks)
    }
}

pub(in crate::serve) async fn text(
    State(service): State<Arc<Service>>,
    text: Result<Json<Text>, JsonRejection>,
) -> Result<Response, Problem> {
    let Json(text) = text?;
    let (wanted, asks) = text.read()?;
    answer(&service, wanted, asks).await
}
