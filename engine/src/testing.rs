//! Toy steps, pipelines and a bench to run them on, for tests.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use flowrun_cache::{Cache, CacheReader, Digest, LockWait, OpenOptions};
use serde_json::{Value, json};

use crate::event::{RunEvent, StepStatus};
use crate::language::Diagnostics;
use crate::pipeline::{Action, Foreach, ForeachList, Level, Pipeline, Source, StepNode};
use crate::plan::{Costs, Plan, plan};
use crate::run::{Expressions, RunOptions, RunSummary, run};
use crate::step::{Cancel, Port, Step, StepContext, StepError, StepOutcome, World};
use crate::tracking::Tracking;

type Work = dyn Fn(&StepContext) -> Result<StepOutcome, StepError> + Send + Sync;

/// A step kind made of a closure. Has the optional list input `parts`, the inputs `x` and `y`
/// unless it is given others, and whatever outputs it is given.
pub(crate) struct Toy {
    pub(crate) kind: &'static str,
    pub(crate) version: u32,
    pub(crate) inputs: Vec<Port>,
    pub(crate) outputs: Vec<Port>,
    pub(crate) work: Box<Work>,
    pub(crate) runs: AtomicUsize,
}

impl Toy {
    pub(crate) fn new(
        kind: &'static str,
        work: impl Fn(&StepContext) -> Result<StepOutcome, StepError> + Send + Sync + 'static,
    ) -> Self {
        Self {
            kind,
            version: 1,
            inputs: vec![
                Port::new("parts", "any", "").optional().many(),
                Port::new("x", "any", ""),
                Port::new("y", "any", ""),
            ],
            outputs: vec![Port::new("out", "file", "")],
            work: Box::new(work),
            runs: AtomicUsize::new(0),
        }
    }

    /// Writes its inputs, labels and param `text` to `out`.
    pub(crate) fn join() -> Self {
        Self::new("join", |ctx| {
            let mut all = ctx.params["text"].as_str().unwrap_or_default().to_owned();
            for input in ctx.inputs.values().flatten() {
                let text = std::fs::read_to_string(&input.path).map_err(|e| io(ctx, &e))?;
                all.push_str(&format!("({}:{text})", input.label));
            }
            write(ctx, "out", &all)?;
            let length = u64::try_from(all.len()).unwrap_or_default();
            Ok(StepOutcome::default().metric("length", length))
        })
    }

    /// Writes the words of `text` as the items of the list `out`.
    pub(crate) fn words() -> Self {
        let mut toy = Self::new("words", |ctx| {
            let text = ctx.params["text"].as_str().unwrap_or_default();
            let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
            for word in &words {
                let path = ctx.output_item("out", word)?;
                std::fs::write(&path, word).map_err(|e| io(ctx, &e))?;
            }
            std::fs::create_dir_all(ctx.output("out")).map_err(|e| io(ctx, &e))?;
            Ok(StepOutcome::default().list("out", words))
        });
        toy.outputs = vec![Port::new("out", "file", "").many()];
        toy
    }
}

pub(crate) fn io(ctx: &StepContext, error: &std::io::Error) -> StepError {
    StepError::io(&ctx.out_dir, error)
}

pub(crate) fn write(ctx: &StepContext, port: &str, text: &str) -> Result<(), StepError> {
    std::fs::write(ctx.output(port), text).map_err(|e| io(ctx, &e))
}

impl Step for Toy {
    fn kind(&self) -> &'static str {
        self.kind
    }
    fn version(&self) -> u32 {
        self.version
    }
    fn about(&self) -> &'static str {
        "a toy"
    }
    fn params_schema(&self) -> Value {
        json!({})
    }
    fn inputs(&self) -> Vec<Port> {
        self.inputs.clone()
    }
    fn outputs(&self) -> Vec<Port> {
        self.outputs.clone()
    }
    fn observe(&self, params: &Value, world: &World) -> Result<BTreeMap<String, Value>, StepError> {
        if let Some(name) = params.get("far").and_then(Value::as_str)
            && world.look_only
        {
            return Err(StepError::unseen(name));
        }
        let Some(name) = params.get("watch").and_then(Value::as_str) else {
            return Ok(BTreeMap::new());
        };
        let path = world.root.join(name);
        let digest = Digest::of_file(&path).map_err(|e| StepError::io(&path, &e))?;
        Ok(BTreeMap::from([(name.to_owned(), json!(digest.short()))]))
    }
    fn run(&self, ctx: &StepContext) -> Result<StepOutcome, StepError> {
        self.runs.fetch_add(1, Ordering::SeqCst);
        (self.work)(ctx)
    }
}

