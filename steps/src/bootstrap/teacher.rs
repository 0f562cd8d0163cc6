//! Who labels: a classifier that is fitted, a prompt of `programs:` with its draws and demos, or a
//! program that an earlier step made; and whether a checkpoint may answer for it. Labels no row.
//!
//! A student that labels is a teacher like any other: the rows that trained it and chose it are
//! those that the teacher came from.

use flowrun_engine::finding::{Finding, Severity};
use flowrun_engine::pipeline::{Action, StepNode};
use flowrun_engine::step::{StepContext, StepError};
use flowrun_lm::program::{MajoritySpec, ProgramSpec};

use super::{ADAPTER, KIND, PROGRAM, Params};
use crate::answer::examples;
use crate::checkpoint::Checkpoint;
use crate::leakage::{id_and_text, learn_from_teachers, lineage_of};
use crate::models::Host;
use crate::program_file::ProgramFile;
use crate::rows::{Row, read_rows};

/// Why nobody can label, and what to do.
#[derive(Debug, PartialEq, Eq)]
struct Refusal {
    /// The param that says it, unless one that is missing is the matter.
    field: Option<&'static str>,
    message: &'static str,
    help: &'static str,
}

const NO_MODEL: Refusal = Refusal {
    field: Some(PROGRAM),
    message: "an `embedding_classifier` asks no model, so no checkpoint can answer for it",
    help: "leave `adapter` out, or name the student's program and its `model`",
};

/// What is wrong with who labels, as the params and the inputs that the step `takes` say.
fn refusal(params: &Params, takes: impl Fn(&str) -> bool) -> Option<Refusal> {
    let refusal = |field, message, help| {
        Some(Refusal {
            field,
            message,
            help,
        })
    };
    let connected = takes(PROGRAM);
    match &params.program {
        Some(_) if connected => refusal(
            Some(PROGRAM),
            "there are two programs: that of `in` and that of `with`",
            "keep the one under `in` for a program that a step made, or the one under `with` for \
             one of `programs:`",
        ),
        None if !connected => refusal(
            None,
            "there is no program that labels",
            "set `program` under `with` to a name of `programs:`, or connect it under `in` to a \
             program that a step made, such as `select.program`",
        ),
        Some(ProgramSpec::EmbeddingClassifier(_)) if takes(ADAPTER) => Some(NO_MODEL),
        None if params.samples != 1 => refusal(
            Some("samples"),
            "a program that a step made is asked once a row",
            "leave `samples` out, or name one of `programs:` under `with`",
        ),
        None if params.knn.is_some() => refusal(
            Some("knn"),
            "a program that a step made has its demos",
            "leave `knn` out, or name one of `programs:` under `with`",
        ),
        _ => None,
    }
}

/// The steps of a pipeline that nobody can label for.
pub(crate) fn check(steps: &[StepNode]) -> Vec<Finding> {
    let found = |step: &StepNode| {
        let Action::Uses(kind) = &step.action else {
            return None;
        };
        if kind.kind() != KIND {
            return None;
        }
        // What an expression over `item` decides is seen when the step runs.
        let params: Params = serde_json::from_value(step.params.clone()).ok()?;
        let Refusal {
            field,
            message,
            help,
        } = refusal(&params, |port| {
            step.inputs.get(port).is_some_and(|given| !given.is_empty())
        })?;
        let path = ["with"].into_iter().chain(field);
        Some(Finding {
            severity: Severity::Error,
            step: step.name.clone(),
            path: path.map(str::to_owned).collect(),
            code: "no-teacher",
            message: message.to_owned(),
            help: help.to_owned(),
        })
    };
    steps.iter().filter_map(found).collect()
}

/// The program that labels, with the rows that it, and the checkpoint that answers, came from.
///
/// # Errors
/// Invalid when the params and inputs name nobody who can label; else when something cannot be
/// read, or a classifier cannot be fitted.
pub(super) fn teacher(
    ctx: &StepContext,
    params: &Params,
    labels: &[String],
    checkpoint: Option<&Checkpoint>,
) -> Result<ProgramFile, StepError> {
    let refused = |why: Refusal| StepError::invalid(why.message).help(why.help);
    let takes = |port: &str| ctx.input_opt(port).is_some();
    if let Some(why) = refusal(params, takes) {
        return Err(refused(why));
    }
    let gold = match ctx.input_opt("labelled") {
        Some(input) => read_rows(&input.path)?,
        None => Vec::new(),
    };
    let host = Host::from(ctx);
    let mut file = match &params.program {
        None => ProgramFile::load(&ctx.input(PROGRAM)?.path)?,
        Some(ProgramSpec::EmbeddingClassifier(spec)) => {
            let rows = read_rows(&ctx.input("unlabelled")?.path)?;
            let total = rows.len() as u64;
            ctx.reporter
                .progress(0, total, "rows", "fitting the teacher");
            ProgramFile::fit(spec, labels, &gold, &rows, &host)?
        }
        Some(prompt) => prompted(prompt, params, labels, &gold, &host)?,
    };
    if let Some(checkpoint) = checkpoint {
        if matches!(file, ProgramFile::Classifier(_)) {
            return Err(refused(NO_MODEL));
        }
        let lineage = lineage_of(&file, Some(checkpoint));
        file.set_lineage(lineage);
    }
    match file.lineage_mut() {
        Some(lineage) => learn_from_teachers(ctx, lineage, &gold)?,
        None => ctx.reporter.warning(
            "it is not known which rows trained the teacher: where a `finetune` did, give that its `lineage`",
        ),
    }
    Ok(file)
}

