//! Pre-tokenizers: how text is cut into words before BPE merges, by the name that a GGUF file
//! gives (`tokenizer.ggml.pre`).
//!
//! To add one: a line in [`REGEXES`], or an arm in [`by_name`]; and one in [`normalizer`] where the
//! models with it read normalised text.

use tokenizers::PreTokenizerWrapper;
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::{
    byte_level::ByteLevel,
    digits::Digits,
    sequence::Sequence,
    split::{Split, SplitPattern},
};
use tokenizers::tokenizer::SplitDelimiterBehavior;

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Names whose pre-tokenizer is one regular expression followed by byte-level mapping.
const REGEXES: [(&str, &str); 4] = [
    ("llama-bpe", LLAMA3),
    ("llama3", LLAMA3),
    ("llama-v3", LLAMA3),
    ("qwen2", QWEN2),
];

/// The pre-tokenizer called `name`, or a sentence that lists the known names.
pub(super) fn by_name(name: &str) -> Result<PreTokenizerWrapper, String> {
    match name {
        "gpt-2" | "gpt2" | "default" | "olmo" => Ok(byte_level(true).into()),
        // Digits stand alone; the rest is GPT-2's.
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" => {
            Ok(Sequence::new(vec![Digits::new(true).into(), byte_level(true).into()]).into())
        }
        _ => match REGEXES.iter().find(|(known, _)| *known == name) {
            Some((_, regex)) => {
                let pattern = SplitPattern::Regex((*regex).to_owned());
                let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
                    .map_err(|e| e.to_string())?;
                Ok(Sequence::new(vec![split.into(), byte_level(false).into()]).into())
            }
            None => Err(format!(
                "the pre-tokenizer `{name}` is not known (known: gpt-2, smollm, starcoder, \
                 refact, command-r, llama-bpe, qwen2)"
            )),
        },
    }
}

/// What is done to text before it is cut, by the same name.
pub(super) fn normalizer(name: &str) -> Option<NFC> {
    (name == "qwen2").then_some(NFC)
}

fn byte_level(use_regex: bool) -> ByteLevel {
    ByteLevel::new(false, true, use_regex)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    use super::*;

    fn pieces(name: &str, text: &str) -> Vec<String> {
        let mut cut = PreTokenizedString::from(text);
        by_name(name).unwrap().pre_tokenize(&mut cut).unwrap();
        let splits = cut.get_splits(OffsetReferential::Original, OffsetType::Byte);
        let pieces = splits.into_iter().map(|(piece, _, _)| piece.to_owned());
        pieces.collect()
    }

    /// As the regular expressions of the models' own `tokenizer.json` cut, spaces as `Ġ` and line
    /// ends as `Ċ`.
    #[test]
    fn texts_are_cut_as_the_models_cut_them() {
        let text = "I'll pay 12345 now!!\n\n  next WORD'S";
        let cut = |digits: &[&'static str]| {
            let before = ["I", "'ll", "Ġpay", "Ġ"];
            let after = ["Ġnow", "!!ĊĊ", "Ġ", "Ġnext", "ĠWORD", "'S"];
            [&before[..], digits, &after[..]].concat()
        };
        for name in ["llama-bpe", "llama3", "llama-v3"] {
            assert_eq!(pieces(name, text), cut(&["123", "45"]), "{name}");
        }
        assert_eq!(pieces("qwen2", text), cut(&["1", "2", "3", "4", "5"]));
        let gpt2 = [
            "I", "'ll", "Ġpay", "Ġ12345", "Ġnow", "!!", "ĊĊĠ", "Ġnext", "ĠWORD", "'", "S",
        ];
        assert_eq!(pieces("gpt-2", text), gpt2);
    }
}
