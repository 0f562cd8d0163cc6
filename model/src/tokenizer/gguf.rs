//! A tokenizer from the metadata of a GGUF file: byte-level BPE here, the other kind in
//! `sentence_piece`.

use std::collections::{BTreeSet, HashMap};

use candle_core::quantized::gguf_file::Value;
use tokenizers::AddedToken;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, Vocab};

use super::{Tokenizer, pre_tokenizer, sentence_piece};

/// GGUF's token types: control tokens are special, user-defined ones are matched whole.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// Builds the tokenizer, or says in a sentence what the metadata lacks.
pub(crate) fn from_gguf(metadata: &HashMap<String, Value>) -> Result<Tokenizer, String> {
    let model = string(metadata, "tokenizer.ggml.model")?;
    let tokens = strings(metadata, "tokenizer.ggml.tokens")?;
    let mut inner = match model {
        "gpt2" => byte_level(metadata, &tokens)?,
        "llama" => sentence_piece::build(metadata, &tokens)?,
        _ => {
            return Err(format!(
                "the tokenizer model `{model}` is not supported, only `gpt2` (byte-level BPE) and \
                 `llama` (SentencePiece); use the model's safetensors folder with its \
                 tokenizer.json"
            ));
        }
    };
    add_special(&mut inner, metadata, &tokens)?;
    Ok(Tokenizer::new(
        inner,
        eos(metadata, tokens.len())?.as_slice(),
    ))
}

fn byte_level(
    metadata: &HashMap<String, Value>,
    tokens: &[&str],
) -> Result<tokenizers::Tokenizer, String> {
    let merges = merges(tokens, strings(metadata, "tokenizer.ggml.merges")?)?;
    let pre = string(metadata, "tokenizer.ggml.pre").unwrap_or("default");
    let ids = tokens
        .iter()
        .enumerate()
        .map(|(id, token)| ((*token).to_owned(), id as u32));
    let bpe = BPE::builder()
        .vocab_and_merges(ids.collect::<Vocab>(), merges)
        // Llama 3 takes a whole word that is in the vocabulary without merging up to it.
        .ignore_merges(pre.starts_with("llama"))
        .build()
        .map_err(|e| format!("the merges do not fit the vocabulary: {e}"))?;
    let mut inner = tokenizers::Tokenizer::new(bpe);
    inner
        .with_normalizer(pre_tokenizer::normalizer(pre))
        .map_err(|e| e.to_string())?;
    inner.with_pre_tokenizer(Some(pre_tokenizer::by_name(pre)?));
    inner.with_decoder(Some(ByteLevel::default()));
    Ok(inner)
}

/// The token that ends a turn, where one is named.
fn eos(metadata: &HashMap<String, Value>, tokens: usize) -> Result<Option<u32>, String> {
    const KEY: &str = "tokenizer.ggml.eos_token_id";
    let Some(value) = metadata.get(KEY) else {
        return Ok(None);
    };
    let id = integer(value).and_then(|id| u32::try_from(id).ok());
    match id.filter(|id| (*id as usize) < tokens) {
        Some(id) => Ok(Some(id)),
        None => Err(format!(
            "the entry `{KEY}` names none of the {tokens} tokens"
        )),
    }
}

fn add_special(
    inner: &mut tokenizers::Tokenizer,
    metadata: &HashMap<String, Value>,
    tokens: &[&str],
) -> Result<(), String> {
    let Some(Value::Array(types)) = metadata.get("tokenizer.ggml.token_type") else {
        return Ok(());
    };
    let typed = tokens.iter().zip(types);
    let special: Vec<_> = typed
        .filter_map(|(token, kind)| match integer(kind) {
            Some(CONTROL) => Some(AddedToken::from(*token, true)),
            Some(USER_DEFINED) => Some(AddedToken::from(*token, false).normalized(false)),
            _ => None,
        })
        .collect();
    inner.add_tokens(special).map_err(|e| e.to_string())?;
    Ok(())
}

/// Merge rules as pairs. A rule whose result is not a token is refused here: the BPE builder
/// assumes that none is longer than the longest token.
fn merges(tokens: &[&str], rules: Vec<&str>) -> Result<Vec<(String, String)>, String> {
    let known: BTreeSet<&str> = tokens.iter().copied().collect();
    let pair = |rule: &str| {
        let (a, b) = rule
            .split_once(' ')
            .ok_or_else(|| format!("`{rule}` is not a merge rule"))?;
        match known.contains(format!("{a}{b}").as_str()) {
            true => Ok((a.to_owned(), b.to_owned())),
            false => Err(format!(
                "the merge rule `{rule}` makes no token of the vocabulary"
            )),
        }
    };
    rules.into_iter().map(pair).collect()
}

pub(crate) fn string<'a>(
    metadata: &'a HashMap<String, Value>,
    key: &str,
) -> Result<&'a str, String> {
    match metadata.get(key) {
        Some(Value::String(text)) => Ok(text),
        Some(_) => Err(format!("the entry `{key}` is not a text")),
        None => Err(format!("the entry `{key}` is missing")),
    }
}

