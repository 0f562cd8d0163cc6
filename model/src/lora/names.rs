//! [`LayerNames`]: what an adapter's files call the layers that it sits on, which hangs on how the
//! base model is loaded where the adapter is. Knows no tensor.

use serde_json::{Value, json};

/// What stands before a layer's number: of a text model; of one with a picture part in
/// `transformers` since 4.52, and before. PEFT puts `base_model.model.` before the model's own name.
pub(super) const PREFIXES: [&str; 3] = [
    "base_model.model.model.layers.",
    "base_model.model.model.language_model.layers.",
    "base_model.model.language_model.model.layers.",
];

/// What an adapter's files call the layers. Under other names than those of the model that it is
/// loaded on, an adapter changes nothing there, often without a word. This crate reads all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LayerNames {
    /// Those of a text model: `model.layers`.
    #[default]
    Text,
    /// Those of a text model that `transformers` loads with a picture part:
    /// `model.language_model.layers`.
    BesidePictures,
}

impl LayerNames {
    /// What stands before a layer's number.
    pub(super) fn prefix(self) -> &'static str {
        let [text, beside_pictures, _] = PREFIXES;
        match self {
            Self::Text => text,
            Self::BesidePictures => beside_pictures,
        }
    }

    /// A tensor's name from the layer's number on, whatever stands before it.
    pub(super) fn strip(name: &str) -> Option<&str> {
        let mut prefixes = PREFIXES.into_iter();
        prefixes.find_map(|prefix| name.strip_prefix(prefix))
    }

    /// PEFT's `target_modules`: a list of names, or a regular expression that a module's whole name
    /// matches. The picture part has modules of the same names, and is not adapted.
    pub(super) fn target_modules(self, modules: &[String]) -> Value {
        match self {
            Self::Text => json!(modules),
            Self::BesidePictures => json!(format!(
                r".*\.language_model\.layers\.\d+\.\w+\.({})",
                modules.join("|")
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_names_are_read_from_the_layers_number_on() {
        for prefix in PREFIXES {
            let name = format!("{prefix}3.mlp.up_proj");
            assert_eq!(LayerNames::strip(&name), Some("3.mlp.up_proj"));
        }
        let pictures = "base_model.model.model.vision_tower.vision_model.encoder.layers.0.mlp.fc1";
        assert_eq!(LayerNames::strip(pictures), None);
        for names in [LayerNames::Text, LayerNames::BesidePictures] {
            assert!(PREFIXES.contains(&names.prefix()));
        }
    }
}
