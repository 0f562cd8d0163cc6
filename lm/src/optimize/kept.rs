//! [`KeptResults`]: what a search has worked out, each piece an action of its own in the action
//! cache: the score of a candidate on a set of rows, the demos of a bootstrap, a proposal. A search
//! that was cut short, or another one that comes upon the same piece, reads it back.
//!
//! Knows no step. Invariant: only whole pieces are kept. A candidate that early stopping left has
//! none, and neither has one whose model left a row unanswered.

use flowrun_cache::action::{ACTION_VERSION, part_label};
use flowrun_cache::{ActionCache, ActionKey, ActionResult, Digest};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use super::Session;
use crate::evaluate::EvaluationResult;
use crate::example::Example;
use crate::lm::Lm;
use crate::program::{Program, Tokens};

/// Version of what is kept. Raised when prompts, scores or the way demos are found change.
const VERSION: u32 = 1;

/// The name of the result within an action's metrics: JSON as text, for records lose the order of
/// fields, which shows in prompts.
const RESULT: &str = "result";

/// The score of one program on a set of rows.
pub(super) const CANDIDATE: &str = "optimize-candidate";
/// The demos that one bootstrap found.
pub(super) const DEMOS: &str = "optimize-demos";
/// What a model proposed.
pub(super) const PROPOSAL: &str = "optimize-proposal";

/// The action cache as a search sees it.
pub struct KeptResults {
    actions: ActionCache,
    metric: String,
    asked_by: String,
    now: Box<dyn Fn() -> String + Send + Sync>,
    recalled: AtomicUsize,
}

impl KeptResults {
    /// Keeps results in `actions`. `metric` names what rows are scored by, `asked_by` who searches;
    /// `now` is the time as UTC, RFC 3339.
    pub fn new(
        actions: ActionCache,
        metric: impl Into<String>,
        asked_by: impl Into<String>,
        now: impl Fn() -> String + Send + Sync + 'static,
    ) -> Self {
        Self {
            actions,
            metric: metric.into(),
            asked_by: asked_by.into(),
            now: Box::new(now),
            recalled: AtomicUsize::new(0),
        }
    }

    /// Evaluations that were read back.
    pub fn recalled(&self) -> usize {
        self.recalled.load(Ordering::Relaxed)
    }
}

/// One piece of work, which may be known from before.
pub(super) struct Piece<'a> {
    kept: &'a KeptResults,
    kind: &'static str,
    manifest: Value,
    started: Instant,
    key: ActionKey,
}

impl<'a> Piece<'a> {
    /// What `program` gives on `rows`, asking `lm`; `params` is all else that it depends on.
    /// `None` when the session keeps nothing.
    pub(super) fn of_program(
        session: &Session<'a>,
        kind: &'static str,
        (program, lm): (&Program, &dyn Lm),
        rows: &[Example],
        params: &Value,
    ) -> Option<Self> {
        let kept = session.kept?;
        let given = json!({
            "model": lm.id(),
            "metric": kept.metric,
            "label": session.label,
            "sampling": session.sampling,
            "settings": params,
        });
        let inputs = json!({
            "program": [{ "digest": program_digest(program) }],
            "rows": [{ "digest": in_order(rows) }],
        });
        Some(Self::new(kept, kind, &given, &inputs))
    }

    /// What depends on `params` alone.
    pub(super) fn of_params(
        session: &Session<'a>,
        kind: &'static str,
        params: &Value,
    ) -> Option<Self> {
        Some(Self::new(session.kept?, kind, params, &json!({})))
    }

    fn new(kept: &'a KeptResults, kind: &'static str, params: &Value, inputs: &Value) -> Self {
        let manifest = json!({
            "kind": kind,
            "kind_version": VERSION,
            "params": params,
            "inputs": inputs,
        });
        Self {
            kept,
            kind,
            key: Digest::of_record("action", &manifest),
            manifest,
            started: Instant::now(),
        }
    }

    /// Where it is kept.
    pub(super) fn key(&self) -> String {
        self.key.to_hex()
    }

    /// The result, where it is known.
    pub(super) fn recall<T: DeserializeOwned>(&self) -> Option<T> {
        let action = self.kept.actions.get(&self.key)?;
        serde_json::from_str(action.metrics.get(RESULT)?.as_str()?).ok()
    }

