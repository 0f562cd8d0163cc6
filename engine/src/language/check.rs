//! From a merged tree to a checked [`Pipeline`]: shapes, names, params, wiring, order.
//!
//! Every check goes on after a mistake, as far as what it looks at is known, so that
//! all mistakes are told at once. Invariant: a pipeline is returned only when none was.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use petgraph::graph::NodeIndex;
use serde_json::{Map, Value, json};

use super::conditions;
use super::definition::{self, Uses};
use super::diagnostic::Diagnostics;
use super::draft::Draft;
use super::mismatch::{Mismatch, Shape};
use super::node::{Data, Entry, Node};
use super::order;
use super::params::{BadName, Tables, complete};
use super::published::Published;
use super::resolution::resolve_all;
use super::schema::pipeline_shape;
use super::source::Drafts;
use super::source_map::{SourceMap, Span};
use super::spec::StepSpec;
use super::wiring::{Wiring, check_uses, wire};
use super::{hooks, settings, suggest, tracking};
use crate::pipeline::{Action, Pipeline, StepNode};
use crate::runner::{JobRunner, Through, runner_schema};
use crate::vocabulary::Vocabulary;

/// What a check needs besides the tree.
pub(crate) struct Setting<'a> {
    /// The pipeline file.
    pub(crate) file: &'a Path,
    /// Project root.
    pub(crate) root: PathBuf,
    /// Profiles that were applied.
    pub(crate) profiles: &'a [String],
    /// Environment variables that are set.
    pub(crate) environment: &'a BTreeMap<String, String>,
    /// The remote cache, if it is a folder.
    pub(crate) remote_folder: Option<&'a Path>,
    /// Step kinds and the shapes of models and programs.
    pub(crate) vocabulary: &'a Vocabulary,
}

/// Checks the merged tree `tree`. None when a mistake was noted.
pub(crate) fn check(
    map: &mut SourceMap,
    mut tree: Node,
    setting: &Setting<'_>,
) -> Option<Pipeline> {
    let name = pipeline_name(map, &tree, setting.file);
    let (context, uses) = resolve_all(map, &mut tree, &name);
    prune(map, &mut tree);
    check_entries(map, &tree, "models", &setting.vocabulary.model_schema);
    check_entries(map, &tree, "programs", &setting.vocabulary.program_schema);
    let table = |name: &str| -> BTreeMap<String, Value> {
        tree.entries(name)
            .map(|(k, e)| (k.clone(), e.value.to_value()))
            .collect()
    };
    let models = table("models");
    let programs = table("programs");
    let tables = Tables {
        models: &models,
        programs: &programs,
        unkeyed: &setting.vocabulary.unkeyed_model_fields,
    };
    let drafts = drafts(map, &tree, &uses, setting);
    let pools = pools(&tree);
    let runners = runners(map, &tree, setting);
    let hooks = hooks::read(map, &tree, setting.environment);
    let around = settings::Around {
        environment: setting.environment,
        pools: &pools,
        runners: &runners,
        job_kinds: &setting.vocabulary.runners,
    };
    let steps = check_steps(map, &drafts, &tables, &around, &setting.root);
    let tracking = tracking::read(map, &tree, &steps);
    if !map.has_errors() {
        check_together(map, &drafts, &steps, setting.vocabulary);
    }
    if map.has_errors() {
        return None;
    }
    let params = match context.get("params") {
        Some(Value::Object(params)) => params.clone().into_iter().collect(),
        _ => BTreeMap::new(),
    };
    Some(Pipeline {
        name,
        about: tree.get("about").and_then(Node::as_text).map(str::to_owned),
        file: setting.file.to_path_buf(),
        root: setting.root.clone(),
        profiles: setting.profiles.to_vec(),
        params,
        models,
        pools,
        runners,
        hooks,
        tracking,
        uses: definition::summary(&uses),
        steps: steps.into_iter().map(Arc::new).collect(),
        sources: map.sources(),
        warnings: Diagnostics::default(),
    })
}

/// What the vocabulary has against the steps together.
fn check_together(
    map: &mut SourceMap,
    drafts: &Drafts<'_>,
    steps: &[StepNode],
    vocabulary: &Vocabulary,
) {
    for finding in vocabulary.checks.iter().flat_map(|check| check(steps)) {
        let index = drafts.by_name.get(finding.step.as_str());
        if let Some(draft) = index.and_then(|index| drafts.list.get(*index)) {
            let at = draft.node.place(&finding.path, false, draft.key);
            map.report_finding(at, finding);
        }
    }
}

