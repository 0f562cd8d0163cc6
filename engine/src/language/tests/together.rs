//! What a vocabulary has against steps together is told where they say it.

use super::{load_options, mistakes_in, project, vocabulary};
use crate::finding::{Finding, Severity};
use crate::language::load_pipeline;
use crate::pipeline::StepNode;

/// A `finetune` must not learn too fast: 1 is certain to fail, 0.5 may.
pub(super) fn check(steps: &[StepNode]) -> Vec<Finding> {
    let speed = |step: &StepNode| step.params["lr"].as_f64().unwrap_or_default();
    let found = steps.iter().filter(|step| speed(step) >= 0.5);
    let finding = |step: &StepNode| Finding {
        severity: match speed(step) >= 1.0 {
            true => Severity::Error,
            false => Severity::Warning,
        },
        step: step.name.clone(),
        path: vec!["with".into(), "lr".into()],
        code: "too-fast",
        message: format!("`{}` is too fast", step.name),
        help: "slow down".into(),
    };
    found.map(finding).collect()
}

const MAIN: &str = "\
models: { m: { provider: x } }
steps:
  load: { uses: load, with: { path: x } }
  train:
    uses: finetune
    in: { rows: load.train }
    with: { model: m, lr: 0.1 }
profiles:
  fast:
    steps:
      train: { with: { lr: 0.6 } }
";

#[test]
fn an_error_keeps_the_pipeline_from_being_run() {
    let found = mistakes_in(&[("main.yaml", &MAIN.replace("lr: 0.1", "lr: 1.5"))]);
    assert_eq!(found.len(), 1, "{found:#?}");
    let place = "main.yaml:7:27: error: `train` is too fast";
    assert!(found[0].starts_with(place), "{found:#?}");
    assert!(found[0].contains("help: slow down"), "{found:#?}");
    // It says nothing while something else is wrong.
    let both = MAIN
        .replace("lr: 0.1", "lr: 1.5")
        .replace("path: x", "pth: x");
    let found = mistakes_in(&[("main.yaml", &both)]);
    assert!(found.iter().all(|m| !m.contains("too fast")), "{found:#?}");
}

#[test]
fn a_warning_stands_where_the_profile_says_it() {
    let dir = project(&[("main.yaml", MAIN)]);
    let mut options = load_options(dir.path());
    let file = dir.path().join("main.yaml");
    let plain = load_pipeline(&file, &vocabulary(), &options).unwrap();
    assert!(plain.warnings.errors.is_empty());
    options.profiles = vec!["fast".into()];
    let fast = load_pipeline(&file, &vocabulary(), &options).unwrap();
    let [warning] = fast.warnings.errors.as_slice() else {
        unreachable!("{:#?}", fast.warnings);
    };
    assert_eq!((warning.line, warning.column), (11, 28));
    let shown = warning.render_plain();
    assert!(
        shown.contains("main.yaml:11:28: warning: `train` is too fast"),
        "{shown}"
    );
}
