//! A GGUF file's tokenizer in the files of the Hugging Face hub, so that `transformers` and vLLM
//! give texts the ids that this program does.
//!
//! A text that is no chat begins there as it begins here, by one rule: the metadata's word, else
//! llama.cpp's default. It is said twice: `transformers` 5 goes by the post-processor of
//! `tokenizer.json`, older versions by `add_bos_token`. A chat's template writes its own begin token: who
//! renders one and then encodes it must not add special tokens, as with the files on the hub.

use std::collections::HashMap;
use std::path::Path;

use candle_core::quantized::gguf_file::Value;
use serde_json::json;
use tokenizers::processors::template::{SpecialToken, TemplateProcessing};

use super::Tokenizer;
use super::gguf::{from_gguf, integer, string};
use crate::chat_template::{CHATML, ChatTemplate};
use crate::error::ModelError;
use crate::gguf_header;

/// `tokenizer.json` and `tokenizer_config.json`, the latter with the chat template: names and
/// texts.
///
/// # Errors
/// [`ModelError::Io`] or [`ModelError::Format`] when the file has no tokenizer that is understood.
pub fn files_of_gguf(path: &Path) -> Result<[(&'static str, String); 2], ModelError> {
    let (content, _) = gguf_header::open(path)?;
    files(&content.metadata).map_err(|why| ModelError::format(path, why))
}

fn files(metadata: &HashMap<String, Value>) -> Result<[(&'static str, String); 2], String> {
    let tokenizer = from_gguf(metadata)?;
    let json = begun(&tokenizer)?.to_string(true);
    let json = json.map_err(|e| format!("its tokenizer cannot be written: {e}"))?;
    let template = string(metadata, "tokenizer.chat_template").unwrap_or(CHATML);
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": false,
        "add_bos_token": !tokenizer.begin.is_empty(),
        "chat_template": template,
    });
    let bos = named(metadata, "tokenizer.ggml.bos_token_id");
    let eos = named(metadata, "tokenizer.ggml.eos_token_id");
    let chat = ChatTemplate::new(template, bos.unwrap_or_default(), eos.unwrap_or_default());
    let after = chat.map_err(|e| e.to_string())?.after_answer();
    // What servers stop at is what adapters learn to end their answers with.
    let turn_end = tokenizer.leading_special(&after);
    let turn_end = turn_end.or_else(|| tokenizer.eos().first().copied());
    let turn_end = turn_end.and_then(|id| tokenizer.spelling(id));
    let mut tokens = vec![
        ("bos_token", bos),
        ("eos_token", turn_end.as_deref().or(eos)),
        (
            "unk_token",
            named(metadata, "tokenizer.ggml.unknown_token_id"),
        ),
        (
            "pad_token",
            named(metadata, "tokenizer.ggml.padding_token_id"),
        ),
    ];
    tokens.retain(|(_, token)| token.is_some());
    for (name, token) in tokens {
        config[name] = json!(token);
    }
    let architecture = string(metadata, "general.architecture").unwrap_or("llama");
    let context = metadata.get(&format!("{architecture}.context_length"));
    if let Some(context) = context.and_then(integer) {
        config["model_max_length"] = context.into();
    }
    Ok([
        ("tokenizer.json", json + "\n"),
        ("tokenizer_config.json", format!("{config:#}\n")),
    ])
}

/// The tokenizer with a post-processor that begins texts.
fn begun(tokenizer: &Tokenizer) -> Result<tokenizers::Tokenizer, String> {
    let mut inner = tokenizer.special.clone();
    if let Some(id) = tokenizer.begin.first().copied() {
        let text = tokenizer.spelling(id);
        let text = text.ok_or_else(|| format!("the begin token {id} has no text"))?;
        // By a name of its own: the token's text need not be one that a template can hold.
        let begin = SpecialToken::new("begin".to_owned(), vec![id], vec![text]);
        let template = TemplateProcessing::builder()
            .try_single("begin $A")?
            .special_tokens(vec![begin.map_err(|e| e.to_string())?])
            .build()
            .map_err(|e| e.to_string())?;
        inner.with_post_processor(Some(template));
    }
    Ok(inner)
}

