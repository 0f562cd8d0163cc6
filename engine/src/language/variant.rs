//! Which variant of a Rust enum a value names, read from the enum's schema.
//! Knows the two forms that schemas of enums have: externally tagged (a map with
//! the variant's name as its one key) and internally tagged (a field with a fixed text).

use serde_json::{Map, Value};

/// The schema that a `$ref` leads to, or the schema itself.
pub(crate) fn deref<'a>(root: &'a Value, schema: &'a Value) -> &'a Value {
    let mut schema = schema;
    // A bound instead of a visited set: a schema that refers to itself is useless.
    for _ in 0..16 {
        let Some(reference) = schema.get("$ref").and_then(Value::as_str) else {
            break;
        };
        let Some(target) = reference.strip_prefix('#').and_then(|p| root.pointer(p)) else {
            break;
        };
        schema = target;
    }
    schema
}

/// The branches of `oneOf` or `anyOf`.
pub(crate) fn branches<'a>(root: &'a Value, schema: &'a Value) -> Vec<&'a Value> {
    let list = schema
        .get("oneOf")
        .or_else(|| schema.get("anyOf"))
        .and_then(Value::as_array);
    list.into_iter()
        .flatten()
        .map(|branch| deref(root, branch))
        .collect()
}

/// The fields of which a map has exactly one: where each branch of `oneOf` does no more than require
/// a field.
pub(crate) fn exclusive(schema: &Value) -> Option<Vec<&str>> {
    let branches = schema.get("oneOf")?.as_array()?;
    branches.iter().map(only_required).collect()
}

/// The field that a branch requires, if it says nothing else.
fn only_required(branch: &Value) -> Option<&str> {
    let branch = branch.as_object().filter(|branch| branch.len() == 1)?;
    match branch.get("required")?.as_array()?.as_slice() {
        [field] => field.as_str(),
        _ => None,
    }
}

/// How a branch is named.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Tag {
    /// `{ name: … }`.
    Key(String),
    /// `{ field: name, … }`.
    Field(String, String),
}

impl Tag {
    /// The variant's name.
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Key(name) | Self::Field(_, name) => name,
        }
    }
}

/// The name of a branch, if it has one.
pub(crate) fn tag_of(branch: &Value) -> Option<Tag> {
    let properties = branch.get("properties")?.as_object()?;
    let required: Vec<&str> = branch
        .get("required")
        .and_then(Value::as_array)
        .map(|r| r.iter().filter_map(Value::as_str).collect())
        .unwrap_or_default();
    let fixed = properties.iter().find_map(|(field, schema)| {
        let text = schema.get("const").and_then(Value::as_str)?;
        required
            .contains(&field.as_str())
            .then(|| Tag::Field(field.clone(), text.to_owned()))
    });
    let key = || match required.as_slice() {
        [only] if properties.len() == 1 => Some(Tag::Key((*only).to_owned())),
        _ => None,
    };
    fixed.or_else(key)
}

/// True when the map names the variant `tag`.
pub(crate) fn names(map: &Map<String, Value>, tag: &Tag) -> bool {
    match tag {
        Tag::Key(key) => map.contains_key(key),
        Tag::Field(field, name) => map.get(field).and_then(Value::as_str) == Some(name),
    }
}

/// The variant of `schema` that `value` names.
pub(crate) fn named(root: &Value, schema: &Value, value: &Value) -> Option<Tag> {
    let map = value.as_object()?;
    let tags = branches(root, deref(root, schema))
        .into_iter()
        .filter_map(tag_of);
    let mut found: Vec<Tag> = tags.filter(|tag| names(map, tag)).collect();
    if found.len() == 1 { found.pop() } else { None }
}
