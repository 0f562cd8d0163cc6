//! [`Value`]: what a field holds, with Python's own spellings of it: `str()`,
//! `repr()` and `json.dumps`. Prompts are made of these spellings, so they are
//! byte-exact. Knows no field types.

use indexmap::IndexMap;
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// Named values in the order in which they were set.
pub type Fields = IndexMap<String, Value>;

/// A value of a field: JSON's kinds, with integers and floats apart and dictionaries in order.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Value {
    /// Python's `None`.
    #[default]
    Null,
    /// `True` or `False`.
    Bool(bool),
    /// An integer.
    Int(i64),
    /// A float; may be NaN or infinite.
    Float(f64),
    /// Text.
    Str(String),
    /// A list (tuples and sets are read as lists).
    List(Vec<Value>),
    /// A dictionary with text keys, in insertion order.
    Dict(Fields),
}

impl Value {
    /// The text, when this is text.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Str(text) => Some(text),
            _ => None,
        }
    }

    /// Python's `str(value)`.
    pub fn to_python_str(&self) -> String {
        match self {
            Self::Str(text) => text.clone(),
            other => other.to_python_repr(),
        }
    }

    /// Python's `repr(value)`.
    pub(crate) fn to_python_repr(&self) -> String {
        match self {
            Self::Null => "None".to_owned(),
            Self::Bool(true) => "True".to_owned(),
            Self::Bool(false) => "False".to_owned(),
            Self::Int(int) => int.to_string(),
            Self::Float(float) => float_repr(*float),
            Self::Str(text) => str_repr(text),
            Self::List(items) => {
                let items: Vec<String> = items.iter().map(Self::to_python_repr).collect();
                format!("[{}]", items.join(", "))
            }
            Self::Dict(fields) => {
                let items: Vec<String> = fields
                    .iter()
                    .map(|(key, value)| format!("{}: {}", str_repr(key), value.to_python_repr()))
                    .collect();
                format!("{{{}}}", items.join(", "))
            }
        }
    }

    /// Python's `json.dumps(value, ensure_ascii=…)`: `, ` and `: ` between the parts.
    pub(crate) fn to_json_dumps(&self, ensure_ascii: bool) -> String {
        match self {
            Self::Null => "null".to_owned(),
            Self::Bool(value) => value.to_string(),
            Self::Int(int) => int.to_string(),
            Self::Float(float) => json_float(*float),
            Self::Str(text) => json_str(text, ensure_ascii),
            Self::List(items) => {
                let items: Vec<String> = items
                    .iter()
                    .map(|item| item.to_json_dumps(ensure_ascii))
                    .collect();
                format!("[{}]", items.join(", "))
            }
            Self::Dict(fields) => {
                let items: Vec<String> = fields
                    .iter()
                    .map(|(key, value)| {
                        let key = json_str(key, ensure_ascii);
                        format!("{key}: {}", value.to_json_dumps(ensure_ascii))
                    })
                    .collect();
                format!("{{{}}}", items.join(", "))
            }
        }
    }
}

/// Python's `repr` of a list of texts, as prompts that list their labels show it.
pub(crate) fn list_repr(items: &[String]) -> String {
    let items: Vec<String> = items.iter().map(|item| str_repr(item)).collect();
    format!("[{}]", items.join(", "))
}