/// A step of kind `join`.
pub(crate) fn node(name: &str) -> StepNode {
    uses(name, Arc::new(Toy::join()))
}

pub(crate) fn uses(name: &str, step: Arc<dyn Step>) -> StepNode {
    StepNode::new(name, Action::Uses(step))
}

/// A `run` step with one output, `out` at `out.txt`.
pub(crate) fn shell(name: &str, command: &str) -> StepNode {
    let mut step = node(name);
    step.action = Action::Run(command.into());
    step.out_paths.insert("out".into(), "out.txt".into());
    step
}

impl StepNode {
    pub(crate) fn text(self, text: &str) -> Self {
        self.with(json!({ "text": text }))
    }
    pub(crate) fn with(mut self, params: Value) -> Self {
        self.params = params.clone();
        self.key_params = params;
        self
    }
    /// `source` is `step.output`, `item.var` or `file:path`.
    pub(crate) fn input(mut self, port: &str, source: &str) -> Self {
        let sources = self.inputs.entry(port.into()).or_default();
        sources.push(source_of(source));
        self
    }
    pub(crate) fn each(mut self, var: &str, source: &str) -> Self {
        let list = ForeachList::Artifacts(vec![source_of(source)]);
        self.level_mut().vars.insert(var.into(), list);
        self
    }
    pub(crate) fn each_value(mut self, var: &str, values: Value) -> Self {
        let list = ForeachList::Values(values.as_array().cloned().unwrap_or_default());
        self.level_mut().vars.insert(var.into(), list);
        self
    }
    /// The one level of its fan-out.
    pub(crate) fn level_mut(&mut self) -> &mut Level {
        let foreach = self.foreach.get_or_insert_with(|| Foreach {
            levels: vec![Level::default()],
        });
        &mut foreach.levels[0]
    }
    pub(crate) fn change(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }
}

fn source_of(text: &str) -> Source {
    if let Some(path) = text.strip_prefix("file:") {
        return Source::File(PathBuf::from(path));
    }
    match text.split_once('.') {
        Some(("item", var)) => Source::Item(var.into()),
        Some((step, output)) => Source::Output {
            step: step.into(),
            output: output.into(),
        },
        None => Source::Item(text.into()),
    }
}

pub(crate) fn pipeline(steps: Vec<StepNode>) -> Pipeline {
    Pipeline {
        name: "toy".into(),
        about: None,
        file: "toy.yaml".into(),
        root: ".".into(),
        profiles: Vec::new(),
        params: BTreeMap::new(),
        models: BTreeMap::new(),
        pools: BTreeMap::new(),
        runners: BTreeMap::new(),
        hooks: BTreeMap::new(),
        tracking: Tracking::default(),
        uses: BTreeMap::new(),
        steps: steps.into_iter().map(Arc::new).collect(),
        sources: Vec::new(),
        warnings: Diagnostics::default(),
    }
}

/// `${{ item.x }}` and conditions `true`, `false`, `name >= number`, `item.x != word`.
pub(crate) fn expressions() -> Expressions {
    Expressions {
        resolve_item,
        eval_bool,
    }
}

fn resolve_item(value: &Value, items: &BTreeMap<String, Value>) -> Result<Value, String> {
    match value {
        Value::String(text) => {
            let mut text = text.clone();
            for (name, value) in items {
                let pattern = format!("${{{{ item.{name} }}}}");
                if text == pattern {
                    return Ok(value.clone());
                }
                let value = value
                    .as_str()
                    .map_or_else(|| value.to_string(), str::to_owned);
                text = text.replace(&pattern, &value);
            }
            Ok(Value::String(text))
        }
        Value::Object(map) => map
            .iter()
            .map(|(k, v)| Ok((k.clone(), resolve_item(v, items)?)))
            .collect::<Result<_, _>>()
            .map(Value::Object),
        other => Ok(other.clone()),
    }
}

fn eval_bool(text: &str, context: &Value) -> Result<bool, String> {
    match text.split_whitespace().collect::<Vec<_>>()[..] {
        ["true"] => Ok(true),
        ["false"] => Ok(false),
        [name, ">=", number] => {
            let metric = context[name]
                .as_f64()
                .ok_or(format!("no metric `{name}`"))?;
            number
                .parse()
                .map(|n: f64| metric >= n)
                .map_err(|_| "not a number".into())
        }
        [name, "!=", word] => {
            let name = name.strip_prefix("item.").unwrap_or(name);
            Ok(context["item"][name] != word)
        }
        _ => Err(format!("cannot evaluate `{text}`")),
    }
}

