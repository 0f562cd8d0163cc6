//! [`FieldType`]: the type of a field: its Python name, its JSON schema, and how a
//! value becomes one of its values (pydantic's lax rules). Knows no prompts.

use crate::literal::{parse_json, parse_python};
use crate::value::{Fields, Value, str_repr};
use serde::{Deserialize, Serialize};

/// The type of a field.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FieldType {
    /// Text.
    Str,
    /// Whole number.
    Int,
    /// Number.
    Float,
    /// True or false.
    Bool,
    /// One of the given values (Python's `Literal[…]`).
    Literal(Vec<Value>),
    /// List of a type.
    List(Box<FieldType>),
    /// Dictionary from texts to a type.
    Dict(Box<FieldType>),
    /// The type, or nothing.
    Optional(Box<FieldType>),
    /// Anything (Python's `Any`).
    Json,
}

impl FieldType {
    /// One of the given texts.
    pub fn one_of<S: Into<String>>(texts: impl IntoIterator<Item = S>) -> Self {
        Self::Literal(
            texts
                .into_iter()
                .map(|text| Value::Str(text.into()))
                .collect(),
        )
    }

    /// Reads a Python annotation such as `Optional[int]` or `Literal['a', 'b']`; `None` for
    /// types that are not in the list above.
    pub fn from_annotation(text: &str) -> Option<Self> {
        let text = text.trim();
        let Some((head, inner)) = text.split_once('[') else {
            return Some(match text {
                "str" => Self::Str,
                "int" => Self::Int,
                "float" => Self::Float,
                "bool" => Self::Bool,
                "list" | "List" => Self::List(Box::new(Self::Json)),
                "dict" | "Dict" => Self::Dict(Box::new(Self::Json)),
                "Any" => Self::Json,
                _ => return None,
            });
        };
        let inner = inner.strip_suffix(']')?;
        match head.trim() {
            "Literal" => match parse_python(&format!("[{inner}]"))? {
                Value::List(values) if !values.is_empty() => Some(Self::Literal(values)),
                _ => None,
            },
            "list" | "List" => Some(Self::List(Box::new(Self::from_annotation(inner)?))),
            "Optional" => Some(Self::Optional(Box::new(Self::from_annotation(inner)?))),
            "dict" | "Dict" => {
                let (key, value) = inner.split_once(',')?;
                (key.trim() == "str").then_some(())?;
                Some(Self::Dict(Box::new(Self::from_annotation(value)?)))
            }
            _ => None,
        }
    }

    /// The name that prompts show. DSPy 2.5 prints the texts of a literal bare, 3.x quotes them.
    pub(crate) fn annotation(&self, quote_literals: bool) -> String {
        match self {
            Self::Str => "str".to_owned(),
            Self::Int => "int".to_owned(),
            Self::Float => "float".to_owned(),
            Self::Bool => "bool".to_owned(),
            Self::Json => "Any".to_owned(),
            Self::Literal(values) => {
                let values: Vec<String> = values
                    .iter()
                    .map(|value| match value {
                        Value::Str(text) if quote_literals => str_repr(text),
                        other => other.to_python_str(),
                    })
                    .collect();
                format!("Literal[{}]", values.join(", "))
            }
            Self::List(item) => match &**item {
                Self::Json => "list".to_owned(),
                item => format!("list[{}]", item.annotation(quote_literals)),
            },
            Self::Dict(item) => match &**item {
                Self::Json => "dict".to_owned(),
                item => format!("dict[str, {}]", item.annotation(quote_literals)),
            },
            Self::Optional(item) => format!("Union[{}, NoneType]", item.annotation(quote_literals)),
        }
    }

    /// The JSON schema as pydantic writes it: keys in alphabetical order, or with `type` first.
    pub fn json_schema(&self, type_first: bool) -> Value {
        let mut schema = self.schema_fields(type_first);
        schema.sort_by(|a, _, b, _| {
            (type_first && a != "type", a).cmp(&(type_first && b != "type", b))
        });
        Value::Dict(schema)
    }

