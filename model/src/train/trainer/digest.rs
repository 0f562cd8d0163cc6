//! What decides the result of a training, as a digest: a saved state goes on only where it is equal.

use crate::error::ModelError;
use crate::lora::LoraConfig;
use crate::train::config::TrainConfig;
use crate::train::row::TrainRow;
use crate::weights::LlamaWeights;

/// Digest of everything that decides the result. Of the base model the norms stand for all
/// weights: they are small, and differ between any two trained models.
pub(super) fn digest(
    weights: &LlamaWeights,
    lora: &LoraConfig,
    config: &TrainConfig,
    rows: &[TrainRow],
) -> Result<String, ModelError> {
    let mut hasher = blake3::Hasher::new();
    let settings = format!("train-state-3 {:?} {lora:?} {config:?}", weights.config);
    hasher.update(settings.as_bytes());
    let norms = weights.layers.iter().map(|layer| &layer.attn_norm);
    for tensor in norms.chain([&weights.norm]) {
        for value in tensor.flatten_all()?.to_vec1::<f32>()? {
            hasher.update(&value.to_le_bytes());
        }
    }
    hash_rows(&mut hasher, rows);
    Ok(hasher.finalize().to_hex().to_string())
}

pub(super) fn hash_rows(hasher: &mut blake3::Hasher, rows: &[TrainRow]) {
    for row in rows {
        hasher.update(&(row.earlier.len() as u64).to_le_bytes());
        for place in row
            .earlier
            .iter()
            .flat_map(|answer| [answer.start, answer.end])
        {
            hasher.update(&(place as u64).to_le_bytes());
        }
        for part in [&row.prompt, &row.target] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            for token in part {
                hasher.update(&token.to_le_bytes());
            }
        }
    }
}
