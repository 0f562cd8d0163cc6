//! Rows that come and go while others are answered.

use std::sync::Arc;

use super::{all, ask, generator, request, watched};
use crate::base_model::BaseModel;
use crate::chat_template::ChatTemplate;
use crate::error::ModelError;
use crate::generate::{Ask, Batch, ChoiceSet, GenerateOptions, GenerateRequest, Generator, Said};
use crate::tiny;

#[test]
fn rows_join_while_others_run_and_the_pieces_make_the_answer() {
    let generator = generator(1, 4);
    let texts = ["a", "hello", "where is my card"];
    let whole = all(&generator, &texts.map(|text| request(text, 9)));
    let mut batch = Batch::new(2, 1 << 20);
    let mut early = String::new();
    batch
        .add(&generator, 0, &ask(request(texts[0], 9)))
        .unwrap();
    batch.step(&mut |_, said| {
        if let Said::Piece(piece) = said {
            early.push_str(&piece.text);
        }
    });
    for (id, text) in texts.iter().enumerate().skip(1) {
        batch.add(&generator, id, &ask(request(text, 9))).unwrap();
    }
    let heard = watched(&mut batch, 3);
    for (id, (text, probs, answer)) in heard.iter().enumerate() {
        let early = if id == 0 { early.as_str() } else { "" };
        assert_eq!(format!("{early}{text}"), whole[id].text);
        let answer = answer.as_ref().unwrap().as_ref().unwrap();
        assert_eq!(answer.text, whole[id].text);
        for prob in probs {
            assert_eq!(prob.top.len(), 3);
            // Greedy: the token is the likeliest one.
            assert_eq!(prob.top[0], (prob.text.clone(), prob.logprob));
            assert!(prob.logprob <= 0.0 && prob.top[0].1 >= prob.top[1].1);
        }
    }
}

#[test]
fn a_row_that_waits_for_room_is_answered_as_it_is_alone() {
    let generator = generator(5, 4);
    let long = "a long start that all of the prompts have in common, ";
    let ends = [
        "one of them",
        "another one, somewhat longer",
        "the third",
        "one of them",
    ];
    let requests = ends.map(|end| request(&format!("{long}{end}"), 6));
    let wanted = all(&generator, &requests);
    // Too little for two: the others wait through all the steps of the one before them.
    let mut batch = Batch::new(4, 1 << 20).with_room(1);
    for (id, request) in requests.iter().enumerate() {
        batch.add(&generator, id, &ask(request.clone())).unwrap();
    }
    let mut most = 0;
    let mut texts = vec![String::new(); 4];
    while !batch.is_empty() {
        batch.step(&mut |id, said| {
            if let Said::Piece(piece) = said {
                texts[id].push_str(&piece.text);
            }
        });
        most = most.max(batch.len());
    }
    assert_eq!(most, 4);
    for (text, wanted) in texts.iter().zip(&wanted) {
        assert_eq!(*text, wanted.text);
    }
}

#[test]
fn a_choice_that_is_longer_than_the_context_is_refused() {
    let generator = generator(6, 4);
    let long = |end: &str| format!("{}{end}", "word ".repeat(20_000));
    let choice = ask(GenerateRequest {
        choices: Some(ChoiceSet {
            after: None,
            values: vec![long("a"), long("b")],
            then: String::new(),
        }),
        ..request("hello", 5)
    });
    let mut batch = Batch::new(4, 0);
    batch.add(&generator, 0, &choice).unwrap();
    let (_, _, answer) = &watched(&mut batch, 1)[0];
    let error = answer.as_ref().unwrap().as_ref().unwrap_err();
    assert!(matches!(error, ModelError::TooLong(_)), "{error}");
    assert!(error.to_string().contains("longest choice"), "{error}");
}

