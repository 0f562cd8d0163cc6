//! What the calls of a step would cost: the program is run over its rows against nothing, so that
//! every prompt is written as it would be sent, and those with a kept answer are told apart. What is
//! likely and what is the bound are counted apart: for the bound a request has its worst case, as
//! `budget` takes it.

mod tally;

use std::path::Path;
use std::sync::Arc;

use flowrun_cache::CompletionCache;
use flowrun_engine::estimate::{Estimate, Foresight};
use flowrun_lm::client::OpenAiSpec;
use flowrun_lm::example::{Demo, Example};
use flowrun_lm::optimize::RandomSearch;
use flowrun_lm::program::{Program, SavedProgram};
use serde_json::Value;

use self::tally::Tally;
use crate::answer::{KEPT_ANSWERS, SamplingSpec, examples};
use crate::models::ModelSpec;
use crate::program_file::ProgramFile;
use crate::rows::{JsonlReader, Row};

/// Rows whose prompts are written at a time.
const AT_ONCE: usize = 4096;

/// What a program would ask of a model.
pub(crate) struct Calls<'a> {
    pub(crate) file: &'a ProgramFile,
    pub(crate) sampling: SamplingSpec,
    /// The file of the rows.
    pub(crate) rows: &'a Path,
    /// Of them as many at most.
    pub(crate) most: usize,
}

/// A search for demos.
pub(crate) struct Search<'a> {
    pub(crate) file: &'a ProgramFile,
    pub(crate) sampling: SamplingSpec,
    pub(crate) settings: &'a RandomSearch,
    /// Rows of a call.
    pub(crate) batch: usize,
    pub(crate) trainset: &'a [Row],
    pub(crate) valset: &'a [Row],
}

/// The server that a step asks, if it asks one: a model of this machine costs time alone.
pub(crate) fn server(model: Option<&ModelSpec>) -> Option<&OpenAiSpec> {
    match model? {
        ModelSpec::OpenAi(spec) => Some(spec),
        ModelSpec::Embedded(_) | ModelSpec::SentenceEncoder(_) => None,
    }
}

/// The cost of calls, where the rows are known; else that of the nearest earlier result.
pub(crate) fn estimate(
    spec: &OpenAiSpec,
    calls: Option<Calls<'_>>,
    given: &Foresight<'_>,
) -> Estimate {
    let counted = calls.and_then(|calls| count(spec, &calls, given));
    counted.unwrap_or_else(|| as_before(spec, given))
}

/// The cost of a search: that of the nearest earlier result, else the most that it can be.
pub(crate) fn estimate_search(
    spec: &OpenAiSpec,
    search: Option<Search<'_>>,
    given: &Foresight<'_>,
) -> Estimate {
    let before = as_before(spec, given);
    if used_before(given).is_some_and(|(_, kept)| kept == 0) {
        return before;
    }
    let most = search.and_then(|search| most(spec, &search));
    most.unwrap_or(before)
}

