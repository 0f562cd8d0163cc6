//! Whether a server answers the smoke rows as they were answered when scored.

use std::fmt;

use flowrun_engine::step::{StepContext, StepError, StepErrorKind};

use super::server::Server;
use crate::bundle::Bundle;

/// How many rows were answered as before.
#[derive(Debug, Clone, Copy)]
pub(super) struct Agreed {
    right: usize,
    of: usize,
}

impl fmt::Display for Agreed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.right, self.of)
    }
}

/// Asks row by row.
///
/// # Errors
/// Gate when less than `agreement` of the rows are answered as before, or one is not answered.
pub(super) fn check(
    server: &Server,
    bundle: &Bundle,
    agreement: f64,
    ctx: &StepContext,
) -> Result<Agreed, StepError> {
    let rows = bundle.smoke_rows()?;
    let mut right = 0;
    let mut first = None;
    for (done, row) in rows.iter().enumerate() {
        ctx.check_cancelled()?;
        let label = server
            .predict(&row.text)
            .map_err(|why| failed(format!("row `{}` got no answer: {why}", row.id), server))?;
        if label == row.label {
            right += 1;
        } else {
            first.get_or_insert_with(|| {
                format!("row `{}` is now `{label}`, was `{}`", row.id, row.label)
            });
        }
        let total = rows.len() as u64;
        ctx.reporter
            .progress(done as u64 + 1, total, "rows", "smoke test");
    }
    let agreed = Agreed {
        right,
        of: rows.len(),
    };
    match first {
        Some(first) if (right as f64) < agreement * rows.len() as f64 => {
            let text = format!("{agreed} smoke rows are answered as evaluated: {first}");
            Err(failed(text, server))
        }
        _ => Ok(agreed),
    }
}

fn failed(text: String, server: &Server) -> StepError {
    let text = format!("the smoke test failed, nothing was deployed: {text}");
    let log = server.last_words();
    let text = match log.is_empty() {
        true => text,
        false => format!("{text}; the server's log ends with: {log}"),
    };
    StepError::new(StepErrorKind::Gate, text).help(
        "the model, the program and `sampling` of `deploy` must be those that the scores were \
         measured with",
    )
}
