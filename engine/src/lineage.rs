//! [`Lineage`]: where an artifact comes from: the step that made it, with what it was
//! made of, and so on up to the files of the project.
//!
//! A run's record says which step used which source, the results in the cache say which
//! bytes came of it; digests join the two. Runs nothing.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::{Path, PathBuf};

use flowrun_cache::{ActionResult, CacheReader, Digest, OutputValue};
use serde::Serialize;
use serde_json::Value;

use crate::event::StepStatus;
use crate::record::{PlanSource, RunPlan, RunRecord};

/// Where an artifact comes from.
#[derive(Debug, Clone, Serialize)]
pub struct Lineage {
    /// The artifact.
    pub artifact: MadeOutput,
    /// The run whose record was read.
    pub run: String,
    /// The step that made it, then those before it, nearest first; each stands once.
    pub steps: Vec<MadeBy>,
}

/// An output of a step.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct MadeOutput {
    /// Step id.
    pub step: String,
    /// Output port.
    pub output: String,
    /// Its label in a list.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Content digest, hex.
    pub digest: String,
}

/// A step as it made something.
#[derive(Debug, Clone, Serialize)]
pub struct MadeBy {
    /// Step id.
    pub step: String,
    /// Step kind.
    pub kind: String,
    /// Action key, hex.
    pub key: String,
    /// The run that did the work, where its record is still there.
    pub made_in: Option<String>,
    /// When the work ended.
    pub made_at: String,
    /// Milliseconds that it took.
    pub took_ms: u64,
    /// Its params, as they entered the key.
    pub params: Value,
    /// Its command, for a `run` step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    /// Facts about the outside world that it depended on.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub observed: BTreeMap<String, Value>,
    /// Files, downloads and packages that its params name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<NamedSource>,
    /// What went into it.
    pub inputs: Vec<Used>,
}

/// A source that a step's params name: an object with `file`, `url`, `pip` or `hf` in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NamedSource {
    /// Where in the params: `train`, `model.weights`.
    pub param: String,
    /// What it names, for people.
    pub name: String,
    /// sha256 of its content, where the params give it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

/// One artifact that went into a step.
#[derive(Debug, Clone, Serialize)]
pub struct Used {
    /// Input port; for a file that a command names, its name.
    pub input: String,
    /// Content digest, hex.
    pub digest: String,
    /// Where it comes from.
    pub from: Origin,
}

/// Where an input comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// A step of the same run.
    Step(MadeOutput),
    /// A file or folder of the project: a source.
    File(PathBuf),
    /// It is not recorded (records of older versions, results that were removed).
    Unknown,
}

/// A run, read for lineage.
pub struct RunLineage {
    record: RunRecord,
    plan: RunPlan,
    results: BTreeMap<String, ActionResult>,
    /// Which outputs have a digest.
    made: BTreeMap<Digest, BTreeSet<MadeOutput>>,
}

impl RunLineage {
    /// Reads a run's record and the results that it used.
    ///
    /// # Errors
    /// When the record cannot be read.
    pub fn load(run_dir: &Path, cache: &CacheReader) -> std::io::Result<Self> {
        let record = RunRecord::load(run_dir)?;
        let plan = RunRecord::load_plan(run_dir).unwrap_or_default();
        let mut results = BTreeMap::new();
        let mut made: BTreeMap<Digest, BTreeSet<MadeOutput>> = BTreeMap::new();
        for step in &record.steps {
            let key = Digest::parse(&step.key);
            let Some(result) = key.and_then(|key| cache.actions().get(&key)) else {
                continue;
            };
            for (digest, output) in outputs_of(&step.step, &result) {
                made.entry(digest).or_default().insert(output);
            }
            results.insert(step.step.clone(), result);
        }
        Ok(Self {
            record,
            plan,
            results,
            made,
        })
    }

