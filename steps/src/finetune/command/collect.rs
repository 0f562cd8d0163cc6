//! What the Trainer of Hugging Face's `transformers` leaves behind: `checkpoint-<step>` folders
//! with an adapter and a `trainer_state.json` each, and a line for each report on its output.

use std::path::{Path, PathBuf};

use flowrun_engine::step::StepError;
use serde::Deserialize;

use crate::checkpoint::{ADAPTER_CONFIG, ADAPTER_VALUES};
use crate::report::LossPoint;
use crate::rows::read_json;

/// The files of an adapter.
pub(super) const FILES: [&str; 2] = [ADAPTER_CONFIG, ADAPTER_VALUES];
const STATE: &str = "trainer_state.json";
const CHECKPOINT: &str = "checkpoint-";

/// What a finished training left.
pub(super) struct Collected {
    /// By step; never empty.
    pub(super) checkpoints: Vec<Found>,
    /// By step.
    pub(super) losses: Vec<LossPoint>,
}

impl Collected {
    /// Optimizer steps in all.
    pub(super) fn steps(&self) -> usize {
        self.checkpoints.last().map_or(0, |found| found.step)
    }
}

/// A checkpoint.
pub(super) struct Found {
    pub(super) folder: PathBuf,
    pub(super) epoch: usize,
    pub(super) step: usize,
}

/// The part of `trainer_state.json` that is read.
#[derive(Deserialize)]
struct State {
    epoch: f64,
    log_history: Vec<Report>,
}

/// One report of a training; other reports have no loss.
#[derive(Deserialize)]
struct Report {
    step: u64,
    #[serde(default)]
    epoch: f64,
    #[serde(default)]
    loss: Option<f64>,
}

/// Takes stock of `out`.
///
/// # Errors
/// Failed when there is no checkpoint, or one cannot be read.
pub(super) fn collect(out: &Path, program: &str) -> Result<Collected, StepError> {
    let folders = checkpoints(out);
    let Some((_, last)) = folders.last() else {
        return Err(StepError::failed(format!(
            "{program} ended well and left no `{CHECKPOINT}<step>` with an adapter"
        ))
        .help("its output is in the step's log; `backend.command.config` must not change where or when it saves"));
    };
    let state: State = read_json(&last.join(STATE))?;
    let losses = state.log_history.iter().filter_map(point).collect();
    let found = |(step, folder): &(usize, PathBuf)| {
        let state: State = read_json(&folder.join(STATE))?;
        Ok(Found {
            folder: folder.clone(),
            // Not exact where the last batch of an epoch is short.
            epoch: state.epoch.round() as usize,
            step: *step,
        })
    };
    let checkpoints = folders.iter().map(found);
    Ok(Collected {
        checkpoints: checkpoints.collect::<Result<_, StepError>>()?,
        losses,
    })
}

/// The folder of the last whole checkpoint.
pub(super) fn last_checkpoint(out: &Path) -> Option<PathBuf> {
    checkpoints(out).pop().map(|(_, folder)| folder)
}

/// The folders with an adapter, by step.
fn checkpoints(out: &Path) -> Vec<(usize, PathBuf)> {
    let entries = std::fs::read_dir(out).into_iter().flatten().flatten();
    let folder = |path: PathBuf| {
        let name = path.file_name()?.to_str()?;
        let step = name.strip_prefix(CHECKPOINT)?.parse().ok()?;
        let whole = FILES
            .iter()
            .chain([&STATE])
            .all(|file| path.join(file).is_file());
        whole.then_some((step, path))
    };
    let mut found: Vec<_> = entries.filter_map(|entry| folder(entry.path())).collect();
    found.sort();
    found
}

fn point(report: &Report) -> Option<LossPoint> {
    Some(LossPoint {
        step: report.step,
        // The last report of an epoch has its whole number.
        epoch: (report.epoch.ceil() as u32).saturating_sub(1),
        loss: report.loss?,
        validation: None,
    })
}

/// Steps done and a text for people, from a report on the output:
/// `{'loss': 1.25, 'grad_norm': 0.5, 'learning_rate': 0.001, 'epoch': 0.5}`. The step is not in
/// it, so it is worked out from the epoch.
pub(super) fn progress(line: &str, epochs: usize, steps: usize) -> Option<(u64, String)> {
    let loss = number(line, "loss")?;
    let epoch = number(line, "epoch")?;
    let done = epoch / epochs.max(1) as f64 * steps as f64;
    let text = format!("epoch {}, loss {loss:.4}", epoch.ceil());
    Some((done.round() as u64, text))
}

/// The value of a key of a Python dict as it prints; newer versions print numbers as strings.
fn number(line: &str, key: &str) -> Option<f64> {
    let (_, rest) = line.split_once(&format!("'{key}':"))?;
    let end = rest.find([',', '}'])?;
    rest[..end].trim().trim_matches('\'').parse().ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn reports_of_old_and_new_versions_are_read() {
        let old = "{'loss': 1.25, 'grad_norm': 0.5, 'epoch': 0.5}";
        let new = "{'loss': '1.25', 'grad_norm': '0.5', 'epoch': '0.5'}\r";
        for line in [old, new] {
            let (step, text) = progress(line, 2, 8).unwrap();
            assert_eq!((step, text.as_str()), (2, "epoch 1, loss 1.2500"));
        }
        for line in ["", "{'train_runtime': 3.0, 'epoch': 2.0}", "'loss': 1"] {
            assert!(progress(line, 2, 8).is_none(), "{line}");
        }
    }

    #[test]
    fn checkpoints_come_by_step_and_only_whole() {
        let dir = tempfile::tempdir().unwrap();
        let make = |step: usize, epoch: f64, files: &[&str]| {
            let folder = dir.path().join(format!("checkpoint-{step}"));
            std::fs::create_dir_all(&folder).unwrap();
            let state = format!(
                r#"{{"epoch": {epoch}, "log_history": [
                    {{"step": 9, "epoch": 0.9, "loss": 2.0, "grad_norm": 1}},
                    {{"step": {step}, "epoch": {epoch}, "loss": 1.0}},
                    {{"step": {step}, "epoch": {epoch}, "train_runtime": 3}}]}}"#
            );
            for file in files {
                std::fs::write(folder.join(file), &state).unwrap();
            }
        };
        assert!(collect(dir.path(), "TRL").is_err());
        let all = [FILES[0], FILES[1], STATE];
        make(20, 2.0, &all);
        make(10, 1.0, &all);
        make(30, 3.0, &[FILES[0], STATE]);
        let found = collect(dir.path(), "TRL").unwrap();
        let steps: Vec<_> = found
            .checkpoints
            .iter()
            .map(|c| (c.step, c.epoch))
            .collect();
        assert_eq!(steps, [(10, 1), (20, 2)]);
        let losses: Vec<_> = found.losses.iter().map(|p| (p.step, p.epoch)).collect();
        assert_eq!(losses, [(9, 0), (20, 1)]);
        assert!(
            last_checkpoint(dir.path())
                .unwrap()
                .ends_with("checkpoint-20")
        );
    }
}
