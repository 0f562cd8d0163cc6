//! [`Finding`]: what a vocabulary has against steps that are right each by itself and do not go
//! together. The engine gives it its place in the file, and does not know what it is about.

use crate::pipeline::StepNode;

/// How certain it is that something goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// A run would fail: there is none.
    Error,
    /// A run may fail, which depends on what the pipeline does not say.
    Warning,
}

impl Severity {
    /// The word for people.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
        }
    }
}

/// Something that is wrong, or may be, with a step among the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How certain it is.
    pub severity: Severity,
    /// The step's name.
    pub step: String,
    /// The field of the step that says it (`with`, `lora`, `rank`); of what is not written, the
    /// nearest thing around it is shown.
    pub path: Vec<String>,
    /// Stable name of the kind of finding.
    pub code: &'static str,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub help: String,
}

/// Looks at all steps of a pipeline, in their order; each of them passed the engine's own checks.
pub type WholeCheck = fn(&[StepNode]) -> Vec<Finding>;
