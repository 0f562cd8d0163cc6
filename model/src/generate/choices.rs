//! [`Trie`]: the values of a [`ChoiceSet`] as tokens, and their probabilities.
//!
//! A value's probability is the product, over the places where the values part, of the model's
//! probability of its next token among the tokens that some value has there: what constrained
//! decoding would draw. They sum to 1, no other token is looked at, and where only one value is
//! left nothing needs computing. A fork that is reached with a probability below [`UNLIKELY`] is
//! not followed, unless all probabilities are asked for: its values share that evenly. Invariant: no
//! value's tokens begin with another's, as every value carries its end.

use super::ChoiceSet;
use crate::error::ModelError;
use crate::llama::{Adapter, KvCache, Llama, Run};
use crate::tokenizer::Tokenizer;

/// Below this, a fork is not worth its tokens: a trained model follows few forks, and the values
/// left out hold next to no probability. The likeliest of n values has at least 1/n, so half of
/// that is the bound where it is smaller.
const UNLIKELY: f32 = 1e-3;

/// Values that share a start, parted by their next tokens.
pub(super) struct Trie {
    values: Vec<Vec<u32>>,
    root: Option<Fork>,
}

/// A place where values part.
struct Fork {
    /// The tokens that may come next, and where each leads.
    next: Vec<(u32, Branch)>,
}

impl Fork {
    /// Tokens of all edges below.
    fn tokens(&self) -> usize {
        let below = self.next.iter().map(|(_, branch)| match branch {
            Branch::Value(_) => 0,
            Branch::Fork(edge, fork) => edge.len() + fork.tokens(),
        });
        below.sum()
    }

    /// All values below.
    fn values(&self) -> Vec<usize> {
        let below = self.next.iter().flat_map(|(_, branch)| match branch {
            Branch::Value(value) => vec![*value],
            Branch::Fork(_, fork) => fork.values(),
        });
        below.collect()
    }
}

enum Branch {
    /// Only this value is left.
    Value(usize),
    /// The values part again after these tokens (the first is the one that leads here).
    Fork(Vec<u32>, Fork),
}

/// Where a row stands: its state and what was fed so far.
pub(super) struct Start<'a> {
    /// Hidden state of the last token.
    pub(super) hidden: &'a [f32],
    /// The adapter of what comes next.
    pub(super) adapter: Option<&'a Adapter>,
    /// Whether unlikely forks are followed too.
    pub(super) exact: bool,
    /// What was fed.
    pub(super) past: Vec<&'a KvCache>,
}

/// A fork of one row, waiting for its state.
struct Open<'t> {
    row: usize,
    fork: &'t Fork,
    tokens: &'t [u32],
    /// Caches of the forks above, outermost first, by position among all.
    above: Vec<usize>,
    probability: f32,
}

impl Trie {
    /// # Errors
    /// [`ModelError::Request`] when there is no value, or two have the same tokens.
    pub(super) fn new(set: &ChoiceSet, tokenizer: &Tokenizer) -> Result<Self, ModelError> {
        let refuse = ModelError::Request;
        let mut values = Vec::with_capacity(set.values.len());
        for value in &set.values {
            let mut tokens =
                tokenizer.encode(&format!("{}{value}{}", set.spaces(), set.then), false)?;
            if set.then.is_empty() {
                tokens.extend(tokenizer.eos().first());
            }
            values.push(tokens);
        }
        if values.is_empty() {
            return Err(refuse("`choices` has no values".to_owned()));
        }
        let all: Vec<usize> = (0..values.len()).collect();
        let mut root = match branch(&values, &all, 0) {
            Some(Branch::Fork(_, fork)) => Some(fork),
            Some(Branch::Value(_)) => None,
            None => {
                return Err(refuse(
                    "a value of `choices` is given twice, is empty, or begins with another one \
                     that has no end"
                        .to_owned(),
                ));
            }
        };
        // What all values begin with belongs to the first edge; the root's state comes before it.
        let shared = super::prompt::common_start(values.iter().map(Vec::as_slice));
        if shared > 0
            && let Some(fork) = root.take()
        {
            let first = values[0][0];
            let edge = values[0][..shared].to_vec();
            root = Some(Fork {
                next: vec![(first, Branch::Fork(edge, fork))],
            });
        }
        Ok(Self { values, root })
    }

    /// Tokens that are fed at most to score the values, once for each row.
    pub(super) fn fed(&self) -> usize {
        self.root.as_ref().map_or(0, Fork::tokens)
    }

