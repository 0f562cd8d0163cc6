//! Makes a plan: looks the steps up in order, and what follows one that would run is not known.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use flowrun_cache::{ActionResult, ArtifactKind, CacheReader, CompletionCache, OutputRecord};
use serde_json::Value;

use crate::dag::{predecessors, required_predecessors};
use crate::estimate::{Estimate, Foresight, TotalEstimate};
use crate::expansion::{ActionRequest, Entry, expand, gather, kind_of};
use crate::gates;
use crate::history::History;
use crate::lookup::{Found, Lookup};
use crate::pipeline::{Action, CachePolicy, Pipeline, StepNode};
use crate::places::published;
use crate::premises::Stamps;
use crate::run::{RunError, RunOptions, Selection};
use crate::step::{StepError, StepErrorKind, World};
use crate::why::{Cause, Reason, why, why_anyway};

use super::{Costs, OutOfPlace, Plan, PlanStatus, PlannedItem, PlannedPublish, PlannedStep};

/// Plans a run. What the run that `options` ask to remember left behind spares reading files.
///
/// # Errors
/// [`RunError::NoStep`] when the options name a step that does not exist.
pub fn plan(
    pipeline: &Pipeline,
    cache: &CacheReader,
    world: &World,
    options: &RunOptions,
    costs: Costs,
) -> Result<Plan, RunError> {
    let selection = Selection::of(pipeline, options)?;
    let remembered = options.remember.map(|name| Stamps::of(cache.dir(), name));
    let planner = Planner {
        pipeline,
        options,
        lookup: Lookup::reading(
            &pipeline.root,
            World {
                look_only: true,
                ..world.clone()
            },
            cache,
            options.remote.clone(),
            remembered.unwrap_or_default(),
        ),
        history: History::new(&pipeline.name, cache.dir(), None),
        selection,
        cache,
        costs,
        completions: OnceLock::new(),
    };
    let mut known: BTreeMap<String, Known> = BTreeMap::new();
    let mut steps = Vec::new();
    for node in &pipeline.steps {
        if !planner.selection.steps.contains(&node.name) {
            continue;
        }
        let (planned, step) = planner.step(node, &known);
        steps.push(planned);
        known.insert(node.name.clone(), step);
    }
    let estimates = steps.iter().flat_map(|step| {
        let name = step.step.as_str();
        step.estimates().map(move |estimate| (name, estimate))
    });
    let cost = TotalEstimate::of(estimates);
    Ok(Plan { steps, cost })
}

/// What is known of a step that was planned.
enum Known {
    Outputs(BTreeMap<String, OutputRecord>),
    Later,
    Skipped,
}

struct Planner<'a> {
    pipeline: &'a Pipeline,
    options: &'a RunOptions,
    lookup: Lookup,
    history: History,
    selection: Selection,
    cache: &'a CacheReader,
    costs: Costs,
    /// Read when the first estimate asks for them.
    completions: OnceLock<Arc<CompletionCache>>,
}

