//! Prompts and answers: sets a (format), b (parse), d (fine-tuning messages), h (saved programs).

use super::banking77::{self, Banking77, clean};
use super::fake_lm::Scripted;
use super::recording::{RecordedSignature, compare, get, read, same, say, skip};
use flowrun_lm::adapter::{AdapterKind, ParseError};
use flowrun_lm::example::Demo;
use flowrun_lm::lm::{Message, Sampling};
use flowrun_lm::messages::{MessageOptions, trace_to_messages};
use flowrun_lm::program::{Program, RunOptions, load_dspy_json, to_dspy_json};
use flowrun_lm::value::{Fields, Value};
use serde::Deserialize;

#[derive(Deserialize)]
struct Format {
    signature: RecordedSignature,
    demos: Vec<Demo>,
    inputs: Fields,
}

#[test]
fn a_prompts_are_written_byte_for_byte() {
    compare::<Format>("a_format", |case, dialect| {
        let signature = case.input.signature.signature(dialect);
        let adapter = AdapterKind::Chat.adapter(dialect);
        let ours = adapter.format(&signature, &case.input.demos, &case.input.inputs);
        match get(&case.expected, "messages") {
            None => same("refused", &ours.is_err(), &true),
            Some(theirs) => same("messages", &ours, &Ok(read::<Vec<Message>>(theirs))),
        }
    });
}

#[derive(Deserialize)]
struct Parse {
    signature: RecordedSignature,
    completion: String,
}

#[test]
fn b_answers_are_read_alike() {
    compare::<Parse>("b_parse", |case, dialect| {
        let signature = case.input.signature.signature(dialect);
        let adapter = AdapterKind::Chat.adapter(dialect);
        let ours = adapter.parse(&signature, &case.input.completion);
        if let Some(theirs) = get(&case.expected, "fields") {
            let Value::Dict(theirs) = theirs else {
                return Err("the recording is odd".to_owned());
            };
            let ours = ours.map_err(|error| format!("{error}; DSPy reads {theirs:?}"))?;
            let order: Vec<&String> = ours.keys().collect();
            let expected: Vec<String> = read(get(&case.expected, "order").unwrap());
            same("order", &order, &expected.iter().collect())?;
            return same("fields", &without_nan(&ours), theirs);
        }
        let kind = match ours {
            Ok(fields) => return Err(format!("ours reads {fields:?}, DSPy nothing")),
            Err(ParseError::MissingFields { .. }) => "missing_fields",
            Err(ParseError::Field { .. }) => "field_parse_error",
        };
        same(
            "kind",
            &Value::from(kind),
            get(&case.expected, "kind").unwrap(),
        )
    });
}

/// NaN is not even equal to itself.
fn without_nan(fields: &Fields) -> Fields {
    let plain = |value: &Value| match value {
        Value::Float(float) if float.is_nan() => Value::from("NaN"),
        other => other.clone(),
    };
    fields.iter().map(|(k, v)| (k.clone(), plain(v))).collect()
}

#[derive(Deserialize)]
struct Convert {
    text: String,
    completion: String,
    program_demos: Vec<Demo>,
    exclude_demos: bool,
}

#[test]
fn d_rows_become_the_same_messages() {
    let Some(data) = Banking77::load() else {
        return;
    };
    compare::<Convert>("d_messages", |case, dialect| {
        let mut program = banking77::seed_program(&data.top25, dialect, true);
        program.predictors[0]
            .demos
            .clone_from(&case.input.program_demos);
        let row = data.row(&case.input.text);
        let lm = Scripted::new(|_| case.input.completion.clone());
        let rows = [row.clone()];
        let result = program
            .run(&lm, &Sampling::default(), &rows, &RunOptions::default())
            .remove(0);
        let collected = get(&case.expected, "collected") == Some(&Value::Bool(true));
        same("collected", &result.prediction.is_ok(), &collected)?;
        let Ok(prediction) = &result.prediction else {
            return Ok(());
        };
        let messages = get(&case.expected, "messages").ok_or("there are no messages recorded")?;
        let expected: Fields = read(get(&case.expected, "prediction").unwrap());
        same("prediction", &prediction.fields, &expected)?;
        let label = prediction.text("label").unwrap_or_default().to_owned();
        for (what, labels) in [("score", &data.labels), ("kept_in_top25", &data.top25)] {
            let known = Value::Bool(labels.contains(&label));
            same(what, &Some(&known), &get(&case.expected, what))?;
        }
        let options = MessageOptions {
            exclude_demos: case.input.exclude_demos,
        };
        let ours = trace_to_messages(&program, &row.id, &result.trace, options);
        let ours = ours.map_err(|error| error.to_string())?;
        same("messages", &ours[0].messages, &read(messages))
    });
}

