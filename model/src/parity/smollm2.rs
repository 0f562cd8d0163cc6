//! SmolLM2 against `parity/smollm2.json`.
//!
//! The weights are looked for at `FLOWRUN_SMOLLM2_GGUF` and where flowrun keeps downloads;
//! without them these tests say that they skip. With `FLOWRUN_E2E=full` they fail without them,
//! check all prompts instead of some, and ask the packages themselves where `FLOWRUN_PYTHON` names
//! an interpreter that has them.
#![allow(clippy::print_stdout)]

use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, LazyLock};

use serde::Deserialize;

use super::at_hand::{file, full};
use super::{Chat, Encoded, adapter_of_ours, check_chats, check_tokens};
use super::{folder, logits, read, worst};
use crate::base_model::BaseModel;
use crate::chat_template::{ChatMessage, TemplateArguments};
use crate::generate::{Answer, Finish, GenerateOptions, GenerateRequest, Generator};
use crate::llama::{Llama, Precision, Run};
use crate::required::skip;

/// Tokens of a recorded answer at most.
const ANSWER: usize = 16;

#[derive(Deserialize)]
struct Top {
    tokens: Vec<u32>,
    top: Vec<usize>,
    logits: Vec<f32>,
    log_sum_exp: f32,
}

#[derive(Deserialize)]
struct Greedy {
    question: String,
    tokens: Vec<u32>,
    /// The smallest lead of a chosen token over the next best, in the reference.
    lead: f32,
}

#[derive(Deserialize)]
struct SmolLm2 {
    sha256: String,
    tokenizer: Vec<Encoded>,
    chats: Vec<Chat>,
    logits: Vec<Top>,
    greedy: Vec<Greedy>,
}

static WEIGHTS: LazyLock<Option<(PathBuf, Arc<BaseModel>)>> = LazyLock::new(|| {
    let sha256 = recorded().sha256;
    let path = file("smollm2", "FLOWRUN_SMOLLM2_GGUF", &sha256)?;
    let base = BaseModel::load(&path, "smollm2").unwrap();
    Some((path, Arc::new(base)))
});

fn recorded() -> SmolLm2 {
    read(&folder().join("smollm2.json"))
}

fn smollm2() -> Option<(SmolLm2, &'static Arc<BaseModel>)> {
    let (_, base) = WEIGHTS.as_ref()?;
    Some((recorded(), base))
}

#[test]
fn tokens_equal_the_reference() {
    let Some((recorded, base)) = smollm2() else {
        return;
    };
    check_tokens(base, &recorded.tokenizer);
    println!("{} texts have equal tokens", recorded.tokenizer.len());
}

#[test]
fn chats_equal_the_reference() {
    let Some((recorded, base)) = smollm2() else {
        return;
    };
    check_chats(base, &recorded.chats);
}

#[test]
fn logits_equal_the_reference() {
    let Some((recorded, base)) = smollm2() else {
        return;
    };
    for (precision, tolerance) in [(Precision::F32, 2e-3), (Precision::Int8, 0.1)] {
        let llama = Llama::new(Arc::clone(base), None, precision).unwrap();
        for case in &recorded.logits {
            let got = logits(&llama, &case.tokens);
            let top: Vec<f32> = case.top.iter().map(|token| got[*token]).collect();
            let off = worst(&top, &case.logits);
            let most = got.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum = most + got.iter().map(|l| (l - most).exp()).sum::<f32>().ln();
            println!(
                "{precision:?}, {} tokens: off by {off:.5}, log-sum-exp by {:.5}",
                case.tokens.len(),
                sum - case.log_sum_exp
            );
            assert!(off < tolerance, "{precision:?}: off by {off}");
            assert!((sum - case.log_sum_exp).abs() < tolerance);
        }
    }
}

/// How many of the recorded answers come out token by token.
fn equal_answers(recorded: &[Greedy], base: &Arc<BaseModel>, precision: Precision) -> Vec<usize> {
    let llama = Llama::new(Arc::clone(base), None, precision).unwrap();
    let prompt = |greedy: &Greedy| {
        let message = ChatMessage::new("user", greedy.question.clone());
        base.prompt_tokens(&[message]).unwrap()
    };
    let differs = |greedy: &Greedy| {
        // The whole answer in one pass: each token must be the likeliest after those before it.
        let prompt = prompt(greedy);
        let mut own = llama.cache(prompt.len() + greedy.tokens.len());
        let mut feed = prompt;
        greedy.tokens.iter().any(|wanted| {
            let run = Run {
                tokens: &feed,
                past: vec![],
                own: &mut own,
                adapter: None,
            };
            let hidden = llama.forward(vec![run]).unwrap();
            let logits = llama.logits(&hidden).unwrap();
            let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
            feed = vec![*wanted];
            best != Some(*wanted as usize)
        })
    };
    let rows = recorded.iter().enumerate();
    rows.filter(|(_, greedy)| differs(greedy))
        .map(|(at, _)| at)
        .collect()
}