/// The token whose id an entry gives.
fn named<'a>(metadata: &'a HashMap<String, Value>, key: &str) -> Option<&'a str> {
    let id = metadata.get(key).and_then(integer)?;
    let Some(Value::Array(tokens)) = metadata.get("tokenizer.ggml.tokens") else {
        return None;
    };
    match tokens.get(usize::try_from(id).ok()?) {
        Some(Value::String(text)) => Some(text),
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::gguf_header::tests::with_alignment;
    use crate::tokenizer::Tokenizer;
    use crate::tokenizer::gguf::tests::tiny_metadata;

    #[test]
    fn the_files_give_the_same_ids() {
        let mut metadata = tiny_metadata();
        let template = "{% for m in messages %}{{ m.content }}{% endfor %}";
        metadata.insert(
            "tokenizer.chat_template".to_owned(),
            Value::String(template.to_owned()),
        );
        metadata.insert("llama.context_length".to_owned(), Value::U32(2048));
        let [(_, tokenizer), (_, config)] = files(&metadata).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        std::fs::write(&path, tokenizer).unwrap();
        let read = Tokenizer::from_file(&path, &[]).unwrap();
        let ours = from_gguf(&metadata).unwrap();
        for text in ["<|im_start|>user\nmy card, 1234é<|im_end|>", " card", "😀"] {
            for special in [true, false] {
                let ids = ours.encode(text, special).unwrap();
                assert_eq!(read.encode(text, special).unwrap(), ids, "{text}");
            }
        }
        let config: serde_json::Value = serde_json::from_str(&config).unwrap();
        assert_eq!(config["eos_token"], "<|im_end|>");
        assert_eq!(config["chat_template"], template);
        assert_eq!(config["model_max_length"], 2048);
        assert!(config.get("pad_token").is_none());
    }

    #[test]
    fn servers_are_told_what_ends_a_turn() {
        let mut metadata = tiny_metadata();
        metadata.insert("tokenizer.ggml.eos_token_id".to_owned(), Value::U32(0));
        let eos = |metadata: &HashMap<String, Value>| {
            let [_, (_, config)] = files(metadata).unwrap();
            let config: serde_json::Value = serde_json::from_str(&config).unwrap();
            config["eos_token"].clone()
        };
        assert_eq!(eos(&metadata), "<|im_end|>");
        let silent = "{% for m in messages %}{{ m.content }}{% endfor %}";
        let silent = Value::String(silent.to_owned());
        metadata.insert("tokenizer.chat_template".to_owned(), silent);
        assert_eq!(eos(&metadata), "<|endoftext|>");
        // As in training, where the template writes nothing there.
        metadata.insert("tokenizer.ggml.eot_token_id".to_owned(), Value::U32(2));
        assert_eq!(eos(&metadata), "<|im_end|>");
    }

    /// The settings of metadata with these entries, the tokenizer of the file, and that of here.
    fn settings(entries: &[(&str, Value)]) -> (serde_json::Value, Tokenizer, Tokenizer) {
        let mut metadata = tiny_metadata();
        for (key, value) in entries {
            metadata.insert(format!("tokenizer.ggml.{key}"), value.clone());
        }
        let [(_, tokenizer), (_, config)] = files(&metadata).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        std::fs::write(&path, tokenizer).unwrap();
        let read = Tokenizer::from_file(&path, &[]).unwrap();
        let config = serde_json::from_str(&config).unwrap();
        (config, read, from_gguf(&metadata).unwrap())
    }

    #[test]
    fn a_text_begins_there_as_it_begins_here() {
        let bos = || ("bos_token_id", Value::U32(1));
        let asks = |asks| ("add_bos_token", Value::Bool(asks));
        let llama3 = || ("pre", Value::String("llama-bpe".to_owned()));
        for (entries, begins) in [
            (vec![], false),
            (vec![bos()], false),
            (vec![bos(), asks(true)], true),
            (vec![bos(), llama3()], true),
            (vec![bos(), llama3(), asks(false)], false),
            // There is nothing to begin with.
            (vec![asks(true)], false),
        ] {
            let (config, read, tokenizer) = settings(&entries);
            assert_eq!(config["add_bos_token"], begins, "{entries:?}");
            let tokens = tokenizer.text_tokens("card").unwrap();
            assert_eq!(tokens.first() == Some(&1), begins, "{entries:?}");
            assert_eq!(read.text_tokens("card").unwrap(), tokens, "{entries:?}");
            if begins {
                assert_eq!(config["bos_token"], "<|im_start|>");
            }
        }
    }

    #[test]
    fn a_header_that_cannot_be_is_an_error_here_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.gguf");
        std::fs::write(&path, with_alignment(0)).unwrap();
        let error = files_of_gguf(&path).unwrap_err().to_string();
        assert!(error.contains("`general.alignment` is 0"), "{error}");
    }
}
