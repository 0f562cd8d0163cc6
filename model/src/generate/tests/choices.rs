//! Answers out of a closed list.

use super::{all, generator, request};
use crate::chat_template::ChatMessage;
use crate::generate::{ChoiceSet, GenerateRequest};
use crate::tiny;

#[test]
fn choices_have_the_probabilities_of_constrained_decoding() {
    let seed = 4;
    let generator = generator(seed, 3);
    let base = generator.base();
    let adapter = tiny::adapter(&base.weights.config, seed + 1);
    let values = ["card", "card_lost", "cash", "top up", "b"].map(str::to_owned);
    let texts = ["a", "hello", "where is my card", "x"];
    let requests: Vec<_> = texts
        .iter()
        .map(|text| GenerateRequest {
            choices: Some(ChoiceSet {
                after: None,
                values: values.to_vec(),
                then: String::new(),
            }),
            ..request(text, 5)
        })
        .collect();
    let encoded: Vec<Vec<u32>> = values
        .iter()
        .map(|value| base.answer_tokens(value).unwrap())
        .collect();
    for (answer, text) in all(&generator, &requests).iter().zip(texts) {
        let prompt = base
            .prompt_tokens(&[ChatMessage::new("user", text)])
            .unwrap();
        let wanted: Vec<f64> = encoded
            .iter()
            .map(|tokens| {
                let mut probability = 1.0;
                for at in 0..tokens.len() {
                    let alike = encoded.iter().filter(|o| o.starts_with(&tokens[..at]));
                    let next: std::collections::BTreeSet<u32> = alike.map(|o| o[at]).collect();
                    let fed = [prompt.as_slice(), &tokens[..at]].concat();
                    let logits = tiny::logits(base, Some(&adapter), &fed);
                    let sum: f64 = next.iter().map(|t| logits[*t as usize].exp()).sum();
                    probability *= logits[tokens[at] as usize].exp() / sum;
                }
                probability
            })
            .collect();
        let got = answer.choice_probs.as_ref().unwrap();
        assert!((got.iter().sum::<f32>() - 1.0).abs() < 1e-5);
        for (got, wanted) in got.iter().zip(&wanted) {
            assert!((f64::from(*got) - wanted).abs() < 1e-4, "{got} {wanted}");
        }
        let best = (0..5).max_by(|a, b| wanted[*a].total_cmp(&wanted[*b]));
        assert_eq!(answer.text, values[best.unwrap()]);
    }
}

#[test]
fn values_with_a_common_start_and_a_single_value_are_fine() {
    let generator = generator(5, 2);
    let choose = |values: &[&str], then: &str| {
        let choices = ChoiceSet {
            after: None,
            values: values.iter().map(|v| (*v).to_owned()).collect(),
            then: then.to_owned(),
        };
        let request = GenerateRequest {
            choices: Some(choices),
            ..request("hello", 5)
        };
        generator
            .generate(&[request], &|_, _| {}, &|| false)
            .remove(0)
    };
    let one = choose(&["only"], "!").unwrap();
    assert_eq!(
        (one.text.as_str(), one.choice_probs),
        ("only!", Some(vec![1.0]))
    );
    let two = choose(&["card_a", "card_b"], "")
        .unwrap()
        .choice_probs
        .unwrap();
    assert!((two[0] + two[1] - 1.0).abs() < 1e-6 && two[0] != two[1]);
    assert!(choose(&["a", "a"], "").is_err());
    assert!(choose(&[], "").is_err());
}

#[test]
fn a_choice_may_come_after_generated_text() {
    let generator = generator(6, 2);
    let free = all(&generator, &[request("hello", 8)]).remove(0).text;
    let after: String = free.chars().take(2).collect();
    let mut request = request("hello", 8);
    request.choices = Some(ChoiceSet {
        after: Some(after.clone()),
        values: vec!["x".into(), "yz".into()],
        then: ".".into(),
    });
    let answer = all(&generator, &[request]).remove(0);
    assert!(
        answer.text == format!("{after}x.") || answer.text == format!("{after}yz."),
        "{}",
        answer.text
    );
}

#[test]
fn a_space_before_the_choice_is_part_of_it() {
    let generator = generator(6, 2);
    let free = all(&generator, &[request("hello", 8)]).remove(0).text;
    // A header that ends in a space which the model would not write by itself.
    let header: String = free.chars().take(2).collect();
    let header = header.trim_end().to_owned();
    let mut request = request("hello", 8);
    request.choices = Some(ChoiceSet {
        after: Some(format!("{header} ")),
        values: vec!["x".into(), "yz".into()],
        then: String::new(),
    });
    let answer = all(&generator, &[request]).remove(0);
    assert!(answer.choice_probs.is_some(), "{}", answer.text);
    assert!(
        answer.text == format!("{header} x") || answer.text == format!("{header} yz"),
        "{}",
        answer.text
    );
}