/// The sizes of the pools; one of a wrong shape was taken out before.
fn pools(tree: &Node) -> BTreeMap<String, usize> {
    let sizes = tree.entries("pools").filter_map(|(name, entry)| {
        let places = entry.value.to_value().as_u64()?;
        Some((name.clone(), usize::try_from(places).ok()?))
    });
    sizes.collect()
}

/// The job systems of the file; one that is not right is left out.
fn runners(map: &mut SourceMap, tree: &Node, setting: &Setting<'_>) -> BTreeMap<String, JobRunner> {
    let vocabulary = setting.vocabulary;
    let mut all = BTreeMap::new();
    for (name, entry) in tree.entries("runners") {
        let Some(kind) = vocabulary.runners.get(name) else {
            let known = vocabulary.runners.keys().map(String::as_str);
            let help = suggest::help(name, "job systems", known);
            let message = format!("there is no job system `{name}`");
            map.report(entry.key, "unknown-runner", message, "", help);
            continue;
        };
        let shape = match Shape::new(runner_schema(kind.settings_schema())) {
            Ok(shape) => shape,
            Err(why) => {
                let message = format!("the schema of `{name}` is not valid: {why}");
                map.report(entry.key, "internal", message, "", None);
                continue;
            }
        };
        let value = match entry.value.data {
            Data::Null => json!({}),
            _ => entry.value.to_value(),
        };
        let mismatches = shape.check(&value);
        for mismatch in &mismatches {
            report_mismatch(map, &entry.value, entry.key, mismatch);
        }
        // Where something is wrong with it, steps that name it are still right to do so.
        let fits = mismatches.is_empty();
        let known = if fits { value } else { json!({}) };
        if let Ok(runner) = JobRunner::new(kind, &known) {
            check_surroundings(map, entry, &runner, setting);
            all.insert(name.clone(), runner);
        }
    }
    all
}

/// What the settings of a job system name must be there.
fn check_surroundings(
    map: &mut SourceMap,
    entry: &Entry,
    runner: &JobRunner,
    setting: &Setting<'_>,
) {
    let at = |path: &[&str], on_key: bool| {
        let path: Vec<String> = path.iter().map(|part| (*part).to_owned()).collect();
        entry.value.place(&path, on_key, entry.key)
    };
    for (index, name) in runner.settings.env.iter().enumerate() {
        if setting.environment.get(name).is_none_or(String::is_empty) {
            let help = format!("set it before running: `export {name}=…`");
            let message = format!("the variable `{name}` is not set");
            let place = at(&["env", &index.to_string()], false);
            map.report(place, "missing-secret", message, "", Some(help));
        }
    }
    for here in runner.settings.shared.keys() {
        if !setting.root.join(here).is_dir() {
            let text = here.display().to_string();
            let message = format!("there is no folder `{text}`");
            let help =
                "`shared` is a map from folders here to the same ones as the workers see them";
            let place = at(&["shared", &text], true);
            map.report(place, "unreadable", message, "", Some(help.to_owned()));
        }
    }
    if runner.settings.through == Through::Remote
        && let Some(folder) = setting.remote_folder
        && let Err(unseen) = runner.kind.sees(&runner.own, folder)
    {
        let place = at(&["through"], false);
        map.report(place, "unseen-remote", unseen.message, "", unseen.help);
    }
}

/// `name:`, else the name of the file.
fn pipeline_name(map: &mut SourceMap, tree: &Node, file: &Path) -> String {
    let allowed = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.');
    if let Some(node) = tree.get("name").filter(|n| n.as_text().is_some()) {
        let name = node.as_text().unwrap_or_default();
        if name.is_empty() || name.starts_with('.') || !name.chars().all(allowed) {
            let help = "letters, digits, `-`, `_` and `.`; use `about:` for a sentence".to_owned();
            let message = format!("`{name}` is not a name for a pipeline");
            map.report(node.span, "bad-name", message, "", Some(help));
        }
        return name.to_owned();
    }
    let stem = file
        .file_stem()
        .map_or("pipeline".into(), |s| s.to_string_lossy());
    stem.chars()
        .map(|c| if allowed(c) { c } else { '-' })
        .collect()
}