    /// The evaluation, where it is known; it costs nothing then.
    pub(super) fn recall_evaluation(&self) -> Option<EvaluationResult> {
        let known: EvaluationResult = self.recall()?;
        self.kept.recalled.fetch_add(1, Ordering::Relaxed);
        Some(EvaluationResult {
            tokens: Tokens::default(),
            ..known
        })
    }

    /// Keeps an evaluation in which every row was answered, and gives its key.
    pub(super) fn keep_evaluation(self, result: &EvaluationResult) -> Option<String> {
        if result.lm_failures > 0 {
            return None;
        }
        let mut lean = result.clone();
        lean.rows.iter_mut().for_each(|row| row.raw = None);
        let key = self.key();
        self.keep(&lean);
        Some(key)
    }

    /// Keeps the result. One that cannot be kept is worked out again another time.
    pub(super) fn keep(self, value: &impl Serialize) {
        let stored = serde_json::to_string(value)
            .map_err(|e| e.to_string())
            .and_then(|text| {
                let took = self.started.elapsed().as_millis();
                let result = ActionResult {
                    version: ACTION_VERSION,
                    key: self.key,
                    manifest: self.manifest,
                    outputs: BTreeMap::new(),
                    metrics: BTreeMap::from([(RESULT.to_owned(), text.into())]),
                    took_ms: u64::try_from(took).unwrap_or(u64::MAX),
                    finished_at: (self.kept.now)(),
                    label: part_label(self.kind, &self.kept.asked_by),
                };
                self.kept.actions.put(&result).map_err(|e| e.to_string())
            });
        if let Err(why) = stored {
            tracing::warn!("a result of the search could not be kept: {why}");
        }
    }
}

/// Digest of all of a program that reaches a prompt or reads an answer.
fn program_digest(program: &Program) -> Digest {
    let predictor = |predictor: &crate::program::Predictor| {
        let label = predictor.label.as_ref();
        let near = predictor.neighbours.as_ref();
        in_order(&(
            &predictor.name,
            &predictor.signature,
            format!("{:?}", predictor.adapter),
            &predictor.sources,
            label.map(|rule| (&rule.field, &rule.labels, rule.constrain)),
            &predictor.demos,
            near.map(|near| (near.k, &near.rows, &near.vectors)),
        ))
    };
    let predictors: Vec<Digest> = program.predictors.iter().map(predictor).collect();
    let votes = program.votes.as_ref();
    let votes = votes.map(|votes| (&votes.members, votes.samples, votes.temperature));
    in_order(&(program.dialect, predictors, votes))
}

/// Digest of a value as it is: other than in records, the order of fields counts, for it shows in
/// prompts.
fn in_order(value: &(impl Serialize + ?Sized)) -> Digest {
    // What is digested here has texts as keys.
    let text = serde_json::to_vec(value).expect("keys are texts");
    Digest::of_bytes(&text)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::program::ProgramSpec;

    fn program(change: impl FnOnce(&mut Program)) -> Digest {
        let spec: ProgramSpec = serde_json::from_str(
            r#"{"predict": {"inputs": [{"name": "text"}],
                "outputs": [{"name": "label", "type": "label"}]}}"#,
        )
        .unwrap();
        let mut program = spec.build(&["a".into(), "b".into()]).unwrap();
        change(&mut program);
        program_digest(&program)
    }

    #[test]
    fn whatever_reaches_a_prompt_makes_another_program() {
        let plain = program(|_| {});
        assert_eq!(program(|_| {}), plain);
        let demo = |fields: &[(&str, &str)]| {
            crate::example::Demo::labeled(&Example::of_texts("0", fields.iter().copied()))
        };
        let all = [
            program(|p| p.predictors[0].demos.push(demo(&[("text", "x")]))),
            program(|p| {
                p.predictors[0]
                    .demos
                    .push(demo(&[("text", "x"), ("label", "a")]));
            }),
            program(|p| {
                p.predictors[0]
                    .demos
                    .push(demo(&[("label", "a"), ("text", "x")]));
            }),
            program(|p| p.predictors[0].signature.instructions.push('!')),
            program(|p| {
                p.predictors[0].adapter = std::sync::Arc::new(crate::adapter::CompactAdapter);
            }),
            program(|p| p.predictors[0].label.as_mut().unwrap().constrain ^= true),
            plain,
        ];
        let different: std::collections::BTreeSet<String> =
            all.iter().map(Digest::to_hex).collect();
        assert_eq!(different.len(), all.len());
    }
}
