//! The architectures that are read: what each has that Llama's layers lack, and what its files
//! keep differently.
//!
//! To add one: a file that declares its [`Architecture`], and a line in [`ALL`]. A part that no
//! other has also needs its code in both passes. Knows no tensor.

mod llama;
mod qwen2;
mod qwen3;

use crate::config::LayerParts;

/// What tells one architecture from the others.
#[derive(Debug)]
pub(crate) struct Architecture {
    /// `general.architecture` of GGUF files; the entries of its sizes begin with it too.
    pub(crate) gguf: &'static str,
    /// `model_type` in Hugging Face's `config.json`.
    pub(crate) model_type: &'static str,
    /// What its layers have.
    pub(crate) parts: LayerParts,
    /// Whether GGUF files interleave the two halves of each head's query and key rows.
    pub(crate) interleaved: bool,
    /// Head size where `config.json` names none; without it, the hidden size over the heads.
    pub(crate) head_dim: Option<usize>,
}

/// All of them.
pub(crate) const ALL: [&Architecture; 3] = [&llama::LLAMA, &qwen2::QWEN2, &qwen3::QWEN3];

impl Architecture {
    /// The one that a GGUF file names, or a sentence that lists the known ones.
    pub(crate) fn of_gguf(name: &str) -> Result<&'static Self, String> {
        find(name, |architecture| architecture.gguf)
            .map_err(|known| format!("the architecture `{name}` is not supported ({known})"))
    }

    /// The one that a `config.json` names, or a sentence that lists the known ones.
    pub(crate) fn of_model_type(name: &str) -> Result<&'static Self, String> {
        find(name, |architecture| architecture.model_type)
            .map_err(|known| format!("`model_type: {name}` is not supported ({known})"))
    }
}

fn find(
    name: &str,
    of: fn(&Architecture) -> &'static str,
) -> Result<&'static Architecture, String> {
    let found = ALL
        .into_iter()
        .find(|architecture| of(architecture) == name);
    found.ok_or_else(|| format!("known: {}", ALL.map(of).join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_architecture_is_told_what_is_known() {
        for architecture in ALL {
            let found = Architecture::of_gguf(architecture.gguf);
            assert!(found.is_ok_and(|found| found.parts == architecture.parts));
            assert!(Architecture::of_model_type(architecture.model_type).is_ok());
        }
        let error = Architecture::of_gguf("qwen2moe").err().unwrap_or_default();
        assert_eq!(
            error,
            "the architecture `qwen2moe` is not supported (known: llama, qwen2, qwen3)"
        );
        let error = Architecture::of_model_type("bert")
            .err()
            .unwrap_or_default();
        assert!(error.starts_with("`model_type: bert` is not supported"));
    }
}
