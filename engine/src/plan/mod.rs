//! [`plan`]: what a run would do, and why. Reads the cache without its lock,
//! runs nothing, fetches nothing and writes nothing.
//!
//! A step is known only when everything before it is fresh: behind a stale
//! step it is pending, because that step may make the same bytes again.
//!
//! What a fresh step publishes is looked at as a run looks at it. Files that a run with nothing to do
//! has hashed, and that were left alone since, are not read; folders are read whole.

mod planner;

use serde::Serialize;

use crate::estimate::{Estimate, TotalEstimate};
use crate::why::Reason;

pub use self::planner::plan;

/// What a run would do, in topological order.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// The steps that take part.
    pub steps: Vec<PlannedStep>,
    /// What they are likely to cost, where one costs money and estimates were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost: Option<TotalEstimate>,
}

/// One step of a plan.
#[derive(Debug, Clone, Serialize)]
pub struct PlannedStep {
    /// Step name.
    pub step: String,
    /// Step kind; `run` for shell steps.
    pub kind: String,
    /// Its items by id, where they are known. A step without `foreach` has one.
    pub items: Vec<PlannedItem>,
    /// Fresh when all items are; stale when one is; else unknown.
    pub status: PlanStatus,
    /// What it is likely to cost while its items are not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub estimate: Option<Estimate>,
}

impl PlannedStep {
    /// What would be published though the step does not run.
    pub fn to_publish(&self) -> impl Iterator<Item = &PlannedPublish> {
        self.items.iter().flat_map(|item| &item.publish)
    }

    /// Its estimates, of its items or of the step as a whole.
    pub fn estimates(&self) -> impl Iterator<Item = &Estimate> {
        let items = self.items.iter().filter_map(|item| item.estimate.as_ref());
        items.chain(&self.estimate)
    }
}

/// One action of a planned step.
#[derive(Debug, Clone, Serialize)]
pub struct PlannedItem {
    /// Step id: `evaluate[epoch-2]`.
    pub id: String,
    /// Action key, hex; empty when it cannot be known.
    pub key: String,
    /// Whether it would run.
    pub status: PlanStatus,
    /// What would be published though it does not run: outputs that are not in the project as they
    /// are in the cache. What an action that would run publishes is known only then.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub publish: Vec<PlannedPublish>,
    /// What it is likely to cost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub estimate: Option<Estimate>,
}

/// A file or folder that a run would put into the project without running its step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlannedPublish {
    /// Its path, relative to the project.
    pub path: String,
    /// What lies there now.
    pub found: OutOfPlace,
}

/// What lies where an output is to be published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OutOfPlace {
    /// Nothing.
    Missing,
    /// Something else.
    Changed,
}

impl OutOfPlace {
    /// `missing` or `changed`.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Changed => "changed",
        }
    }
}

/// Whether something would run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "status", rename_all = "kebab-case")]
pub enum PlanStatus {
    /// Its result is in the cache.
    Fresh,
    /// It would run.
    Stale {
        /// Why, on one line.
        why: String,
        /// The same, one line for each thing that changed.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        changes: Vec<String>,
        /// The run that it was compared with, where it was compared.
        #[serde(skip_serializing_if = "Option::is_none")]
        against: Option<String>,
    },
    /// Not known until the steps before it ran.
    Pending {
        /// Which they are.
        why: String,
        /// Their names.
        after: Vec<String>,
    },
    /// Not known until a run has looked at something that is not on this machine: a plan fetches
    /// nothing.
    Unknown {
        /// What that is.
        why: String,
    },
    /// It would not run: its `when` is false, or it needs a step that would not run.
    Skipped {
        /// Why.
        why: String,
    },
}

impl PlanStatus {
    /// Why it would run, would not, or is not known yet.
    #[must_use]
    pub fn why(&self) -> &str {
        match self {
            Self::Fresh => "nothing changed",
            Self::Stale { why, .. }
            | Self::Pending { why, .. }
            | Self::Unknown { why }
            | Self::Skipped { why } => why,
        }
    }

    /// It would run.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        matches!(self, Self::Stale { .. })
    }

    /// It would run, for a reason that compares nothing.
    fn stale(why: String) -> Self {
        Self::Stale {
            why,
            changes: Vec::new(),
            against: None,
        }
    }

    fn because(reason: Reason) -> Self {
        Self::Stale {
            why: reason.text(),
            changes: reason.lines,
            against: reason.against,
        }
    }
}

impl Plan {
    /// A step by its name, or by the id of one of its items.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&PlannedStep> {
        let by_name = self.steps.iter().find(|s| s.step == name);
        by_name.or_else(|| {
            let has_item = |s: &&PlannedStep| s.items.iter().any(|i| i.id == name);
            self.steps.iter().find(has_item)
        })
    }

    /// The steps that a name stands for: a step, one of its items, or a use of a step definition.
    #[must_use]
    pub fn named(&self, name: &str) -> Vec<&PlannedStep> {
        if let Some(step) = self.find(name) {
            return vec![step];
        }
        let prefix = format!("{name}/");
        let inside = |s: &&PlannedStep| s.step.starts_with(&prefix);
        self.steps.iter().filter(inside).collect()
    }

    /// What would be published though no step that made it runs.
    pub fn to_publish(&self) -> impl Iterator<Item = &PlannedPublish> {
        self.steps.iter().flat_map(PlannedStep::to_publish)
    }

    /// A run would do nothing: no step would run, and all that is published is in its place.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.is_fresh() && self.to_publish().next().is_none()
    }

    /// Nothing would run.
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        self.steps
            .iter()
            .all(|s| matches!(s.status, PlanStatus::Fresh | PlanStatus::Skipped { .. }))
    }
}

/// Whether a plan says what its steps are likely to cost: that reads their inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Costs {
    /// It does.
    Estimated,
    /// It does not.
    Left,
}