/// The most that a search asks: every candidate on all rows of the valset, every bootstrap on all
/// of the trainset, each prompt with the longest demos that it may have, and no answer kept.
fn most(spec: &OpenAiSpec, search: &Search<'_>) -> Option<Estimate> {
    let (saved, mut program) = search.file.prompt().ok()?;
    if !is_countable(saved, &program) {
        return None;
    }
    let settings = search.settings;
    let rows = |rows: &[Row]| examples(rows, search.file.label_field());
    let (trainset, valset) = (rows(search.trainset), rows(search.valset));
    let demos = longest(&trainset, settings.most_demos());
    for predictor in &mut program.predictors {
        predictor
            .demos
            .extend(demos.iter().copied().map(Demo::labeled));
    }
    let none = || Arc::new(CompletionCache::in_memory());
    let seen = |rows: &[Example]| {
        let tally = Tally::new(spec, none(), true);
        tally.ask(&program, search.sampling, rows);
        tally.seen()
    };
    let (scored, tried) = (seen(&valset), seen(&trainset));
    let answer = scored.at_most.completion.checked_div(scored.requests)?;
    let (candidates, bootstraps) = settings.size();
    let times = |a: usize, b: u64| (a as u64).saturating_mul(b);
    // Where a try fails, its row leaves the demos, and the rest of its batch is asked anew.
    let held: usize = program.predictors.iter().map(|p| p.demos.len()).sum();
    let per_row = tried.requests.div_ceil(trainset.len().max(1) as u64);
    let again = times(held.saturating_mul(search.batch), per_row);
    let sum = |scored: u64, tried: u64, again: u64| {
        let tried = times(settings.max_rounds, tried).saturating_add(again);
        times(candidates, scored).saturating_add(times(bootstraps, tried))
    };
    let requests = sum(scored.requests, tried.requests, again);
    // A demo that was worked out holds an answer.
    let shown = times(settings.max_bootstrapped_demos, answer).saturating_mul(requests);
    let longest = again.saturating_mul(tried.longest);
    let prompt = sum(scored.at_most.prompt, tried.at_most.prompt, longest).saturating_add(shown);
    let completion = requests.saturating_mul(answer);
    let (val, train) = (valset.len(), trainset.len());
    Some(Estimate {
        uses: format!(
            "at most {requests} requests: {candidates} candidates on {val} rows, {bootstraps} of \
             them worked out on {train} rows; at most {prompt} tokens of prompts, {completion} of \
             answers"
        ),
        usd_at_most: spec.prices.map(|prices| prices.cost(prompt, completion)),
        ..Estimate::default()
    })
}

/// The rows with the longest texts.
fn longest(rows: &[Example], count: usize) -> Vec<&Example> {
    let bytes = |row: &&Example| -> usize {
        let texts = row.fields.values();
        texts.map(|value| value.to_python_str().len()).sum()
    };
    let mut rows: Vec<&Example> = rows.iter().collect();
    rows.sort_by_cached_key(|row| std::cmp::Reverse(bytes(row)));
    rows.truncate(count);
    rows
}

/// What demos are chosen is known only with the encoder at hand; what a later stage is asked, only
/// with the answers of the one before.
fn is_countable(saved: &SavedProgram, program: &Program) -> bool {
    let stages = match &program.votes {
        Some(votes) => votes.members.iter().any(|stages| *stages > 1),
        None => program.predictors.len() > 1,
    };
    saved.neighbours.is_empty() && !stages
}

fn count(spec: &OpenAiSpec, calls: &Calls<'_>, given: &Foresight<'_>) -> Option<Estimate> {
    let (saved, program) = calls.file.prompt().ok()?;
    if !is_countable(saved, &program) {
        return None;
    }
    // What is asked for the rows; in the worst case no answer can be read but those that are kept.
    let seen = |worst| {
        let tally = Tally::new(spec, (given.completions)(), worst);
        let rows = JsonlReader::<Row>::open(calls.rows).ok()?;
        let mut rows = rows.take(calls.most);
        loop {
            let some: Result<Vec<Row>, _> = rows.by_ref().take(AT_ONCE).collect();
            let some = some.ok()?;
            if some.is_empty() {
                return Some(tally.seen());
            }
            let some = examples(&some, calls.file.label_field());
            tally.ask(&program, calls.sampling, &some);
        }
    };
    let likely = seen(false)?;
    // An answer that cannot be read is asked for once more, in another format.
    let mut formats = program.predictors.iter().map(|p| p.adapter.fallback());
    let bound = match formats.any(|other| other.is_some()) {
        true => seen(true)?,
        false => likely,
    };
    Some(likely.estimate(&bound, spec.prices))
}

/// A number that the nearest earlier result measured.
fn measured<'a>(given: &Foresight<'a>, name: &str) -> Option<&'a Value> {
    given.earlier?.get(name)
}

/// Tokens that the nearest earlier result used, and answers that it took from those kept.
fn used_before(given: &Foresight<'_>) -> Option<(u64, u64)> {
    let number = |name: &str| measured(given, name)?.as_u64();
    // Where all answers were kept, nothing is known of what they cost once.
    let tokens = number("tokens").filter(|n| *n > 0)?;
    Some((tokens, number(KEPT_ANSWERS).unwrap_or(0)))
}

