//! The leakage guard: rows that trained or selected something do not score it unnoticed.
//!
//! A row is itself by its id. A row of another id with an equal text is counted and reported, and
//! refused only where that is asked for: real data holds some texts in train and test alike.

use std::path::Path;

use flowrun_engine::step::{StepContext, StepError};
use flowrun_lm::lineage::{Lineage, Overlap};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::checkpoint::Checkpoint;
use crate::program_file::ProgramFile;
use crate::rows::Row;

/// Ids that an error names; the step's log has all of them.
const NAMED: usize = 20;

/// What happens when rows to be scored had a part in what is scored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LeakageRule {
    /// The same row (by id) is an error; an equal text under another id is reported.
    #[default]
    Refuse,
    /// An equal text under another id is an error too.
    RefuseEqualTexts,
    /// Nothing is an error; scores and report say that the number is not clean.
    Allow,
}

/// Rows as a lineage takes them: id and text.
pub(crate) fn id_and_text(rows: &[Row]) -> impl Iterator<Item = (&str, &str)> {
    rows.iter().map(|row| (row.id.as_str(), row.text.as_str()))
}

/// All that is known of the rows that a program with its checkpoint came from; `None` when one
/// of the two does not say.
pub(crate) fn lineage_of(
    program: &ProgramFile,
    checkpoint: Option<&Checkpoint>,
) -> Option<Lineage> {
    let mut lineage = program.lineage()?.clone();
    if let Some(checkpoint) = checkpoint {
        lineage.merge(checkpoint.lineage.as_ref()?);
    }
    Some(lineage)
}

/// Refuses or reports rows that had a part in `what`.
///
/// # Errors
/// Invalid, naming the rows, as the rule says.
pub(crate) fn guard(
    ctx: &StepContext,
    rule: LeakageRule,
    overlap: &Overlap,
    what: &str,
) -> Result<(), StepError> {
    for (part, ids) in parts(overlap) {
        if !ids.is_empty() {
            ctx.reporter.log(&format!("{part}: {}", ids.join(", ")));
        }
    }
    let by_id = !overlap.trained.is_empty() || !overlap.selected.is_empty();
    let by_text = !overlap.same_text.is_empty();
    let refused = match rule {
        LeakageRule::Refuse => by_id,
        LeakageRule::RefuseEqualTexts => by_id || by_text,
        LeakageRule::Allow => false,
    };
    let found = describe(overlap);
    if refused {
        return Err(StepError::invalid(format!("{what}: {found}")).help(
            "give other rows, or set `leakage: allow` to go on with numbers that are marked as \
             not clean",
        ));
    }
    if by_id || by_text {
        ctx.reporter.warning(&format!("{what}: {found}"));
    }
    Ok(())
}

fn parts(overlap: &Overlap) -> [(&'static str, &[String]); 3] {
    [
        ("trained on", &overlap.trained),
        ("selected by", &overlap.selected),
        ("equal text under another id", &overlap.same_text),
    ]
}

/// `2 rows trained on (`a`, `b`), 1 row selected by (`c`)`.
fn describe(overlap: &Overlap) -> String {
    let part = |(part, ids): (&str, &[String])| {
        let named: Vec<String> = ids.iter().take(NAMED).map(|id| format!("`{id}`")).collect();
        let more = match ids.len().saturating_sub(NAMED) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let rows = if ids.len() == 1 { "row" } else { "rows" };
        let count = ids.len();
        (count > 0).then(|| format!("{count} {rows} {part} ({}{more})", named.join(", ")))
    };
    let parts: Vec<String> = parts(overlap).into_iter().filter_map(part).collect();
    parts.join("; ")
}

/// Reads the lineage that `convert-to-messages` wrote.
///
/// # Errors
/// When it cannot be read.
pub(crate) fn read(path: &Path) -> Result<Lineage, StepError> {
    crate::rows::read_json(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_found_is_named_up_to_a_limit() {
        let overlap = Overlap {
            trained: (0..22).map(|i| format!("d:{i}")).collect(),
            selected: vec!["e".into()],
            same_text: Vec::new(),
        };
        let text = describe(&overlap);
        assert!(text.starts_with("22 rows trained on (`d:0`, "), "{text}");
        assert!(
            text.ends_with("`d:19` and 2 more); 1 row selected by (`e`)"),
            "{text}"
        );
    }
}
