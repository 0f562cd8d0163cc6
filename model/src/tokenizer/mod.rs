//! Text to tokens and back: a thin layer over the `tokenizers` crate.
//!
//! Knows no weights. Invariant: encoding never adds a begin token by itself, since a rendered chat
//! carries its own; and a text has all of its tokens and no others, whatever length its file cuts
//! or fills texts to.

mod gguf;
mod hugging_face;
mod pre_tokenizer;
mod sentence_piece;
mod stream;

use std::path::Path;

pub(crate) use gguf::{from_gguf, integer, string};
pub use hugging_face::files_of_gguf;
pub(crate) use stream::TextStream;

use crate::error::ModelError;

#[cfg(test)]
pub(crate) use gguf::tests::tiny_tokenizer;

/// Tokens that end a turn under any of the usual chat formats.
const TURN_ENDS: [&str; 8] = [
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "</s>",
    "<end_of_turn>",
    "<eos>",
];

/// The tokenizer of one model.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    /// Reads special tokens that are spelled in the text.
    special: tokenizers::Tokenizer,
    /// Takes every text as plain data.
    plain: tokenizers::Tokenizer,
    eos: Vec<u32>,
    /// What a text begins with that is no chat.
    begin: Vec<u32>,
}

impl Tokenizer {
    /// Wraps a built tokenizer. `eos` are the tokens that end a turn, the model's own first;
    /// the usual ones are added where the vocabulary has them as special tokens. Texts that are no
    /// chats begin as its post-processor says.
    pub fn new(inner: tokenizers::Tokenizer, eos: &[u32]) -> Self {
        let mut special = inner;
        special.with_padding(None);
        special
            .with_truncation(None)
            .expect("only a length can be out of range");
        special.set_encode_special_tokens(false);
        let mut plain = special.clone();
        plain.set_encode_special_tokens(true);
        let mut ends = eos.to_vec();
        ends.dedup();
        let added = special.get_added_tokens_decoder();
        for text in TURN_ENDS {
            let id = special
                .token_to_id(text)
                .filter(|id| added.contains_key(id));
            ends.extend(id.filter(|id| !ends.contains(id)));
        }
        Self {
            begin: begin(&special),
            special,
            plain,
            eos: ends,
        }
    }

    /// The same, with texts that are no chats beginning with `token`, or with none.
    #[must_use]
    pub(crate) fn with_begin(self, token: Option<u32>) -> Self {
        let begin = token.into_iter().collect();
        Self { begin, ..self }
    }

    /// The same, with `token` before all others that end a turn.
    #[must_use]
    pub(crate) fn with_turn_end(mut self, token: u32) -> Self {
        self.eos.retain(|end| *end != token);
        self.eos.insert(0, token);
        self
    }

    /// Reads a `tokenizer.json`. `eos` as in [`Tokenizer::new`].
    ///
    /// # Errors
    /// [`ModelError::Format`] when the file is missing or not a tokenizer.
    pub fn from_file(path: &Path, eos: &[&str]) -> Result<Self, ModelError> {
        let inner =
            tokenizers::Tokenizer::from_file(path).map_err(|e| ModelError::format(path, e))?;
        let ids: Vec<u32> = eos
            .iter()
            .filter_map(|text| inner.token_to_id(text))
            .collect();
        Ok(Self::new(inner, &ids))
    }