    /// An output by `step.output`, `step[item].output`, or with the label of a list's entry
    /// behind it, `step.output/label`.
    #[must_use]
    pub fn named(&self, name: &str) -> Option<MadeOutput> {
        let all = self.made.values().flatten();
        let mut found: Vec<&MadeOutput> = all
            .filter(|m| {
                let short = format!("{}.{}", m.step, m.output);
                name == short
                    || m.label
                        .as_ref()
                        .is_some_and(|l| name == format!("{short}/{l}"))
            })
            .collect();
        // A list itself comes before its entries.
        found.sort_by_key(|m| m.label.is_some());
        found.first().map(|m| (*m).clone())
    }

    /// An output whose digest begins so.
    #[must_use]
    pub fn with_digest(&self, start: &str) -> Option<MadeOutput> {
        let found = self
            .made
            .iter()
            .find(|(d, _)| d.to_hex().starts_with(start));
        found.and_then(|(_, outputs)| outputs.first().cloned())
    }

    /// Names of all outputs, for messages.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        let all = self.made.values().flatten();
        let names: BTreeSet<String> = all.map(|m| format!("{}.{}", m.step, m.output)).collect();
        names.into_iter().collect()
    }

    /// The lineage of an output. `ran` says in which run a key's work was done.
    #[must_use]
    pub fn of(&self, artifact: MadeOutput, ran: &BTreeMap<String, String>) -> Lineage {
        let mut wanted = VecDeque::from([artifact.step.clone()]);
        let mut seen = BTreeSet::from([artifact.step.clone()]);
        let mut steps = Vec::new();
        while let Some(id) = wanted.pop_front() {
            let Some(made) = self.made_by(&id, ran) else {
                continue;
            };
            for used in &made.inputs {
                if let Origin::Step(before) = &used.from
                    && seen.insert(before.step.clone())
                {
                    wanted.push_back(before.step.clone());
                }
            }
            steps.push(made);
        }
        Lineage {
            artifact,
            run: self.record.run.clone(),
            steps,
        }
    }

    fn made_by(&self, id: &str, ran: &BTreeMap<String, String>) -> Option<MadeBy> {
        let result = self.results.get(id)?;
        let manifest = &result.manifest;
        let observed = manifest["observed"].as_object();
        Some(MadeBy {
            step: id.to_owned(),
            kind: text(&manifest["kind"]),
            key: result.key.to_hex(),
            made_in: ran.get(&result.key.to_hex()).cloned(),
            made_at: result.finished_at.clone(),
            took_ms: result.took_ms,
            params: manifest["params"].clone(),
            command: manifest["command"].as_str().map(str::to_owned),
            observed: observed
                .into_iter()
                .flatten()
                .map(|(name, value)| (name.clone(), value.clone()))
                .collect(),
            sources: named_sources(&manifest["params"]),
            inputs: self.inputs(id, manifest),
        })
    }

    fn inputs(&self, id: &str, manifest: &Value) -> Vec<Used> {
        let mut used = Vec::new();
        for (port, list) in manifest["inputs"].as_object().into_iter().flatten() {
            let sources = self.sources(id, port);
            let entries = list.as_array().into_iter().flatten();
            let digests: Vec<String> = entries.map(|entry| text(&entry["digest"])).collect();
            let origins = self.origins(&digests, &sources);
            used.extend(digests.into_iter().zip(origins).map(|(digest, from)| Used {
                input: port.clone(),
                digest,
                from,
            }));
        }
        for (file, digest) in manifest["files"].as_object().into_iter().flatten() {
            used.push(Used {
                input: file.clone(),
                digest: text(digest),
                from: Origin::File(PathBuf::from(file)),
            });
        }
        used
    }

    /// The sources of a port; those behind a `foreach` variable in its place.
    fn sources(&self, id: &str, port: &str) -> Vec<&PlanSource> {
        let step = self.plan.steps.iter().find(|s| s.step == step_of(id));
        let mut sources = Vec::new();
        for source in step.and_then(|s| s.inputs.get(port)).into_iter().flatten() {
            unfold(source, &mut sources);
        }
        sources
    }

    /// Where the entries of a port come from.
    fn origins(&self, digests: &[String], sources: &[&PlanSource]) -> Vec<Origin> {
        let steps: Vec<_> = digests.iter().map(|d| self.maker(d, sources)).collect();
        let files = sources.iter().filter_map(|source| match source {
            PlanSource::File(path) => Some(path),
            _ => None,
        });
        // Files stand in the order in which the pipeline names them; a result that is gone
        // looks like one of them.
        let open = steps.iter().filter(|step| step.is_none()).count();
        let mut files = files
            .clone()
            .take(if files.count() == open { open } else { 0 });
        let origin = |step: Option<MadeOutput>| match step {
            Some(output) => Origin::Step(output),
            None => files
                .next()
                .map_or(Origin::Unknown, |path| Origin::File(path.clone())),
        };
        steps.into_iter().map(origin).collect()
    }

    /// The output of a step that the pipeline names and that has these bytes: equal bytes may
    /// come from several steps.
    fn maker(&self, digest: &str, sources: &[&PlanSource]) -> Option<MadeOutput> {
        let made = Digest::parse(digest).and_then(|digest| self.made.get(&digest))?;
        let named = |output: &&MadeOutput| {
            let name = format!("{}.{}", step_of(&output.step), output.output);
            sources
                .iter()
                .any(|s| matches!(s, PlanSource::Output(o) if *o == name))
        };
        made.iter().find(named).cloned()
    }
}

