//! `tracking:`.

use super::{load_options, mistakes_in, project, vocabulary};
use crate::language::load_pipeline;

const MAIN: &str = "\
tracking:
  mlflow:
    experiment: '${{ run.name }}-x'
    artifacts: [load.train, pick.choice]
    register: { name: m, output: pick.choice }
steps:
  load: { uses: load, with: { path: x } }
  pick: { run: ls, out: { choice: c } }
  each: { run: ls, foreach: { n: [1, 2] }, out: { o: o } }
";

#[test]
fn outputs_are_named_by_their_steps() {
    let dir = project(&[("main.yaml", MAIN)]);
    let file = dir.path().join("main.yaml");
    let options = load_options(dir.path());
    let pipeline = load_pipeline(&file, &vocabulary(), &options).unwrap();
    let mlflow = &pipeline.tracking.mlflow;
    assert_eq!(mlflow.experiment.as_deref(), Some("main-x"));
    let outputs = mlflow.artifacts.iter();
    let outputs: Vec<String> = outputs
        .map(|o| format!("{}.{}", o.step, o.output))
        .collect();
    assert_eq!(outputs, ["load.train", "pick.choice"]);
    let register = mlflow.register.as_ref().unwrap();
    assert_eq!(
        (register.name.as_str(), register.output.step.as_str()),
        ("m", "pick")
    );
}

#[test]
fn a_folder_for_event_files_is_named_with_or_without_mlflow() {
    let steps = "steps:\n  a: { run: ls }\n";
    let text = format!("tracking:\n  tensorboard: {{ folder: out/tb }}\n{steps}");
    let dir = project(&[("main.yaml", &text)]);
    let options = load_options(dir.path());
    let file = dir.path().join("main.yaml");
    let pipeline = load_pipeline(&file, &vocabulary(), &options).unwrap();
    let tensorboard = pipeline.tracking.tensorboard.unwrap();
    assert_eq!(tensorboard.folder.to_str(), Some("out/tb"));
    for wrong in ["{}", "{ folder: '' }"] {
        let text = format!("tracking:\n  tensorboard: {wrong}\n{steps}");
        let found = mistakes_in(&[("main.yaml", &text)]);
        assert!(found[0].starts_with("main.yaml:2:"), "{found:#?}");
        assert!(found[0].contains("needs `folder`"), "{found:#?}");
    }
    let both = MAIN.replace("tracking:\n", "tracking:\n  tensorboard: { folder: tb }\n");
    let dir = project(&[("main.yaml", &both)]);
    let options = load_options(dir.path());
    let file = dir.path().join("main.yaml");
    let pipeline = load_pipeline(&file, &vocabulary(), &options).unwrap();
    assert!(pipeline.tracking.tensorboard.is_some());
    assert_eq!(pipeline.tracking.mlflow.artifacts.len(), 2);
}

#[test]
fn an_output_that_is_not_there_is_told_where_it_stands() {
    for (from, to, line, words) in [
        ("[load.train,", "[lod.train,", 4, "did you mean `load`?"),
        ("[load.train,", "[load.trian,", 4, "`trian`"),
        ("[load.train,", "[load,", 4, "step.output"),
        ("output: pick.choice", "output: each.o", 5, "is a list"),
        ("name: m, ", "", 5, "`register` needs"),
        ("experiment:", "experimant:", 3, "`experimant`"),
    ] {
        assert!(MAIN.contains(from), "{from}");
        let text = MAIN.replace(from, to);
        let found = mistakes_in(&[("main.yaml", &text)]);
        let told =
            |shown: &String| shown.contains(&format!("main.yaml:{line}:")) && shown.contains(words);
        assert!(found.iter().any(told), "{to}: {found:#?}");
    }
}
