//! What an item of a step reads of the steps before it.

use std::rc::Rc;

use flowrun_cache::{Artifact, OutputRecord, OutputValue};

use super::Expansion;
use super::items::{Bound, Item};
use super::made::{Parting, parted};
use crate::pipeline::Source;
use crate::step::StepError;

impl<F: Fn(&str, &str) -> Option<OutputRecord>> Expansion<'_, F> {
    /// The artifacts of sources; `item` is the one in which they are walked or read.
    pub(super) fn elements(
        &self,
        sources: &[Source],
        item: &Item,
    ) -> Result<Vec<(Artifact, String)>, StepError> {
        let mut all = Vec::new();
        for source in sources {
            match source {
                Source::Output { step, output } => match &self.record(step, output)?.value {
                    OutputValue::One(artifact) => all.push((artifact.clone(), output.clone())),
                    OutputValue::List(items) => {
                        all.extend(items.iter().map(|i| (i.artifact.clone(), i.label.clone())));
                    }
                },
                Source::Sibling {
                    step,
                    output,
                    levels,
                    many,
                } => {
                    let (levels, many) = (*levels, *many);
                    let found = self.of_sibling(step, output, Parting { levels, many }, item)?;
                    if found.is_empty() && !many {
                        return Err(self.not_made(step, output));
                    }
                    all.extend(found);
                }
                Source::Item(var) => all.push(self.artifact_of(var, item)?),
                Source::File(_) => {
                    let text = format!("`{}` can walk outputs of steps only", self.node.name);
                    return Err(StepError::invalid(text));
                }
            }
        }
        Ok(all)
    }

    /// An output of a step that was made.
    pub(super) fn record(&self, step: &str, port: &str) -> Result<Rc<OutputRecord>, StepError> {
        let record = self.made.record(step, port);
        record.ok_or_else(|| self.not_made(step, port))
    }

    /// The artifact that a variable is in an item.
    pub(super) fn artifact_of(
        &self,
        variable: &str,
        item: &Item,
    ) -> Result<(Artifact, String), StepError> {
        match item.binding.get(variable) {
            Some(Bound::Artifact { artifact, label }) => Ok((artifact.clone(), label.clone())),
            _ => Err(StepError::invalid(format!(
                "`{}` needs an artifact, but `item.{variable}` is a value",
                self.node.name
            ))),
        }
    }

    /// What another step of the same walk made for this item.
    pub(super) fn of_sibling(
        &self,
        step: &str,
        output: &str,
        parting: Parting,
        item: &Item,
    ) -> Result<Vec<(Artifact, String)>, StepError> {
        let label = item.label.as_deref().unwrap_or_default();
        let (label, _) = parted(label, parting.levels);
        let made = self.made.of_item(step, output, parting, label);
        made.ok_or_else(|| self.not_made(step, output))
    }

    pub(super) fn not_made(&self, step: &str, port: &str) -> StepError {
        let text = format!(
            "`{}` needs `{step}.{port}`, which was not made",
            self.node.name
        );
        StepError::invalid(text)
    }
}
