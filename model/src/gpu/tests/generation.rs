//! Answers on the device.

use std::sync::Arc;

use super::{assert_close, devices};
use crate::architecture;
use crate::generate::{Batch, ChoiceSet, GenerateOptions, GenerateRequest, Generator};
use crate::gpu::Gpu;
use crate::llama::{KvCache, Llama, Precision, Run};
use crate::lora::LoraAdapter;
use crate::tiny::{self, request};

/// Feeds runs of mixed lengths, one of them in two parts, with two adapters and with none.
fn fed(base: &Arc<crate::BaseModel>, gpu: Option<&Gpu>) -> Vec<f32> {
    let config = &base.weights.config;
    let on = |adapter: &LoraAdapter| {
        let llama = Llama::new(Arc::clone(base), Some(adapter), Precision::F32).unwrap();
        match gpu {
            Some(gpu) => llama.moved_to(gpu).unwrap(),
            None => llama,
        }
    };
    let llamas = [on(&tiny::adapter(config, 7)), on(&tiny::adapter(config, 8))];
    let llama = &llamas[0];
    let tokens = |from: u32, len: u32| -> Vec<u32> {
        (from..from + len).map(|i| (i * 37 + 5) % 200).collect()
    };
    let feed = |tokens: &[u32], past: Vec<&KvCache>, own: &mut KvCache| {
        let run = Run {
            tokens,
            past,
            own,
            adapter: None,
        };
        llama.forward(vec![run]).unwrap()
    };
    let (mut start, mut more) = (llama.cache(0), llama.cache(0));
    feed(&tokens(0, 9), vec![], &mut start);
    feed(&tokens(9, 3), vec![&start], &mut more);
    // Grows beyond its first room.
    for at in 0..70 {
        feed(&tokens(12 + at, 1), vec![&start], &mut more);
    }
    let mut own: Vec<KvCache> = (0..4).map(|_| llama.cache(0)).collect();
    let texts = [tokens(3, 40), tokens(70, 5), tokens(90, 1), tokens(95, 7)];
    let adapters = [
        llamas[0].adapter(),
        llamas[1].adapter(),
        None,
        llamas[1].adapter(),
    ];
    let pasts = [vec![], vec![&start], vec![&start, &more], vec![]];
    let runs = own.iter_mut().zip(&texts).zip(adapters).zip(pasts);
    let runs = runs.map(|(((own, tokens), adapter), past)| Run {
        tokens,
        past,
        own,
        adapter,
    });
    let hidden = llama.forward(runs.collect()).unwrap();
    let logits = llama.logits(&hidden).unwrap();
    [hidden, logits].concat()
}

#[test]
fn logits_equal_the_cpu() {
    for architecture in architecture::ALL {
        let base = tiny::base_of(architecture, 1);
        let wanted = fed(&base, None);
        for gpu in devices() {
            let got = fed(&base, Some(&gpu));
            assert_close(&got, &wanted, 2e-5, architecture.gguf);
        }
    }
}

fn generator(base: &Arc<crate::BaseModel>, seed: u64, gpu: Option<&Gpu>) -> Generator {
    let adapter = tiny::adapter(&base.weights.config, seed);
    let llama = Llama::new(Arc::clone(base), Some(&adapter), Precision::F32).unwrap();
    let llama = match gpu {
        Some(gpu) => llama.moved_to(gpu).unwrap(),
        None => llama,
    };
    Generator::of(llama, GenerateOptions::default())
}

#[test]
fn greedy_answers_and_choices_equal_the_cpu() {
    let choose = GenerateRequest {
        choices: Some(ChoiceSet {
            after: None,
            values: ["card", "card_lost", "cash", "top up"]
                .map(str::to_owned)
                .to_vec(),
            then: String::new(),
        }),
        ..request("where is my card", 9)
    };
    let texts = ["where is my card", "where is my cash", "hello", "a"];
    let texts = texts.map(|text| request(text, 9));
    let requests: Vec<_> = texts.into_iter().chain([choose]).collect();
    for architecture in architecture::ALL {
        let base = tiny::base_of(architecture, 3);
        let answers = |gpu: Option<&Gpu>| -> Vec<_> {
            let generator = generator(&base, 4, gpu);
            let answers = generator.generate(&requests, &|_, _| {}, &|| false);
            answers.into_iter().map(Result::unwrap).collect()
        };
        let wanted = answers(None);
        for gpu in devices() {
            for (got, wanted) in answers(Some(&gpu)).iter().zip(&wanted) {
                assert_eq!(got.text, wanted.text, "{}", architecture.gguf);
                assert_eq!(got.cached_tokens, wanted.cached_tokens);
                if let (Some(got), Some(wanted)) = (&got.choice_probs, &wanted.choice_probs) {
                    assert_close(got, wanted, 1e-4, architecture.gguf);
                }
            }
        }
    }
}

#[test]
fn rows_of_two_adapters_are_answered_together_and_share_their_starts() {
    let base = tiny::base(5);
    let answers = |gpu: Option<&Gpu>| {
        let on = [generator(&base, 6, gpu), generator(&base, 7, gpu)];
        let mut batch = Batch::new(3, 1 << 20);
        for (id, text) in ["where is my card", "where is my cash", "where is"]
            .into_iter()
            .enumerate()
        {
            for (at, generator) in on.iter().enumerate() {
                let ask = crate::Ask {
                    request: request(text, 9),
                    text: None,
                    top_p: 1.0,
                    logprobs: None,
                };
                batch.add(generator, 2 * id + at, &ask).unwrap();
            }
        }
        let mut texts = vec![String::new(); 6];
        while !batch.is_empty() {
            batch.step(&mut |id, said| {
                if let crate::Said::End(answer) = said {
                    texts[id] = answer.unwrap().text;
                }
            });
        }
        texts
    };
    let wanted = answers(None);
    for gpu in devices() {
        assert_eq!(answers(Some(&gpu)), wanted);
    }
}
