//! The `with` of a step, completed: defaults of the schema filled in, names of
//! models and programs replaced by their entries.
//!
//! Knows no places. Invariant: `params` and `key_params` differ only within the
//! entries that took the place of model names.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::expr::{escaped, has_expression};
use super::variant;

/// Deepest schema that is followed; one may refer to itself.
const MAX_DEPTH: usize = 64;

/// The entries that names may refer to.
pub(crate) struct Tables<'a> {
    /// `models:`.
    pub(crate) models: &'a BTreeMap<String, Value>,
    /// `programs:`.
    pub(crate) programs: &'a BTreeMap<String, Value>,
    /// Fields of a model entry that do not enter keys.
    pub(crate) unkeyed: &'a [String],
}

/// A name that leads nowhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BadName {
    /// Where in the params.
    pub(crate) path: Vec<String>,
    /// `models` or `programs`.
    pub(crate) table: String,
    /// The name; None when it is an expression that waits for `item`.
    pub(crate) name: Option<String>,
}

/// The completed params.
pub(crate) struct Completed {
    /// What the step gets.
    pub(crate) params: Value,
    /// What enters the key.
    pub(crate) key_params: Value,
    /// Names that lead nowhere.
    pub(crate) bad: Vec<BadName>,
}

/// Completes the params `with` by their schema. `again`: the result is read once more, per item,
/// so that a literal `${{` in an entry must be escaped.
pub(crate) fn complete(schema: &Value, with: Value, tables: &Tables<'_>, again: bool) -> Completed {
    let mut walk = Walk {
        root: schema,
        tables,
        again,
        path: Vec::new(),
        bad: Vec::new(),
    };
    let mut params = with.clone();
    let mut key_params = with;
    walk.value(schema, &mut params, &mut key_params, true);
    Completed {
        params,
        key_params,
        bad: walk.bad,
    }
}

struct Walk<'a> {
    root: &'a Value,
    tables: &'a Tables<'a>,
    again: bool,
    path: Vec<String>,
    bad: Vec<BadName>,
}