#[test]
fn choices_that_have_no_room_are_refused_where_each_ones_probability_is_told() {
    let generator = generator(6, 4);
    // Pairs that part at their first and at their last token.
    let pairs = ["a", "b"].map(|start| format!("{start}{}", " card".repeat(20)));
    let values = pairs
        .iter()
        .flat_map(|pair| [format!("{pair}x"), format!("{pair}y")]);
    let told = ask(GenerateRequest {
        choices: Some(ChoiceSet {
            after: None,
            values: values.collect(),
            then: String::new(),
        }),
        ..request("hello", 5)
    });
    let untold = Ask {
        logprobs: None,
        ..told.clone()
    };
    let answer = |ask: &Ask, room: usize| {
        let mut batch = Batch::new(4, 0).with_room(room);
        batch.add(&generator, 0, ask).unwrap();
        watched(&mut batch, 1).remove(0).2.unwrap()
    };
    let error = answer(&told, 1).unwrap_err();
    assert!(matches!(error, ModelError::Request(_)), "{error}");
    assert!(error.to_string().contains("log-probabilities"), "{error}");
    assert!(answer(&untold, 1).is_ok());
    assert!(answer(&told, 1 << 30).is_ok());
}

#[test]
fn a_removed_row_is_silent_and_the_others_go_on() {
    let generator = generator(3, 4);
    let mut batch = Batch::new(4, 0);
    for id in 0..3 {
        batch
            .add(&generator, id, &ask(request("hello", 5)))
            .unwrap();
    }
    batch.step(&mut |_, _| {});
    batch.remove(1);
    let ended: Vec<bool> = watched(&mut batch, 3)
        .iter()
        .map(|(_, _, answer)| answer.is_some())
        .collect();
    assert_eq!(ended, [true, false, true]);
}

#[test]
fn a_text_is_gone_on_with_as_it_is_and_a_choice_has_its_probabilities() {
    let generator = generator(4, 4);
    let text = Ask {
        text: Some("once upon".to_owned()),
        ..ask(request("", 4))
    };
    let choice = ask(GenerateRequest {
        choices: Some(ChoiceSet {
            after: None,
            values: vec!["yes".to_owned(), "no".to_owned()],
            then: String::new(),
        }),
        ..request("hello", 5)
    });
    let mut batch = Batch::new(4, 0);
    batch.add(&generator, 0, &text).unwrap();
    batch.add(&generator, 1, &choice).unwrap();
    let heard = watched(&mut batch, 2);
    let free = heard[0].2.as_ref().unwrap().as_ref().unwrap();
    let tokens = generator
        .base()
        .tokenizer
        .encode("once upon", true)
        .unwrap();
    assert_eq!(free.prompt_tokens, tokens.len());
    let (text, probs, _) = &heard[1];
    assert!(["yes", "no"].contains(&text.as_str()));
    let sum: f32 = probs[0].top.iter().map(|(_, logprob)| logprob.exp()).sum();
    assert!((sum - 1.0).abs() < 1e-5 && probs[0].text == *text);
}

#[test]
fn a_text_begins_with_the_begin_token_where_the_model_asks_for_one() {
    let tiny = tiny::base(4);
    let answered = |begin: Option<u32>, text: &str| {
        let tokenizer = tiny.tokenizer.clone().with_begin(begin);
        let chat = ChatTemplate::chatml().unwrap();
        let base = BaseModel::new(tiny.weights.clone(), tokenizer, chat, "begins");
        let generator = Generator::new(Arc::new(base), None, GenerateOptions::default()).unwrap();
        let mut batch = Batch::new(4, 0);
        let text = Ask {
            text: Some(text.to_owned()),
            ..ask(request("", 6))
        };
        batch.add(&generator, 0, &text).unwrap();
        let (_, _, answer) = watched(&mut batch, 1).remove(0);
        answer.unwrap().unwrap()
    };
    let plain = answered(None, "once upon");
    let begun = answered(Some(1), "once upon");
    assert_eq!(begun.prompt_tokens, plain.prompt_tokens + 1);
    assert_eq!(begun, answered(None, "<|im_start|>once upon"));
    assert_eq!(begun, answered(Some(1), "<|im_start|>once upon"));
}
