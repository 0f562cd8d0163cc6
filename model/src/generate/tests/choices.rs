//! Answers out of a closed list.

use std::sync::Arc;

use super::{all, ask, generator, request, watched};
use crate::base_model::BaseModel;
use crate::chat_template::{ChatMessage, ChatTemplate};
use crate::generate::{
    Ask, Batch, ChoiceSet, GenerateOptions, GenerateRequest, Generator, Row, TokenProb,
};
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

#[test]
fn a_token_that_goes_on_past_the_place_of_a_choice_is_cut_there() {
    let generator = generator(6, 2);
    let base = generator.base();
    let token = |text: &str| base.tokenizer.token_id(text).unwrap();
    let mut asked = request("hello", 8);
    // Later in the token than the place, so it ends nothing.
    asked.stop = vec!["rd".to_owned()];
    let mut take = |after: &str| {
        asked.choices = Some(ChoiceSet {
            after: Some(after.to_owned()),
            values: vec!["p".into(), "q".into()],
            then: ".".into(),
        });
        let mut row = Row::new(0, &asked, vec![1, 2], &generator.llama).unwrap();
        row.watch(1.0, Some(0));
        let prob = |text: &str| TokenProb {
            text: text.to_owned(),
            logprob: -1.0,
            top: Vec::new(),
        };
        assert!(row.take(token("x"), base).unwrap().is_none() && !row.choosing);
        let told = row.fresh_piece(Some(prob("x"))).unwrap();
        assert_eq!((told.text.as_str(), told.token), ("x", Some(prob("x"))));
        assert!(row.take(token("card"), base).unwrap().is_none());
        assert!(row.choosing, "{after}");
        // It is not one of the answer's tokens: a part of it is.
        let told = row.fresh_piece(Some(prob("card"))).unwrap();
        assert_eq!((told.text.as_str(), told.token), (&after.trim()[1..], None));
        let answer = row.chosen(&[3, 4], 1, vec![0.4, 0.6], base).unwrap();
        (row.pending, answer.text)
    };
    let plain = |text: &str| base.tokenizer.encode(text, false).unwrap();
    assert_eq!(take("xc"), (plain("c"), "xcq.".to_owned()));
    assert_eq!(take("xca "), (plain("ca"), "xca q.".to_owned()));
    asked.stop.clear();
    let mut row = Row::new(0, &asked, vec![1, 2], &generator.llama).unwrap();
    row.choices.as_mut().unwrap().after = Some("card".to_owned());
    assert!(row.take(token("card"), base).unwrap().is_none());
    assert_eq!((row.choosing, row.pending), (true, vec![token("card")]));
}

#[test]
fn log_probabilities_that_are_told_are_each_values_own_however_unlikely() {
    let seed = 4;
    let generator = generator(seed, 3);
    let base = generator.base();
    let adapter = tiny::adapter(&base.weights.config, seed + 1);
    let letters: Vec<char> = ('a'..='t').collect();
    let values = letters
        .iter()
        .flat_map(|c| [format!("{c}x"), format!("{c}y")]);
    let values: Vec<String> = values.collect();
    let choice = GenerateRequest {
        choices: Some(ChoiceSet {
            after: None,
            values: values.clone(),
            then: String::new(),
        }),
        ..request("hello", 5)
    };
    let prompt = base
        .prompt_tokens(&[ChatMessage::new("user", "hello")])
        .unwrap();
    let token = |letter: &str| base.tokenizer.token_id(letter).unwrap();
    // The share of each of `among` after the prompt and `more`.
    let shares = |more: &[u32], among: &[u32]| -> Vec<f64> {
        let fed = [prompt.as_slice(), more].concat();
        let logits = tiny::logits(base, Some(&adapter), &fed);
        let weights: Vec<f64> = among.iter().map(|t| logits[*t as usize].exp()).collect();
        let sum: f64 = weights.iter().sum();
        weights.into_iter().map(|weight| weight / sum).collect()
    };
    let first: Vec<u32> = letters.iter().map(|c| token(&c.to_string())).collect();
    let second = [token("x"), token("y")];
    let wanted: Vec<f64> = shares(&[], &first)
        .into_iter()
        .zip(&first)
        .flat_map(|(share, letter)| {
            shares(&[*letter], &second)
                .into_iter()
                .map(move |s| s * share)
        })
        .collect();
    let off = |got: f64, at: usize| (got.ln() - wanted[at].ln()).abs();

    let told = Ask {
        logprobs: Some(values.len()),
        ..ask(choice.clone())
    };
    let mut batch = Batch::new(4, 0);
    batch.add(&generator, 0, &told).unwrap();
    let (_, probs, _) = watched(&mut batch, 1).remove(0);
    assert_eq!(probs[0].top.len(), values.len());
    for (value, logprob) in &probs[0].top {
        let at = values.iter().position(|known| known == value).unwrap();
        let off = off(f64::from(*logprob).exp(), at);
        assert!(off < 0.05, "{value}: off by {off}");
    }
    // Where nobody looks at them, the unlikely ones are not computed.
    let shared = all(&generator, &[choice]).remove(0).choice_probs.unwrap();
    let even =
        |at: &usize| shared[*at] == shared[at + 1] && off(f64::from(shared[*at]), *at) > 0.05;
    assert!((0..values.len()).step_by(2).any(|at| even(&at)));
}

#[test]
fn the_choices_of_two_models_in_a_batch_are_each_in_its_own_tokens() {
    // What ends a turn differs.
    let generators = [(3, "<|im_end|>"), (4, "<|endoftext|>")].map(|(seed, end)| {
        let tiny = tiny::base(seed);
        let template = format!("{{% for m in messages %}}{{{{ m.content }}}}{end}{{% endfor %}}");
        let chat = ChatTemplate::new(&template, "", "").unwrap();
        let tokenizer = tiny.tokenizer.clone();
        let base = BaseModel::new(tiny.weights.clone(), tokenizer, chat, "one of two");
        Generator::new(Arc::new(base), None, GenerateOptions::default()).unwrap()
    });
    // One is the other's beginning, so that the end of a turn has a share.
    let choice = GenerateRequest {
        choices: Some(ChoiceSet {
            after: None,
            values: vec!["card".to_owned(), "cards".to_owned()],
            then: String::new(),
        }),
        ..request("hello", 5)
    };
    let alone: Vec<_> = generators
        .iter()
        .map(|generator| {
            all(generator, std::slice::from_ref(&choice))
                .remove(0)
                .choice_probs
        })
        .collect();
    let mut batch = Batch::new(4, 0);
    for (id, generator) in generators.iter().enumerate() {
        batch.add(generator, id, &ask(choice.clone())).unwrap();
    }
    for ((_, _, answer), alone) in watched(&mut batch, 2).into_iter().zip(alone) {
        let together = answer.unwrap().unwrap().choice_probs.unwrap();
        for (a, b) in together.iter().zip(alone.unwrap()) {
            assert!((a - b).abs() < 1e-4, "{together:?}");
        }
    }
}