/// In which run the work of each key was done, by the runs' records; the newest, where
/// several did it.
#[must_use]
pub fn runs_by_key(cache: &CacheReader) -> BTreeMap<String, String> {
    let mut ran = BTreeMap::new();
    for dir in cache.runs() {
        let Ok(record) = RunRecord::load(&dir) else {
            continue;
        };
        for step in record.steps {
            if step.status == StepStatus::Ran {
                ran.entry(step.key).or_insert_with(|| record.run.clone());
            }
        }
    }
    ran
}

/// The name of the step that an id belongs to.
fn step_of(id: &str) -> &str {
    id.split_once('[').map_or(id, |(step, _)| step)
}

/// A source, or those that a `foreach` variable walks in its place.
fn unfold<'a>(source: &'a PlanSource, into: &mut Vec<&'a PlanSource>) {
    match source {
        PlanSource::Item(_, walked) => walked.iter().for_each(|source| unfold(source, into)),
        other => into.push(other),
    }
}

fn named_sources(params: &Value) -> Vec<NamedSource> {
    let mut found = Vec::new();
    find_sources("", params, &mut found);
    found
}

fn find_sources(path: &str, value: &Value, found: &mut Vec<NamedSource>) {
    let Some(map) = value.as_object() else {
        return;
    };
    let part = |name: &str| match map.get(name) {
        Some(Value::String(text)) => Some(text.clone()),
        Some(Value::Object(hub)) => hub.get("repo")?.as_str().map(str::to_owned),
        _ => None,
    };
    let outer = ["url", "pip", "hf"].into_iter().find_map(part);
    let inner = part("file");
    if outer.is_some() || inner.is_some() {
        let parts: Vec<String> = outer.into_iter().chain(inner).collect();
        found.push(NamedSource {
            param: path.to_owned(),
            name: parts.join(": "),
            sha256: part("sha256"),
        });
        return;
    }
    for (name, value) in map {
        let path = match path {
            "" => name.clone(),
            outer => format!("{outer}.{name}"),
        };
        find_sources(&path, value, found);
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn outputs_of(step: &str, result: &ActionResult) -> Vec<(Digest, MadeOutput)> {
    let mut all = Vec::new();
    for (port, output) in &result.outputs {
        let made = |digest: Digest, label: Option<&str>| {
            let output = MadeOutput {
                step: step.to_owned(),
                output: port.clone(),
                label: label.map(str::to_owned),
                digest: digest.to_hex(),
            };
            (digest, output)
        };
        all.push(made(output.value.digest(), None));
        if let OutputValue::List(items) = &output.value {
            let items = items.iter();
            all.extend(items.map(|i| made(i.artifact.digest, Some(&i.label))));
        }
    }
    all
}