#[derive(Deserialize)]
struct Saved {
    demos: Vec<Demo>,
}

#[test]
fn h_programs_are_saved_and_loaded_alike() {
    let Some(data) = Banking77::load() else {
        return;
    };
    compare::<Saved>("h_saved_program", |case, dialect| {
        let program = |demos: &[Demo]| -> Program {
            let mut program = banking77::seed_program(&data.top25, dialect, true);
            program.predictors[0].demos = demos.to_vec();
            program
        };
        let theirs = get(&case.expected, "json").unwrap();
        // As text, so that the order of the keys counts.
        let ours = serde_json::to_string_pretty(&to_dspy_json(&program(&case.input.demos)));
        let ours = ours.map_err(|error| error.to_string())?;
        let text = serde_json::to_string_pretty(theirs).unwrap();
        same("text", &ours, &text)?;
        let head = get(&case.expected, "file_head")
            .and_then(Value::as_str)
            .unwrap();
        same("head", &ours.starts_with(head), &true)?;
        let mut loaded = program(&[]);
        load_dspy_json(&mut loaded, &text).map_err(|error| error.to_string())?;
        same("loaded", &loaded.predictors[0].demos, &case.input.demos)?;
        same("again", &to_dspy_json(&loaded), theirs)
    });
}

#[test]
fn i_the_rows_are_those_of_the_recordings() {
    let Some(data) = Banking77::load() else {
        return;
    };
    let recorded = Banking77::facts();
    if recorded.is_empty() {
        skip("no recordings `i_data`");
    }
    for facts in recorded {
        let mut checked = 0;
        let mut check = |what: &str, same: Option<bool>| {
            assert_ne!(same, Some(false), "{what}");
            checked += usize::from(same.is_some());
        };
        let top25 = get(&facts, "top25").map(read::<Vec<String>>);
        check("top25", top25.map(|top25| top25 == data.top25));
        let counts = get(&facts, "counts").map(read::<Vec<usize>>);
        check(
            "counts",
            counts.map(|counts| data.counts.starts_with(&counts)),
        );
        let next = get(&facts, "next_labels_26_28").map(read::<Vec<String>>);
        check(
            "next",
            next.map(|next| data.labels[25..].starts_with(&next)),
        );
        if let Some(Value::Dict(changed)) = get(&facts, "csv_labels_changed") {
            for (written, cleaned) in changed {
                check(
                    written,
                    Some(cleaned.as_str() == Some(clean(written).as_str())),
                );
            }
        }
        // Which row of the file comes where.
        let whole = |item: &Value| matches!(item, Value::Int(_));
        let places = |fact: &&Value| matches!(fact, Value::List(items) if items.iter().all(whole));
        let order = get(&facts, "permutation").filter(places);
        let order = order.map(read::<Vec<usize>>);
        check("permutation", order.map(|order| order == data.order));
        let sets = [
            ("train_filtered", Some(&data.filtered)),
            ("test_filtered", data.test.as_ref()),
            ("ft_train", Some(&data.train)),
            ("labeled100", Some(&data.labeled)),
        ];
        for (name, rows) in sets {
            let Some(rows) = rows else {
                continue;
            };
            let fields: Vec<Fields> = rows.iter().map(|row| row.fields.clone()).collect();
            let part = |key| get(&facts, key).and_then(|part| get(part, name));
            let head = part("head3").map(read::<Vec<Fields>>);
            check(name, head.map(|head| fields.starts_with(&head)));
            let tail = part("tail3").map(read::<Vec<Fields>>);
            check(name, tail.map(|tail| fields.ends_with(&tail)));
            let size = part("sizes").map(read::<usize>);
            check(name, size.map(|size| size == rows.len()));
        }
        match checked {
            0 => skip("a recording `i_data` holds no fact that is known here"),
            _ => say(&format!("i_data: {checked} facts agree")),
        }
    }
}
