//! The report of a finished distillation: one page for people, one file for programs.
//!
//! All but `step` knows no step and no store: it turns a [`Report`] into text. Invariants: the page needs no
//! network and runs no script but its own; every text from outside is escaped; every figure on it
//! is in `report.json` or follows from what is; on stand-in data every score says so.

mod chart;
mod data;
mod heat_map;
mod step;
mod svg;
mod view;
mod words;

#[cfg(test)]
mod tests;

pub use data::{
    Comparison, Confusion, CostRow, DataSummary, ErrorRow, LossPoint, OracleAudit, Report, Score,
    StepCost,
};

pub use step::ReportStep;
pub use words::dollars;

/// The page, with all its style inline. Its one script sorts tables; the page's policy names the
/// script by its hash, so text that slipped through unescaped still could not run.
const TEMPLATE: &str = include_str!("../../templates/report.html");

/// Draws the report as one self-contained HTML page.
///
/// # Errors
/// Only when the template and the data disagree, which is a defect of this module.
pub fn render_html(report: &Report) -> Result<String, tera::Error> {
    let mut context = tera::Context::new();
    context.insert("report", report);
    context.insert("view", &view::View::new(report));
    tera::Tera::one_off(TEMPLATE, &context, true)
}
