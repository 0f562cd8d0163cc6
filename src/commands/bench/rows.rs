//! `flowrun bench rows`: what the steps that pass rows on cost with many of them.
//!
//! The steps run one by one, each in a process of its own with what it reads from the cache, so
//! that peak memory is that step's; then all in one run, from an empty cache.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use serde::Serialize;
use serde_json::json;

use super::cost::{Cost, measure};
use super::oracle::Oracle;
use crate::args::{GlobalArgs, RowsBench};
use crate::exit::{Exit, Failure};
use crate::output;

/// Labels of the rows; there are at least as many rows.
const LABELS: u64 = 10;
/// The step that asks the server.
const BOOTSTRAP: &str = "bootstrap";
/// The steps in the order in which they are measured; those of [`PIPELINE`] and [`LABELLING`].
const STEPS: [&str; 5] = [
    "load",
    "filter-top-n",
    "split",
    "convert-to-messages",
    BOOTSTRAP,
];
/// Every step gets all rows.
const PIPELINE: &str = "\
name: rows
programs:
  classify:
    predict:
      adapter: compact
      instructions: Classify the bank customer's query by intent.
      inputs: [{ name: text }]
      outputs: [{ name: label, type: label }]
steps:
  load:
    uses: load
    with: { name: rows, train: { file: train.csv }, test: { file: test.csv } }
  filter-top-n:
    uses: filter-top-n
    in: { train: load.train, test: load.test }
    with: { n: 10 }
  split:
    uses: split
    in: { rows: filter-top-n.train }
    with: { labelled: 0 }
  convert-to-messages:
    uses: convert-to-messages
    in: { rows: [filter-top-n.train], labels: filter-top-n.labels }
    with: { program: classify }
";
/// What follows [`PIPELINE`] where the rows are labelled.
const LABELLING: &str = "  bootstrap:
    uses: bootstrap
    in: { unlabelled: split.unlabelled, labels: filter-top-n.labels }
    with: { program: classify, model: oracle }