impl Walk<'_> {
    fn value(&mut self, schema: &Value, params: &mut Value, key: &mut Value, fill: bool) {
        if self.path.len() > MAX_DEPTH {
            return;
        }
        if let Some(table) = schema.get("x-flowrun-ref").and_then(Value::as_str) {
            return self.reference(table, params, key);
        }
        let target = variant::deref(self.root, schema);
        if !std::ptr::eq(target, schema) {
            self.value(target, params, key, fill);
        }
        if let (Value::Object(params), Value::Object(key)) = (&mut *params, &mut *key) {
            self.object(schema, params, key, fill);
        }
        if let (Some(items), Value::Array(params), Value::Array(key)) =
            (schema.get("items"), &mut *params, &mut *key)
        {
            for (i, (params, key)) in params.iter_mut().zip(key).enumerate() {
                self.within(&i.to_string(), |walk| walk.value(items, params, key, fill));
            }
        }
        for all in schema
            .get("allOf")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
        {
            self.value(all, params, key, fill);
        }
        if let Some(branch) = branch_of(self.root, schema, params) {
            self.value(branch, params, key, fill);
        }
    }

    fn object(
        &mut self,
        schema: &Value,
        params: &mut Map<String, Value>,
        key: &mut Map<String, Value>,
        fill: bool,
    ) {
        let none = Map::new();
        let properties = schema
            .get("properties")
            .and_then(Value::as_object)
            .unwrap_or(&none);
        for (name, schema) in properties {
            let mut fill_within = fill;
            if !params.contains_key(name) {
                let Some(default) = schema.get("default").filter(|_| fill) else {
                    continue;
                };
                params.insert(name.clone(), default.clone());
                key.insert(name.clone(), default.clone());
                // A default is whole; filling it could go on for ever.
                fill_within = false;
            }
            self.member(name, schema, params, key, fill_within);
        }
        if let Some(others) = schema.get("additionalProperties").filter(|s| s.is_object()) {
            let names: Vec<String> = params
                .keys()
                .filter(|k| !properties.contains_key(*k))
                .cloned()
                .collect();
            for name in names {
                self.member(&name, others, params, key, fill);
            }
        }
    }

    fn member(
        &mut self,
        name: &str,
        schema: &Value,
        params: &mut Map<String, Value>,
        key: &mut Map<String, Value>,
        fill: bool,
    ) {
        if let (Some(params), Some(key)) = (params.get_mut(name), key.get_mut(name)) {
            self.within(name, |walk| walk.value(schema, params, key, fill));
        }
    }

    fn within(&mut self, segment: &str, f: impl FnOnce(&mut Self)) {
        self.path.push(segment.to_owned());
        f(self);
        self.path.pop();
    }

    /// Replaces a name, or each name of a list.
    fn reference(&mut self, table: &str, params: &mut Value, key: &mut Value) {
        match (&mut *params, &mut *key) {
            (Value::Array(params), Value::Array(key)) => {
                for (i, (params, key)) in params.iter_mut().zip(key).enumerate() {
                    self.within(&i.to_string(), |walk| walk.reference(table, params, key));
                }
            }
            (Value::String(name), _) => {
                let name = name.clone();
                let entries = if table == "models" {
                    self.tables.models
                } else {
                    self.tables.programs
                };
                match entries.get(&name) {
                    Some(entry) => {
                        *params = self.entry(entry.clone());
                        *key = self.entry(self.keyed(table, entry));
                    }
                    None => self.bad.push(BadName {
                        path: self.path.clone(),
                        table: table.to_owned(),
                        name: (!has_expression(&name)).then_some(name),
                    }),
                }
            }
            _ => {}
        }
    }

    /// An entry, as it stands in params.
    fn entry(&self, entry: Value) -> Value {
        if self.again { escaped(entry) } else { entry }
    }

    fn keyed(&self, table: &str, entry: &Value) -> Value {
        let mut entry = entry.clone();
        if let (Value::Object(fields), "models") = (&mut entry, table) {
            fields.retain(|name, _| !self.tables.unkeyed.contains(name));
        }
        entry
    }
}

/// The branch of `oneOf` or `anyOf` that the value takes.
fn branch_of<'a>(root: &'a Value, schema: &'a Value, value: &Value) -> Option<&'a Value> {
    let list = schema
        .get("oneOf")
        .or_else(|| schema.get("anyOf"))
        .and_then(Value::as_array)?;
    let tag = variant::named(root, schema, value);
    list.iter().find(|branch| {
        let whole = variant::deref(root, branch);
        match &tag {
            Some(tag) => variant::tag_of(whole).as_ref() == Some(tag),
            None => may_be(whole, value),
        }
    })
}

