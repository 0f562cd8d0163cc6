//! A SentencePiece tokenizer with byte fallback from the metadata of a GGUF file, as Gemma has it.
//!
//! SentencePiece joins the two neighbours whose whole has the best score. A BPE rule for every way
//! to cut a piece in two, in the order of the pieces' scores, does the same. A character that is
//! no piece becomes its bytes. Knows no special token: [`super::gguf`] adds them, and the pieces
//! that are matched whole.

use std::collections::HashMap;

use candle_core::quantized::gguf_file::Value;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::Replace;

use super::gguf::integer;

/// What stands for a space in the pieces.
const SPACE: &str = "▁";
/// GGUF's type of the pieces that text is joined from.
const NORMAL: i64 = 1;
/// Longer pieces, in bytes, are no model's.
const LONGEST: usize = 1024;

/// Builds the tokenizer, or says in a sentence what the metadata lack.
pub(super) fn build(
    metadata: &HashMap<String, Value>,
    tokens: &[&str],
) -> Result<tokenizers::Tokenizer, String> {
    const PREFIX: &str = "tokenizer.ggml.add_space_prefix";
    if !matches!(metadata.get(PREFIX), Some(Value::Bool(false))) {
        return Err(format!(
            "a tokenizer of the model `llama` is supported where `{PREFIX}` is false alone; use \
             the model's safetensors folder with its tokenizer.json"
        ));
    }
    let ids = tokens.iter().enumerate();
    let ids = ids.map(|(id, token)| ((*token).to_owned(), id as u32));
    let mut bpe = BPE::builder()
        .vocab_and_merges(ids.collect::<Vocab>(), merges(metadata, tokens)?)
        .byte_fallback(true)
        .fuse_unk(true);
    let unknown = metadata.get("tokenizer.ggml.unknown_token_id");
    let unknown = unknown
        .and_then(integer)
        .and_then(|id| usize::try_from(id).ok());
    if let Some(token) = unknown.and_then(|id| tokens.get(id)) {
        bpe = bpe.unk_token((*token).to_owned());
    }
    let bpe = bpe.build();
    let bpe = bpe.map_err(|e| format!("the pieces do not fit each other: {e}"))?;
    let mut inner = tokenizers::Tokenizer::new(bpe);
    let replace = |from: &str, to: &str| Replace::new(from, to).map_err(|e| e.to_string());
    inner
        .with_normalizer(Some(replace(" ", SPACE)?))
        .map_err(|e| e.to_string())?;
    inner.with_decoder(Some(Sequence::new(vec![
        replace(SPACE, " ")?.into(),
        ByteFallback::new().into(),
        Fuse::new().into(),
    ])));
    Ok(inner)
}

/// The rules, best first. Of pieces with one score, the first in the vocabulary comes first.
fn merges(
    metadata: &HashMap<String, Value>,
    tokens: &[&str],
) -> Result<Vec<(String, String)>, String> {
    let scores = scores(metadata, tokens.len())?;
    let types = match metadata.get("tokenizer.ggml.token_type") {
        Some(Value::Array(types)) => types.as_slice(),
        _ => &[],
    };
    let is_normal = |id: &usize| {
        let kind = types.get(*id);
        kind.is_none_or(|kind| integer(kind) == Some(NORMAL))
    };
    let mut pieces: Vec<usize> = (0..tokens.len()).filter(is_normal).collect();
    pieces.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    let known: std::collections::HashSet<&str> = tokens.iter().copied().collect();
    let mut merges = Vec::new();
    for piece in pieces.into_iter().map(|id| tokens[id]) {
        if piece.len() > LONGEST {
            return Err(format!("a piece of {} bytes is too long", piece.len()));
        }
        // From the longest left part on, as `transformers` does.
        let cuts = piece.char_indices().rev().filter(|(at, _)| *at > 0);
        let pairs = cuts.map(|(at, _)| piece.split_at(at));
        let pairs = pairs.filter(|(a, b)| known.contains(a) && known.contains(b));
        merges.extend(pairs.map(|(a, b)| (a.to_owned(), b.to_owned())));
    }
    Ok(merges)
}