/// The recorded answers that do not come out through the generator: all prompts in one call, what
/// they begin with computed once, 32 of them decoded together.
fn different_texts(recorded: &[Greedy], base: &Arc<BaseModel>, precision: Precision) -> Vec<usize> {
    let options = GenerateOptions {
        precision,
        ..GenerateOptions::default()
    };
    let generator = Generator::new(Arc::clone(base), None, options).unwrap();
    let request = |greedy: &Greedy| GenerateRequest {
        messages: vec![ChatMessage::new("user", greedy.question.clone())],
        template_arguments: TemplateArguments::new(),
        max_tokens: ANSWER,
        temperature: 0.0,
        seed: None,
        stop: Vec::new(),
        choices: None,
    };
    let requests: Vec<_> = recorded.iter().map(request).collect();
    let answers = generator.generate(&requests, &|_, _| {}, &|| false);
    let differs = |greedy: &Greedy, answer: Answer| {
        let answer = answer.unwrap();
        let text = base.tokenizer.decode(&greedy.tokens).unwrap();
        let ended = greedy
            .tokens
            .last()
            .is_some_and(|last| base.tokenizer.eos().contains(last));
        let finish = if ended { Finish::Stop } else { Finish::Length };
        (answer.text, answer.completion_tokens, answer.finish)
            != (text, greedy.tokens.len(), finish)
    };
    let pairs = recorded.iter().zip(answers).enumerate();
    pairs
        .filter_map(|(at, (greedy, answer))| differs(greedy, answer).then_some(at))
        .collect()
}

#[test]
fn greedy_answers_equal_the_reference() {
    let Some((recorded, base)) = smollm2() else {
        return;
    };
    let count = if full() { recorded.greedy.len() } else { 12 };
    let some = &recorded.greedy[..count];
    let different = equal_answers(some, base, Precision::F32);
    println!("f32: {} of {count} equal", count - different.len());
    for at in &different {
        let greedy = &recorded.greedy[*at];
        println!("{}: a lead of {} turned", greedy.question, greedy.lead);
    }
    // A lead smaller than rounding may turn; none else may.
    let turned = |different: &[usize]| different.iter().all(|at| some[*at].lead < 2e-3);
    assert!(turned(&different), "{different:?}");
    let different = different_texts(some, base, Precision::F32);
    println!(
        "f32, generated together: {} of {count} equal",
        count - different.len()
    );
    assert!(turned(&different), "generated together: {different:?}");
    if full() {
        let different = equal_answers(some, base, Precision::Int8);
        println!("8 bits: {} of {count} equal", count - different.len());
        let different = different_texts(some, base, Precision::Int8);
        println!(
            "8 bits, generated together: {} of {count} equal",
            count - different.len()
        );
    }
}

/// Asks the installed packages: our adapter through PEFT, on the same GGUF file.
#[test]
fn with_our_adapter_equals_peft_itself() {
    let (Some((recorded, base)), Some(python), true) =
        (smollm2(), std::env::var_os("FLOWRUN_PYTHON"), full())
    else {
        let why = "FLOWRUN_E2E=full and FLOWRUN_PYTHON, with torch and PEFT, are not both set";
        skip("peft", why);
        return;
    };
    let path = &WEIGHTS.as_ref().unwrap().0;
    let tokens = &recorded.logits[1].tokens;
    let files = tempfile::tempdir().unwrap();
    for invocation in [None, Some(vec![tokens[tokens.len() / 2]])] {
        let mut adapter = adapter_of_ours(base, 0.05);
        adapter.config.invocation_tokens = invocation;
        adapter.save(files.path(), "smollm2").unwrap();
        let output = Command::new(&python)
            .arg(folder().join("record.py"))
            .arg("logits")
            .args([path.as_path(), files.path()])
            .args(tokens.iter().map(u32::to_string))
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let wanted: Vec<f32> = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        let plain = Llama::new(Arc::clone(base), None, Precision::F32).unwrap();
        let llama = Llama::new(Arc::clone(base), Some(&adapter), Precision::F32).unwrap();
        let got = logits(&llama, tokens);
        let (off, moved) = (
            worst(&got, &wanted),
            worst(&logits(&plain, tokens), &wanted),
        );
        println!("off by {off:.5}, where the adapter moves logits by {moved:.3}");
        assert!(off < 5e-3 && moved > 0.1, "off by {off}, moved by {moved}");
    }
}
