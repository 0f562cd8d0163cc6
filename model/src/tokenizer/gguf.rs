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
    let turn_end = id_or_none(metadata, "tokenizer.ggml.eot_token_id", tokens.len());
    let text_end = id(metadata, "tokenizer.ggml.eos_token_id", tokens.len())?;
    let ends: Vec<u32> = turn_end.into_iter().chain(text_end).collect();
    let begin = begin(metadata, tokens.len())?;
    Ok(Tokenizer::new(inner, &ends).with_begin(begin))
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
        .ignore_merges(is_llama3(pre))
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

fn is_llama3(pre: &str) -> bool {
    pre.starts_with("llama")
}

/// The token that an entry names, where there is one.
fn id(metadata: &HashMap<String, Value>, key: &str, tokens: usize) -> Result<Option<u32>, String> {
    let Some(value) = metadata.get(key) else {
        return Ok(None);
    };
    let id = integer(value).and_then(|id| u32::try_from(id).ok());
    match id.filter(|id| (*id as usize) < tokens) {
        Some(id) => Ok(Some(id)),
        None => Err(format!(
            "the entry `{key}` names none of the {tokens} tokens"
        )),
    }
}

/// The same where a model can do without: files say with a number that is no token's, such as -1,
/// that there is none.
fn id_or_none(metadata: &HashMap<String, Value>, key: &str, tokens: usize) -> Option<u32> {
    id(metadata, key, tokens).ok().flatten()
}

/// What a text that is no chat begins with, by default as in llama.cpp.
fn begin(metadata: &HashMap<String, Value>, tokens: usize) -> Result<Option<u32>, String> {
    let asked = match flag(metadata, "tokenizer.ggml.add_bos_token")? {
        Some(asked) => asked,
        None => {
            let pre = string(metadata, "tokenizer.ggml.pre").unwrap_or("default");
            string(metadata, "tokenizer.ggml.model")? == "llama" || is_llama3(pre)
        }
    };
    let begin = id_or_none(metadata, "tokenizer.ggml.bos_token_id", tokens);
    Ok(begin.filter(|_| asked))
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

/// Whether an entry asks for something, where there is one.
fn flag(metadata: &HashMap<String, Value>, key: &str) -> Result<Option<bool>, String> {
    match metadata.get(key) {
        Some(Value::Bool(asked)) => Ok(Some(*asked)),
        Some(_) => Err(format!("the entry `{key}` is neither true nor false")),
        None => Ok(None),
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
    use crate::base_model::BaseModel;
    use crate::chat_template::{CHATML, ChatTemplate};

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
    fn a_text_begins_as_llama_cpp_begins_it() {
        let begins = |entries: &[(&str, Value)]| {
            let mut metadata = tiny_metadata();
            for (key, value) in entries {
                metadata.insert(format!("tokenizer.ggml.{key}"), value.clone());
            }
            let tokenizer = from_gguf(&metadata).unwrap();
            tokenizer.text_tokens("card").unwrap().first() == Some(&1)
        };
        let bos = || ("bos_token_id", Value::U32(1));
        let asks = |asks| ("add_bos_token", Value::Bool(asks));
        let llama3 = || ("pre", Value::String("llama-bpe".to_owned()));
        assert!(!begins(&[bos()]));
        assert!(begins(&[bos(), asks(true)]));
        assert!(begins(&[bos(), llama3()]));
        assert!(!begins(&[bos(), llama3(), asks(false)]));
        assert!(!begins(&[llama3()]));
    }

    #[test]
    fn a_turn_ends_as_the_chat_template_ends_it() {
        // As in Gemma's files: what ends a text is not what ends a turn.
        let mut metadata = tiny_metadata();
        let mut set = |name: &str, id| {
            metadata.insert(format!("tokenizer.ggml.{name}"), Value::U32(id));
            from_gguf(&metadata).unwrap()
        };
        let base = |tokenizer: &Tokenizer, template: &str| {
            let weights = crate::tiny::base(1).weights.clone();
            let chat = ChatTemplate::new(template, "", "<|endoftext|>").unwrap();
            BaseModel::new(weights, tokenizer.clone(), chat, "ends")
        };
        let last = |base: &BaseModel| base.answer_tokens("my card").unwrap().pop();
        let told = |after: &str| {
            format!("{{% for m in messages %}}{{{{ m.content }}}}{after}{{% endfor %}}")
        };
        let tokenizer = set("eos_token_id", 0);
        let chatml = base(&tokenizer, CHATML);
        assert_eq!(chatml.tokenizer.eos(), [2, 0]);
        assert_eq!(last(&chatml), Some(2));
        assert_eq!(last(&base(&tokenizer, &told(" {{ eos_token }}"))), Some(0));
        assert_eq!(last(&base(&tokenizer, &told("<|im_end|>"))), Some(2));
        // A template that writes nothing there leaves the file's word.
        assert_eq!(last(&base(&tokenizer, &told(""))), Some(0));
        assert_eq!(last(&base(&set("eot_token_id", 2), &told(""))), Some(2));
    }

    #[test]
    fn llama_3_takes_a_whole_word_without_merging_up_to_it() {
        let mut metadata = tiny_metadata();
        let pre = Value::String("llama-bpe".to_owned());
        metadata.insert("tokenizer.ggml.pre".to_owned(), pre);
        let llama = from_gguf(&metadata).unwrap();
        let id = |token: &&str| llama.token_id(token).unwrap();
        for (text, wanted) in [
            ("card", &["card"][..]),
            ("card card", &["card", "Ġcard"]),
            // A word that is none of the vocabulary is merged.
            ("car cards", &["c", "ar", "Ġc", "ar", "d", "s"]),
            ("1212", &["1", "2", "1", "2"]),
            ("12", &["12"]),
        ] {
            let tokens = llama.encode(text, true).unwrap();
            let wanted: Vec<u32> = wanted.iter().map(id).collect();
            assert_eq!(tokens, wanted, "{text}");
            assert_eq!(llama.decode(&tokens).unwrap(), text);
        }
        // No merge makes `card`.
        let other = tiny_tokenizer().encode("card", true).unwrap();
        assert_eq!(other.len(), 3);
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
    fn a_turn_end_or_begin_that_is_no_token_is_none() {
        for none in [Value::U32(100_000), Value::U32(u32::MAX), Value::I32(-1)] {
            let mut metadata = tiny_metadata();
            for (key, value) in [
                ("eot_token_id", none.clone()),
                ("bos_token_id", none.clone()),
                ("add_bos_token", Value::Bool(true)),
            ] {
                metadata.insert(format!("tokenizer.ggml.{key}"), value);
            }
            let tokenizer = from_gguf(&metadata).unwrap();
            assert_eq!(tokenizer.eos(), [2, 0], "{none:?}");
            let card = tokenizer.encode("card", true).unwrap();
            assert_eq!(tokenizer.text_tokens("card").unwrap(), card);
        }
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
            ("tokenizer.ggml.add_bos_token", Value::U32(1)),
        ] {
            let mut metadata = tiny_metadata();
            metadata.insert(key.to_owned(), value);
            assert!(from_gguf(&metadata).is_err(), "{key}");
        }
    }
}