/// True when the value has a type that the schema allows.
fn may_be(schema: &Value, value: &Value) -> bool {
    let is = |ty: &str| match value {
        Value::Null => ty == "null",
        Value::Bool(_) => ty == "boolean",
        Value::Number(n) => ty == "number" || (ty == "integer" && !n.is_f64()),
        Value::String(_) => ty == "string",
        Value::Array(_) => ty == "array",
        Value::Object(_) => ty == "object",
    };
    if let Some(fixed) = schema.get("const") {
        return fixed == value;
    }
    match schema.get("type") {
        Some(Value::String(ty)) => is(ty),
        Some(Value::Array(types)) => types.iter().filter_map(Value::as_str).any(is),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn tables<'a>(
        models: &'a BTreeMap<String, Value>,
        programs: &'a BTreeMap<String, Value>,
        unkeyed: &'a [String],
    ) -> Tables<'a> {
        Tables {
            models,
            programs,
            unkeyed,
        }
    }

    #[test]
    fn names_become_entries_everywhere() {
        let models = BTreeMap::from([("m".to_owned(), json!({"model": "x", "base_url": "u"}))]);
        let programs = BTreeMap::from([("p".to_owned(), json!({"predict": {}}))]);
        let unkeyed = ["base_url".to_owned()];
        let schema = json!({
            "properties": {
                "model": {"$ref": "#/$defs/Model"},
                "judges": {"type": "array", "items": {"type": "string", "x-flowrun-ref": "models"}},
                "teacher": {"anyOf": [{"$ref": "#/$defs/Model"}, {"type": "null"}], "default": null},
                "student": {"type": ["string", "null"], "x-flowrun-ref": "models"},
                "fallback": {"$ref": "#/$defs/Model", "default": "m"},
                "nested": {"type": "object", "properties": {
                    "program": {"type": "string", "x-flowrun-ref": "programs"},
                    "n": {"type": "integer", "default": 3}}},
                "limit": {"type": "integer", "default": 10},
            },
            "$defs": {"Model": {"type": "string", "x-flowrun-ref": "models"}},
        });
        let with = json!({"model": "m", "judges": ["m", "q"], "student": null,
                          "nested": {"program": "p"}});
        let tables = tables(&models, &programs, &unkeyed);
        let done = complete(&schema, with, &tables, false);
        let full = json!({"model": "x", "base_url": "u"});
        let keyed = json!({"model": "x"});
        assert_eq!(
            done.params,
            json!({"model": full, "judges": [full, "q"], "student": null, "teacher": null,
                   "fallback": full, "limit": 10, "nested": {"program": {"predict": {}}, "n": 3}})
        );
        assert_eq!(
            done.key_params,
            json!({"model": keyed, "judges": [keyed, "q"], "student": null, "teacher": null,
                   "fallback": keyed, "limit": 10, "nested": {"program": {"predict": {}}, "n": 3}})
        );
        assert_eq!(
            done.bad,
            [BadName {
                path: vec!["judges".into(), "1".into()],
                table: "models".into(),
                name: Some("q".into())
            }]
        );
    }

    #[test]
    fn what_is_read_once_more_is_escaped_in_entries_and_keys() {
        let program = json!({"predict": {"instructions": "Write ${{ x }}."}});
        let programs = BTreeMap::from([("p".to_owned(), program)]);
        let none = BTreeMap::new();
        let schema = json!({"properties": {"program": {"x-flowrun-ref": "programs"}}});
        let text = |again| {
            let with = json!({"program": "p"});
            let done = complete(&schema, with, &tables(&none, &programs, &[]), again);
            assert_eq!(done.params, done.key_params);
            done.params["program"]["predict"]["instructions"].clone()
        };
        assert_eq!(text(false), "Write ${{ x }}.");
        assert_eq!(text(true), "Write $${{ x }}.");
    }

    #[test]
    fn a_variant_gets_its_own_defaults() {
        let schema = json!({"properties": {"how": {"oneOf": [
            {"type": "object", "required": ["kind"],
             "properties": {"kind": {"const": "a"}, "x": {"default": 1}}},
            {"type": "object", "required": ["kind"],
             "properties": {"kind": {"const": "b"}, "y": {"default": 2}}},
        ]}}});
        let none = BTreeMap::new();
        let done = complete(
            &schema,
            json!({"how": {"kind": "b"}}),
            &tables(&none, &none, &[]),
            false,
        );
        assert_eq!(done.params, json!({"how": {"kind": "b", "y": 2}}));
    }

    #[test]
    fn a_schema_that_refers_to_itself_ends() {
        let schema = json!({"$ref": "#/$defs/T", "$defs": {"T": {"properties": {
            "child": {"$ref": "#/$defs/T", "default": {}}}}}});
        let none = BTreeMap::new();
        let done = complete(&schema, json!({}), &tables(&none, &none, &[]), false);
        assert_eq!(done.params, json!({"child": {}}));
        let tables = tables(&none, &none, &[]);
        let _ = complete(&json!({"$ref": "#"}), json!({}), &tables, false);
    }
}