    fn schema_fields(&self, type_first: bool) -> Fields {
        let typed = |name: &str| Fields::from([("type".to_owned(), Value::from(name))]);
        match self {
            Self::Str => typed("string"),
            Self::Int => typed("integer"),
            Self::Float => typed("number"),
            Self::Bool => typed("boolean"),
            Self::Json => Fields::new(),
            Self::Literal(values) => {
                let mut schema = common_type(values).map_or_else(Fields::new, typed);
                match values.as_slice() {
                    [only] => schema.insert("const".to_owned(), only.clone()),
                    _ => schema.insert("enum".to_owned(), Value::List(values.clone())),
                };
                schema
            }
            Self::List(item) => {
                let mut schema = typed("array");
                schema.insert("items".to_owned(), item.json_schema(type_first));
                schema
            }
            Self::Dict(item) => {
                let mut schema = typed("object");
                let items = match &**item {
                    Self::Json => Value::Bool(true),
                    item => item.json_schema(type_first),
                };
                schema.insert("additionalProperties".to_owned(), items);
                schema
            }
            Self::Optional(item) => {
                let null = Value::Dict(typed("null"));
                let any = Value::List(vec![item.json_schema(type_first), null]);
                Fields::from([("anyOf".to_owned(), any)])
            }
        }
    }

    /// The value as one of this type's values, by pydantic's lax rules.
    ///
    /// # Errors
    /// A text that says what was expected.
    pub(crate) fn coerce(&self, value: Value) -> Result<Value, String> {
        let refuse = |value: &Value| {
            Err(format!(
                "`{}` is not a valid {}",
                value.to_python_str(),
                self.annotation(true)
            ))
        };
        match (self, value) {
            (Self::Json, value) => Ok(value),
            (Self::Optional(_), Value::Null) => Ok(Value::Null),
            (Self::Optional(item), value) => item.coerce(value),
            (Self::Str, value @ Value::Str(_)) => Ok(value),
            (Self::Bool, value) => to_bool(&value)
                .map(Value::Bool)
                .map_or_else(|| refuse(&value), Ok),
            (Self::Int, value) => to_int(&value)
                .map(Value::Int)
                .map_or_else(|| refuse(&value), Ok),
            (Self::Float, value) => to_float(&value)
                .map(Value::Float)
                .map_or_else(|| refuse(&value), Ok),
            (Self::Literal(values), value) if values.contains(&value) => Ok(value),
            (Self::List(item), Value::List(items)) => items
                .into_iter()
                .map(|value| item.coerce(value))
                .collect::<Result<_, _>>()
                .map(Value::List),
            (Self::Dict(item), Value::Dict(fields)) => fields
                .into_iter()
                .map(|(key, value)| Ok((key, item.coerce(value)?)))
                .collect::<Result<_, String>>()
                .map(Value::Dict),
            (_, value) => refuse(&value),
        }
    }

    /// Reads a text as DSPy 2.5 does: JSON, else a Python literal, else the text itself.
    ///
    /// # Errors
    /// A text that says what was expected.
    pub(crate) fn parse_v2(&self, text: &str) -> Result<Value, String> {
        if *self == Self::Str {
            return Ok(Value::from(text));
        }
        self.coerce(read_loosely(text))
    }

    /// Reads a text as DSPy 3 does: literals may be quoted, an optional text keeps its words.
    ///
    /// # Errors
    /// A text that says what was expected.
    pub(crate) fn parse_v3(&self, text: &str) -> Result<Value, String> {
        match self {
            Self::Str => Ok(Value::from(text)),
            Self::Literal(values) => pick_literal(values, text)
                .ok_or_else(|| format!("`{text}` is not a valid {}", self.annotation(true))),
            Self::Optional(item) if **item == Self::Str => Ok(Value::from(text)),
            _ => self.coerce(read_loosely(text)),
        }
    }
}

/// The value that the text means on its own.
fn read_loosely(text: &str) -> Value {
    parse_json(text)
        .or_else(|| parse_python(text))
        .unwrap_or_else(|| Value::from(text))
}

fn pick_literal(values: &[Value], text: &str) -> Option<Value> {
    let matches = |text: &str| {
        values
            .iter()
            .find(|value| value.to_python_str() == text)
            .cloned()
    };
    if let Some(value) = matches(text) {
        return Some(value);
    }
    let mut inner = crate::python_text::strip(text);
    if let Some((head, rest)) = inner.split_once('[')
        && matches!(head, "Literal" | "str")
        && let Some(rest) = rest.strip_suffix(']')
    {
        inner = rest;
    }
    for quote in ['"', '\''] {
        if let Some(unquoted) = inner
            .strip_prefix(quote)
            .and_then(|rest| rest.strip_suffix(quote))
        {
            inner = unquoted;
            break;
        }
    }
    matches(inner)
}

