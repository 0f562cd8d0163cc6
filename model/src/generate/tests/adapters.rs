//! Several adapters, plain and activated, over one base model.

use super::{all, ask, request, watched};
use crate::architecture;
use crate::chat_template::ChatMessage;
use crate::generate::{Batch, ChoiceSet, GenerateOptions, Generated, Generator, SHORTEST_PREFIX};
use crate::llama::Run;
use crate::lora::LoraAdapter;
use crate::tiny;

/// The likeliest tokens, the adapter in effect from `start` on, one request by itself.
fn activated_greedy(generator: &Generator, text: &str, max_tokens: usize) -> (usize, String) {
    let (llama, base) = (&generator.llama, generator.base());
    let prompt = base
        .prompt_tokens(&[ChatMessage::new("user", text)])
        .unwrap();
    let adapter = llama.adapter().unwrap();
    let start = adapter.start(&prompt).unwrap();
    let mut own = llama.cache(0);
    let mut feed = |tokens: &[u32], adapter| {
        let run = Run {
            tokens,
            past: vec![],
            own: &mut own,
            adapter,
        };
        llama.forward(vec![run]).unwrap()
    };
    feed(&prompt[..start], None);
    let mut hidden = feed(&prompt[start..], Some(adapter));
    let mut tokens = Vec::new();
    for _ in 0..max_tokens {
        let logits = llama.logits(&hidden).unwrap();
        let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
        tokens.push(best.unwrap() as u32);
        if base.tokenizer.eos().contains(&tokens[tokens.len() - 1]) {
            break;
        }
        hidden = feed(&tokens[tokens.len() - 1..], Some(adapter));
    }
    (start, base.tokenizer.decode(&tokens).unwrap())
}

#[test]
fn an_activated_adapter_answers_alike_alone_and_with_a_shared_start() {
    let base = tiny::base(1);
    let mut adapter = tiny::adapter(&base.weights.config, 2);
    // The header of the answer.
    let mark = base
        .tokenizer
        .encode("<|im_start|>assistant", true)
        .unwrap();
    adapter.config.invocation_tokens = Some(mark);
    let generator = |adapter: &LoraAdapter| {
        Generator::new(base.clone(), Some(adapter), GenerateOptions::default()).unwrap()
    };
    let activated = generator(&adapter);
    let same = "a question long enough to share its start: ";
    let texts: Vec<String> = (0..5).map(|i| format!("{same}{i}")).collect();
    let requests: Vec<_> = texts.iter().map(|text| request(text, 7)).collect();
    for (answer, text) in all(&activated, &requests).iter().zip(&texts) {
        let (start, wanted) = activated_greedy(&activated, text, 7);
        assert!(start > SHORTEST_PREFIX);
        assert_eq!(answer.text, wanted, "{text}");
    }
    // One that is never invoked leaves the base model as it is.
    adapter.config.invocation_tokens = Some(vec![1, 1, 1]);
    let plain = Generator::new(base.clone(), None, GenerateOptions::default()).unwrap();
    assert_eq!(all(&generator(&adapter), &requests), all(&plain, &requests));
}

#[test]
fn rows_of_one_pass_may_have_different_adapters() {
    let base = tiny::base(3);
    let config = &base.weights.config;
    let generators: Vec<Generator> = [None, Some(4), Some(5)]
        .map(|seed: Option<u64>| {
            let adapter = seed.map(|seed| tiny::adapter(config, seed));
            Generator::new(base.clone(), adapter.as_ref(), GenerateOptions::default()).unwrap()
        })
        .into();
    let tokens: Vec<u32> = (0..9).map(|i| i * 13 + 2).collect();
    let order = [1, 1, 0, 2, 1, 0];
    let hidden = |order: &[usize]| {
        let llama = &generators[0].llama;
        let mut caches: Vec<_> = order.iter().map(|_| llama.cache(9)).collect();
        let runs = order.iter().zip(&mut caches).map(|(which, own)| Run {
            tokens: &tokens,
            past: vec![],
            own,
            adapter: generators[*which].llama.adapter(),
        });
        llama.forward(runs.collect()).unwrap()
    };
    let width = config.hidden;
    for (which, got) in order.iter().zip(hidden(&order).chunks(width)) {
        let alone = hidden(&[*which]);
        let off = got.iter().zip(&alone).map(|(a, b)| (a - b).abs());
        assert!(off.fold(0.0, f32::max) < 1e-4);
    }
}

