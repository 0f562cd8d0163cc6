//! The job systems that a step's `runner` may name: one file each, and [`registry`], the visible
//! list of them.

mod kubernetes;
mod ray;
mod slurm;

use std::collections::BTreeMap;
use std::sync::Arc;

use flowrun_engine::runner::JobKind;

/// Every job system by name.
#[must_use]
pub fn registry() -> BTreeMap<String, Arc<dyn JobKind>> {
    let kinds: Vec<Arc<dyn JobKind>> = vec![
        Arc::new(kubernetes::Kubernetes),
        Arc::new(ray::Ray),
        Arc::new(slurm::Slurm),
    ];
    kinds
        .into_iter()
        .map(|kind| (kind.name().to_owned(), kind))
        .collect()
}