fn common_type(values: &[Value]) -> Option<&'static str> {
    let name = |value: &Value| match value {
        Value::Str(_) => "string",
        Value::Int(_) => "integer",
        Value::Bool(_) => "boolean",
        _ => "",
    };
    let first = name(values.first()?);
    (!first.is_empty() && values.iter().all(|value| name(value) == first)).then_some(first)
}

fn to_bool(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(value) => Some(*value),
        Value::Int(0) => Some(false),
        Value::Int(1) => Some(true),
        Value::Float(float) if *float == 0.0 => Some(false),
        Value::Float(float) if *float == 1.0 => Some(true),
        Value::Str(text) => match text.to_ascii_lowercase().as_str() {
            "0" | "off" | "f" | "false" | "n" | "no" => Some(false),
            "1" | "on" | "t" | "true" | "y" | "yes" => Some(true),
            _ => None,
        },
        _ => None,
    }
}

fn to_int(value: &Value) -> Option<i64> {
    match value {
        Value::Int(int) => Some(*int),
        Value::Bool(value) => Some(i64::from(*value)),
        Value::Float(float) if float.fract() == 0.0 && float.abs() < 9.2e18 => Some(*float as i64),
        Value::Str(text) => {
            let text = text.trim();
            let whole = match text.split_once('.') {
                Some((whole, zeros)) if zeros.bytes().all(|b| b == b'0') => whole,
                Some(_) => return None,
                None => text,
            };
            whole.parse().ok()
        }
        _ => None,
    }
}

fn to_float(value: &Value) -> Option<f64> {
    match value {
        Value::Float(float) => Some(*float),
        Value::Int(int) => Some(*int as f64),
        Value::Bool(value) => Some(f64::from(u8::from(*value))),
        Value::Str(text) => text.trim().parse().ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn ty(annotation: &str) -> FieldType {
        FieldType::from_annotation(annotation).unwrap()
    }

    #[test]
    fn annotations_round_trip() {
        for (text, shown) in [
            ("str", "str"),
            ("Optional[str]", "Union[str, NoneType]"),
            ("list[Literal['a', 'b']]", "list[Literal['a', 'b']]"),
            ("dict[str, list[int]]", "dict[str, list[int]]"),
            ("Literal[1, 2]", "Literal[1, 2]"),
        ] {
            assert_eq!(ty(text).annotation(true), shown);
        }
        assert_eq!(ty("Literal['a', 'b']").annotation(false), "Literal[a, b]");
        assert_eq!(FieldType::from_annotation("datetime"), None);
    }

    #[test]
    fn schemas_are_pydantics() {
        let schema = |text: &str, first| ty(text).json_schema(first).to_json_dumps(true);
        assert_eq!(
            schema("list[int]", false),
            r#"{"items": {"type": "integer"}, "type": "array"}"#
        );
        assert_eq!(
            schema("list[int]", true),
            r#"{"type": "array", "items": {"type": "integer"}}"#
        );
        assert_eq!(
            schema("Optional[str]", false),
            r#"{"anyOf": [{"type": "string"}, {"type": "null"}]}"#
        );
    }

    #[test]
    fn values_are_read_by_lax_rules() {
        assert_eq!(ty("int").parse_v2("3.0"), Ok(Value::Int(3)));
        assert!(ty("int").parse_v2("3.5").is_err());
        assert!(ty("int").parse_v2("1,000").is_err());
        assert_eq!(ty("bool").parse_v2("yes"), Ok(Value::Bool(true)));
        assert_eq!(ty("float").parse_v2("2"), Ok(Value::Float(2.0)));
        assert_eq!(ty("Optional[str]").parse_v2("None"), Ok(Value::Null));
        assert_eq!(
            ty("Optional[str]").parse_v3("None"),
            Ok(Value::from("None"))
        );
        assert_eq!(
            ty("Literal['a', 'b']").parse_v3("Literal['b']"),
            Ok(Value::from("b"))
        );
        assert!(ty("Literal['a', 'b']").parse_v2("A").is_err());
        assert_eq!(
            ty("list[int]").parse_v2("(1, 2)"),
            Ok(Value::List(vec![Value::Int(1), Value::Int(2)]))
        );
    }
}
