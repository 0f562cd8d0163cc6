//! Each profile of a file by itself.

use super::{load_options, project, vocabulary};
use crate::language::{check_profiles, load_pipeline};

const MAIN: &str = "\
params: { n: 3 }
models: { m: { provider: x } }
steps:
  load: { uses: load, with: { path: x } }
  train:
    uses: finetune
    in: { rows: load.train }
    with: { model: m, lr: 0.1 }
profiles:
  good:
    params: { n: 4 }
  typo:
    steps:
      trian: { with: { lr: 0.2 } }
  param:
    params: { m: 4 }
  eager:
    steps:
      train: { with: { lr: 0.6 } }
  away:
    steps:
      load: { secrets: [NOWHERE] }
  small:
    steps:
      train: { with: { model: big } }
  big:
    models: { big: { provider: x } }
";

/// What is found only with a profile: the first line of each, paths relative to the folder.
fn found(text: &str) -> Vec<String> {
    let dir = project(&[("main.yaml", text)]);
    let options = load_options(dir.path());
    let file = dir.path().join("main.yaml");
    let plain = match load_pipeline(&file, &vocabulary(), &options) {
        Ok(pipeline) => pipeline.warnings.errors,
        Err(found) => found.errors,
    };
    let folder = format!("{}/", dir.path().display());
    let all = check_profiles(&file, &vocabulary(), &options, &plain);
    let shown = all.iter().map(|one| {
        assert!(one.found.message.contains(&format!("`{}`", one.profile)));
        let shown = one.found.render_plain().replace(&folder, "");
        shown.lines().next().unwrap_or_default().to_owned()
    });
    shown.collect()
}

const TYPO: &str =
    "main.yaml:14:7: warning: profile `typo` alone: `trian` has neither `uses` nor `run`";
const PARAM: &str = "main.yaml:16:15: error: profile `param`: unknown param `m`";
const EAGER: &str = "main.yaml:19:28: warning: profile `eager` alone: `train` is too fast";

#[test]
fn what_is_wrong_with_one_profile_alone_names_it_and_stands_where_it_says_it() {
    assert_eq!(found(MAIN), [TYPO, PARAM, EAGER]);
    let none = MAIN.split("profiles:").next().unwrap_or_default();
    assert!(found(none).is_empty());
}

#[test]
fn a_profile_that_lies_over_another_is_no_mistake() {
    let without = MAIN.replace("  big:\n    models: { big: { provider: x } }\n", "");
    let found = found(&without);
    let expected = "main.yaml:25:31: warning: profile `small` alone: there is no model `big`";
    assert_eq!(found, [TYPO, PARAM, EAGER, expected]);
}

#[test]
fn what_is_wrong_without_a_profile_is_not_told_again() {
    let wrong = MAIN.replace("path: x", "pth: x");
    // Nothing is said of how fast it learns while something else is wrong.
    assert_eq!(found(&wrong), [TYPO, PARAM]);
}
