//! [`Estimate`]: what a step that would run is likely to cost, as its kind works it out for a plan.
//!
//! Knows no step kind and no price. Invariant: nothing runs, is fetched or is written for it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use flowrun_cache::CompletionCache;
use serde::Serialize;
use serde_json::Value;

/// What is known of a step before it runs.
pub struct Foresight<'a> {
    /// Its params; while it waits for others, `${{ item }}` may be left in them.
    pub params: &'a Value,
    /// The file of every artifact that it would read, by port; `None` while one is not known, or
    /// is a folder.
    pub inputs: Option<&'a BTreeMap<String, Vec<PathBuf>>>,
    /// The answers that are kept.
    pub completions: &'a dyn Fn() -> Arc<CompletionCache>,
    /// What the nearest earlier result of the step measured.
    pub earlier: Option<&'a BTreeMap<String, Value>>,
}

impl Foresight<'_> {
    /// The one file of a port.
    #[must_use]
    pub fn input(&self, port: &str) -> Option<&PathBuf> {
        self.inputs?.get(port)?.first()
    }
}

/// What a step is likely to cost.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Estimate {
    /// What it would use, in words.
    pub uses: String,
    /// US dollars, likely.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usd: Option<f64>,
    /// US dollars that its requests cannot exceed, each of them sent once: a try whose answer was
    /// lost may be charged again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usd_at_most: Option<f64>,
    /// It costs money, but nobody can say how much.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub unknown: bool,
}

/// The sum of estimates.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct TotalEstimate {
    /// US dollars, likely; none where it is not known of a step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usd: Option<f64>,
    /// US dollars that are not exceeded in that sense; none where a step has no bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usd_at_most: Option<f64>,
    /// The steps of which nothing is known, and which are in neither sum.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unknown: Vec<String>,
}

impl TotalEstimate {
    /// Of the steps that have one; `None` when none costs money.
    pub(crate) fn of<'a>(all: impl Iterator<Item = (&'a str, &'a Estimate)>) -> Option<Self> {
        let mut unknown: Vec<String> = Vec::new();
        let mut known: Option<(Option<f64>, Option<f64>)> = None;
        let plus = |a: Option<f64>, b: Option<f64>| a.zip(b).map(|(a, b)| a + b);
        for (step, estimate) in all {
            if estimate.unknown {
                if unknown.last().is_none_or(|last| last != step) {
                    unknown.push(step.to_owned());
                }
            } else if estimate.usd.or(estimate.usd_at_most).is_some() {
                let (usd, most) = known.unwrap_or((Some(0.0), Some(0.0)));
                known = Some((plus(usd, estimate.usd), plus(most, estimate.usd_at_most)));
            }
        }
        if known.is_none() && unknown.is_empty() {
            return None;
        }
        let (usd, usd_at_most) = known.unwrap_or_default();
        Some(Self {
            usd,
            usd_at_most,
            unknown,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(usd: Option<f64>, usd_at_most: Option<f64>) -> Estimate {
        Estimate {
            usd,
            usd_at_most,
            ..Estimate::default()
        }
    }

    #[test]
    fn a_sum_is_only_of_what_is_known() {
        let unknown = Estimate {
            unknown: true,
            ..Estimate::default()
        };
        let (both, bound) = (cost(Some(1.0), Some(3.0)), cost(None, Some(2.0)));
        let free = cost(None, None);
        let of = |all: &[(&'static str, &Estimate)]| TotalEstimate::of(all.iter().copied());
        assert_eq!(of(&[("a", &free)]), None);
        let total = |usd, usd_at_most, unknown: &[&str]| {
            Some(TotalEstimate {
                usd,
                usd_at_most,
                unknown: unknown.iter().map(|step| (*step).to_owned()).collect(),
            })
        };
        let sum = of(&[("a", &both), ("b", &both), ("c", &free)]);
        assert_eq!(sum, total(Some(2.0), Some(6.0), &[]));
        let sum = of(&[
            ("a", &both),
            ("b", &bound),
            ("c", &unknown),
            ("c", &unknown),
        ]);
        assert_eq!(sum, total(None, Some(5.0), &["c"]));
        assert_eq!(of(&[("c", &unknown)]), total(None, None, &["c"]));
    }
}
