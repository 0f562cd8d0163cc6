//! [`Definition`] and [`Use`]: step definitions, and the steps that use them. What replaces a use
//! by the steps of its definition is in `inliner`; ports are joined where all steps are known.

use std::collections::BTreeMap;
use std::path::PathBuf;

use indexmap::IndexMap;
use serde_json::Value;

use super::node::{Entry, Node};
use super::source_map::Span;
use crate::pipeline::{DefinitionUse, METRICS};
use crate::step::Port;

/// The name by which the steps of a definition read its inputs.
pub(crate) const INPUTS: &str = "in";

/// The field that has a step run once for each item.
pub(crate) const FOREACH: &str = "foreach";

/// One use of a step definition.
pub(crate) struct Use {
    /// The prefix of the steps around it.
    pub(crate) scope: String,
    /// Where its name is written.
    pub(crate) key: Span,
    /// It as written, expressions filled in.
    pub(crate) node: Node,
    /// What the definition says; None when that is not known.
    pub(crate) definition: Option<Definition>,
    /// Its params that differ from item to item: variable of `item` to the value, in which
    /// `${{ item… }}` waits.
    pub(crate) bound: Vec<(String, Value)>,
}

impl Use {
    /// The lists that it walks.
    pub(crate) fn foreach(&self) -> Option<&Entry> {
        self.node
            .entry(FOREACH)
            .filter(|e| e.value.as_map().is_some())
    }
}

/// The ports of a step definition.
pub(crate) struct Definition {
    /// The file.
    pub(crate) file: PathBuf,
    /// One sentence for people.
    pub(crate) about: Option<String>,
    /// Input ports.
    pub(crate) inputs: Vec<Port>,
    /// Output port to the `step.output` inside.
    pub(crate) outputs: IndexMap<String, Entry>,
    /// The names of its steps, with their prefix.
    pub(crate) steps: Vec<String>,
}

/// The uses of a pipeline, by name.
pub(crate) type Uses = BTreeMap<String, Use>;

/// The uses around the steps of `scope`, innermost first.
pub(crate) fn around<'a>(uses: &'a Uses, scope: &str) -> impl Iterator<Item = (&'a str, &'a Use)> {
    std::iter::successors(use_of(uses, scope), move |(_, used)| {
        use_of(uses, &used.scope)
    })
}

/// The use whose steps have the prefix `scope`.
fn use_of<'a>(uses: &'a Uses, scope: &str) -> Option<(&'a str, &'a Use)> {
    let (name, used) = uses.get_key_value(scope.strip_suffix('/')?)?;
    Some((name.as_str(), used))
}

/// The uses with a `foreach` that the steps of `scope` belong to, innermost first.
pub(crate) fn walkers<'a>(uses: &'a Uses, scope: &str) -> impl Iterator<Item = (&'a str, &'a Use)> {
    around(uses, scope).filter(|(_, used)| used.foreach().is_some())
}

/// The innermost of them.
pub(crate) fn walker<'a>(uses: &'a Uses, scope: &str) -> Option<(&'a str, &'a Use)> {
    walkers(uses, scope).next()
}

/// What a pipeline keeps of its uses.
pub(crate) fn summary(uses: &Uses) -> BTreeMap<String, DefinitionUse> {
    let known = uses.iter().filter_map(|(name, used)| {
        let definition = used.definition.as_ref()?;
        let about = used.node.get("about").and_then(Node::as_text);
        let about = about.map(str::to_owned).or(definition.about.clone());
        let file = definition.file.clone();
        Some((name.clone(), DefinitionUse { file, about }))
    });
    known.collect()
}

impl Definition {
    /// The step inside whose metrics a gate on the use means: the one that makes the output
    /// `metrics`, else the one that makes all outputs.
    pub(crate) fn gated(&self) -> Option<&str> {
        fn maker(output: &Entry) -> Option<&str> {
            Some(output.value.as_text()?.split_once('.')?.0)
        }
        if let Some(metrics) = self.outputs.get(METRICS) {
            return maker(metrics);
        }
        let mut makers = self.outputs.values().map(maker);
        let first = makers.next()??;
        makers.all(|other| other == Some(first)).then_some(first)
    }
}
