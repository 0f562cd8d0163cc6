//! [`RowInput`]: what a program reads of a row. The columns that a caller has to give.

use super::Program;
use crate::field_type::FieldType;
use crate::value::Value;
use std::collections::BTreeSet;

/// A column that a program reads.
#[derive(Debug, Clone, PartialEq)]
pub struct RowInput {
    /// The field's name.
    pub name: String,
    /// The row's column that it is taken from.
    pub column: String,
    /// What it is, where the program says.
    pub desc: Option<String>,
    /// Its type.
    pub ty: FieldType,
}

impl RowInput {
    /// A text in a column of the same name.
    pub fn text(name: impl Into<String>) -> Self {
        let name = name.into();
        Self {
            column: name.clone(),
            name,
            desc: None,
            ty: FieldType::Str,
        }
    }

    /// Whether the value can be one of its type, by the rules that answers are read by.
    ///
    /// # Errors
    /// A text that says what was expected.
    pub fn check(&self, value: &Value) -> Result<(), String> {
        self.ty.coerce(value.clone()).map(drop)
    }
}

impl Program {
    /// What it reads of a row, each column once and by the first field that takes it. What an
    /// earlier step of the program makes is not read of the row.
    pub fn row_inputs(&self) -> Vec<RowInput> {
        let members = match &self.votes {
            Some(votes) => self.members(votes),
            None => vec![self.clone()],
        };
        let mut all: Vec<RowInput> = Vec::new();
        for member in &members {
            let mut made = BTreeSet::new();
            for predictor in &member.predictors {
                for field in &predictor.signature.inputs {
                    let column = predictor.sources.get(&field.name).unwrap_or(&field.name);
                    let is_known = all.iter().any(|input| input.column == *column);
                    if is_known || made.contains(column) {
                        continue;
                    }
                    all.push(RowInput {
                        name: field.name.clone(),
                        column: column.clone(),
                        desc: field.shown_desc().map(str::to_owned),
                        ty: field.ty.clone(),
                    });
                }
                made.extend(predictor.signature.outputs.iter().map(|f| f.name.clone()));
            }
        }
        all
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use crate::program::ProgramSpec;

    #[test]
    fn columns_are_read_once_and_what_a_stage_makes_is_not() {
        let spec: ProgramSpec = serde_json::from_str(
            r#"{"majority": {"programs": [
                {"stages": [
                    {"name": "topic", "predict": {
                        "inputs": [{"name": "query", "from": "text"}],
                        "outputs": [{"name": "topic"}]}},
                    {"name": "label", "predict": {
                        "inputs": [{"name": "topic"}, {"name": "tags", "type": "json"}],
                        "outputs": [{"name": "label", "type": "label"}]}}]},
                {"predict": {"inputs": [{"name": "text"}],
                    "outputs": [{"name": "label", "type": "label"}]}}]}}"#,
        )
        .unwrap();
        let inputs = spec.build(&["a".into()]).unwrap().row_inputs();
        let named: Vec<(&str, &str)> = inputs
            .iter()
            .map(|input| (input.name.as_str(), input.column.as_str()))
            .collect();
        assert_eq!(named, [("query", "text"), ("tags", "tags")]);
    }
}
