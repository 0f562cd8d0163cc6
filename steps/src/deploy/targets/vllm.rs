//! vLLM with the adapter, and this program's server with the prompt in front of it.

use flowrun_engine::step::StepError;
use serde_json::json;

use super::{Content, Facts, File, Target, script};

pub(super) const TARGET: Target = Target {
    name: "vllm",
    about: "A script that starts vLLM with the adapter, and the program in front of it.",
    render,
};

/// Ranks that vLLM makes room for (`--max-lora-rank`).
const RANKS: [u64; 8] = [8, 16, 32, 64, 128, 256, 320, 512];

fn render(facts: &Facts<'_>) -> Result<Vec<File>, StepError> {
    let (base, id) = facts.base_model("vllm")?;
    facts.check_plain("vllm")?;
    let model_port = match facts.settings.port {
        u16::MAX => u16::MAX - 1,
        port => port + 1,
    };
    let rank = match facts.rank()? {
        None => None,
        Some(rank) => Some(
            RANKS
                .into_iter()
                .find(|room| rank <= *room)
                .ok_or_else(|| {
                    let most = RANKS[RANKS.len() - 1];
                    StepError::invalid(format!(
                        "vLLM takes adapters of rank {most} at most, not {rank}"
                    ))
                })?,
        ),
    };
    let more = [
        ("base", json!(base)),
        ("base_id", json!(id)),
        ("rank", json!(rank)),
        ("model_port", json!(model_port)),
    ];
    let start = facts.fill(include_str!("../../../templates/deploy/vllm.sh"), &more)?;
    let mut files = vec![script("serve.sh", start)];
    if let Some(adapter) = facts.bundle.adapter()? {
        files.push(File {
            path: "adapter".into(),
            content: Content::CopyOf(adapter),
        });
    }
    files.extend(facts.gateway(&format!("http://127.0.0.1:{model_port}/v1"))?);
    Ok(files)
}
