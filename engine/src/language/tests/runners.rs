//! `runners:` and a step's `runner`.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};

use super::{load_options, mistakes_in, object, project, vocabulary};
use crate::language::load_pipeline;
use crate::pipeline::RunnerKind;
use crate::runner::{JobKind, JobSystem};
use crate::step::{StepError, World};

/// A job system that has settings and cannot be opened.
pub(super) struct Farm;

impl JobKind for Farm {
    fn name(&self) -> &'static str {
        "farm"
    }
    fn about(&self) -> &'static str {
        "A farm."
    }
    fn settings_schema(&self) -> Value {
        object(
            &json!({"address": {"type": "string", "pattern": "^https?://"}}),
            &["address"],
        )
    }
    fn example(&self) -> &'static str {
        "{ address: 'http://farm' }"
    }
    fn open(&self, _: &Value, _: &World) -> Result<Box<dyn JobSystem>, StepError> {
        Err(StepError::failed("there is no farm"))
    }
    fn sees(&self, settings: &Value, remote: &Path) -> Result<(), StepError> {
        match remote.starts_with("/barn") && settings["address"] == "http://farm" {
            true => Ok(()),
            false => Err(StepError::invalid("it is in no barn").help("carry it in")),
        }
    }
}

pub(super) fn kinds() -> std::collections::BTreeMap<String, Arc<dyn JobKind>> {
    [("farm".to_owned(), Arc::new(Farm) as Arc<dyn JobKind>)].into()
}

const MAIN: &str = "\
params: { host: farm }
runners:
  farm: { address: 'http://${{ params.host }}', jobs: 5 }
profiles:
  big:
    runners: { farm: { jobs: 99 } }
steps:
  a: { run: ls, runner: farm, resources: { cpu: 2, custom: { plough: 1 } } }
  load: { uses: load, runner: farm, with: { path: x } }
";

#[test]
fn any_step_may_be_a_job_and_a_profile_changes_where() {
    let dir = project(&[("main.yaml", MAIN)]);
    let mut options = load_options(dir.path());
    let file = dir.path().join("main.yaml");
    let pipeline = load_pipeline(&file, &vocabulary(), &options).unwrap();
    let farm = &pipeline.runners["farm"];
    assert_eq!((farm.settings.jobs, farm.settings.attempts), (5, 3));
    assert_eq!(farm.own, json!({"address": "http://farm"}));
    for step in &pipeline.steps {
        assert_eq!(step.runner, RunnerKind::Job("farm".to_owned()));
    }
    assert!((pipeline.steps[0].resources.custom["plough"] - 1.0).abs() < 1e-9);
    options.profiles = vec!["big".into()];
    let big = load_pipeline(&file, &vocabulary(), &options).unwrap();
    assert_eq!(big.runners["farm"].settings.jobs, 99);
}

#[test]
fn what_is_wrong_with_a_runner_is_told_where_it_stands() {
    for (from, to, place, words) in [
        (
            "jobs: 5",
            "jbos: 5",
            "main.yaml:3:49",
            "did you mean `jobs`?",
        ),
        ("jobs: 5", "jobs: 0", "main.yaml:3:55", ""),
        ("'http://$", "'ftp://$", "main.yaml:3:20", ""),
        (
            "  farm: {",
            "  fram: {",
            "main.yaml:3:3",
            "did you mean `farm`?",
        ),
        (
            "ls, runner: farm",
            "ls, runner: fram",
            "main.yaml:8:25",
            "did you mean `farm`?",
        ),
        (
            "jobs: 5",
            "env: [PATH, NOWHERE]",
            "main.yaml:3:61",
            "export NOWHERE",
        ),
        (
            "jobs: 5",
            "shared: { nowhere: /mnt }",
            "main.yaml:3:59",
            "no folder `nowhere`",
        ),
        ("plough: 1", "plough: x", "main.yaml:8:70", ""),
    ] {
        let found = mistakes_in(&[("main.yaml", &MAIN.replace(from, to))]);
        assert!(
            found
                .iter()
                .any(|m| m.starts_with(place) && m.contains(words)),
            "{to}: {found:#?}"
        );
    }
    let nowhere = mistakes_in(&[("main.yaml", "steps:\n  a: { run: ls, runner: farm }\n")]);
    assert!(
        nowhere[0].contains("`runners: { farm: { address: 'http://farm' } }`"),
        "{nowhere:#?}"
    );
    let here = "steps:\n  a: { run: ls, resources: { custom: { plough: 1 } } }\n";
    let here = mistakes_in(&[("main.yaml", here)]);
    assert!(here[0].contains("`custom` resources"), "{here:#?}");
}

#[test]
fn a_remote_folder_that_the_workers_do_not_see_is_told_where_they_are_to_use_it() {
    let shipped = MAIN.replace("jobs: 5", "through: remote");
    for (text, folder, told) in [
        (shipped.as_str(), Some("/elsewhere"), true),
        (shipped.as_str(), Some("/barn/store"), false),
        (shipped.as_str(), None, false),
        (MAIN, Some("/elsewhere"), false),
    ] {
        let dir = project(&[("main.yaml", text)]);
        let mut options = load_options(dir.path());
        options.remote_folder = folder.map(Into::into);
        let file = dir.path().join("main.yaml");
        let errors = load_pipeline(&file, &vocabulary(), &options).err();
        let errors = errors.map(|found| found.errors).unwrap_or_default();
        let shown: Vec<String> = errors.iter().map(|e| e.render_plain()).collect();
        assert_eq!(shown.len(), usize::from(told), "{folder:?}: {shown:#?}");
        let right = |text: &String| {
            let place = "main.yaml:3:58: error: it is in no barn\n";
            text.contains(place) && text.contains("help: carry it in")
        };
        assert!(shown.iter().all(right), "{shown:#?}");
    }
}