#[test]
fn adapters_share_a_batch_and_prompts_their_common_start() {
    let base = tiny::base(1);
    let adapter = tiny::adapter(&base.weights.config, 2);
    let options = GenerateOptions::default();
    let plain = Generator::new(base.clone(), None, options).unwrap();
    let adapted = Generator::new(base, Some(&adapter), options).unwrap();
    let long = "a long start that all of the prompts have in common, ";
    let requests: Vec<_> = ["one", "two", "three", "one"]
        .iter()
        .map(|end| request(&format!("{long}{end}"), 6))
        .collect();
    let wanted = [&plain, &adapted].map(|generator| all(generator, &requests));
    let mut batch = Batch::new(8, 1 << 20);
    for (id, request) in requests.iter().enumerate() {
        batch.add(&plain, 2 * id, &ask(request.clone())).unwrap();
        batch
            .add(&adapted, 2 * id + 1, &ask(request.clone()))
            .unwrap();
    }
    let answers: Vec<Generated> = watched(&mut batch, 8)
        .into_iter()
        .map(|(_, _, answer)| answer.unwrap().unwrap())
        .collect();
    for (id, answer) in answers.iter().enumerate() {
        assert_eq!(answer.text, wanted[id % 2][id / 2].text, "{id}");
    }
    assert!(answers.iter().any(|a| a.cached_tokens >= 16), "{answers:?}");
    assert_ne!(wanted[0], wanted[1]);

    // No room: nothing is kept, nothing changes.
    let mut batch = Batch::new(8, 0);
    for (id, request) in requests.iter().enumerate() {
        batch.add(&plain, id, &ask(request.clone())).unwrap();
    }
    for (id, (text, _, _)) in watched(&mut batch, 4).iter().enumerate() {
        assert_eq!(*text, wanted[0][id].text);
    }
}

#[test]
fn activated_adapters_and_the_base_model_share_what_comes_before_the_invocation() {
    for architecture in architecture::ALL {
        let base = tiny::base_of(architecture, 1);
        let mark = base.tokenizer.encode("<|im_start|>assistant", true);
        let mark = mark.unwrap();
        let generator = |seed: Option<u64>| {
            let adapter = seed.map(|seed| {
                let mut adapter = tiny::adapter(&base.weights.config, seed);
                adapter.config.invocation_tokens = Some(mark.clone());
                adapter
            });
            Generator::new(base.clone(), adapter.as_ref(), GenerateOptions::default()).unwrap()
        };
        let generators = [generator(None), generator(Some(2)), generator(Some(3))];
        // Not an activated one: its keys and values are its own.
        let plain = tiny::adapter(&base.weights.config, 4);
        let plain = Generator::new(base.clone(), Some(&plain), GenerateOptions::default());
        let plain = plain.unwrap();
        let text = "a question that is long enough to be worth keeping";
        let wanted = |of: &Generator| all(of, &[request(text, 6)]).remove(0).text;

        let mut batch = Batch::new(1, 1 << 20);
        let order = [0, 0, 1, 2, 1].map(|at: usize| &generators[at]);
        let order: Vec<&Generator> = order.into_iter().chain([&plain]).collect();
        for (id, of) in order.iter().enumerate() {
            batch.add(of, id, &ask(request(text, 6))).unwrap();
        }
        let heard = watched(&mut batch, order.len());
        let answers = heard.into_iter().map(|(_, _, answer)| answer);
        let answers: Vec<Generated> = answers.map(|answer| answer.unwrap().unwrap()).collect();
        for (answer, of) in answers.iter().zip(&order) {
            assert_eq!(answer.text, wanted(of), "{}", architecture.gguf);
        }
        let prompt = base.prompt_tokens(&[ChatMessage::new("user", text)]);
        let prompt = prompt.unwrap();
        let adapter = generators[1].llama.adapter().unwrap();
        let before = adapter.start(&prompt).unwrap();
        assert!(before > SHORTEST_PREFIX);
        // The base model's second prompt is the first to have anything in common with another;
        // of what it kept, an adapter takes what comes before its invocation.
        let cached: Vec<usize> = answers.iter().map(|answer| answer.cached_tokens).collect();
        let wanted = [0, 0, before, before, before, 0];
        assert_eq!(cached, wanted, "{}", architecture.gguf);
    }
}

#[test]
fn rows_of_several_adapters_are_answered_together_as_each_alone() {
    for architecture in architecture::ALL {
        let base = tiny::base_of(architecture, 5);
        let generators: Vec<Generator> = [None, Some(6), Some(7)]
            .map(|seed: Option<u64>| {
                let adapter = seed.map(|seed| tiny::adapter(&base.weights.config, seed));
                Generator::new(base.clone(), adapter.as_ref(), GenerateOptions::default()).unwrap()
            })
            .into();
        let mut batch = Batch::new(8, 0);
        let asked = |id: usize| {
            let mut request = request(["a", "where is"][id % 2], 6);
            // One of the rows of each model is at its choice at once.
            request.choices = (id < 3).then(|| ChoiceSet {
                after: None,
                values: vec!["card".to_owned(), "cash".to_owned()],
                then: String::new(),
            });
            request
        };
        for id in 0..7 {
            let of = &generators[id % 3];
            batch.add(of, id, &ask(asked(id))).unwrap();
        }
        for (id, (_, _, answer)) in watched(&mut batch, 7).into_iter().enumerate() {
            let answer = answer.unwrap().unwrap();
            let alone = all(&generators[id % 3], &[asked(id)]).remove(0);
            assert_eq!(answer.text, alone.text, "{} {id}", architecture.gguf);
            let pairs = answer.choice_probs.iter().flatten();
            let pairs = pairs.zip(alone.choice_probs.iter().flatten());
            let off = pairs.map(|(a, b)| (a - b).abs());
            assert!(off.fold(0.0, f32::max) < 1e-4, "{id}");
        }
    }
}
