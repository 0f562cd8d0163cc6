//! [`Predictor`]: one prompting step: a signature, the adapter that writes it, its
//! demos, and where its inputs come from. Makes requests and reads answers;
//! never calls a model.

use crate::adapter::{Adapter, FormatError};
use crate::example::{Demo, Example};
use crate::lm::{Request, Sampling};
use crate::metric::sanitize_label;
use crate::program::Neighbours;
use crate::signature::Signature;
use crate::value::{Fields, Value};
use std::collections::BTreeMap;
use std::sync::Arc;

/// How an output that holds a label is treated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelRule {
    /// Name of the output.
    pub field: String,
    /// The known labels; may be empty.
    pub labels: Vec<String>,
    /// Whether to ask the model to answer with one of them and nothing else.
    pub constrain: bool,
}

impl LabelRule {
    /// The known label that is spelled so, or so but for case and spaces; else what the notebook's
    /// sanitiser makes of the text.
    fn meant(&self, text: &str) -> String {
        if self.labels.iter().any(|label| label == text) {
            return text.to_owned();
        }
        let tidy = sanitize_label(text);
        let known = self.labels.iter().find(|l| sanitize_label(l) == tidy);
        known.cloned().unwrap_or(tidy)
    }

    /// The probability of a label, by those of all in their order.
    pub fn probability(&self, label: &str, probs: &[f32]) -> Option<f32> {
        let place = self.labels.iter().position(|known| known == label)?;
        probs.get(place).copied()
    }
}

/// One prompting step.
#[derive(Debug, Clone)]
pub struct Predictor {
    /// Names it in traces and saved programs.
    pub name: String,
    /// What it takes and gives.
    pub signature: Signature,
    /// How it is written.
    pub adapter: Arc<dyn Adapter>,
    /// Input name → the row's column that it is taken from; an input not listed has the
    /// column's name.
    pub sources: BTreeMap<String, String>,
    /// The output that holds a label, if any.
    pub label: Option<LabelRule>,
    /// Worked examples, in order.
    pub demos: Vec<Demo>,
    /// Where further ones are chosen for each query.
    pub neighbours: Option<Neighbours>,
}

impl Predictor {
    /// A step without demos whose inputs have the names of the row's columns.
    pub fn new(name: impl Into<String>, signature: Signature, adapter: Arc<dyn Adapter>) -> Self {
        Self {
            name: name.into(),
            signature,
            adapter,
            sources: BTreeMap::new(),
            label: None,
            demos: Vec::new(),
            neighbours: None,
        }
    }

    /// Its inputs among the values that there are; those that are missing are left out.
    pub fn inputs(&self, available: &Fields) -> Fields {
        let of = |name: &str| {
            let column = self.sources.get(name).map_or(name, String::as_str);
            available
                .get(column)
                .map(|value| (name.to_owned(), value.clone()))
        };
        self.signature
            .inputs
            .iter()
            .filter_map(|field| of(&field.name))
            .collect()
    }

    /// The row as a demo by the names of the predictor's fields; `None` when it has no input or no
    /// output of it.
    pub fn labelled(&self, row: &Example) -> Option<Demo> {
        let mut fields = self.inputs(&row.fields);
        let given = fields.len();
        for field in &self.signature.outputs {
            if let Some(value) = row.fields.get(&field.name) {
                fields.insert(field.name.clone(), value.clone());
            }
        }
        (given > 0 && fields.len() > given).then_some(Demo {
            augmented: false,
            fields,
        })
    }

    /// The demos as the adapter is to see them, without those equal to the row `but`.
    pub(crate) fn demos_but(&self, but: Option<&Example>) -> Vec<Demo> {
        self.shown(&[], but)
    }

    /// Its own demos, then those chosen for the query.
    fn shown(&self, near: &[Demo], but: Option<&Example>) -> Vec<Demo> {
        // Demos chosen for the query bear the names of the predictor's fields.
        let own = but.and_then(|row| self.labelled(row));
        let near = near.iter().filter(|demo| own.as_ref() != Some(*demo));
        let all = self.demos.iter().chain(near);
        let kept = all.filter(|demo| !but.is_some_and(|row| demo.is(row)));
        if !self.adapter.maps_columns() {
            return kept.cloned().collect();
        }
        kept.map(|demo| {
            let mut demo = demo.clone();
            for (name, value) in self.inputs(&demo.fields) {
                demo.fields.entry(name).or_insert(value);
            }
            demo
        })
        .collect()
    }

    /// The call that answers these inputs with the demos `near` to them, written by `adapter` (its own, or its fallback).
    ///
    /// # Errors
    /// When an input is missing or cannot be written.
    pub fn request(
        &self,
        adapter: &dyn Adapter,
        inputs: &Fields,
        sampling: &Sampling,
        near: &[Demo],
        but: Option<&Example>,
    ) -> Result<Request, FormatError> {
        let messages = adapter.format(&self.signature, &self.shown(near, but), inputs)?;
        let choices = self
            .label
            .as_ref()
            .filter(|rule| rule.constrain && !rule.labels.is_empty())
            .map(|rule| adapter.choices(&self.signature, rule.labels.clone()));
        Ok(Request {
            messages,
            sampling: sampling.clone(),
            choices,
        })
    }

    /// The outputs with the label sanitised: as it stands in the list, where it is meant by it.
    pub fn sanitized(&self, outputs: &Fields) -> Fields {
        let mut outputs = outputs.clone();
        if let Some(rule) = &self.label
            && let Some(Value::Str(label)) = outputs.get_mut(&rule.field)
        {
            *label = rule.meant(label);
        }
        outputs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_is_given_back_as_the_list_spells_it() {
        let rule = LabelRule {
            field: "label".to_owned(),
            labels: ["Lost card", "POSITIVE", "pin"].map(str::to_owned).into(),
            constrain: true,
        };
        for (said, meant) in [
            ("Lost card", "Lost card"),
            (" lost_Card\n", "Lost card"),
            ("Positive", "POSITIVE"),
            ("pin", "pin"),
            ("New Card", "new_card"),
        ] {
            assert_eq!(rule.meant(said), meant);
        }
        assert_eq!(rule.probability("pin", &[0.2, 0.3, 0.5]), Some(0.5));
        assert_eq!(rule.probability("other", &[0.2, 0.3, 0.5]), None);
    }
}
