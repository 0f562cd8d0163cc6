//! `flowrun lineage`: which steps, runs and inputs made an artifact, up to the sources.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use console::style;
use flowrun_cache::CacheReader;
use flowrun_engine::lineage::{Lineage, MadeBy, MadeOutput, Origin, RunLineage, runs_by_key};
use serde_json::Value;

use crate::args::GlobalArgs;
use crate::exit::{Exit, Failure};
use crate::reporter::duration;
use crate::{output, recorded};

/// Digits that a digest must have at least.
const DIGEST: usize = 6;
/// Characters of a digest that are shown.
const SHOWN: usize = 12;
/// Characters of a command or of params that are shown.
const LINE: usize = 100;

/// Shows the lineage of an artifact.
pub(crate) fn lineage(
    artifact: &str,
    run: Option<&str>,
    global: &GlobalArgs,
) -> Result<Exit, Failure> {
    let reader = CacheReader::open(&global.cache_dir);
    let runs = match run {
        Some(name) => vec![recorded::find_dir(Some(name), global)?],
        None => reader.runs(),
    };
    let (run, made) = find(artifact, &runs, &reader)?;
    let lineage = run.of(made, &runs_by_key(&reader));
    if global.json {
        return output::json(&lineage);
    }
    output::print(&text(&lineage))
}

/// The newest of the runs that has the artifact.
fn find(
    artifact: &str,
    runs: &[PathBuf],
    reader: &CacheReader,
) -> Result<(RunLineage, MadeOutput), Failure> {
    let digest = digest_of(artifact, reader)?;
    let mut names = Vec::new();
    for dir in runs {
        let Ok(run) = RunLineage::load(dir, reader) else {
            continue;
        };
        let made = match &digest {
            Some(digest) => run.with_digest(digest),
            None => run.named(artifact),
        };
        if let Some(made) = made {
            return Ok((run, made));
        }
        if names.is_empty() {
            names = run.names();
        }
    }
    let text = match (digest, names.is_empty()) {
        (_, true) => "no run in the cache made anything".to_owned(),
        (Some(digest), false) => format!("no run made an artifact with the digest {digest}…"),
        (None, false) => format!(
            "`{artifact}` is neither a file, nor a digest, nor an output; the outputs are {}",
            names.join(", ")
        ),
    };
    Err(Failure::usage(text))
}

/// The digest of a file or folder, or the digits that were given.
fn digest_of(artifact: &str, reader: &CacheReader) -> Result<Option<String>, Failure> {
    let path = Path::new(artifact);
    if path.exists() {
        let there = reader.store().address_in_project(path)?;
        return Ok(Some(there.digest.to_hex()));
    }
    let digits = artifact.len() >= DIGEST && artifact.bytes().all(|b| b.is_ascii_hexdigit());
    Ok(digits.then(|| artifact.to_ascii_lowercase()))
}

fn text(lineage: &Lineage) -> String {
    let artifact = &lineage.artifact;
    let mut out = format!(
        "{} {}\n",
        name_of(artifact),
        style(short(&artifact.digest)).dim()
    );
    let mut shown = BTreeSet::new();
    step_text(&mut out, lineage, &artifact.step, 1, &mut shown);
    out
}

fn name_of(made: &MadeOutput) -> String {
    let label = made.label.as_ref().map(|l| format!("/{l}"));
    format!("{}.{}{}", made.step, made.output, label.unwrap_or_default())
}

/// A step below what it made, and what went into it below that.
fn step_text(
    out: &mut String,
    lineage: &Lineage,
    id: &str,
    depth: usize,
    shown: &mut BTreeSet<String>,
) {
    let indent = "  ".repeat(depth);
    let Some(made) = lineage.steps.iter().find(|s| s.step == id) else {
        return;
    };
    let step = style(id).bold();
    if !shown.insert(id.to_owned()) {
        out.push_str(&format!("{indent}made by {step}, see above\n"));
        return;
    }
    let run = made.made_in.as_ref().map(|run| format!(" in run {run}"));
    out.push_str(&format!(
        "{indent}made by {step} ({}){}, {}, {}\n",
        made.kind,
        run.unwrap_or_default(),
        made.made_at,
        duration(made.took_ms)
    ));
    for line in facts(made) {
        out.push_str(&format!("{indent}  {}\n", style(line).dim()));
    }
    for source in &made.sources {
        let digest = source.sha256.as_deref().map(short).unwrap_or_default();
        let line = format!(
            "{} ← {} (source) {}",
            source.param,
            source.name,
            style(digest).dim()
        );
        out.push_str(&format!("{indent}  {}\n", line.trim_end()));
    }
    for used in &made.inputs {
        let digest = style(short(&used.digest)).dim();
        let from = match &used.from {
            Origin::Step(before) => name_of(before),
            Origin::File(path) => format!("{} (source)", path.display()),
            Origin::Unknown => "not recorded".to_owned(),
        };
        out.push_str(&format!("{indent}  {} ← {from} {digest}\n", used.input));
        if let Origin::Step(before) = &used.from {
            step_text(out, lineage, &before.step, depth + 2, shown);
        }
    }
}

fn facts(made: &MadeBy) -> Vec<String> {
    let mut facts = Vec::new();
    if let Some(command) = &made.command {
        facts.push(format!("command {}", line(command)));
    }
    if made
        .params
        .as_object()
        .is_some_and(|params| !params.is_empty())
    {
        facts.push(format!("params {}", line(&made.params.to_string())));
    }
    let observed = made.observed.iter();
    facts
        .extend(observed.map(|(name, value): (&String, &Value)| {
            format!("{name} {}", line(&value.to_string()))
        }));
    facts
}

fn line(text: &str) -> String {
    let text = text.trim().replace('\n', "; ");
    if text.chars().count() <= LINE {
        return text;
    }
    text.chars().take(LINE - 1).chain(['…']).collect()
}

fn short(digest: &str) -> String {
    digest.chars().take(SHOWN).collect()
}