/// A project folder with its cache.
pub(crate) struct Bench {
    dir: tempfile::TempDir,
    pub(crate) world: World,
    pub(crate) options: RunOptions,
    pub(crate) cancel: Cancel,
    /// Called with each event while the run goes on.
    pub(crate) on_event: OnEvent,
}

/// Hears each event of a run.
type OnEvent = Arc<Mutex<dyn FnMut(&RunEvent) + Send>>;

/// A finished run.
pub(crate) struct Ran {
    pub(crate) summary: RunSummary,
    pub(crate) events: Vec<RunEvent>,
}

impl Bench {
    pub(crate) fn new() -> std::io::Result<Self> {
        let dir = tempfile::tempdir()?;
        std::fs::create_dir(dir.path().join("project"))?;
        let root = dir.path().join("project");
        let env = [
            ("PATH", "/usr/local/bin:/usr/bin:/bin"),
            ("HOME", "/nowhere"),
        ];
        let mut options = RunOptions::new(expressions());
        options.jobs = 4;
        Ok(Self {
            dir,
            world: World {
                root,
                env: env.map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
                ..World::default()
            },
            options,
            cancel: Cancel::default(),
            on_event: Arc::new(Mutex::new(|_: &RunEvent| {})),
        })
    }

    pub(crate) fn root(&self) -> &Path {
        &self.world.root
    }

    pub(crate) fn cache_dir(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    fn pipeline(&self, steps: &[StepNode]) -> Pipeline {
        Pipeline {
            root: self.world.root.clone(),
            ..pipeline(steps.to_vec())
        }
    }

    /// One run, with the cache opened and closed as a program would.
    #[allow(clippy::unwrap_used)]
    pub(crate) fn run(&self, steps: &[StepNode]) -> Ran {
        let open = OpenOptions {
            // A child that another test is just starting holds this process's lock until it execs.
            wait: LockWait::Wait,
            command: "test".into(),
            on_wait: None,
        };
        let cache = Arc::new(Cache::open(&self.cache_dir(), &open).unwrap());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
            let heard = Arc::clone(&self.on_event);
            let listener = tokio::spawn(async move {
                let mut events = Vec::new();
                while let Some(event) = receiver.recv().await {
                    (heard.lock().unwrap())(&event);
                    events.push(event);
                }
                events
            });
            let summary = run(
                Arc::new(self.pipeline(steps)),
                cache,
                self.world.clone(),
                self.options.clone(),
                self.cancel.clone(),
                sender,
            )
            .await
            .unwrap();
            let events = listener.await.unwrap();
            Ran { summary, events }
        })
    }

    #[allow(clippy::unwrap_used)]
    pub(crate) fn plan(&self, steps: &[StepNode]) -> Plan {
        let reader = CacheReader::open(&self.cache_dir());
        plan(
            &self.pipeline(steps),
            &reader,
            &self.world,
            &self.options,
            Costs::Left,
        )
        .unwrap()
    }
}

impl Ran {
    /// `step status`, sorted.
    pub(crate) fn ends(&self) -> Vec<String> {
        let mut ends: Vec<String> = self
            .finished()
            .map(|(step, status, _)| format!("{step} {status:?}").to_lowercase())
            .collect();
        ends.sort();
        ends
    }

    /// The steps that ran, sorted.
    pub(crate) fn ran(&self) -> Vec<&str> {
        let mut ran: Vec<&str> = self
            .finished()
            .filter(|(_, status, _)| *status == StepStatus::Ran)
            .map(|(step, _, _)| step)
            .collect();
        ran.sort_unstable();
        ran
    }

    fn finished(&self) -> impl Iterator<Item = (&str, StepStatus, &str)> {
        self.events.iter().filter_map(|event| match event {
            RunEvent::StepFinished {
                step, status, why, ..
            } => Some((step.as_str(), *status, why.as_str())),
            _ => None,
        })
    }

    /// Why a step ended as it did, the last time.
    pub(crate) fn why(&self, id: &str) -> &str {
        let ends = self.finished().filter(|(step, _, _)| *step == id);
        ends.last().map_or("no such step", |(_, _, why)| why)
    }

    /// Digest of a step's output.
    pub(crate) fn digest(&self, id: &str, port: &str) -> String {
        let digest = self.events.iter().rev().find_map(|event| match event {
            RunEvent::StepFinished { step, outputs, .. } if step == id => {
                outputs.get(port).map(|o| o.digest.clone())
            }
            _ => None,
        });
        digest.unwrap_or_default()
    }

    pub(crate) fn warnings(&self) -> Vec<&str> {
        let events = self.events.iter();
        events
            .filter_map(|event| match event {
                RunEvent::Warning { text, .. } => Some(text.as_str()),
                _ => None,
            })
            .collect()
    }
}
