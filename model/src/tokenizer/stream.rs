//! [`TextStream`]: an answer's text as its tokens come.
//!
//! A token has no text of its own: a character may be split over several, and some decoders drop
//! the first space. So the tokens since the last whole character are decoded together with those
//! before them, whose text is known (the two offsets of Hugging Face's
//! text-generation-inference). Invariant: what was read once never changes, and a token costs
//! the same however long the text is.

use super::Tokenizer;
use crate::error::ModelError;

/// A character has four bytes at most; tokens that make none by then never will.
const PENDING: usize = 8;

/// Text that grows token by token.
#[derive(Debug, Clone, Default)]
pub(crate) struct TextStream {
    text: String,
    /// The last tokens whose text is in `text`, then those that are waiting for more.
    window: Vec<u32>,
    /// How many of them are in `text`.
    read: usize,
    /// The text of those.
    context: String,
}

impl TextStream {
    /// The text so far, without a character that is half there.
    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// Whether every token so far is in the text.
    pub(crate) fn is_whole(&self) -> bool {
        self.window.len() == self.read
    }

    /// The last tokens, after which the next one is read.
    pub(crate) fn window(&self) -> &[u32] {
        &self.window
    }

    /// Takes back what is after the first `len` bytes. Nothing may be added then.
    pub(crate) fn cut(&mut self, len: usize) {
        let text = self.text.get(..len).unwrap_or_default().to_owned();
        *self = Self {
            text,
            ..Self::default()
        };
    }

    /// Adds a token.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the decoder fails.
    pub(crate) fn push(&mut self, token: u32, tokenizer: &Tokenizer) -> Result<(), ModelError> {
        self.window.push(token);
        let seen = tokenizer.decode(&self.window)?;
        let grown = seen.len() > self.context.len();
        let whole = grown && !seen.ends_with(char::REPLACEMENT_CHARACTER);
        if whole || self.window.len() - self.read >= PENDING {
            self.text.push_str(self.fresh(&seen));
            self.window.drain(..self.read);
            self.read = self.window.len();
            self.context = tokenizer.decode(&self.window)?;
        }
        Ok(())
    }

    /// The whole text; what is left of a character becomes `U+FFFD`.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the decoder fails.
    pub(crate) fn finish(&self, tokenizer: &Tokenizer) -> Result<String, ModelError> {
        let seen = tokenizer.decode(&self.window)?;
        Ok(format!("{}{}", self.text, self.fresh(&seen)))
    }

    fn fresh<'a>(&self, seen: &'a str) -> &'a str {
        seen.get(self.context.len()..).unwrap_or_default()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::tokenizer::tiny_tokenizer;

    /// What is read after each token.
    fn pieces(tokens: &[u32]) -> (Vec<String>, TextStream) {
        let (mut stream, mut pieces) = (TextStream::default(), Vec::new());
        for token in tokens {
            let before = stream.text().len();
            stream.push(*token, &tiny_tokenizer()).unwrap();
            pieces.push(stream.text()[before..].to_owned());
        }
        (pieces, stream)
    }

    #[test]
    fn a_character_that_is_split_over_tokens_comes_whole() {
        let text = "é card €, 字 😀!";
        let tokens = tiny_tokenizer().encode(text, false).unwrap();
        let (pieces, stream) = pieces(&tokens);
        assert_eq!(pieces.concat(), text);
        assert_eq!(stream.finish(&tiny_tokenizer()).unwrap(), text);
        assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')));
        // A byte a token: three say nothing, the fourth brings the picture.
        let at = pieces.iter().position(|piece| piece == "😀").unwrap();
        assert!(pieces[at - 3..at].iter().all(String::is_empty));
    }

    #[test]
    fn half_a_character_at_the_end_is_told_at_the_end_alone() {
        let tokens = tiny_tokenizer().encode("ab😀", false).unwrap();
        let (pieces, stream) = pieces(&tokens[..tokens.len() - 1]);
        assert_eq!(pieces.concat(), "ab");
        assert_eq!(stream.finish(&tiny_tokenizer()).unwrap(), "ab\u{fffd}");
    }

    #[test]
    fn a_token_costs_the_same_at_the_end_of_a_long_text() {
        let tokenizer = tiny_tokenizer();
        let word = tokenizer.encode(" card", false).unwrap();
        // Bytes that never make a character are no reason to wait for ever either.
        let broken = tokenizer.encode("😀", false).unwrap()[1];
        let mut stream = TextStream::default();
        for token in word.iter().cycle().take(500).chain([&broken; 500]) {
            stream.push(*token, &tokenizer).unwrap();
            assert!(stream.window.len() <= 2 * PENDING);
        }
        assert!(stream.text().starts_with(" card card"));
        assert!(stream.text().ends_with('\u{fffd}'));
    }

    #[test]
    fn special_tokens_say_nothing() {
        let tokens = tiny_tokenizer().encode("a<|im_end|>b", true).unwrap();
        assert_eq!(pieces(&tokens).0, ["a", "", "b"]);
    }
}
