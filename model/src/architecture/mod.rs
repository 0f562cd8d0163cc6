//! The architectures that are read: what each has that Llama's layers lack, and what its files
//! keep differently.
//!
//! To add one: a file that declares its [`Architecture`], and a line in [`ALL`]. A part that no
//! other has also needs its code in both passes. Knows no tensor.

mod gemma3;
mod llama;
mod qwen2;
mod qwen3;

#[cfg(test)]
use crate::config::LocalAttention;
use crate::config::{LayerParts, LlamaConfig};
use crate::lora::LayerNames;

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
    /// Base of the rotary frequencies where the files name none.
    pub(crate) rope_theta: f64,
    /// Whether the head is the embedding matrix where `config.json` does not say.
    pub(crate) tied_head: bool,
    /// What Hugging Face's tensors call the norm before the feed-forward layer.
    pub(crate) ffn_norm: &'static str,
    /// Whether Hugging Face's tensors hold the norms' weights less one.
    pub(crate) norms_less_one: bool,
    /// Whether embeddings are multiplied by the square root of their width.
    pub(crate) scaled_embedding: bool,
    /// Scores are divided by the square root of this; without it, of the head size.
    pub(crate) query_scalar: Option<fn(&LlamaConfig) -> f64>,
    /// Its local layers, if it has any.
    pub(crate) local: Option<LocalLayers>,
    /// The numbers of layers of its sizes that were published with a picture part, which GGUF files
    /// leave out: `transformers` loads them with it.
    pub(crate) beside_pictures: &'static [usize],
}

/// What an architecture with local layers says where its files do not.
#[derive(Debug)]
pub(crate) struct LocalLayers {
    /// Base of their rotary frequencies.
    pub(crate) rope_theta: f64,
    /// Each layer is local but every one whose number, counted from 1, this divides.
    pub(crate) pattern: usize,
}

/// All of them.
pub(crate) const ALL: [&Architecture; 4] =
    [&llama::LLAMA, &qwen2::QWEN2, &qwen3::QWEN3, &gemma3::GEMMA3];

impl Architecture {
    /// The one that a GGUF file names, or a sentence that lists the known ones.
    pub(crate) fn of_gguf(name: &str) -> Result<&'static Self, String> {
        find(name, |architecture| architecture.gguf)
            .map_err(|known| format!("the architecture `{name}` is not supported ({known})"))
    }

    /// What the adapters of a GGUF file call its layers: as the model is named where `transformers`
    /// loads it. Nothing in the file says it but the size; a text model of the same size, which
    /// somebody took out or trained further, has a text model's names.
    pub(crate) fn layer_names(&self, layers: usize) -> LayerNames {
        match self.beside_pictures.contains(&layers) {
            true => LayerNames::BesidePictures,
            false => LayerNames::Text,
        }
    }

    /// The one that a `config.json` names, or a sentence that lists the known ones.
    pub(crate) fn of_model_type(name: &str) -> Result<&'static Self, String> {
        find(name, |architecture| architecture.model_type)
            .map_err(|known| format!("`model_type: {name}` is not supported ({known})"))
    }
}

/// Which layers of a tiny model are local, where the architecture has such: the first alone.
#[cfg(test)]
pub(crate) fn tiny_local(architecture: &Architecture, layers: usize) -> Option<LocalAttention> {
    let of = |_: &LocalLayers| LocalAttention {
        window: 4,
        rope_theta: 30.0,
        layers: (0..layers).map(|layer| layer == 0).collect(),
    };
    architecture.local.as_ref().map(of)
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
    fn sizes_that_came_with_a_picture_part_name_their_layers_beside_it() {
        let names = |name: &str, layers: usize| {
            let found = Architecture::of_gguf(name);
            found.map(|architecture| architecture.layer_names(layers))
        };
        for (layers, expected) in [
            (18, LayerNames::Text),
            (26, LayerNames::Text),
            (34, LayerNames::BesidePictures),
            (48, LayerNames::BesidePictures),
            (62, LayerNames::BesidePictures),
        ] {
            assert_eq!(names("gemma3", layers), Ok(expected), "{layers}");
        }
        assert_eq!(names("llama", 48), Ok(LayerNames::Text));
    }

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
            "the architecture `qwen2moe` is not supported (known: llama, qwen2, qwen3, gemma3)"
        );
        let error = Architecture::of_model_type("bert")
            .err()
            .unwrap_or_default();
        assert!(error.starts_with("`model_type: bert` is not supported"));
    }
}
