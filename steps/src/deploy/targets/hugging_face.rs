//! The layout of a model on the Hugging Face hub: adapter, tokenizer (made from the weights where
//! they are a GGUF file), program, and a card with the scores and where they come from.

use flowrun_engine::step::{StepError, World};
use serde_json::{Value, json};

use super::{Content, Facts, File, Target, text};
use crate::bundle::Bundle;
use crate::leakage::lineage_of;
use crate::models::{ModelSpec, local};

pub(super) const TARGET: Target = Target {
    name: "hugging-face",
    about: "A model repository: adapter, tokenizer, program, and a card with the scores.",
    render,
};

/// Files of a tokenizer.
const TOKENIZER: [&str; 4] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

/// Which rows it came from, as far as that is known; null where it is not.
fn lineage(bundle: &Bundle) -> Result<Value, StepError> {
    let lineage = lineage_of(&bundle.program, bundle.checkpoint()?.as_ref());
    Ok(lineage.map_or(Value::Null, |lineage| {
        let sets = lineage.sets().into_iter();
        let sets: Vec<Value> = sets
            .map(|(name, parts)| json!({"name": name, "parts": parts}))
            .collect();
        json!({"sets": sets, "unknown": lineage.has_unknown_teachers()})
    }))
}

fn render(facts: &Facts<'_>) -> Result<Vec<File>, StepError> {
    let bundle = facts.bundle;
    let adapter = bundle.adapter()?;
    let model = bundle.manifest.model.as_ref();
    let weights = match model {
        Some(ModelSpec::Embedded(spec)) => Some(&spec.weights),
        _ => None,
    };
    let base = facts.settings.base_model.clone();
    let base = base.or_else(|| weights.and_then(|weights| weights.hf.clone()));
    let told = Some(bundle.template_arguments()?).filter(|told| !told.is_empty());
    let more = [
        ("told", json!(told)),
        ("base", json!(base)),
        ("weights", json!(weights)),
        ("adapter", json!(adapter.is_some())),
        ("labels", json!(bundle.program.labels())),
        ("lineage", lineage(bundle)?),
    ];
    let card = facts.fill(
        include_str!("../../../templates/deploy/hugging_face.md"),
        &more,
    )?;
    let copy = |name: &str, from: std::path::PathBuf| File {
        path: name.into(),
        content: Content::CopyOf(from),
    };
    let mut files = vec![
        text("README.md", card),
        copy("program.json", bundle.folder.join("program.json")),
        copy("bundle.json", bundle.folder.join("bundle.json")),
    ];
    if let Some(adapter) = adapter {
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            files.push(copy(name, adapter.join(name)));
        }
    }
    if let Some(weights) = weights {
        let world = World {
            root: bundle.folder.clone(),
            ..facts.world.clone()
        };
        let found = weights.locate(&world, &world.cancel)?.path;
        if found.is_dir() {
            let there = TOKENIZER.iter().filter(|name| found.join(name).is_file());
            files.extend(there.map(|name| copy(name, found.join(name))));
        } else {
            let made = local::tokenizer_files(&found)?;
            files.extend(made.into_iter().map(|(name, content)| text(name, content)));
        }
    }
    Ok(files)
}