/// Python's `repr` of a float: the shortest digits that read back, with an
/// exponent below 1e-4 and from 1e16 on.
pub fn float_repr(float: f64) -> String {
    if float.is_nan() {
        return "nan".to_owned();
    }
    if float.is_infinite() {
        return if float > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let scientific = format!("{float:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if float == 0.0 || (-4..16).contains(&exponent) {
        let plain = format!("{float}");
        return if plain.contains('.') {
            plain
        } else {
            format!("{plain}.0")
        };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// Python's `repr` of a text.
pub(crate) fn str_repr(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    let mut out = String::with_capacity(text.len() + 2);
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if is_printable(c) => out.push(c),
            c if u32::from(c) <= 0xff => out.push_str(&format!("\\x{:02x}", u32::from(c))),
            c if u32::from(c) <= 0xffff => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => out.push_str(&format!("\\U{:08x}", u32::from(c))),
        }
    }
    out.push(quote);
    out
}

/// Python's `str.isprintable` for one character, without the unassigned code points.
fn is_printable(c: char) -> bool {
    let format = matches!(u32::from(c),
        0xad | 0x600..=0x605 | 0x61c | 0x6dd | 0x70f | 0x180e | 0x200b..=0x200f
        | 0x202a..=0x202e | 0x2060..=0x206f | 0xfeff | 0xfff9..=0xfffb | 0xe0001..=0xe007f);
    let private = matches!(u32::from(c), 0xe000..=0xf8ff | 0xf0000..=0x10ffff);
    !(c.is_control() || (c.is_whitespace() && c != ' ') || format || private)
}

fn json_float(float: f64) -> String {
    match float_repr(float).as_str() {
        "nan" => "NaN".to_owned(),
        "inf" => "Infinity".to_owned(),
        "-inf" => "-Infinity".to_owned(),
        finite => finite.to_owned(),
    }
}

fn json_str(text: &str, ensure_ascii: bool) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if u32::from(c) < 0x20 => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            c if ensure_ascii && !(' '..='~').contains(&c) => {
                let mut units = [0u16; 2];
                for unit in c.encode_utf16(&mut units) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Str(text.to_owned())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Str(text)
    }
}

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Null => serializer.serialize_unit(),
            Self::Bool(value) => serializer.serialize_bool(*value),
            Self::Int(int) => serializer.serialize_i64(*int),
            Self::Float(float) => serializer.serialize_f64(*float),
            Self::Str(text) => serializer.serialize_str(text),
            Self::List(items) => serializer.collect_seq(items),
            Self::Dict(fields) => serializer.collect_map(fields),
        }
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("null, a boolean, a number, a text, a list or a dictionary with text keys")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        Value::deserialize(deserializer)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Int(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(i64::try_from(value).map_or(Value::Float(value as f64), Value::Int))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Str(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::Str(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element()? {
            items.push(item);
        }
        Ok(Value::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut fields = Fields::new();
        while let Some((key, value)) = access.next_entry()? {
            fields.insert(key, value);
        }
        Ok(Value::Dict(fields))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn floats_are_spelled_as_python_does() {
        for (float, text) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e-7, "1e-07"),
            (1e16, "1e+16"),
            (123456789012345.0, "123456789012345.0"),
            (1e15, "1000000000000000.0"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (-0.0, "-0.0"),
            (1.5e300, "1.5e+300"),
            (0.701, "0.701"),
        ] {
            assert_eq!(float_repr(float), text);
        }
    }

    #[test]
    fn texts_are_quoted_as_python_does() {
        assert_eq!(str_repr("don't"), "\"don't\"");
        assert_eq!(str_repr("a'b\"c"), "'a\\'b\"c'");
        assert_eq!(str_repr("é\u{a0}\u{7}\n"), "'é\\xa0\\x07\\n'");
        assert_eq!(list_repr(&["a".into(), "b".into()]), "['a', 'b']");
    }

    #[test]
    fn json_dumps_can_escape_or_not() {
        let value: Value = serde_json::from_str(r#"{"z":1,"é":[true,null,0.5,"𝄞"]}"#).unwrap();
        assert_eq!(
            value.to_json_dumps(true),
            r#"{"z": 1, "\u00e9": [true, null, 0.5, "\ud834\udd1e"]}"#
        );
        assert_eq!(
            value.to_json_dumps(false),
            r#"{"z": 1, "é": [true, null, 0.5, "𝄞"]}"#
        );
    }

    #[test]
    fn json_round_trips_in_order() {
        let text = r#"{"b":1,"a":[1.0,"x",null,true]}"#;
        let value: Value = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&value).unwrap(), text);
    }
}
