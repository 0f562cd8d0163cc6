//! The leakage guard: rows that trained or selected something do not score it unnoticed.
//!
//! A row is itself by its id. A row of another id with an equal text is counted and reported, and
//! refused only where that is asked for: real data holds some texts in train and test alike.
//!
//! Influence goes through teachers: a row that a teacher labelled bears its mark, and what is made
//! from such rows, or chosen by them, counts the rows that the teacher came from as its own.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use flowrun_cache::Digest;
use flowrun_engine::step::{Port, StepContext, StepError};
use flowrun_lm::lineage::{Lineage, Overlap, ScoredRow};
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

/// Rows as they are scored.
pub(crate) fn scored_rows(rows: &[Row]) -> impl Iterator<Item = ScoredRow<'_>> {
    rows.iter().map(|row| ScoredRow {
        id: &row.id,
        text: &row.text,
        by_teacher: row.teacher.is_some(),
    })
}

/// Digits of a teacher's mark.
const MARK: usize = 16;

/// The mark on rows that a teacher labels: the first digits of its program's digest.
///
/// # Errors
/// When its file cannot be read.
pub(crate) fn mark(teacher: &Path) -> Result<String, StepError> {
    let digest = Digest::of_file(teacher).map_err(|e| StepError::io(teacher, &e))?;
    Ok(digest.to_hex().chars().take(MARK).collect())
}

/// The port for the teachers of a step's rows.
pub(crate) fn teachers_port() -> Port {
    Port::new(
        "teachers",
        "program",
        "The teachers that labelled the rows: what they came from counts as taken part.",
    )
    .many()
    .optional()
}

/// Adds what the teachers of `rows` came from, by the programs of the port `teachers`. Of one that
/// is not there it is said that its rows are not known.
///
/// # Errors
/// When a program cannot be read.
pub(crate) fn learn_from_teachers(
    ctx: &StepContext,
    lineage: &mut Lineage,
    rows: &[Row],
) -> Result<(), StepError> {
    let marks = rows.iter().filter_map(|row| row.teacher.clone()).collect();
    learn_from_marked(ctx, lineage, &marks)
}

/// The same for rows that bear these marks.
///
/// # Errors
/// When a program cannot be read.
pub(crate) fn learn_from_marked(
    ctx: &StepContext,
    lineage: &mut Lineage,
    marks: &BTreeSet<String>,
) -> Result<(), StepError> {
    if marks.is_empty() {
        return Ok(());
    }
    let mut given = BTreeMap::new();
    for input in ctx.input_list("teachers") {
        given.insert(mark(&input.path)?, ProgramFile::load(&input.path)?);
    }
    for mark in marks {
        match given.get(mark).map(ProgramFile::lineage) {
            Some(Some(teacher)) => lineage.learn_from(teacher),
            Some(None) => {
                ctx.reporter.warning(
                    "rows bear the labels of a teacher of which it is not known what trained it: \
                     scores cannot say whether their rows taught it; where a `finetune` trained \
                     it, give that its `lineage`",
                );
                lineage.learn_from_unknown(mark.as_str());
            }
            None => {
                ctx.reporter.warning(
                    "rows bear the labels of a teacher that `teachers` does not give: scores \
                     cannot say whether their rows taught it; connect it, such as \
                     `teachers: bootstrap.teacher`",
                );
                lineage.learn_from_unknown(mark.as_str());
            }
        }
    }
    Ok(())
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
    let by_id =
        !(overlap.trained.is_empty() && overlap.selected.is_empty() && overlap.taught.is_empty());
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

fn parts(overlap: &Overlap) -> [(&'static str, &[String]); 4] {
    [
        ("trained on", &overlap.trained),
        ("selected by", &overlap.selected),
        ("known to its teacher", &overlap.taught),
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
            ..Overlap::default()
        };
        let text = describe(&overlap);
        assert!(text.starts_with("22 rows trained on (`d:0`, "), "{text}");
        assert!(
            text.ends_with("`d:19` and 2 more); 1 row selected by (`e`)"),
            "{text}"
        );
    }
}
