//! Sets e (Evaluate), f (metrics), g (Python's random numbers).

use super::recording::{compare, get, read, same};
use flowrun_lm::evaluate::Evaluate;
use flowrun_lm::example::{Example, Prediction};
use flowrun_lm::metric::{answer_exact_match, normalize_text, sanitize_label};
use flowrun_lm::program::{RowError, RowResult, Tokens};
use flowrun_lm::python_random::PythonRandom;
use flowrun_lm::value::Value;
use serde::Deserialize;

#[derive(Deserialize)]
struct Evaluation {
    scores: Value,
    max_errors: usize,
}

impl Evaluation {
    /// Per row: what the metric gives, or the letter of what raises.
    fn scores(&self) -> Vec<Value> {
        let Value::Dict(_) = &self.scores else {
            return read(&self.scores);
        };
        let count = |key| read::<usize>(get(&self.scores, key).unwrap());
        let right = count("true");
        (0..count("total"))
            .map(|at| Value::Bool(at < right))
            .collect()
    }
}

#[test]
fn e_evaluations_give_the_same_scores() {
    compare::<Evaluation>("e_evaluate", |case, _| {
        let scores = case.input.scores();
        let metric = |example: &Example, _: &Prediction| match &scores
            [example.id.parse::<usize>().unwrap()]
        {
            Value::Bool(right) => Ok(f64::from(u8::from(*right))),
            Value::Int(score) => Ok(*score as f64),
            Value::Float(score) => Ok(*score),
            _ => Err("boom".to_owned()),
        };
        let evaluate = Evaluate {
            metric: &metric,
            label: "label",
            max_errors: case.input.max_errors,
        };
        let id = |at: usize| at.to_string();
        let rows: Vec<Example> = (0..scores.len())
            .map(|at| Example::of_texts(id(at), []))
            .collect();
        let results = scores.iter().enumerate().map(|(at, score)| RowResult {
            id: id(at),
            prediction: match score.as_str() {
                Some("E") => Err(RowError::Other("boom".to_owned())),
                _ => Ok(Prediction::default()),
            },
            trace: Vec::new(),
            raw: None,
            tokens: Tokens::default(),
            probs: None,
            confidence: None,
            cut_off: false,
        });
        let ours = evaluate.score(&rows, results);
        let Some(score) = get(&case.expected, "score") else {
            return same("refused", &ours.is_err(), &true);
        };
        let ours = ours.map_err(|error| error.to_string())?;
        same("score", &ours.score, &read(score))?;
        let rows: Vec<f64> = ours.rows.iter().map(|row| row.score).collect();
        same(
            "rows",
            &rows,
            &read(get(&case.expected, "per_example").unwrap()),
        )
    });
}

#[derive(Deserialize)]
struct Labels {
    gold: String,
    raw_prediction: String,
}

#[test]
fn f_metrics_judge_alike() {
    compare::<Labels>("f_metric", |case, _| {
        let (gold, raw) = (&case.input.gold, &case.input.raw_prediction);
        let sanitized = sanitize_label(raw);
        let text = |text: String| Value::Str(text);
        for (name, ours) in [
            (
                "exact_match_raw",
                Value::Bool(answer_exact_match(gold, raw)),
            ),
            (
                "exact_match_sanitized",
                Value::Bool(answer_exact_match(gold, &sanitized)),
            ),
            ("normalized_gold", text(normalize_text(gold))),
            ("normalized_raw", text(normalize_text(raw))),
            ("normalized_sanitized", text(normalize_text(&sanitized))),
            ("sanitized", text(sanitized.clone())),
        ] {
            same(name, &Some(&ours), &get(&case.expected, name))?;
        }
        Ok(())
    });
}

#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
enum Draw {
    Shuffle { seed: i64, n: usize },
    Sample { seed: i64, n: usize, k: usize },
    Sample2 { seed: i64, n: usize, k: usize },
    Randint { seeds: Vec<i64>, lo: i64, hi: i64 },
    Random { seed: i64, n: usize },
}

#[test]
fn g_random_numbers_are_pythons() {
    compare::<Draw>("g_python_rng", |case, _| {
        let json = match &case.input {
            Draw::Shuffle { seed, n } => {
                let mut items: Vec<usize> = (0..*n).collect();
                PythonRandom::new(*seed).shuffle(&mut items);
                serde_json::to_string(&items)
            }
            Draw::Sample { seed, n, k } => {
                serde_json::to_string(&PythonRandom::new(*seed).sample_indices(*n, *k))
            }
            Draw::Sample2 { seed, n, k } => {
                let mut random = PythonRandom::new(*seed);
                let first = random.sample_indices(*n, *k);
                serde_json::to_string(&(first, random.sample_indices(*n, *k)))
            }
            Draw::Randint { seeds, lo, hi } => {
                let draw = |seed: &i64| PythonRandom::new(*seed).randint(*lo, *hi);
                serde_json::to_string(&seeds.iter().map(draw).collect::<Vec<_>>())
            }
            Draw::Random { seed, n } => {
                let mut random = PythonRandom::new(*seed);
                serde_json::to_string(&(0..*n).map(|_| random.random()).collect::<Vec<_>>())
            }
        };
        let ours: Value = serde_json::from_str(&json.unwrap()).unwrap();
        same("drawn", &ours, &case.expected)
    });
}