/// The prompt with its draws.
pub(super) fn drawn(spec: &ProgramSpec, params: &Params) -> ProgramSpec {
    match params.samples {
        1 => spec.clone(),
        samples => ProgramSpec::Majority(MajoritySpec {
            programs: vec![spec.clone()],
            samples,
            temperature: params.temperature,
        }),
    }
}

/// The teacher that asks a model, with its draws and demos.
fn prompted(
    spec: &ProgramSpec,
    params: &Params,
    labels: &[String],
    gold: &[Row],
    host: &Host<'_>,
) -> Result<ProgramFile, StepError> {
    let mut file = ProgramFile::plain(&drawn(spec, params), labels)?;
    let Some(knn) = &params.knn else {
        return Ok(file);
    };
    if knn.bootstrap {
        return Err(StepError::invalid("`knn.bootstrap` belongs to `optimize`")
            .help("leave it out; give rows with their `reasoning` through `explain` instead"));
    }
    if gold.is_empty() {
        return Err(StepError::invalid("`knn` needs rows to choose demos from")
            .help("connect `labelled` to rows with their label"));
    }
    let (knn, encoder) = knn.open(host)?;
    let (_, program) = file.prompt()?;
    let examples = examples(gold, file.label_field());
    let program = knn
        .apply(&program, &examples)
        .map_err(|e| StepError::failed(e.to_string()))?;
    if let ProgramFile::Prompt(saved) = &mut file {
        saved.keep_neighbours(&program, &encoder);
    }
    if let Some(lineage) = file.lineage_mut() {
        lineage.train(id_and_text(gold));
    }
    Ok(file)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use flowrun_engine::{LoadOptions, load_pipeline};

    /// A step that labels: `IN` is what else is connected, `WITH` what else is set.
    const PIPELINE: &str = "
models:
  student: { provider: embedded, weights: { file: w } }
  encoder: { provider: sentence-encoder, weights: { file: w }, tokenizer: { file: t } }
programs:
  classify:
    predict: { instructions: Sort., inputs: [{ name: text }], outputs: [{ name: label, type: label }] }
  fitted:
    embedding_classifier: { embedder: \"${{ models.encoder }}\", method: centroid }
steps:
  label:
    uses: bootstrap
    in: { unlabelled: { file: rows }, labels: { file: rows } IN }
    with: { model: student WITH }
";

    /// What is said of the step before it runs.
    fn found(connected: &str, with: &str) -> Vec<String> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("rows"), "").unwrap();
        let file = dir.path().join("main.yaml");
        let text = PIPELINE.replace("IN", connected).replace("WITH", with);
        std::fs::write(&file, text).unwrap();
        let options = LoadOptions {
            root: Some(dir.path().to_owned()),
            ..LoadOptions::default()
        };
        let Err(found) = load_pipeline(&file, &crate::registry(), &options) else {
            return Vec::new();
        };
        found.errors.iter().map(|one| one.render_plain()).collect()
    }

    #[test]
    fn a_teacher_that_cannot_be_is_told_before_the_run() {
        const PROGRAM: &str = ", program: { file: rows }";
        const ADAPTER: &str = ", adapter: { file: rows }";
        let both = format!("{PROGRAM}{ADAPTER}");
        for (connected, with) in [
            ("", ", program: classify"),
            ("", ", program: fitted"),
            (ADAPTER, ", program: classify"),
            (ADAPTER, ", program: classify, samples: 3"),
            (PROGRAM, ""),
            (both.as_str(), ""),
        ] {
            let found = found(connected, with);
            assert_eq!(found, Vec::<String>::new(), "{connected} {with}");
        }
        for (connected, with, said) in [
            ("", "", "there is no program that labels"),
            (ADAPTER, "", "there is no program that labels"),
            (PROGRAM, ", program: classify", "there are two programs"),
            (ADAPTER, ", program: fitted", "no checkpoint can answer"),
            (PROGRAM, ", samples: 3", "is asked once a row"),
            (
                PROGRAM,
                ", knn: { embedder: encoder }",
                "a program that a step made has its demos",
            ),
        ] {
            let found = found(connected, with);
            assert_eq!(found.len(), 1, "{connected} {with}: {found:#?}");
            assert!(found[0].contains(said), "{said}: {found:#?}");
        }
    }
}
