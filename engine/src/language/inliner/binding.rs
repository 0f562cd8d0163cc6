//! [`Bindings`]: what the params of a definition are in one use of it.

use serde_json::{Map, Value};

use super::Inliner;
use crate::language::draft::is_port_name;
use crate::language::expr::{holds_expression, unescaped};
use crate::language::node::{Data, Entry, Node};
use crate::language::overlay::fits;
use crate::language::resolution::forbid;
use crate::language::source_map::Span;
use crate::language::suggest;

/// What the params of a definition are in one use.
#[derive(Default)]
pub(super) struct Bindings {
    /// Those that are known.
    pub(super) known: Map<String, Value>,
    /// Those that differ from item to item: the param, the variable that holds it, its value.
    pub(super) waiting: Vec<(String, String, Value)>,
}

impl Inliner<'_> {
    /// The params of the definition, as this use has them.
    pub(super) fn bind(&mut self, entry: &Entry, path: &str, at: Span, tree: &Node) -> Bindings {
        let mut bindings = Bindings::default();
        let with = entry.value.get("with");
        let walked = !self.walked.is_empty();
        let number = self.bound;
        self.bound += 1;
        for (index, (name, default)) in tree.entries("params").enumerate() {
            forbid(self.map, &default.value);
            let given = with.and_then(|w| w.entry(name));
            let value = given.map(|given| given.value.to_value());
            if let Some(value) = value.as_ref().filter(|v| walked && holds_expression(v)) {
                let variable = variable(number, index, name);
                bindings
                    .waiting
                    .push((name.clone(), variable, value.clone()));
                continue;
            }
            match given {
                Some(given) => self.check_param(name, default, given),
                None if default.value.data == Data::Null => {
                    let place = with.map_or(at, |_| entry.value.place(&["with".into()], true, at));
                    let message = format!("`{path}` needs the param `{name}`");
                    self.report(place, "missing-field", message, None);
                }
                None => {}
            }
            let value = match value {
                // It was to be read once more, as what waits is.
                Some(value) if walked => unescaped(value),
                Some(value) => value,
                None => default.value.to_value(),
            };
            bindings.known.insert(name.clone(), value);
        }
        let params = || tree.entries("params").map(|(name, _)| name.as_str());
        for (name, given) in entry.value.entries("with") {
            if !params().any(|param| param == name) {
                let help = suggest::help(name, "its params", params());
                let message = format!("`{path}` has no param `{name}`");
                self.report(given.key, "unknown-param", message, help);
            }
        }
        bindings
    }

    fn check_param(&mut self, name: &str, default: &Entry, given: &Entry) {
        if let Err(message) = fits(name, &default.value.data, &given.value.data) {
            let at = if given.value.is_container() {
                given.key
            } else {
                given.value.span
            };
            self.report(at, "param-type", message, None);
        }
    }
}

/// The variable of `item` for a param of the use of this number: no `foreach` can have one of that
/// name, and no other use has, since conditions that name it are handed to the steps of others.
fn variable(number: usize, index: usize, param: &str) -> String {
    if is_port_name(param) {
        format!("_{number}_{param}")
    } else {
        format!("_{number}_{index}")
    }
}