    /// The tokens of `text`. With `special`, special tokens spelled in the text (`<|im_end|>` in
    /// a rendered chat) become those tokens; without, they are plain characters, which is right
    /// for text that users or models wrote.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the vocabulary cannot express the text.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, ModelError> {
        let tokenizer = if special { &self.special } else { &self.plain };
        let encoding = tokenizer
            .encode_fast(text, false)
            .map_err(|e| ModelError::Tokenizer(format!("cannot encode: {e}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The tokens of a text to go on with that is no chat: as [`Tokenizer::encode`] reads special
    /// tokens, after the begin token that the model's files ask for (`add_bos_token`, or the
    /// post-processor), unless the text spells it.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the vocabulary cannot express the text.
    pub fn text_tokens(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        let tokens = self.encode(text, true)?;
        match tokens.starts_with(&self.begin) {
            true => Ok(tokens),
            false => Ok([self.begin.as_slice(), tokens.as_slice()].concat()),
        }
    }

    /// The special token that `text` begins with, spaces aside.
    pub(crate) fn leading_special(&self, text: &str) -> Option<u32> {
        let tokens = self.encode(text.trim_start(), true).ok()?;
        let added = self.special.get_added_tokens_decoder();
        let first = tokens.first().copied();
        first.filter(|id| added.contains_key(id))
    }

    /// How a token is spelled in the vocabulary.
    pub(crate) fn spelling(&self, token: u32) -> Option<String> {
        self.special.id_to_token(token)
    }

    /// The text of `tokens`, special tokens left out. A character that is cut in the middle
    /// becomes `U+FFFD`.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the decoder fails.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, ModelError> {
        self.special
            .decode(tokens, true)
            .map_err(|e| ModelError::Tokenizer(format!("cannot decode: {e}")))
    }

    /// The tokens that go on with `text` after `before`, which ends a whole character. None where
    /// the vocabulary has no such tokens for it, or says something else there: one that puts a space
    /// before every text does after other tokens.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the vocabulary cannot express the text, or the decoder fails.
    pub(crate) fn encode_after(
        &self,
        before: &[u32],
        text: &str,
    ) -> Result<Option<Vec<u32>>, ModelError> {
        let tokens = self.encode(text, false)?;
        let whole = self.decode(&[before, tokens.as_slice()].concat())?;
        let said = whole.strip_prefix(self.decode(before)?.as_str());
        Ok((!tokens.is_empty() && said == Some(text)).then_some(tokens))
    }

    /// The tokens that end a turn, the model's own first; may be empty.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// The id of a token, spelled as in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.special.token_to_id(token)
    }

    /// Number of tokens, special ones included.
    pub fn vocab_size(&self) -> usize {
        self.special.get_vocab_size(true)
    }

    /// Checks that every token has a row in an embedding of `rows` rows. The largest id counts:
    /// ids may have gaps.
    pub(crate) fn check_fits(&self, rows: usize) -> Result<(), String> {
        let last = self
            .special
            .get_vocab(true)
            .into_iter()
            .max_by_key(|(_, id)| *id);
        match last.filter(|(_, id)| *id as usize >= rows) {
            None => Ok(()),
            Some((token, id)) => Err(format!(
                "the tokenizer's token `{token}` is number {id}, but the embedding has only \
                 {rows} rows (counted from 0); resize the model or take its own tokenizer"
            )),
        }
    }
}

/// What the post-processor puts before every text.
fn begin(tokenizer: &tokenizers::Tokenizer) -> Vec<u32> {
    let encode = |whole| {
        let encoding = tokenizer.encode_fast("a", whole);
        encoding.map_or(Vec::new(), |encoding| encoding.get_ids().to_vec())
    };
    let (mut whole, text) = (encode(true), encode(false));
    let start = whole
        .windows(text.len().max(1))
        .position(|ids| ids == text.as_slice());
    whole.truncate(start.unwrap_or(0));
    whole
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokenizers::normalizers::Prepend;
    use tokenizers::processors::template::TemplateProcessing;
    use tokenizers::{PaddingParams, PaddingStrategy, TruncationParams};

    use super::*;

    #[test]
    fn a_text_is_neither_cut_nor_filled_whatever_its_file_says() {
        let mut inner = tiny_tokenizer().special;
        let cut = TruncationParams {
            max_length: 4,
            ..TruncationParams::default()
        };
        inner.with_truncation(Some(cut)).unwrap();
        inner.with_padding(Some(PaddingParams {
            strategy: PaddingStrategy::Fixed(64),
            ..PaddingParams::default()
        }));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        std::fs::write(&path, inner.to_string(true).unwrap()).unwrap();
        let read = Tokenizer::from_file(&path, &[]).unwrap();
        for special in [true, false] {
            for text in ["a card", "where is my card?<|im_end|>"] {
                let wanted = tiny_tokenizer().encode(text, special).unwrap();
                assert_eq!(read.encode(text, special).unwrap(), wanted, "{text}");
            }
        }
    }

    #[test]
    fn a_text_goes_on_with_tokens_that_say_nothing_else() {
        let plain = tiny_tokenizer();
        let encode = |text: &str| plain.encode(text, false).unwrap();
        let my = encode("my");
        assert_eq!(plain.encode_after(&my, "c").unwrap(), Some(encode("c")));
        assert_eq!(plain.encode_after(&[], "c").unwrap(), Some(encode("c")));
        assert_eq!(plain.encode_after(&my, "").unwrap(), None);
        let mut inner = tiny_tokenizer().special;
        let space = Prepend::new(" ".to_owned());
        inner.with_normalizer(Some(space)).unwrap();
        let prepends = Tokenizer::new(inner, &[]);
        assert_eq!(prepends.decode(&my).unwrap(), "my");
        assert_eq!(prepends.encode_after(&my, "c").unwrap(), None);
    }

    #[test]
    fn a_text_begins_as_the_post_processor_says_unless_it_spells_that() {
        let mut inner = tiny_tokenizer().special;
        let template = TemplateProcessing::builder()
            .try_single("<|im_start|> $A <|im_end|>")
            .unwrap()
            .special_tokens(vec![("<|im_start|>", 1), ("<|im_end|>", 2)])
            .build()
            .unwrap();
        inner.with_post_processor(Some(template));
        let tokenizer = Tokenizer::new(inner, &[]);
        let card = tiny_tokenizer().encode("my card", true).unwrap();
        let begun = [&[1][..], &card].concat();
        assert_eq!(tokenizer.text_tokens("my card").unwrap(), begun);
        assert_eq!(tokenizer.text_tokens("<|im_start|>my card").unwrap(), begun);
        // A rendered chat has its own.
        assert_eq!(tokenizer.encode("my card", true).unwrap(), card);
        assert_eq!(tiny_tokenizer().text_tokens("my card").unwrap(), card);
    }
}