impl Planner<'_> {
    fn step(&self, node: &Arc<StepNode>, known: &BTreeMap<String, Known>) -> (PlannedStep, Known) {
        let planned = |items, status| PlannedStep {
            step: node.name.clone(),
            kind: kind_of(node).to_owned(),
            items,
            estimate: None,
            status,
        };
        let is = |name: &String, wanted: fn(&Known) -> bool| known.get(name).is_some_and(wanted);
        let skipped = required_predecessors(node)
            .into_iter()
            .find(|b| is(b, |k| matches!(k, Known::Skipped)));
        if let Some(before) = skipped {
            let why = format!("needs `{before}`, which is skipped");
            return (planned(vec![], PlanStatus::Skipped { why }), Known::Skipped);
        }
        let after: Vec<String> = predecessors(node)
            .into_iter()
            .filter(|b| is(b, |k| matches!(k, Known::Later)))
            .collect();
        if !after.is_empty() {
            let named: Vec<String> = after.iter().map(|b| format!("`{b}`")).collect();
            let why = format!("after {}", named.join(", "));
            let status = PlanStatus::Pending { why, after };
            let mut step = planned(vec![], status);
            step.estimate = self.estimate(node, &node.name, &node.params, None);
            return (step, Known::Later);
        }
        let output = |step: &str, port: &str| match known.get(step)? {
            Known::Outputs(outputs) => outputs.get(port).cloned(),
            Known::Later | Known::Skipped => None,
        };
        match expand(self.pipeline, node, &self.options.expressions, output) {
            Ok(None) => {
                let why = "its `when` is false".to_owned();
                (planned(vec![], PlanStatus::Skipped { why }), Known::Skipped)
            }
            Err(error) => {
                let status = PlanStatus::stale(error.message);
                (planned(vec![], status), Known::Later)
            }
            Ok(Some(requests)) => {
                let (items, outputs) = self.items(node, &requests);
                let status = of_items(&items);
                (
                    planned(items, status),
                    outputs.map_or(Known::Later, Known::Outputs),
                )
            }
        }
    }

    /// The items, and the step's outputs when all are fresh.
    fn items(
        &self,
        node: &StepNode,
        requests: &[ActionRequest],
    ) -> (Vec<PlannedItem>, Option<BTreeMap<String, OutputRecord>>) {
        let mut items = Vec::with_capacity(requests.len());
        let mut ends = Vec::with_capacity(requests.len());
        for request in requests {
            let (item, outputs) = self.item(request);
            ends.extend(outputs.map(|outputs| (request.label.as_deref(), outputs)));
            items.push(item);
        }
        if ends.len() < requests.len() {
            return (items, None);
        }
        let outputs = if node.foreach.is_some() {
            let ends: Vec<_> = ends.iter().map(|(label, o)| (*label, o)).collect();
            gather(node, &ends)
        } else {
            ends.into_iter().next().map(|(_, o)| o).unwrap_or_default()
        };
        (items, Some(outputs))
    }

    fn item(
        &self,
        request: &ActionRequest,
    ) -> (PlannedItem, Option<BTreeMap<String, OutputRecord>>) {
        let planned = |key: String, status| PlannedItem {
            id: request.id.clone(),
            key,
            status,
            publish: Vec::new(),
            estimate: None,
        };
        let forced = self.selection.forced.contains(&request.node.name);
        let keyed = match self.lookup.key(request) {
            Ok(keyed) => keyed,
            Err(error) if error.kind == StepErrorKind::Unseen => {
                let item = match why_anyway(&self.history, request, forced) {
                    Some(reason) => self.stale(request, String::new(), reason),
                    None => planned(String::new(), PlanStatus::Unknown { why: error.message }),
                };
                return (item, None);
            }
            Err(error) => {
                let status = PlanStatus::stale(error.message);
                return (planned(String::new(), status), None);
            }
        };
        let cause = if forced {
            Cause::Forced
        } else if request.node.cache == CachePolicy::Never {
            Cause::NoResult
        } else {
            match self.lookup.find(request, &keyed.key) {
                Found::Whole(result) | Found::Fetched(result) => {
                    let key = keyed.key.to_hex();
                    let publish = match self.to_publish(request, &result) {
                        Ok(publish) => publish,
                        Err(error) => {
                            return (planned(key, PlanStatus::stale(error.message)), None);
                        }
                    };
                    let fresh = PlannedItem {
                        publish,
                        ..planned(key, PlanStatus::Fresh)
                    };
                    return (fresh, Some(result.outputs));
                }
                Found::Broken => Cause::Broken,
                Found::Nothing | Found::Flawed(_) => Cause::NoResult,
            }
        };
        let reason = why(&self.history, request, &keyed, cause);
        (self.stale(request, keyed.key.to_hex(), reason), None)
    }

    /// What of a result is not in its place in the project; an error where the run would fail instead.
    fn to_publish(
        &self,
        request: &ActionRequest,
        result: &ActionResult,
    ) -> Result<Vec<PlannedPublish>, StepError> {
        let root = &self.lookup.root;
        gates::check(&request.node, &result.metrics, &self.options.expressions)?;
        let places = published(root, &request.publish, &result.outputs)?;
        let not_there = places
            .into_iter()
            .filter(|(artifact, dest)| !self.lookup.is_at(artifact, dest));
        let planned = not_there.map(|(_, dest)| PlannedPublish {
            path: dest
                .strip_prefix(root)
                .unwrap_or(&dest)
                .display()
                .to_string(),
            found: match dest.symlink_metadata() {
                Err(e) if e.kind() == ErrorKind::NotFound => OutOfPlace::Missing,
                _ => OutOfPlace::Changed,
            },
        });
        Ok(planned.collect())
    }

    /// An action that would run.
    fn stale(&self, request: &ActionRequest, key: String, reason: Reason) -> PlannedItem {
        let files = self.files(request);
        PlannedItem {
            id: request.id.clone(),
            key,
            status: PlanStatus::because(reason),
            publish: Vec::new(),
            estimate: self.estimate(&request.node, &request.id, &request.params, files.as_ref()),
        }
    }

    fn estimate(
        &self,
        node: &StepNode,
        id: &str,
        params: &Value,
        inputs: Option<&BTreeMap<String, Vec<PathBuf>>>,
    ) -> Option<Estimate> {
        let Action::Uses(step) = &node.action else {
            return None;
        };
        if self.costs == Costs::Left {
            return None;
        }
        let earlier = self.history.nearest(id).map(|(_, result)| result.metrics);
        let open = || Arc::clone(self.completions.get_or_init(|| self.cache.completions()));
        step.estimate(&Foresight {
            params,
            inputs,
            completions: &open,
            earlier: earlier.as_ref(),
        })
    }

    /// The file of every input.
    fn files(&self, request: &ActionRequest) -> Option<BTreeMap<String, Vec<PathBuf>>> {
        let path = |entry: &Entry| match entry {
            Entry::File(path) => Some(self.pipeline.root.join(path)),
            Entry::Artifact { artifact, .. } => {
                Some(self.cache.store().object_path(&artifact.digest))
                    .filter(|_| artifact.kind == ArtifactKind::File)
            }
        };
        let ports = request.inputs.iter();
        ports
            .map(|(port, given)| {
                let paths: Option<Vec<PathBuf>> = given.entries.iter().map(path).collect();
                let paths = paths.filter(|paths| paths.iter().all(|path| path.is_file()));
                Some((port.clone(), paths?))
            })
            .collect()
    }
}

/// The status of a step from those of its items.
fn of_items(items: &[PlannedItem]) -> PlanStatus {
    let stale: Vec<&PlannedItem> = items.iter().filter(|i| i.status.is_stale()).collect();
    let unknown = |item: &&PlannedItem| matches!(item.status, PlanStatus::Unknown { .. });
    match stale.first().map(|item| &item.status) {
        None => items
            .iter()
            .find(unknown)
            .map_or(PlanStatus::Fresh, |item| item.status.clone()),
        Some(status) if items.len() == 1 => status.clone(),
        Some(PlanStatus::Stale { why, .. }) => {
            PlanStatus::stale(format!("{} of {} items: {why}", stale.len(), items.len()))
        }
        Some(other) => other.clone(),
    }
}
