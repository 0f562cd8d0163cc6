//! [`Node`]: a value that remembers where it was written.
//!
//! Knows no file format. Maps keep the order of the file. Invariant: depth is
//! bounded by the reader, so walks may recurse.

use indexmap::IndexMap;
use serde_json::{Map, Number, Value};

use super::source_map::Span;

/// A value and its place.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Node {
    /// Where it was written. A block map's is its first key; a `${{ }}` result's the expression.
    pub(crate) span: Span,
    /// What it is.
    pub(crate) data: Data,
}

/// A value.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Data {
    /// Nothing.
    Null,
    /// True or false.
    Bool(bool),
    /// A finite number.
    Number(Number),
    /// Text.
    Text(String),
    /// A list.
    List(Vec<Node>),
    /// A map.
    Map(IndexMap<String, Entry>),
}

/// One entry of a map.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Entry {
    /// Where the key was written.
    pub(crate) key: Span,
    /// The value.
    pub(crate) value: Node,
}

impl Node {
    /// The map, if it is one.
    pub(crate) fn as_map(&self) -> Option<&IndexMap<String, Entry>> {
        match &self.data {
            Data::Map(map) => Some(map),
            _ => None,
        }
    }

    /// The map, if it is one.
    pub(crate) fn as_map_mut(&mut self) -> Option<&mut IndexMap<String, Entry>> {
        match &mut self.data {
            Data::Map(map) => Some(map),
            _ => None,
        }
    }

    /// The list, if it is one.
    pub(crate) fn as_list(&self) -> Option<&[Node]> {
        match &self.data {
            Data::List(list) => Some(list),
            _ => None,
        }
    }

    /// The text, if it is some.
    pub(crate) fn as_text(&self) -> Option<&str> {
        match &self.data {
            Data::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The entry `key` of a map.
    pub(crate) fn entry(&self, key: &str) -> Option<&Entry> {
        self.as_map()?.get(key)
    }

    /// The value `key` of a map.
    pub(crate) fn get(&self, key: &str) -> Option<&Node> {
        self.entry(key).map(|e| &e.value)
    }

    /// The entries of the map `key`; none when there is no such map.
    pub(crate) fn entries(&self, key: &str) -> impl Iterator<Item = (&String, &Entry)> {
        self.get(key).and_then(Node::as_map).into_iter().flatten()
    }

    /// The value without places.
    pub(crate) fn to_value(&self) -> Value {
        match &self.data {
            Data::Null => Value::Null,
            Data::Bool(b) => Value::Bool(*b),
            Data::Number(n) => Value::Number(n.clone()),
            Data::Text(t) => Value::String(t.clone()),
            Data::List(items) => Value::Array(items.iter().map(Node::to_value).collect()),
            Data::Map(map) => {
                let entries = map.iter().map(|(k, e)| (k.clone(), e.value.to_value()));
                Value::Object(entries.collect::<Map<_, _>>())
            }
        }
    }

    /// A value all of which stands at `span`.
    pub(crate) fn from_value(value: Value, span: Span) -> Self {
        let data = match value {
            Value::Null => Data::Null,
            Value::Bool(b) => Data::Bool(b),
            Value::Number(n) => Data::Number(n),
            Value::String(t) => Data::Text(t),
            Value::Array(items) => Data::List(
                items
                    .into_iter()
                    .map(|v| Self::from_value(v, span))
                    .collect(),
            ),
            Value::Object(map) => Data::Map(
                map.into_iter()
                    .map(|(k, v)| {
                        (
                            k,
                            Entry {
                                key: span,
                                value: Self::from_value(v, span),
                            },
                        )
                    })
                    .collect(),
            ),
        };
        Self { span, data }
    }

    /// The place of what `path` leads to; of the nearest thing around it when it is not there.
    /// `on_key` asks for the key instead of the value. A map or list is shown by its key.
    pub(crate) fn place(&self, path: &[String], on_key: bool, outer: Span) -> Span {
        let mut node = self;
        let mut place = outer;
        for (i, segment) in path.iter().enumerate() {
            let last = i + 1 == path.len();
            match &node.data {
                Data::Map(map) => {
                    let Some(entry) = map.get(segment) else {
                        return place;
                    };
                    let shown = (on_key && last) || entry.value.is_container();
                    place = if shown { entry.key } else { entry.value.span };
                    node = &entry.value;
                }
                Data::List(items) => {
                    let index = segment.parse::<usize>().ok();
                    let Some(item) = index.and_then(|i| items.get(i)) else {
                        return place;
                    };
                    place = item.span;
                    node = item;
                }
                _ => return place,
            }
        }
        place
    }

    /// Takes out what `path` leads to, if it is there.
    pub(crate) fn remove(&mut self, path: &[String]) {
        let Some((first, rest)) = path.split_first() else {
            return;
        };
        match &mut self.data {
            Data::Map(map) if rest.is_empty() => {
                map.shift_remove(first);
            }
            Data::Map(map) => {
                if let Some(entry) = map.get_mut(first) {
                    entry.value.remove(rest);
                }
            }
            Data::List(items) => {
                let index = first.parse::<usize>().ok().filter(|i| *i < items.len());
                match index {
                    // Removing it would shift what later paths mean.
                    Some(i) if rest.is_empty() => items[i].data = Data::Text(String::new()),
                    Some(i) => items[i].remove(rest),
                    None => {}
                }
            }
            _ => {}
        }
    }

    /// True for a map or a list.
    pub(crate) fn is_container(&self) -> bool {
        matches!(self.data, Data::Map(_) | Data::List(_))
    }

    /// What it is, for messages.
    pub(crate) fn describe(&self) -> String {
        describe(&self.to_value())
    }
}

/// What a value is, for messages: a short one is shown.
pub(crate) fn describe(value: &Value) -> String {
    match value {
        Value::Null => "nothing".into(),
        Value::Bool(b) => format!("`{b}`"),
        Value::Number(n) => format!("the number `{n}`"),
        Value::String(t) if t.chars().count() <= 40 && !t.contains('\n') => {
            format!("the text `{t}`")
        }
        Value::String(_) => "text".into(),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "a map".into(),
    }
}