fn as_before(spec: &OpenAiSpec, given: &Foresight<'_>) -> Estimate {
    let unknown = |uses: String| Estimate {
        uses,
        unknown: spec.prices.is_some(),
        ..Estimate::default()
    };
    let Some((tokens, kept)) = used_before(given) else {
        return unknown("calls of a model, how many is not known before".to_owned());
    };
    if kept > 0 {
        return unknown(format!(
            "an earlier result of it used {tokens} tokens beside {kept} kept answers; without \
             them it uses more"
        ));
    }
    Estimate {
        uses: format!("{tokens} tokens, as an earlier result of it"),
        usd: measured(given, "cost_usd").and_then(Value::as_f64),
        ..Estimate::default()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    use flowrun_lm::program::ProgramSpec;
    use serde_json::json;

    use crate::rows::write_jsonl;

    fn spec() -> OpenAiSpec {
        let prices = json!({"input": 1.0, "output": 10.0});
        let spec = json!({"base_url": "http://h/v1", "model": "m", "prices": prices});
        serde_json::from_value(spec).unwrap()
    }

    fn prompt(format: &str) -> Value {
        json!({"predict": {"format": format, "inputs": [{"name": "text"}],
            "outputs": [{"name": "label", "type": "label"}]}})
    }

    fn estimated(program: Value, earlier: Option<&BTreeMap<String, Value>>) -> Estimate {
        let program: ProgramSpec = serde_json::from_value(program).unwrap();
        let file = ProgramFile::plain(&program, &["a".to_owned(), "b".to_owned()]).unwrap();
        let rows = tempfile::NamedTempFile::new().unwrap();
        let texts = ["x", "ÄÖÜ", "left out"];
        write_jsonl(
            rows.path(),
            texts.map(|text| json!({"id": text, "text": text})),
        )
        .unwrap();
        let given = Foresight {
            params: &Value::Null,
            inputs: None,
            completions: &|| Arc::new(CompletionCache::in_memory()),
            earlier,
        };
        let calls = Calls {
            file: &file,
            sampling: SamplingSpec::default(),
            rows: rows.path(),
            most: 2,
        };
        estimate(&spec(), Some(calls), &given)
    }

    #[test]
    fn the_bound_takes_a_token_for_each_byte_and_a_second_format_into_account() {
        let one = estimated(prompt("dspy-2.5"), None);
        assert!(one.uses.starts_with("2 requests, about"), "{}", one.uses);
        let bound = one.usd_at_most.unwrap();
        // 2,000 tokens of answers at $10, and the prompts.
        assert!(bound > 0.02 && bound < 0.03, "{bound}");
        let two = estimated(prompt("dspy-3"), None);
        assert!(two.uses.starts_with("2 requests, about"), "{}", two.uses);
        let more = "at most 4000 tokens of answers, 2 more requests where answers cannot be read";
        assert!(two.uses.contains(more), "{}", two.uses);
        assert!(two.usd_at_most.unwrap() > 0.04);
    }

    #[test]
    fn stages_are_not_counted_within_votes_either() {
        let votes = |program: Value| json!({"majority": {"samples": 3, "programs": [program]}});
        let six = estimated(votes(prompt("dspy-2.5")), None);
        assert!(six.uses.starts_with("6 requests, about"), "{}", six.uses);
        let fields = |input: &str, output: &str| json!({"inputs": [{"name": input}], "outputs": [{"name": output}]});
        let label = json!({"inputs": [{"name": "topic"}],
            "outputs": [{"name": "label", "type": "label"}]});
        let stages = json!({"stages": [
            {"name": "first", "predict": fields("text", "topic")},
            {"name": "second", "predict": label},
        ]});
        let staged = estimated(votes(stages), None);
        assert!(staged.unknown && staged.usd_at_most.is_none(), "{staged:?}");
    }

    /// Four rows to learn from and two to score on, one of each with a long text.
    fn searched(settings: Value, earlier: Option<&BTreeMap<String, Value>>) -> Estimate {
        let program: ProgramSpec = serde_json::from_value(prompt("dspy-2.5")).unwrap();
        let file = ProgramFile::plain(&program, &["a".to_owned(), "b".to_owned()]).unwrap();
        let row = |(id, text): (usize, String)| -> Row {
            serde_json::from_value(json!({"id": id.to_string(), "text": text, "label": "a"}))
                .unwrap()
        };
        let rows = |texts: &[usize]| -> Vec<Row> {
            let texts = texts.iter().map(|len| "x".repeat(*len));
            texts.enumerate().map(row).collect()
        };
        let given = Foresight {
            params: &Value::Null,
            inputs: None,
            completions: &|| Arc::new(CompletionCache::in_memory()),
            earlier,
        };
        let settings: RandomSearch = serde_json::from_value(settings).unwrap();
        let (trainset, valset) = (rows(&[10, 500, 10, 10]), rows(&[10, 20]));
        let search = Search {
            file: &file,
            sampling: SamplingSpec::default(),
            settings: &settings,
            batch: 16,
            trainset: &trainset,
            valset: &valset,
        };
        estimate_search(&spec(), Some(search), &given)
    }

    #[test]
    fn a_search_has_a_bound_before_its_first_result() {
        let plain = json!({"num_candidate_programs": 0, "restrict": [-3],
            "max_labeled_demos": 0, "max_bootstrapped_demos": 0});
        let one = searched(plain, None);
        assert!(
            one.uses
                .starts_with("at most 2 requests: 1 candidates on 2 rows, 0 of"),
            "{one:?}"
        );
        assert!(one.usd.is_none() && !one.unknown, "{one:?}");
        let bound = one.usd_at_most.unwrap();
        assert!(bound > 0.02 && bound < 0.03, "{bound}");
        // Seeds -3 to 1: five candidates on two rows, three bootstraps on four rows, two demos that
        // may leave during each.
        let five = json!({"num_candidate_programs": 2, "max_labeled_demos": 2,
            "max_bootstrapped_demos": 1});
        let five = searched(five, None);
        let requests = 5 * 2 + 3 * (4 + 2 * 16);
        let said = format!("at most {requests} requests: 5 candidates on 2 rows, 3 of them");
        assert!(five.uses.starts_with(&said), "{five:?}");
        // Answers at $10, each shown once more as a demo at $1, and the longest row in each prompt.
        let least = requests as f64 * (10.0 * 1000.0 + 1000.0 + 500.0) / 1e6;
        assert!(five.usd_at_most.unwrap() > least, "{five:?}");

        let mut earlier = BTreeMap::from([("tokens".to_owned(), json!(100))]);
        let before = searched(json!({}), Some(&earlier));
        assert_eq!(before.uses, "100 tokens, as an earlier result of it");
        earlier.insert(KEPT_ANSWERS.to_owned(), json!(40));
        let bounded = searched(json!({}), Some(&earlier));
        assert!(bounded.uses.starts_with("at most "), "{bounded:?}");
    }

    #[test]
    fn an_earlier_result_that_took_kept_answers_says_no_price() {
        let stages = json!({"stages": [
            {"name": "first", "predict": {"inputs": [{"name": "text"}],
                "outputs": [{"name": "topic"}]}},
            {"name": "second", "predict": {"inputs": [{"name": "topic"}],
                "outputs": [{"name": "label", "type": "label"}]}},
        ]});
        let mut earlier = BTreeMap::from([
            ("tokens".to_owned(), json!(100)),
            ("cost_usd".to_owned(), json!(0.5)),
        ]);
        let before = estimated(stages.clone(), Some(&earlier));
        assert_eq!((before.usd, before.unknown), (Some(0.5), false));
        earlier.insert(KEPT_ANSWERS.to_owned(), json!(40));
        let before = estimated(stages, Some(&earlier));
        assert_eq!((before.usd, before.unknown), (None, true));
        assert!(
            before.uses.contains("beside 40 kept answers"),
            "{}",
            before.uses
        );
    }
}
