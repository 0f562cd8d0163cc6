//! DSPy's ChainOfThought: the same signature with a `reasoning` output before the others.

use crate::adapter::Dialect;
use crate::signature::{Field, Signature};

/// Name of the output that holds the rationale.
pub const REASONING: &str = "reasoning";

/// DSPy 2.5's description of `reasoning` when a program is made before any model is set; made
/// after, it is `${reasoning}`, which prompts do not show.
pub const EXPERIMENTAL_REASONING_DESC: &str = "${produce the output fields}. We ...";

/// The signature with `reasoning` put first among its outputs. `desc` is its description; none
/// is printed without it.
pub fn chain_of_thought(
    mut signature: Signature,
    dialect: Dialect,
    desc: Option<&str>,
) -> Signature {
    let mut reasoning = Field::text(REASONING);
    reasoning.desc = desc.map(str::to_owned);
    if dialect != Dialect::Dspy3 {
        reasoning.prefix = Some("Reasoning: Let's think step by step in order to".to_owned());
    }
    signature.outputs.insert(0, reasoning);
    signature
}