models:
  oracle: { provider: openai, base_url: \"URL\", model: oracle, concurrency: 64 }
";

/// What one process took.
#[derive(Debug, Serialize)]
struct Figure {
    /// Of 10⁶ bytes.
    peak_mb: f64,
    /// From start to end.
    seconds: f64,
    /// Of all its threads and children, user and system.
    cpu_seconds: f64,
}

impl From<Cost> for Figure {
    fn from(cost: Cost) -> Self {
        Self {
            peak_mb: cost.rss_mib * 1024.0 * 1024.0 / 1e6,
            seconds: cost.wall_s,
            cpu_seconds: cost.cpu_s,
        }
    }
}

impl Figure {
    fn cell(&self) -> String {
        format!("{:.0} MB, {:.2} s", self.peak_mb, self.seconds)
    }
}

/// What one number of rows took.
#[derive(Debug, Serialize)]
struct Measured {
    rows: u64,
    csv_bytes: u64,
    /// Whether `bootstrap` ran, alone and in the chain.
    labelled: bool,
    /// Each step by itself.
    steps: BTreeMap<&'static str, Figure>,
    /// All steps in one run.
    chain: Figure,
}

/// Measures, and shows the figures.
#[allow(clippy::print_stderr)]
pub(crate) fn rows(args: &RowsBench, global: &GlobalArgs) -> Result<Exit, Failure> {
    let oracle = Oracle::start(&label(0))?;
    let mut all = Vec::with_capacity(args.rows.len());
    for rows in &args.rows {
        let tell = |what: &str| {
            if !global.quiet && !global.json {
                eprintln!("{rows} rows: {what}");
            }
        };
        let oracle = (*rows <= args.label_rows).then_some(&oracle);
        all.push(measured(*rows, oracle, &tell)?);
    }
    match global.json {
        true => output::json(&json!({ "label_rows": args.label_rows, "measured": all })),
        false => output::print(&table(&all)),
    }
}

/// Without an oracle no rows are labelled.
fn measured(rows: u64, oracle: Option<&Oracle>, tell: &dyn Fn(&str)) -> Result<Measured, Failure> {
    let folder = tempfile::Builder::new()
        .prefix("flowrun-bench-")
        .tempdir()?;
    let csv_bytes = write_project(folder.path(), rows, oracle)?;
    let mut steps = BTreeMap::new();
    for step in STEPS {
        if step == BOOTSTRAP && oracle.is_none() {
            continue;
        }
        tell(step);
        steps.insert(step, run(folder.path(), &["--until", step])?);
    }
    all_asked(rows, oracle)?;
    std::fs::remove_dir_all(folder.path().join(".flowrun"))?;
    tell("all steps in one run");
    let chain = run(folder.path(), &[])?;
    all_asked(rows, oracle)?;
    folder.close()?;
    Ok(Measured {
        rows,
        csv_bytes,
        labelled: oracle.is_some(),
        steps,
        chain,
    })
}

fn run(folder: &Path, scope: &[&str]) -> Result<Figure, Failure> {
    let flowrun = std::env::current_exe()?.display().to_string();
    let mut command = vec![flowrun, "pipeline.yaml".to_owned(), "--quiet".to_owned()];
    command.extend(scope.iter().map(|word| (*word).to_owned()));
    Ok(measure(folder, &command)?.into())
}

/// Figures of fewer rows than there are would be worth nothing.
fn all_asked(rows: u64, oracle: Option<&Oracle>) -> Result<(), Failure> {
    match oracle.map(Oracle::calls) {
        Some(calls) if calls < rows => Err(Failure::new(
            Exit::Internal,
            format!("`bootstrap` asked {calls} times about {rows} rows: nothing is measured"),
        )),
        _ => Ok(()),
    }
}

/// Writes the pipeline and its rows; gives the size of the training rows in bytes.
fn write_project(folder: &Path, rows: u64, oracle: Option<&Oracle>) -> Result<u64, Failure> {
    let mut pipeline = PIPELINE.to_owned();
    if let Some(oracle) = oracle {
        pipeline += &LABELLING.replace("URL", oracle.url());
    }
    std::fs::write(folder.join("pipeline.yaml"), pipeline)?;
    write_rows(&folder.join("test.csv"), LABELS)?;
    write_rows(&folder.join("train.csv"), rows)
}

/// No two texts are the same: the answer to one would be kept for the other.
fn write_rows(path: &Path, rows: u64) -> Result<u64, Failure> {
    let write = || -> std::io::Result<u64> {
        let mut file = BufWriter::new(File::create(path)?);
        writeln!(file, "text,label")?;
        for row in 0..rows {
            let label = label(row % LABELS);
            writeln!(
                file,
                "query {row:08}: why has my new card not come yet and where is it,{label}"
            )?;
        }
        file.flush()?;
        Ok(file.get_ref().metadata()?.len())
    };
    write().map_err(|e| {
        let text = format!(
            "{}: cannot be written: {e}; name a folder with more room by `TMPDIR`",
            path.display()
        );
        Failure::new(Exit::Internal, text)
    })
}

fn label(number: u64) -> String {
    format!("label_{number}")
}

fn table(all: &[Measured]) -> String {
    let mut text = "| rows | CSV |".to_owned();
    for step in STEPS {
        let _ = write!(text, " `{step}` |");
    }
    let _ = writeln!(
        text,
        " all in one run |\n|{}",
        "---|".repeat(STEPS.len() + 3)
    );
    for one in all {
        let _ = write!(text, "| {} | {} |", one.rows, output::bytes(one.csv_bytes));
        for step in STEPS {
            let cell = one.steps.get(step).map_or("–".to_owned(), Figure::cell);
            let _ = write!(text, " {cell} |");
        }
        let _ = writeln!(text, " {} |", one.chain.cell());
    }
    if all.iter().any(|one| !one.labelled) {
        text +=
            "\nWhere `bootstrap` has no figure, the one run is without it too (`--label-rows`).\n";
    }
    text
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn figure() -> Figure {
        Figure::from(Cost {
            cpu_s: 1.0,
            wall_s: 0.5,
            rss_mib: 25.0,
        })
    }

    #[test]
    fn a_step_that_did_not_run_has_no_figure() {
        let all = [Measured {
            rows: 1000,
            csv_bytes: 73_011,
            labelled: false,
            steps: BTreeMap::from([("load", figure())]),
            chain: figure(),
        }];
        let text = table(&all);
        let line = "| 1000 | 73.0 kB | 26 MB, 0.50 s | – | – | – | – | 26 MB, 0.50 s |\n";
        assert!(text.contains(line), "{text}");
        assert!(text.contains("--label-rows"), "{text}");
        let columns = |line: &str| line.matches('|').count();
        let counts: Vec<usize> = text.lines().take(3).map(columns).collect();
        assert_eq!(counts, [9, 9, 9], "{text}");
    }

    #[test]
    fn rows_are_about_70_bytes_and_all_labels_are_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.csv");
        let bytes = write_rows(&path, 1000).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.len() as u64, bytes);
        assert!((65_000..75_000).contains(&bytes), "{bytes}");
        assert_eq!(text.lines().count(), 1001);
        for number in 0..LABELS {
            assert!(text.contains(&format!(",{}\n", label(number))));
        }
    }
}
