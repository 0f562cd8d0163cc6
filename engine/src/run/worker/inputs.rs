//! What a step reads: lent from the store, and looked at again when the step is done.

use std::collections::BTreeMap;
use std::path::Path;

use flowrun_cache::{Artifact, ArtifactKind, Lent};

use super::{Trouble, Worker, broken_or_failed};
use crate::child::let_starts_end;
use crate::lookup::{Inputs, Keyed};
use crate::record::file_name;
use crate::step::{InputArtifact, StepError};

/// Bytes of a label in the name of a list entry.
const ENTRY_NAME: usize = 60;

/// Inputs by port, where a step finds them.
pub(super) type Placed = BTreeMap<String, Vec<InputArtifact>>;

/// An input that a step has.
pub(super) struct Loan {
    port: String,
    artifact: Artifact,
    lent: Lent,
}

/// Where the artifacts of a port are, below the folder of inputs, with their labels.
pub(super) fn names<'a>(
    port: &'a str,
    inputs: &'a Inputs,
) -> impl Iterator<Item = (String, &'a Artifact, &'a str)> {
    // A shell's `*` gives them in order.
    let width = inputs.entries.len().to_string().len().max(4);
    let entries = inputs.entries.iter().enumerate();
    entries.map(move |(i, (artifact, label))| {
        let name = match inputs.list {
            true => format!("{port}/{i:0width$}-{}", file_name(label, ENTRY_NAME)),
            false => port.to_owned(),
        };
        (name, artifact, label.as_str())
    })
}

impl Worker {
    /// Places inputs under `in/<port>`: a list becomes a folder of numbered entries.
    pub(super) fn link_inputs(
        &self,
        keyed: &Keyed,
        in_dir: &Path,
    ) -> Result<(Placed, Vec<Loan>), Trouble> {
        let mut all = BTreeMap::new();
        let mut may_run = false;
        let mut loans = Vec::new();
        for (port, inputs) in &keyed.inputs {
            if inputs.list {
                let place = in_dir.join(port);
                std::fs::create_dir_all(&place).map_err(|e| StepError::io(&place, &e))?;
            }
            let mut linked = Vec::with_capacity(inputs.entries.len());
            for (name, artifact, label) in names(port, inputs) {
                let path = in_dir.join(name);
                let store = self.cache.store();
                let lent = store
                    .link_read_only(artifact, &path)
                    .map_err(|e| broken_or_failed(e, artifact))?;
                may_run |= artifact.executable || artifact.kind == ArtifactKind::Tree;
                loans.push(Loan {
                    port: port.clone(),
                    artifact: artifact.clone(),
                    lent,
                });
                linked.push(InputArtifact {
                    path,
                    digest: artifact.digest,
                    label: label.to_owned(),
                });
            }
            all.insert(port.clone(), linked);
        }
        if may_run {
            let_starts_end();
        }
        Ok((all, loans))
    }

    /// Nobody wrote to the inputs meanwhile: not this step, nor another that has them too.
    pub(super) fn check_lent(&self, loans: &[Loan]) -> Result<(), Trouble> {
        for loan in loans {
            if let Err(error) = loan.lent.check(self.cache.store()) {
                let port = &loan.port;
                let text = format!("the input `{port}` was changed while the step ran");
                let mut trouble = broken_or_failed(error, &loan.artifact);
                trouble.error = StepError::failed(text)
                    .help("inputs are read-only: a command that changes a file copies it first");
                return Err(trouble);
            }
        }
        Ok(())
    }
}
