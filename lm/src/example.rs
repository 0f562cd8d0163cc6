//! [`Example`], [`Demo`], [`Prediction`]: a row of data, a row shown in a prompt,
//! and what a program answered. Two examples are equal when their fields are;
//! ids do not count. Knows no signature.

use crate::value::{Fields, Value};
use serde::de::Error as _;
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A row of data.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Example {
    /// Names the row in results; not part of its meaning.
    pub id: String,
    /// Its columns in order.
    pub fields: Fields,
}

impl Example {
    /// A row of texts.
    pub fn of_texts<'a>(
        id: impl Into<String>,
        columns: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Self {
        let fields = columns
            .into_iter()
            .map(|(name, text)| (name.to_owned(), text.into()));
        Self {
            id: id.into(),
            fields: fields.collect(),
        }
    }

    /// The text of a column; `None` when it is missing or no text.
    pub fn text(&self, column: &str) -> Option<&str> {
        self.fields.get(column)?.as_str()
    }
}

impl PartialEq for Example {
    fn eq(&self, other: &Self) -> bool {
        self.fields == other.fields
    }
}

/// A worked example shown in a prompt.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Demo {
    /// Whether a teacher program made it (DSPy's word); false for a labelled row.
    pub augmented: bool,
    /// Its fields in order.
    pub fields: Fields,
}

impl Demo {
    /// A labelled row as it is.
    pub fn labeled(example: &Example) -> Self {
        Self {
            augmented: false,
            fields: example.fields.clone(),
        }
    }

    /// What a teacher took and gave.
    pub fn augmented(inputs: &Fields, outputs: &Fields) -> Self {
        let mut fields = inputs.clone();
        fields.extend(outputs.clone());
        Self {
            augmented: true,
            fields,
        }
    }

    /// Whether this is the row itself.
    pub fn is(&self, example: &Example) -> bool {
        !self.augmented && self.fields == example.fields
    }
}

/// DSPy's flat form: `{"augmented": true, …}`.
impl Serialize for Demo {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        if self.augmented {
            map.serialize_entry("augmented", &true)?;
        }
        for (name, value) in &self.fields {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Demo {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut fields = Fields::deserialize(deserializer)?;
        let augmented = match fields.shift_remove("augmented") {
            None | Some(Value::Null) => false,
            Some(Value::Bool(augmented)) => augmented,
            Some(_) => {
                return Err(D::Error::custom(
                    "`augmented` of a demo must be true or false",
                ));
            }
        };
        Ok(Self { augmented, fields })
    }
}

/// What a program answered for one row.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Prediction {
    /// The last step's outputs, with labels sanitised.
    pub fields: Fields,
}

impl Prediction {
    /// The text of a field; `None` when it is missing or no text.
    pub fn text(&self, field: &str) -> Option<&str> {
        self.fields.get(field)?.as_str()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn demos_are_flat_in_json() {
        let text = r#"{"augmented":true,"intent":"a","label":"b"}"#;
        let demo: Demo = serde_json::from_str(text).unwrap();
        assert!(demo.augmented);
        assert_eq!(serde_json::to_string(&demo).unwrap(), text);
        assert!(serde_json::from_str::<Demo>(r#"{"augmented":3}"#).is_err());
    }

    #[test]
    fn ids_do_not_count() {
        let a = Example::of_texts("1", [("text", "x")]);
        assert_eq!(a, Example::of_texts("2", [("text", "x")]));
        assert!(Demo::labeled(&a).is(&a));
        assert!(!Demo::augmented(&a.fields, &Fields::new()).is(&a));
    }
}