/// Checks the tree against the shape of a pipeline file, and takes out what does not fit.
fn prune(map: &mut SourceMap, tree: &mut Node) {
    let shape = match pipeline_shape() {
        Ok(shape) => shape,
        Err(why) => return map.report(tree.span, "internal", why, "", None),
    };
    let value = tree.to_value();
    for mismatch in shape.check(&value) {
        report_mismatch(map, tree, tree.span, &mismatch);
        if mismatch.code != "missing-field" {
            tree.remove(&mismatch.path);
        }
    }
}

/// Notes a mismatch of `node`; `outer` is the place of `node` itself.
pub(crate) fn report_mismatch(map: &mut SourceMap, node: &Node, outer: Span, mismatch: &Mismatch) {
    let at = node.place(&mismatch.path, mismatch.on_key, outer);
    let Mismatch {
        code,
        message,
        label,
        help,
        ..
    } = mismatch;
    map.report(at, code, message.clone(), label.clone(), help.clone());
}

/// Checks each entry of `models` or `programs`.
fn check_entries(map: &mut SourceMap, tree: &Node, section: &str, schema: &Value) {
    if tree.get(section).is_none() {
        return;
    }
    let shape = match Shape::new(schema.clone()) {
        Ok(shape) => shape,
        Err(why) => {
            let message = format!("the schema of `{section}` is not valid: {why}");
            return map.report(tree.span, "internal", message, "", None);
        }
    };
    for (_, entry) in tree.entries(section) {
        for mismatch in shape.check(&entry.value.to_value()) {
            report_mismatch(map, &entry.value, entry.key, &mismatch);
        }
    }
}

fn drafts<'a>(
    map: &mut SourceMap,
    tree: &'a Node,
    uses: &'a Uses,
    setting: &'a Setting<'_>,
) -> Drafts<'a> {
    let mut list = Vec::new();
    for (name, entry) in tree.entries("steps") {
        let spec = match (&entry.value.data, entry.value.to_value()) {
            (Data::Null, _) => Some(StepSpec::default()),
            (_, value) => serde_json::from_value::<StepSpec>(value).ok(),
        };
        list.push(Draft::new(map, name, entry, spec, setting.vocabulary));
    }
    if list.is_empty() && !map.has_errors() {
        let at = tree.entry("steps").map_or(tree.span, |e| e.key);
        map.report(at, "no-steps", "the pipeline has no steps", "", None);
    }
    let by_name = list.iter().enumerate().map(|(i, d)| (d.name, i)).collect();
    Drafts {
        list,
        by_name,
        uses,
        root: &setting.root,
    }
}

/// Checks each step by itself and with those it reads from; returns them in order.
fn check_steps(
    map: &mut SourceMap,
    drafts: &Drafts<'_>,
    tables: &Tables<'_>,
    around: &settings::Around<'_>,
    root: &Path,
) -> Vec<StepNode> {
    let mut graph = order::graph(drafts.list.len());
    let mut shapes = HashMap::new();
    let mut published = Published::new(root, map.paths().map(Path::to_owned));
    let mut nodes: Vec<Option<StepNode>> = Vec::with_capacity(drafts.list.len());
    check_uses(map, drafts);
    for (index, draft) in drafts.list.iter().enumerate() {
        let wiring = wire(map, drafts, draft);
        for (before, span) in &wiring.waits_for {
            graph.add_edge(NodeIndex::new(*before), NodeIndex::new(index), *span);
        }
        let (params, key_params) = with(map, draft, tables, &mut shapes);
        let action = draft.action.clone().unwrap_or(Action::Run(String::new()));
        let mut node = step_node(draft, action, wiring, params, key_params);
        settings::read(map, draft, around, &mut published, &mut node);
        nodes.push(Some(node));
    }
    match order::order(&graph) {
        Ok(order) => {
            let mut steps: Vec<StepNode> =
                order.into_iter().filter_map(|i| nodes[i].take()).collect();
            conditions::hand_on(&mut steps);
            steps
        }
        Err(circles) => {
            for circle in circles {
                let mut names: Vec<&str> =
                    circle.steps.iter().map(|i| drafts.list[*i].name).collect();
                names.extend(names.first().copied());
                let message = format!("steps wait for each other: `{}`", names.join(" -> "));
                let help = "take one of these inputs or `needs` out".to_owned();
                map.report(circle.span, "cycle", message, "", Some(help));
            }
            Vec::new()
        }
    }
}

