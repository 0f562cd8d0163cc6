//! The model card: what the bundle is, how good it was measured to be, and how to use it.

use flowrun_engine::step::StepError;
use flowrun_lm::stats::wilson95;

use super::Manifest;
use crate::program_file::ProgramFile;
use crate::scores::Leakage;

const TEMPLATE: &str = include_str!("../../templates/model_card.md");

pub(super) fn render(
    manifest: &Manifest,
    program: &ProgramFile,
    leakage: Option<&Leakage>,
) -> Result<String, StepError> {
    let measured = &manifest.measured;
    let (low, high) = wilson95(measured.correct, measured.n);
    let percent = |share: f64| format!("{:.1}", share * 100.0);
    let mut context = tera::Context::new();
    context.insert("manifest", manifest);
    context.insert("accuracy", &percent(measured.accuracy));
    context.insert("low", &percent(low));
    context.insert("high", &percent(high));
    context.insert("labels", program.labels());
    context.insert("known", &leakage.is_some_and(|leakage| leakage.known));
    context.insert("clean", &leakage.is_some_and(Leakage::is_clean));
    context.insert(
        "base",
        &manifest.model.as_ref().map(crate::models::ModelSpec::name),
    );
    tera::Tera::one_off(TEMPLATE, &context, false)
        .map_err(|e| StepError::failed(format!("the model card: {e}")))
}
