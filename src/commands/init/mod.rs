//! `flowrun init`: a pipeline for the user's own texts.
//!
//! What is not given by a flag is asked for on a terminal, and else taken from the file where
//! it is plain. The pipeline is checked before it is left.

mod data;
mod question;
mod template;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use flowrun_engine::language::project_root;
use flowrun_engine::{LoadOptions, load_pipeline};

use self::data::Data;
use self::question::Asker;
use self::template::Plan;
use crate::args::{GlobalArgs, InitArgs};
use crate::exit::{Exit, Failure};
use crate::output::{self, count};
use crate::surroundings::absolute;

/// Writes a pipeline for labelled texts.
pub(crate) fn init(args: &InitArgs, global: &GlobalArgs) -> Result<Exit, Failure> {
    let asks = !args.yes && std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
    let mut stdin = std::io::stdin().lock();
    let mut asker = Asker::new(asks.then_some(&mut stdin));
    let file = match &args.data {
        Some(file) => file.clone(),
        None => PathBuf::from(
            asker
                .ask(
                    "File with your texts and labels (CSV, JSONL, Parquet)",
                    None,
                )
                .ok_or_else(|| {
                    Failure::usage(
                        "name the file with your texts and labels: `flowrun init FILE.csv`",
                    )
                })?,
        ),
    };
    let data = Data::read(&file)?;
    let text = data.column(args.text.as_deref(), data.guess_text(), "text", &mut asker)?;
    let label = data.column(
        args.label.as_deref(),
        data.guess_label(&text),
        "label",
        &mut asker,
    )?;
    let name = match &args.name {
        Some(name) => plain_name(name),
        None => {
            let guess = plain_name(&file.file_stem().unwrap_or_default().to_string_lossy());
            plain_name(
                &asker
                    .ask("Name of the pipeline", Some(&guess))
                    .unwrap_or(guess),
            )
        }
    };
    let output = match &args.output {
        Some(output) => output.clone(),
        None => PathBuf::from(format!("pipelines/{name}.yaml")),
    };
    if output.exists() && !args.force {
        let text = format!(
            "{} is there already; `--force` writes over it",
            output.display()
        );
        return Err(Failure::usage(text));
    }
    let plan = Plan {
        data_path: below(&project_root(&output), &file)?,
        test_path: match &args.test {
            Some(test) => Some(below(&project_root(&output), test)?),
            None => None,
        },
        facts: data.facts(&text, &label, args.test.is_some())?,
        text,
        label,
        name,
    };
    write(&plan, &output)?;
    told(&plan, &output, global)
}

/// Writes the pipeline, once it has passed the checks beside the place where it is to be.
fn write(plan: &Plan, output: &Path) -> Result<(), Failure> {
    let folder = output.parent().filter(|p| !p.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    let draft = tempfile::Builder::new()
        .prefix(".init-")
        .suffix(".yaml")
        .tempfile_in(folder)?;
    std::fs::write(draft.path(), plan.yaml())?;
    load_pipeline(
        draft.path(),
        &flowrun_steps::registry(),
        &LoadOptions::default(),
    )?;
    Ok(std::fs::write(output, plan.yaml())?)
}

fn told(plan: &Plan, output: &Path, global: &GlobalArgs) -> Result<Exit, Failure> {
    let facts = &plan.facts;
    if global.json {
        return output::json(&serde_json::json!({
            "pipeline": output,
            "name": plan.name,
            "text": plan.text,
            "label": plan.label,
            "labels": facts.labels,
            "labelled": facts.labelled,
            "unlabelled": facts.unlabelled,
        }));
    }
    if global.quiet {
        return Ok(Exit::Ok);
    }
    let job = if plan.distils() {
        "a classifier fitted on the labelled rows labels the others; a small model learns from both"
    } else {
        "a small model learns from the labelled rows"
    };
    let file = output.display();
    output::print(&format!(
        "wrote {file}: {}, {} with a label, {} without; {job}\n\n  \
         flowrun graph {file}      what it does\n  \
         flowrun doctor {file}     what this machine lacks for it\n  \
         flowrun {file}            run it\n",
        count(facts.labels, "label"),
        count(facts.labelled, "row"),
        facts.unlabelled,
    ))
}

/// A name of lower-case letters, digits and dashes.
fn plain_name(text: &str) -> String {
    let dashed = text.chars().map(|c| match c.to_ascii_lowercase() {
        c if c.is_ascii_alphanumeric() => c,
        _ => '-',
    });
    let name: String = dashed.collect();
    let words: Vec<&str> = name.split('-').filter(|word| !word.is_empty()).collect();
    match words.is_empty() {
        true => "mine".to_owned(),
        false => words.join("-"),
    }
}

/// A file as the project sees it: relative to its root where it lies below.
fn below(root: &Path, file: &Path) -> Result<PathBuf, Failure> {
    let (root, file) = (absolute(root)?, absolute(file)?);
    Ok(file
        .strip_prefix(&root)
        .map_or(file.clone(), Path::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain() {
        let named = ["My Data (v2)", "été", "a_b.c", "--"].map(plain_name);
        assert_eq!(named, ["my-data-v2", "t", "a-b-c", "mine"]);
    }
}
