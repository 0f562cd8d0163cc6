//! Whether a server answers the smoke rows as they were answered when scored, and how fast.

use std::fmt;
use std::time::{Duration, Instant};

use flowrun_engine::step::{Cancel, StepError, StepErrorKind};

use super::server::Endpoint;
use crate::bundle::SmokeRow;

/// Hears how many of how many rows are done.
pub(super) type Progress<'a> = &'a dyn Fn(u64, u64);

/// How many rows were answered as before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Agreed {
    /// Answered as before.
    pub right: usize,
    /// Asked.
    pub of: usize,
    /// Of the times of the answers, asked one after the other, the one that 95 % do not exceed
    /// (nearest rank).
    pub p95: Duration,
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
    endpoint: &Endpoint,
    rows: &[SmokeRow],
    agreement: f64,
    cancel: &Cancel,
    progress: Progress<'_>,
) -> Result<Agreed, StepError> {
    let (mut right, mut first) = (0, None);
    let mut times = Vec::with_capacity(rows.len());
    for (done, row) in rows.iter().enumerate() {
        if cancel.is_cancelled() {
            return Err(StepError::cancelled());
        }
        let asked = Instant::now();
        let label = endpoint
            .predict(&row.question())
            .map_err(|why| failed(format!("row `{}` got no answer: {why}", row.id)))?;
        times.push(asked.elapsed());
        if label == row.label {
            right += 1;
        } else {
            first.get_or_insert_with(|| {
                format!("row `{}` is now `{label}`, was `{}`", row.id, row.label)
            });
        }
        progress(done as u64 + 1, rows.len() as u64);
    }
    let agreed = Agreed {
        right,
        of: rows.len(),
        p95: percentile95(times),
    };
    match first {
        Some(first) if (right as f64) < agreement * rows.len() as f64 => Err(failed(format!(
            "{agreed} smoke rows are answered as evaluated: {first}"
        ))),
        _ => Ok(agreed),
    }
}

fn percentile95(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    let rank = (times.len() * 95).div_ceil(100);
    times
        .get(rank.saturating_sub(1))
        .copied()
        .unwrap_or_default()
}

fn failed(text: String) -> StepError {
    let text = format!("the smoke test failed, nothing was deployed: {text}");
    StepError::new(StepErrorKind::Gate, text).help(
        "the model, the program and `sampling` of `deploy` must be those that the scores were \
         measured with",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_95th_percentile_is_by_nearest_rank() {
        let ms = Duration::from_millis;
        assert_eq!(percentile95((1..=20).rev().map(ms).collect()), ms(19));
        assert_eq!(percentile95(vec![ms(3)]), ms(3));
        assert_eq!(percentile95(vec![]), ms(0));
    }
}
