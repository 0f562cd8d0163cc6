//! `flowrun bench engine`: what the engine costs on this machine.
//!
//! Where `ninja` is installed, it does the same work beside it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use flowrun_cache::{Cache, OpenOptions};
use flowrun_engine::Diagnostics;
use flowrun_engine::pipeline::{Action, Pipeline, StepNode};
use flowrun_engine::run::run as run_pipeline;
use flowrun_engine::step::{Cancel, Port, Step, StepContext, StepError, StepOutcome, World};
use flowrun_engine::tracking::Tracking;
use serde::Serialize;
use serde_json::{Value, json};

use super::cost::{Cost, measure, measured_here};
use crate::args::{EngineBench, Scope};
use crate::exit::{Exit, Failure};
use crate::surroundings::run_options;

/// A step of the layered graph reads these neighbours of the layer before.
const NEIGHBOURS: [usize; 3] = [0, 1, 7];
/// Figures of what little has changed in are medians of so many runs.
const RUNS: usize = 3;
/// Those of the flat graph, of so many of each program in turn: what else the machine does changes
/// within seconds.
const ROUNDS: usize = 9;

/// A program that does the work, and its command line.
type Program = (&'static str, Vec<String>);

/// A line of the table.
#[derive(Debug, Serialize)]
struct Figure {
    work: &'static str,
    program: String,
    steps: usize,
    #[serde(flatten)]
    cost: Cost,
}

/// Measures, and shows the figures.
#[allow(clippy::print_stdout)]
pub(crate) fn engine(args: &EngineBench, json: bool) -> Result<Exit, Failure> {
    if let Some((program, rest)) = args.measure.split_first() {
        let cost = measured_here(Command::new(program).args(rest))?;
        println!("{}", json!(cost));
        return Ok(Exit::Ok);
    }
    if let Some(steps) = args.in_process {
        in_process(steps)?;
        return Ok(Exit::Ok);
    }
    let folder = std::env::temp_dir().join(format!("flowrun-bench-{}", std::process::id()));
    let figures = figures(&folder, args.quick);
    std::fs::remove_dir_all(&folder)?;
    for figure in figures? {
        if json {
            println!("{}", json!(figure));
        } else {
            let Cost {
                cpu_s,
                wall_s,
                rss_mib,
            } = figure.cost;
            let each = cpu_s * 1e6 / figure.steps as f64;
            println!(
                "{:34} {:8} {:6} steps {cpu_s:8.3} s CPU {wall_s:8.3} s {rss_mib:6.1} MiB {each:8.1} µs CPU a step",
                figure.work, figure.program, figure.steps
            );
        }
    }
    Ok(Exit::Ok)
}

fn figures(folder: &Path, quick: bool) -> Result<Vec<Figure>, Failure> {
    let (layers, width, flat) = if quick {
        (10, 100, 100)
    } else {
        (100, 100, 1000)
    };
    let flowrun = std::env::current_exe()?.display().to_string();
    let mut programs: Vec<Program> = vec![(
        "flowrun",
        vec![flowrun, "pipeline.yaml".into(), "--quiet".into()],
    )];
    let ninja = Command::new("ninja").arg("--version").output();
    if ninja.is_ok_and(|o| o.status.success()) {
        programs.push(("ninja", vec!["ninja".into(), "--quiet".into()]));
    }
    let mut all = Vec::new();
    for (program, command) in &programs {
        let mut add = |work, steps, cost| {
            all.push(Figure {
                work,
                program: (*program).to_owned(),
                steps,
                cost,
            });
        };
        let layered = folder.join(format!("{program}-layered"));
        write_layered(&layered, layers, width)?;
        let cold = measure(&layered, command)?;
        add("all of a layered graph", layers * width, cold);
        add(
            "nothing changed",
            layers * width,
            median(|_| measure(&layered, command))?,
        );
        // ninja has no early cutoff: it would do most of the graph again.
        if *program == "flowrun" {
            let edited = |i| {
                std::fs::write(layered.join("src/s_0"), format!("# edit {i}\nvalue 0\n"))?;
                measure(&layered, command)
            };
            add(
                "a comment in one source changed",
                layers * width,
                median(edited)?,
            );
        }
    }
    for (program, cost) in in_turn(folder, &programs, flat)? {
        all.push(Figure {
            work: "all of a flat graph",
            program: program.to_owned(),
            steps: flat,
            cost,
        });
    }
    let steps = layers * width;
    let own = vec![
        std::env::current_exe()?.display().to_string(),
        "bench".into(),
        "engine".into(),
        "--in-process".into(),
        steps.to_string(),
    ];
    all.push(Figure {
        work: "steps inside the process, cold",
        program: "flowrun".into(),
        steps,
        cost: median(|_| measure(folder, &own))?,
    });
    Ok(all)
}

/// What each program costs for a flat graph, of which nothing was made before.
fn in_turn(
    folder: &Path,
    programs: &[Program],
    steps: usize,
) -> Result<Vec<(&'static str, Cost)>, Failure> {
    let mut costs = vec![Vec::with_capacity(ROUNDS); programs.len()];
    for round in 0..ROUNDS {
        for turn in 0..programs.len() {
            // None always comes after another: the disk may still be at work for that.
            let at = (round + turn) % programs.len();
            let (program, command) = &programs[at];
            let flat = folder.join(format!("{program}-flat-{round}"));
            write_flat(&flat, steps)?;
            costs[at].push(measure(&flat, command)?);
        }
    }
    let names = programs.iter().map(|(program, _)| *program);
    Ok(names.zip(costs.into_iter().map(middle)).collect())
}

fn median(once: impl FnMut(usize) -> Result<Cost, Failure>) -> Result<Cost, Failure> {
    Ok(middle((0..RUNS).map(once).collect::<Result<Vec<_>, _>>()?))
}

/// The middle one of some by their time, which must be there.
fn middle(mut costs: Vec<Cost>) -> Cost {
    costs.sort_by(|a, b| a.cpu_s.total_cmp(&b.cpu_s));
    let at = costs.len() / 2;
    costs.swap_remove(at)
}

/// The same graph as `pipeline.yaml` and `build.ninja`: the first layer strips comments, so
/// an edit of one ends after one step.
fn write_layered(folder: &Path, layers: usize, width: usize) -> std::io::Result<()> {
    std::fs::create_dir_all(folder.join("src"))?;
    let mut yaml = String::from("name: bench\nsteps:\n");
    let mut ninja = String::from("rule sh\n  command = $cmd\n");
    for j in 0..width {
        std::fs::write(
            folder.join(format!("src/s_{j}")),
            format!("# edit\nvalue {j}\n"),
        )?;
        let _ = write!(
            yaml,
            "  l0-{j}:\n    run: grep -v '^#' \"$p\" > \"$out\"\n    in: {{ p: {{ file: src/s_{j} }} }}\n    out: {{ out: out }}\n"
        );
        let _ = write!(
            ninja,
            "build out/l0_{j}: sh src/s_{j}\n  cmd = grep -v '^#' src/s_{j} > out/l0_{j}\n"
        );
    }
    for l in 1..layers {
        for j in 0..width {
            let before = NEIGHBOURS.map(|n| (j + n) % width);
            let [a, b, c] = before.map(|n| format!("l{}-{n}.out", l - 1));
            let _ = write!(
                yaml,
                "  l{l}-{j}:\n    run: cksum \"$a\" \"$b\" \"$c\" > \"$out\"\n    in: {{ a: {a}, b: {b}, c: {c} }}\n    out: {{ out: out }}\n"
            );
            let files = before.map(|n| format!("out/l{}_{n}", l - 1)).join(" ");
            let _ = write!(
                ninja,
                "build out/l{l}_{j}: sh {files}\n  cmd = cksum {files} > out/l{l}_{j}\n"
            );
        }
    }
    std::fs::write(folder.join("pipeline.yaml"), yaml)?;
    std::fs::write(folder.join("build.ninja"), ninja)
}

/// Independent steps that write one small file each.
fn write_flat(folder: &Path, steps: usize) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let mut yaml = String::from("name: bench\nsteps:\n");
    let mut ninja = String::from("rule sh\n  command = $cmd\n");
    for i in 0..steps {
        let _ = write!(
            yaml,
            "  t{i}:\n    run: echo {i} > \"$out\"\n    out: {{ out: out }}\n"
        );
        let _ = write!(ninja, "build out/t{i}: sh\n  cmd = echo {i} > out/t{i}\n");
    }
    std::fs::write(folder.join("pipeline.yaml"), yaml)?;
    std::fs::write(folder.join("build.ninja"), ninja)
}