fn step_node(
    draft: &Draft<'_>,
    action: Action,
    wiring: Wiring,
    params: Value,
    key_params: Value,
) -> StepNode {
    let out_paths = if draft.is_run() {
        draft.spec.out.clone().unwrap_or_default()
    } else {
        BTreeMap::new()
    };
    StepNode {
        name: draft.name.to_owned(),
        action,
        params,
        key_params,
        inputs: wiring.inputs,
        lists: wiring.lists,
        outputs: draft.outputs.clone().unwrap_or_default(),
        out_paths,
        needs: wiring.needs,
        foreach: wiring.foreach,
        ..StepNode::default()
    }
}

/// Checks and completes the `with` of a step; returns params and key params.
fn with<'a>(
    map: &mut SourceMap,
    draft: &Draft<'a>,
    tables: &Tables<'_>,
    shapes: &mut HashMap<&'static str, Shape>,
) -> (Value, Value) {
    let nothing = || (json!({}), json!({}));
    let Some(kind) = draft.kind() else {
        return nothing();
    };
    let shape = match shapes.entry(kind.kind()) {
        std::collections::hash_map::Entry::Occupied(slot) => slot.into_mut(),
        std::collections::hash_map::Entry::Vacant(slot) => match Shape::new(kind.params_schema()) {
            Ok(shape) => slot.insert(shape),
            Err(why) => {
                let message = format!("the schema of `{}` is not valid: {why}", kind.kind());
                map.report(draft.place(&["uses"]), "internal", message, "", None);
                return nothing();
            }
        },
    };
    let value = match draft.node.get("with") {
        Some(node) if node.as_map().is_some() => node.to_value(),
        _ => Value::Object(Map::new()),
    };
    for mismatch in shape.check(&value) {
        report_with(map, draft, mismatch);
    }
    let completed = complete(shape.schema(), value, tables, draft.fans_out());
    for bad in completed.bad {
        report_name(map, draft, tables, &bad);
    }
    (completed.params, completed.key_params)
}

fn report_with(map: &mut SourceMap, draft: &Draft<'_>, mut mismatch: Mismatch) {
    if mismatch.code == "missing-field" && mismatch.path.is_empty() {
        let kind = draft.spec.uses.as_deref().unwrap_or_default();
        mismatch.message = format!(
            "`{kind}` in the step `{}`: {}",
            draft.name, mismatch.message
        );
        if draft.node.get("with").is_none() {
            return report_mismatch(
                map,
                draft.node,
                draft.key,
                &Mismatch {
                    path: vec!["uses".into()],
                    ..mismatch
                },
            );
        }
    }
    mismatch.path.insert(0, "with".into());
    report_mismatch(map, draft.node, draft.key, &mismatch);
}

fn report_name(map: &mut SourceMap, draft: &Draft<'_>, tables: &Tables<'_>, bad: &BadName) {
    let mut path = vec!["with".to_owned()];
    path.extend(bad.path.iter().cloned());
    let written = draft.node.get("with").is_some();
    let outer = if written {
        draft.key_of(&["with"])
    } else {
        draft.place(&["uses"])
    };
    let at = draft.node.place(&path, false, outer);
    if map.has_error_in(at) {
        return;
    }
    let (what, table) = match bad.table.as_str() {
        "models" => ("model", tables.models),
        _ => ("program", tables.programs),
    };
    let Some(name) = &bad.name else {
        let message = format!("a {what} cannot be chosen by `item`");
        let help = format!("name the {what}, or make one step for each");
        return map.report(at, "bad-reference", message, "", Some(help));
    };
    let known: BTreeSet<&str> = table.keys().map(String::as_str).collect();
    let help = suggest::help(name, &format!("{what}s of this pipeline"), known)
        .or_else(|| Some(format!("the file has no `{what}s:`")));
    let code = if what == "model" {
        "unknown-model"
    } else {
        "unknown-program"
    };
    map.report(at, code, format!("there is no {what} `{name}`"), "", help);
}
