//! What the use of a step definition says of all that is inside, and of single outputs and
//! metrics: given to the steps that it concerns. Knows no files and no params: texts are filled in
//! where they are written, before.

use indexmap::IndexMap;

use super::definition::Definition;
use super::expr::escape;
use super::node::{Data, Entry, Node};

/// The field with the gates on a step's metrics.
pub(crate) const EXPECT: &str = "expect";

/// Fields of a use that the steps inside take over when they do not say otherwise.
const HANDED_DOWN: [&str; 6] = ["retry", "timeout", "resources", "pool", "runner", "cache"];

/// Gives a step inside what the use says for all of them, and what it says of this one's outputs
/// and metrics. `again`: the step is read once more, per item, and the use was not.
pub(crate) fn hand_down(
    outer: &Node,
    definition: &Definition,
    name: &str,
    step: &mut Node,
    again: bool,
) {
    if step.data == Data::Null {
        step.data = Data::Map(IndexMap::new());
    }
    let published = published(outer, definition, name);
    let Some(fields) = step.as_map_mut() else {
        return;
    };
    for field in HANDED_DOWN {
        if let (Some(entry), false) = (outer.entry(field), fields.contains_key(field)) {
            fields.insert(field.to_owned(), entry.clone());
        }
    }
    let read_again = |entry: Entry| if again { final_text(entry) } else { entry };
    if let Some(entry) = outer.entry("env") {
        add_missing(fields, "env", &read_again(entry.clone()));
    }
    if let Some(entry) = published {
        add_missing(fields, "publish", &read_again(entry));
    }
    if let Some(entry) = outer.entry("secrets") {
        add_to_list(fields, "secrets", entry);
    }
    if let Some(entry) = outer.entry(EXPECT)
        && definition.gated() == Some(name)
    {
        add_to_list(fields, EXPECT, entry);
    }
}

/// Adds the elements of a list to those that are there.
fn add_to_list(fields: &mut IndexMap<String, Entry>, field: &str, from: &Entry) {
    let own = fields.entry(field.to_owned()).or_insert_with(|| Entry {
        key: from.key,
        value: Node {
            span: from.value.span,
            data: Data::List(Vec::new()),
        },
    });
    if let (Data::List(own), Some(more)) = (&mut own.value.data, from.value.as_list()) {
        own.extend(more.iter().cloned());
    }
}

/// The entry with the texts of its map as they are to come out when they are read once more.
fn final_text(mut entry: Entry) -> Entry {
    let texts = entry.value.as_map_mut().into_iter().flatten();
    for (_, inner) in texts {
        if let Data::Text(text) = &mut inner.value.data {
            *text = escape(text);
        }
    }
    entry
}

/// Lays the entries of a map under those that are there.
fn add_missing(fields: &mut IndexMap<String, Entry>, field: &str, from: &Entry) {
    let Some(own) = fields.get_mut(field) else {
        fields.insert(field.to_owned(), from.clone());
        return;
    };
    if let (Some(own), Some(more)) = (own.value.as_map_mut(), from.value.as_map()) {
        for (name, entry) in more {
            own.entry(name.clone()).or_insert_with(|| entry.clone());
        }
    }
}

/// The `publish` of the use, for the outputs that come from the step `name` inside.
fn published(outer: &Node, definition: &Definition, name: &str) -> Option<Entry> {
    let publish = outer.entry("publish")?;
    let mut ours: IndexMap<String, Entry> = IndexMap::new();
    for (port, entry) in publish.value.as_map()? {
        let source = definition.outputs.get(port).and_then(|e| e.value.as_text());
        if let Some((step, output)) = source.and_then(|s| s.split_once('.'))
            && step == name
        {
            ours.insert(output.to_owned(), entry.clone());
        }
    }
    let value = Node {
        span: publish.value.span,
        data: Data::Map(ours),
    };
    let filled = value.as_map().is_some_and(|m| !m.is_empty());
    filled.then_some(Entry {
        key: publish.key,
        value,
    })
}
