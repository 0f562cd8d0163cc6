//! [`expand`]: turns a step into its actions, once the outputs before it are
//! known. A step without `foreach` has one action, without a label.
//!
//! Knows no cache: what it makes is a list of [`ActionRequest`]s.
//!
//! | file | does |
//! |---|---|
//! | this one | the way from a step to its actions |
//! | `items` | the items that it walks: their variables, labels, and which are left out |
//! | `condition` | what a condition asks for, by its text |
//! | `reading` | what an item reads of the steps before it |
//! | `made` | their outputs, parted by item once |
//! | `request` | the action of an item |
//! | `gathering` | the outputs of all items as lists |

mod condition;
mod gathering;
mod items;
mod made;
mod reading;
mod request;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use flowrun_cache::OutputRecord;
use serde_json::Value;

pub(crate) use condition::{asks_for_item, level_of};
pub(crate) use gathering::gather;
use made::Made;
pub(crate) use request::{ActionRequest, Entry, kind_of};

use crate::pipeline::{Pipeline, StepNode};
use crate::step::StepError;

/// Most items of one step: those of lists within lists are multiplied.
const MAX_ITEMS: usize = 1_000_000;

/// How expressions that need run-time values are evaluated. The engine's
/// language half gives both.
#[derive(Clone, Copy)]
pub struct Expressions {
    /// Fills `${{ … item … }}` in a value.
    pub resolve_item: fn(&Value, &BTreeMap<String, Value>) -> Result<Value, String>,
    /// Evaluates a condition over a context object.
    pub eval_bool: fn(&str, &Value) -> Result<bool, String>,
}

impl std::fmt::Debug for Expressions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Expressions")
    }
}

/// The actions of a step, or `None` when its `when` is false. `output` gives
/// the outputs of the steps before it.
///
/// # Errors
/// Lists of different lengths, too many items, an expression that cannot be
/// evaluated, two items that would publish to one path.
pub(crate) fn expand(
    pipeline: &Pipeline,
    node: &Arc<StepNode>,
    expressions: &Expressions,
    output: impl Fn(&str, &str) -> Option<OutputRecord>,
) -> Result<Option<Vec<ActionRequest>>, StepError> {
    let expansion = Expansion {
        pipeline,
        node,
        expressions,
        made: Made::new(output),
    };
    let mut requests = Vec::new();
    let wanted = expansion.each_item(&mut |item| {
        if requests.len() == MAX_ITEMS {
            let text = format!("`{}` has more than {MAX_ITEMS} items", node.name);
            return Err(StepError::invalid(text).help("give each item more to do"));
        }
        requests.push(expansion.request(item)?);
        Ok(())
    })?;
    if !wanted {
        return Ok(None);
    }
    check_publish(node, &requests)?;
    Ok(Some(requests))
}

/// A step, and what it is turned into actions with.
struct Expansion<'a, F> {
    pipeline: &'a Pipeline,
    node: &'a Arc<StepNode>,
    expressions: &'a Expressions,
    made: Made<F>,
}

fn check_publish(node: &StepNode, requests: &[ActionRequest]) -> Result<(), StepError> {
    let mut paths = BTreeSet::new();
    for path in requests.iter().flat_map(|r| r.publish.values()) {
        if !paths.insert(path) {
            let text = format!("`{}` would publish twice to `{path}`", node.name);
            return Err(StepError::invalid(text)
                .help("name the item in the path, for example `results/${{ item.x }}.json`"));
        }
    }
    Ok(())
}