/// A step that writes a few bytes.
struct Tiny;

impl Step for Tiny {
    fn kind(&self) -> &'static str {
        "tiny"
    }
    fn version(&self) -> u32 {
        1
    }
    fn about(&self) -> &'static str {
        "Writes its number."
    }
    fn params_schema(&self) -> Value {
        json!({ "type": "object" })
    }
    fn inputs(&self) -> Vec<Port> {
        Vec::new()
    }
    fn outputs(&self) -> Vec<Port> {
        vec![Port::new("out", "file", "The number.")]
    }
    fn run(&self, ctx: &StepContext) -> Result<StepOutcome, StepError> {
        let path = ctx.output("out");
        std::fs::write(&path, ctx.params.to_string()).map_err(|e| StepError::io(&path, &e))?;
        Ok(StepOutcome::default())
    }
}

/// Runs so many tiny steps in a fresh cache below the working folder.
fn in_process(steps: usize) -> Result<(), Failure> {
    let folder = PathBuf::from(format!("in-process-{}", std::process::id()));
    let step: Arc<dyn Step> = Arc::new(Tiny);
    let node = |i: usize| StepNode {
        params: json!({ "number": i }),
        key_params: json!({ "number": i }),
        ..StepNode::new(format!("t{i}"), Action::Uses(Arc::clone(&step)))
    };
    let pipeline = Pipeline {
        name: "bench".into(),
        about: None,
        file: "bench.yaml".into(),
        root: ".".into(),
        profiles: Vec::new(),
        params: BTreeMap::new(),
        models: BTreeMap::new(),
        pools: BTreeMap::new(),
        runners: BTreeMap::new(),
        hooks: BTreeMap::new(),
        tracking: Tracking::default(),
        uses: BTreeMap::new(),
        steps: (0..steps).map(node).map(Arc::new).collect(),
        sources: Vec::new(),
        warnings: Diagnostics::default(),
    };
    let open = OpenOptions::no_wait("flowrun bench");
    let cache = Arc::new(Cache::open(&folder, &open)?);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (events, _) = tokio::sync::mpsc::unbounded_channel();
    let run = run_pipeline(
        Arc::new(pipeline),
        cache,
        World::default(),
        run_options(None, &Scope::default()),
        Cancel::default(),
        events,
    );
    let summary = runtime.block_on(run)?;
    std::fs::remove_dir_all(&folder)?;
    if summary.ran == steps {
        return Ok(());
    }
    let text = format!("{} of {steps} steps ran", summary.ran);
    Err(Failure::new(Exit::StepFailed, text))
}