    /// Tokens of the longest value.
    pub(super) fn longest(&self) -> usize {
        self.values.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// The tokens of a value, its end included.
    pub(super) fn tokens(&self, value: usize) -> &[u32] {
        &self.values[value]
    }

    /// The probability of every value, for every row.
    pub(super) fn score(
        &self,
        llama: &Llama,
        rows: &[Start<'_>],
    ) -> Result<Vec<Vec<f32>>, ModelError> {
        let mut probs = vec![vec![0.0f32; self.values.len()]; rows.len()];
        let Some(root) = &self.root else {
            probs.iter_mut().for_each(|row| row[0] = 1.0);
            return Ok(probs);
        };
        let mut caches: Vec<KvCache> = Vec::new();
        let mut open = Vec::new();
        for (row, start) in rows.iter().enumerate() {
            let at = Place {
                row,
                above: &[],
                probability: 1.0,
                exact: start.exact,
            };
            part(llama, root, start.hidden, &at, &mut probs[row], &mut open)?;
        }
        let width = llama.base().weights.config.hidden;
        while !open.is_empty() {
            let level = std::mem::take(&mut open);
            let mut own: Vec<KvCache> = level.iter().map(|o| llama.cache(o.tokens.len())).collect();
            let runs = level.iter().zip(&mut own).map(|(fork, own)| Run {
                tokens: fork.tokens,
                past: rows[fork.row]
                    .past
                    .iter()
                    .copied()
                    .chain(fork.above.iter().map(|at| &caches[*at]))
                    .collect(),
                own,
                adapter: rows[fork.row].adapter,
            });
            let hidden = llama.forward(runs.collect())?;
            for ((fork, hidden), own) in level.into_iter().zip(hidden.chunks(width)).zip(own) {
                let mut above = fork.above;
                above.push(caches.len());
                caches.push(own);
                let at = Place {
                    row: fork.row,
                    above: &above,
                    probability: fork.probability,
                    exact: rows[fork.row].exact,
                };
                let probs = &mut probs[fork.row];
                part(llama, fork.fork, hidden, &at, probs, &mut open)?;
            }
        }
        Ok(probs)
    }
}

/// Where a fork is reached.
struct Place<'a> {
    row: usize,
    above: &'a [usize],
    probability: f32,
    exact: bool,
}

/// Shares the probability of a fork out to its branches.
fn part<'t>(
    llama: &Llama,
    fork: &'t Fork,
    hidden: &[f32],
    at: &Place<'_>,
    probs: &mut [f32],
    open: &mut Vec<Open<'t>>,
) -> Result<(), ModelError> {
    let tokens: Vec<u32> = fork.next.iter().map(|(token, _)| *token).collect();
    let shares = softmax(&llama.logits_of(hidden, &tokens)?);
    let unlikely = match at.exact {
        true => 0.0,
        false => UNLIKELY.min(0.5 / probs.len() as f32),
    };
    for ((_, branch), share) in fork.next.iter().zip(shares) {
        let probability = at.probability * share;
        match branch {
            Branch::Value(value) => probs[*value] = probability,
            Branch::Fork(_, fork) if probability < unlikely => {
                let values = fork.values();
                let share = probability / values.len() as f32;
                values.into_iter().for_each(|value| probs[value] = share);
            }
            Branch::Fork(tokens, fork) => open.push(Open {
                row: at.row,
                fork,
                tokens,
                above: at.above.to_vec(),
                probability,
            }),
        }
    }
    Ok(())
}

/// Where the values `among`, equal before `from`, lead. `None` when one ends where others go on.
fn branch(values: &[Vec<u32>], among: &[usize], from: usize) -> Option<Branch> {
    if let [only] = among {
        return values.get(*only).map(|_| Branch::Value(*only));
    }
    let mut depth = from;
    let fork = loop {
        let mut next: Vec<(u32, Vec<usize>)> = Vec::new();
        for value in among {
            let token = *values[*value].get(depth)?;
            match next.iter_mut().find(|(known, _)| *known == token) {
                Some((_, values)) => values.push(*value),
                None => next.push((token, vec![*value])),
            }
        }
        if next.len() > 1 {
            let next = next
                .into_iter()
                .map(|(token, among)| {
                    let mut branch = branch(values, &among, depth + 1)?;
                    if let Branch::Fork(edge, _) = &mut branch {
                        edge.insert(0, token);
                    }
                    Some((token, branch))
                })
                .collect::<Option<Vec<_>>>()?;
            break Fork { next };
        }
        depth += 1;
    };
    let edge = values[among[0]][from..depth].to_vec();
    Some(Branch::Fork(edge, fork))
}

fn softmax(logits: &[f32]) -> Vec<f32> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f32> = logits.iter().map(|l| (l - most).exp()).collect();
    let sum: f32 = weights.iter().sum();
    weights.into_iter().map(|w| w / sum).collect()
}