fn scores(metadata: &HashMap<String, Value>, count: usize) -> Result<Vec<f32>, String> {
    const KEY: &str = "tokenizer.ggml.scores";
    let wrong = || format!("the entry `{KEY}` is missing or not a number for each token");
    let Some(Value::Array(values)) = metadata.get(KEY) else {
        return Err(wrong());
    };
    let score = |value: &Value| match value {
        Value::F32(score) => Some(*score),
        _ => None,
    };
    let scores: Option<Vec<f32>> = values.iter().map(score).collect();
    let scores = scores.filter(|scores| scores.len() == count);
    scores.ok_or_else(wrong)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::tokenizer::{Tokenizer, from_gguf};

    /// Tokens with score and type: control, unknown, bytes, one that is matched whole, pieces.
    fn metadata() -> HashMap<String, Value> {
        let mut tokens: Vec<(String, f32, i32)> = vec![
            ("<pad>".into(), 0.0, 3),
            ("<eos>".into(), 0.0, 3),
            ("<unk>".into(), 0.0, 2),
            ("  ".into(), -1000.0, 4),
        ];
        tokens.extend((0..256).map(|byte| (format!("<0x{byte:02X}>"), 0.0, 6)));
        let pieces = [
            "ar", "ca", "card", "▁card", "car", "▁", "a", "b", "c", "d", "r",
        ];
        let scored = pieces.iter().zip(1u8..);
        tokens.extend(scored.map(|(piece, rank)| ((*piece).to_owned(), -f32::from(rank), 1)));
        let of = |value: fn(&(String, f32, i32)) -> Value| {
            Value::Array(tokens.iter().map(value).collect())
        };
        HashMap::from([
            ("model", Value::String("llama".into())),
            ("add_space_prefix", Value::Bool(false)),
            ("tokens", of(|token| Value::String(token.0.clone()))),
            ("scores", of(|token| Value::F32(token.1))),
            ("token_type", of(|token| Value::I32(token.2))),
            ("eos_token_id", Value::U32(1)),
            ("unknown_token_id", Value::U32(2)),
        ])
        .into_iter()
        .map(|(key, value)| (format!("tokenizer.ggml.{key}"), value))
        .collect()
    }

    fn pieces(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
        let tokens = tokenizer.encode(text, true).unwrap();
        assert_eq!(
            tokenizer.decode(&tokens).unwrap(),
            text.replace("<eos>", "")
        );
        tokens
    }

    #[test]
    fn the_best_whole_is_joined_first_and_spaces_and_bytes_come_back() {
        let tokenizer = from_gguf(&metadata()).unwrap();
        let ids = |texts: &[&str]| -> Vec<u32> {
            let ids = texts.iter().map(|text| tokenizer.token_id(text));
            ids.map(Option::unwrap).collect()
        };
        for (text, wanted) in [
            ("card card", &["card", "▁card"][..]),
            // `ar` is better than `ca`, and nothing joins `ar` with `b`.
            ("carb a", &["car", "b", "▁", "a"][..]),
            ("ca  b", &["ca", "  ", "b"][..]),
            ("é", &["<0xC3>", "<0xA9>"][..]),
            (
                "a😀<eos>",
                &["a", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "<eos>"],
            ),
        ] {
            assert_eq!(pieces(&tokenizer, text), ids(wanted), "{text}");
        }
        let plain = tokenizer.encode("<eos>", false).unwrap();
        assert!(plain.len() > 1 && !plain.contains(&1));
        assert_eq!(tokenizer.decode(&plain).unwrap(), "<eos>");
        assert_eq!(tokenizer.eos(), [1]);
    }

    #[test]
    fn metadata_that_do_not_fit_are_an_error() {
        for (key, value) in [
            ("tokenizer.ggml.add_space_prefix", Value::Bool(true)),
            ("tokenizer.ggml.scores", Value::Array(vec![Value::F32(1.0)])),
            ("tokenizer.ggml.scores", Value::U8(1)),
            ("tokenizer.ggml.tokens", Value::U8(1)),
        ] {
            let mut metadata = metadata();
            metadata.insert(key.to_owned(), value);
            assert!(from_gguf(&metadata).is_err(), "{key}");
        }
    }
}