fn strings<'a>(metadata: &'a HashMap<String, Value>, key: &str) -> Result<Vec<&'a str>, String> {
    let wrong = || format!("the entry `{key}` is missing or not a list of texts");
    let Some(Value::Array(values)) = metadata.get(key) else {
        return Err(wrong());
    };
    let texts = values.iter().map(|value| match value {
        Value::String(text) => Ok(text.as_str()),
        _ => Err(wrong()),
    });
    texts.collect()
}

/// Any integer value, whatever its width.
pub(crate) fn integer(value: &Value) -> Option<i64> {
    match value {
        Value::U8(v) => Some((*v).into()),
        Value::I8(v) => Some((*v).into()),
        Value::U16(v) => Some((*v).into()),
        Value::I16(v) => Some((*v).into()),
        Value::U32(v) => Some((*v).into()),
        Value::I32(v) => Some((*v).into()),
        Value::U64(v) => i64::try_from(*v).ok(),
        Value::I64(v) => Some(*v),
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod tests {
    use super::*;

    fn texts(list: &[&str]) -> Value {
        Value::Array(
            list.iter()
                .map(|t| Value::String((*t).to_owned()))
                .collect(),
        )
    }

    /// The tokenizer of the tiny test models.
    pub(crate) fn tiny_tokenizer() -> Tokenizer {
        from_gguf(&tiny_metadata()).unwrap()
    }

    /// A vocabulary of the byte letters and a few merges, ChatML's tokens first.
    pub(crate) fn tiny_metadata() -> HashMap<String, Value> {
        let mut tokens = vec![
            "<|endoftext|>".to_owned(),
            "<|im_start|>".into(),
            "<|im_end|>".into(),
        ];
        let mut letters: Vec<char> = ByteLevel::alphabet().into_iter().collect();
        letters.sort_unstable();
        tokens.extend(letters.into_iter().map(String::from));
        tokens.extend(["Ġc", "ar", "card", "Ġcard", "Ċ", "12"].map(String::from));
        let types = (0..tokens.len())
            .map(|i| Value::I32(if i < 3 { 3 } else { 1 }))
            .collect();
        let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
        HashMap::from([
            (
                "tokenizer.ggml.model".to_owned(),
                Value::String("gpt2".into()),
            ),
            (
                "tokenizer.ggml.pre".to_owned(),
                Value::String("smollm".into()),
            ),
            ("tokenizer.ggml.tokens".to_owned(), texts(&tokens)),
            ("tokenizer.ggml.token_type".to_owned(), Value::Array(types)),
            (
                "tokenizer.ggml.merges".to_owned(),
                texts(&["Ġ c", "a r", "Ġc ar", "Ġcar d", "1 2"][..2]),
            ),
            ("tokenizer.ggml.eos_token_id".to_owned(), Value::U32(2)),
        ])
    }

    #[test]
    fn digits_stand_alone_and_special_tokens_are_read_on_request() {
        let tokenizer = tiny_tokenizer();
        assert_eq!(tokenizer.eos(), [2, 0]);
        let chat = tokenizer
            .encode("<|im_start|>car 12<|im_end|>", true)
            .unwrap();
        assert_eq!((chat[0], *chat.last().unwrap()), (1, 2));
        let id = |t: &str| tokenizer.token_id(t).unwrap();
        assert_eq!(chat[1..3], [id("c"), id("ar")]);
        assert_eq!(chat[4..6], [id("1"), id("2")]);
        assert_eq!(tokenizer.decode(&chat).unwrap(), "car 12");
        let plain = tokenizer.encode("<|im_end|>", false).unwrap();
        assert!(plain.len() > 1 && !plain.contains(&2));
        assert_eq!(tokenizer.decode(&plain).unwrap(), "<|im_end|>");
    }

    #[test]
    fn qwen_reads_composed_characters() {
        let mut metadata = tiny_metadata();
        let pre = Value::String("qwen2".to_owned());
        metadata.insert("tokenizer.ggml.pre".to_owned(), pre);
        let qwen = from_gguf(&metadata).unwrap();
        let encode = |tokenizer: &Tokenizer, text| tokenizer.encode(text, true).unwrap();
        for text in ["e\u{301}", "a\u{308}rd<|im_end|>"] {
            let plain = encode(&tiny_tokenizer(), text);
            assert!(encode(&qwen, text).len() < plain.len(), "{text}");
        }
        assert_eq!(qwen.decode(&encode(&qwen, "e\u{301}")).unwrap(), "é");
    }

    #[test]
    fn metadata_that_does_not_fit_is_an_error_not_a_panic() {
        for (key, value) in [
            ("tokenizer.ggml.model", Value::String("llama".into())),
            ("tokenizer.ggml.pre", Value::String("martian".into())),
            ("tokenizer.ggml.tokens", Value::U8(3)),
            ("tokenizer.ggml.merges", texts(&["Ġ c", "card card"])),
            ("tokenizer.ggml.merges", texts(&["nospace"])),
            ("tokenizer.ggml.eos_token_id", Value::U32(100_000)),
            ("tokenizer.ggml.eos_token_id", Value::I32(-1)),
        ] {
            let mut metadata = tiny_metadata();
            metadata.insert(key.to_owned(), value);
            assert!(from_gguf(&metadata).is_err(), "{key}");
        }
    }
}
