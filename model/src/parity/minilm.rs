//! The sentence encoder on the real weights of all-MiniLM-L6-v2 against `parity/minilm.json`: what
//! sentence-transformers computes of 20 texts.
//!
//! The files are looked for at `FLOWRUN_MINILM_WEIGHTS` and `FLOWRUN_MINILM_TOKENIZER` and where
//! flowrun keeps downloads; without them the test says that it skips, and fails with
//! `FLOWRUN_E2E=full`.
#![allow(clippy::print_stdout)]

use serde::Deserialize;

use super::at_hand::file;
use super::{folder, worst};
use crate::embed::SentenceEncoder;

#[derive(Deserialize)]
struct Recorded {
    /// Digests of the two files.
    weights: String,
    tokenizer: String,
    texts: Vec<Text>,
}

#[derive(Deserialize)]
struct Text {
    text: String,
    tokens: Vec<u32>,
    vector: Vec<f32>,
}

#[test]
fn vectors_equal_those_of_sentence_transformers() {
    let path = folder().join("minilm.json");
    let record = std::fs::read(&path)
        .expect("`record.py minilm model.safetensors tokenizer.json` writes it");
    let recorded: Recorded = serde_json::from_slice(&record).unwrap();
    assert_eq!(recorded.texts.len(), 20);
    let weights = file("minilm", "FLOWRUN_MINILM_WEIGHTS", &recorded.weights);
    let named = "FLOWRUN_MINILM_TOKENIZER";
    let tokenizer = file("minilm", named, &recorded.tokenizer);
    let (Some(weights), Some(tokenizer)) = (weights, tokenizer) else {
        return;
    };
    let encoder = SentenceEncoder::load(&weights, &tokenizer, None).unwrap();
    let texts: Vec<&str> = recorded
        .texts
        .iter()
        .map(|text| text.text.as_str())
        .collect();
    let vectors = encoder.embed(&texts).unwrap();
    let mut most = 0f32;
    for (wanted, got) in recorded.texts.iter().zip(&vectors) {
        let tokens = encoder.tokens(&wanted.text).unwrap();
        assert_eq!(tokens, wanted.tokens, "{:?}", wanted.text);
        let off = worst(got, &wanted.vector);
        assert!(off < 2e-5, "{:?}: off by {off}", wanted.text);
        most = most.max(off);
    }
    // Texts that mean different things are far apart, so that a mix-up would show.
    let first = &recorded.texts[0].vector;
    let nearest = recorded.texts[1..]
        .iter()
        .map(|other| worst(first, &other.vector));
    assert!(nearest.fold(f32::INFINITY, f32::min) > 0.02);
    println!("20 vectors are off by {most:.7} at most");
}
