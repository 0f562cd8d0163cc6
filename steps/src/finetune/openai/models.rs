//! What came of a job: the models that the server keeps, by the step that they were trained to, and
//! the curve of the loss.

use flowrun_engine::step::{StepError, StepOutcome};
use serde_json::Value;

use super::Training;
use super::events::Seen;
use super::shapes::{CheckpointRow, Job, PAGE, Page, failed, read};
use crate::checkpoint::Checkpoint;
use crate::finetune::Params;
use crate::format_version::FormatVersion;
use crate::report::LossPoint;
use crate::rows::write_json;

impl Training<'_> {
    /// The step's outputs.
    pub(super) fn outcome(
        &self,
        params: &Params,
        job: &Job,
        seen: &Seen,
    ) -> Result<StepOutcome, StepError> {
        let rows = self.checkpoints(&job.id)?;
        let models = models(job, rows, params.epochs, seen.total_steps())?;
        Checkpoint::base().save(&self.ctx.output("base"))?;
        let mut labels = Vec::new();
        for model in models {
            let checkpoint = Checkpoint {
                version: FormatVersion,
                name: Checkpoint::name_of(model.epoch, model.step),
                epoch: model.epoch,
                step: model.step,
                adapter: None,
                hosted: Some(model.id),
                // Only the server knows what it tells its template.
                chat_template_kwargs: None,
                lineage: None,
            };
            let to = self.ctx.output_item("checkpoints", &checkpoint.name)?;
            checkpoint.save(&to)?;
            labels.push(checkpoint.name);
        }
        if labels.len() < params.epochs {
            self.ctx.reporter.warning(&format!(
                "the server kept {} checkpoints of {} epochs",
                labels.len(),
                params.epochs
            ));
        }
        let all = seen.total_steps().unwrap_or(0).max(1);
        let losses: Vec<LossPoint> = (seen.losses.iter())
            .map(|(step, loss)| LossPoint {
                step: *step,
                epoch: u32::try_from((step.saturating_sub(1)) * params.epochs as u64 / all)
                    .unwrap_or(u32::MAX),
                loss: *loss,
                validation: None,
            })
            .collect();
        write_json(&self.ctx.output("loss"), &losses)?;
        let last = losses.last();
        let mut outcome = StepOutcome::default()
            .list("checkpoints", labels)
            .metric("job", job.id.as_str())
            .metric("loss", last.map_or(Value::Null, |point| point.loss.into()));
        if let Some(tokens) = job.trained_tokens {
            outcome = outcome.metric("tokens", tokens);
        }
        Ok(outcome)
    }

    fn checkpoints(&self, id: &str) -> Result<Vec<CheckpointRow>, StepError> {
        let mut all: Vec<CheckpointRow> = Vec::new();
        loop {
            let after = all.last().map(|row| row.id.clone());
            let mut query = vec![("limit", PAGE)];
            query.extend(after.as_deref().map(|after| ("after", after)));
            let page = self
                .api
                .get(&["fine_tuning", "jobs", id, "checkpoints"], &query);
            let page: Page<CheckpointRow> = match page {
                Ok(value) => read(value)?,
                // Some servers keep only the last model.
                Err(error) if error.status() == Some(404) => return Ok(all),
                Err(error) => return Err(failed(error)),
            };
            let listed = all.len();
            for row in page.data {
                if !all.iter().any(|known| known.id == row.id) {
                    all.push(row);
                }
            }
            // A server that knows no `after` lists the same again.
            if !page.has_more || all.len() == listed {
                return Ok(all);
            }
        }
    }
}

/// A model that came of a training.
#[derive(Debug, PartialEq, Eq)]
struct Model {
    id: String,
    epoch: usize,
    step: usize,
}

/// The checkpoints and the last model, by step. Where the last model is listed too, it is one.
fn models(
    job: &Job,
    mut rows: Vec<CheckpointRow>,
    epochs: usize,
    total_steps: Option<u64>,
) -> Result<Vec<Model>, StepError> {
    let last = job.fine_tuned_model.clone();
    let last = last.ok_or_else(|| {
        StepError::failed(format!(
            "the job {} succeeded without naming its model",
            job.id
        ))
    })?;
    rows.sort_by_key(|row| row.step_number);
    let listed = rows.last().map_or(0, |row| row.step_number);
    let total = total_steps.unwrap_or(listed).max(listed).max(1);
    if listed == total {
        // Its own name outlives that of a checkpoint.
        rows.pop();
    }
    let epoch = |step: u64| {
        let epoch = (step as f64 * epochs as f64 / total as f64).round() as usize;
        epoch.max(1)
    };
    let mut models: Vec<Model> = (rows.into_iter())
        .map(|row| Model {
            id: row.fine_tuned_model_checkpoint,
            epoch: epoch(row.step_number),
            step: row.step_number as usize,
        })
        .collect();
    models.push(Model {
        id: last,
        epoch: epochs,
        step: total as usize,
    });
    Ok(models)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    fn job(model: Option<&str>) -> Job {
        let job = json!({"id": "j", "status": "succeeded", "fine_tuned_model": model});
        serde_json::from_value(job).unwrap()
    }

    fn rows(steps: &[u64]) -> Vec<CheckpointRow> {
        let row = |step: &u64| CheckpointRow {
            id: format!("c{step}"),
            fine_tuned_model_checkpoint: format!("m:ckpt-step-{step}"),
            step_number: *step,
        };
        steps.iter().map(row).collect()
    }

    fn named(models: &[Model]) -> Vec<(&str, usize, usize)> {
        let name = |model: &Model| (model.epoch, model.step);
        models
            .iter()
            .map(|model| (model.id.as_str(), name(model).0, name(model).1))
            .collect()
    }

    #[test]
    fn the_last_model_is_one_with_its_checkpoint() {
        let found = models(&job(Some("m")), rows(&[30, 10, 20]), 3, Some(30)).unwrap();
        let expected = [
            ("m:ckpt-step-10", 1, 10),
            ("m:ckpt-step-20", 2, 20),
            ("m", 3, 30),
        ];
        assert_eq!(named(&found), expected);
    }

    #[test]
    fn a_server_may_list_only_the_later_ones_or_none() {
        let found = models(&job(Some("m")), rows(&[20]), 3, Some(30)).unwrap();
        assert_eq!(named(&found), [("m:ckpt-step-20", 2, 20), ("m", 3, 30)]);
        let found = models(&job(Some("m")), vec![], 3, None).unwrap();
        assert_eq!(named(&found), [("m", 3, 1)]);
        assert!(models(&job(None), vec![], 3, None).is_err());
    }

    #[test]
    fn a_checkpoint_before_the_last_step_is_none_of_the_last() {
        let found = models(&job(Some("m")), rows(&[20]), 3, Some(30)).unwrap();
        assert_eq!(named(&found), [("m:ckpt-step-20", 2, 20), ("m", 3, 30)]);
        let found = models(&job(Some("m")), rows(&[10, 30]), 3, Some(30)).unwrap();
        assert_eq!(named(&found), [("m:ckpt-step-10", 1, 10), ("m", 3, 30)]);
    }
}
