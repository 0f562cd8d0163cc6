use std::path::Path;

use flowrun_cache::ArtifactStore;
use serde_json::json;

use super::*;
use crate::format_version::FormatVersion;
use crate::scores::ScoredRow;

fn program() -> ProgramFile {
    let spec = json!({"predict": {
        "inputs": [{"name": "text"}], "outputs": [{"name": "label", "type": "label"}],
    }});
    let labels = ["a".to_owned(), "b".to_owned()];
    ProgramFile::plain(&serde_json::from_value(spec).unwrap(), &labels).unwrap()
}

fn model(entry: serde_json::Value) -> ModelSpec {
    serde_json::from_value(entry).unwrap()
}

/// Ten rows, the last of which could not be read; nine are right.
fn scores(dataset: &str) -> Scores {
    let row = |at: usize| ScoredRow {
        id: format!("d:test:{at}"),
        text: format!("text {at}"),
        inputs: None,
        gold: "a".to_owned(),
        predicted: (at < 9).then(|| "a".to_owned()),
        correct: at < 9,
        confidence: None,
        raw: None,
        error: None,
    };
    let score = ProgramScore {
        n: 10,
        correct: 9,
        accuracy: 0.9,
        parse_failures: 1,
        rows: (0..10).map(row).collect(),
        ..ProgramScore::default()
    };
    Scores {
        version: FormatVersion,
        dataset: dataset.to_owned(),
        model: "m".to_owned(),
        programs: vec![score],
        comparison: None,
    }
}

fn write(
    folder: &Path,
    model: &ModelSpec,
    scores: &Scores,
    root: &Path,
) -> Result<Bundle, StepError> {
    write_with(folder, model, None, scores, root)
}

fn write_with(
    folder: &Path,
    model: &ModelSpec,
    adapter: Option<&Path>,
    scores: &Scores,
    root: &Path,
) -> Result<Bundle, StepError> {
    let parts = Parts {
        name: "intents",
        program: &program(),
        model: Some(model),
        adapter,
        sampling: SamplingSpec::default(),
        scores,
        smoke_rows: 4,
        agreement: 1.0,
    };
    let world = World {
        root: root.to_owned(),
        ..World::default()
    };
    Bundle::write(folder, &parts, &world)
}

/// A bundle for tests of other modules.
pub(crate) fn test_bundle(folder: &Path, entry: serde_json::Value, root: &Path) -> Bundle {
    write(folder, &model(entry), &scores("d"), root).unwrap()
}

#[test]
fn a_bundle_is_read_as_it_was_written_and_equal_parts_give_equal_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let remote = model(json!({"provider": "openai", "base_url": "http://h/v1", "model": "m"}));
    let [one, two] = ["one", "two"].map(|name| dir.path().join(name));
    let written = write(&one, &remote, &scores("d"), dir.path()).unwrap();
    write(&two, &remote, &scores("d"), dir.path()).unwrap();
    let digest = |folder: &Path| ArtifactStore::address_of(folder).unwrap().digest;
    assert_eq!(digest(&one), digest(&two));

    let read = Bundle::open(&one).unwrap();
    assert_eq!(read.manifest, written.manifest);
    assert_eq!(read.program, program());
    let rows = read.smoke_rows().unwrap();
    let ids: Vec<&str> = rows.iter().map(|row| row.id.as_str()).collect();
    assert_eq!(ids, ["d:test:0", "d:test:2", "d:test:5", "d:test:7"]);
    let card = std::fs::read_to_string(one.join(CARD)).unwrap();
    assert!(
        card.contains("| 10 | 9 | 90.0 % | 59.6 to 98.2 % | 1 |"),
        "{card}"
    );
    assert!(!card.contains("stand-in"), "{card}");
}

#[test]
fn a_bundles_template_is_told_what_its_checkpoint_was_trained_with() {
    let dir = tempfile::tempdir().unwrap();
    let entry = |told: serde_json::Value| {
        let entry = json!({
            "provider": "openai", "base_url": "http://h/v1", "model": "m",
            "chat_template_kwargs": told,
        });
        model(entry)
    };
    let quick = json!({"enable_thinking": false});
    let checkpoint = |name: &str, told: serde_json::Value| {
        let folder = dir.path().join(name);
        let checkpoint = Checkpoint {
            hosted: Some("ft:m".to_owned()),
            chat_template_kwargs: serde_json::from_value(told).unwrap(),
            ..Checkpoint::base()
        };
        checkpoint.save(&folder).unwrap();
        folder
    };
    let trained = checkpoint("trained", quick.clone());
    // As checkpoints were before they said it.
    let older = checkpoint("older", serde_json::Value::Null);
    for (at, (told, adapter, expected)) in [
        (json!({}), &trained, quick.clone()),
        (quick.clone(), &trained, quick.clone()),
        (json!({}), &older, json!({})),
        (quick.clone(), &older, quick.clone()),
    ]
    .into_iter()
    .enumerate()
    {
        let folder = dir.path().join(format!("bundle-{at}"));
        let model = entry(told);
        write_with(&folder, &model, Some(adapter), &scores("d"), dir.path()).unwrap();
        let bundle = Bundle::open(&folder).unwrap();
        assert_eq!(json!(bundle.template_arguments().unwrap()), expected);
        assert_eq!(
            bundle.manifest.model,
            Some(model),
            "the entry stays as it is"
        );
    }
    let folder = dir.path().join("refused");
    let other = entry(json!({"enable_thinking": true}));
    let refused = write_with(&folder, &other, Some(&trained), &scores("d"), dir.path());
    let error = refused.err().unwrap();
    assert!(
        error.message.contains("and the entry of `m`"),
        "{}",
        error.message
    );
    assert!(!folder.join(ADAPTER).exists());
}

#[test]
fn a_smoke_row_with_a_label_that_there_is_not_is_unknown() {
    let dir = tempfile::tempdir().unwrap();
    let remote = model(json!({"provider": "openai", "base_url": "http://h/v1", "model": "m"}));
    let mut scores = scores("d");
    scores.programs[0].rows[2].predicted = Some("made_up".to_owned());
    let bundle = write(&dir.path().join("b"), &remote, &scores, dir.path()).unwrap();
    let labels = bundle
        .smoke_rows()
        .unwrap()
        .into_iter()
        .map(|row| row.label);
    assert_eq!(labels.collect::<Vec<_>>(), ["a", UNKNOWN, "a", "a"]);
}

#[test]
fn the_card_says_whether_the_accuracy_is_clean() {
    let dir = tempfile::tempdir().unwrap();
    let remote = model(json!({"provider": "openai", "base_url": "http://h/v1", "model": "m"}));
    let known = |trained| {
        Some(crate::scores::Leakage {
            known: true,
            trained,
            ..Default::default()
        })
    };
    let said = [
        (known(0), "No row of the test set"),
        (known(2), "the accuracy is not clean"),
        (None, "It is not known"),
    ];
    for (at, (leakage, text)) in said.into_iter().enumerate() {
        let mut scores = scores("d");
        scores.programs[0].leakage = leakage;
        let folder = dir.path().join(at.to_string());
        write(&folder, &remote, &scores, dir.path()).unwrap();
        let card = std::fs::read_to_string(folder.join(CARD)).unwrap();
        assert!(card.contains(text), "{card}");
    }
}

#[test]
fn a_model_that_was_measured_on_the_stand_in_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let remote = model(json!({"provider": "openai", "base_url": "http://h/v1", "model": "m"}));
    write(
        &dir.path().join("b"),
        &remote,
        &scores("stand-in"),
        dir.path(),
    )
    .unwrap();
    let card = std::fs::read_to_string(dir.path().join("b").join(CARD)).unwrap();
    assert!(
        card.contains("stand-in data, not on real queries"),
        "{card}"
    );
}

#[test]
fn a_file_of_the_project_comes_along_and_is_pinned() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("models")).unwrap();
    std::fs::write(dir.path().join("models/w.gguf"), "weights").unwrap();
    let own = model(json!({"provider": "embedded", "weights": {"file": "models/w.gguf"}}));
    let folder = dir.path().join("bundle");
    let bundle = write(&folder, &own, &scores("d"), dir.path()).unwrap();
    let Some(ModelSpec::Embedded(spec)) = &bundle.manifest.model else {
        unreachable!("it was an embedded model");
    };
    // Found in the bundle alone, with the project gone.
    let world = World {
        root: folder.clone(),
        ..World::default()
    };
    std::fs::remove_dir_all(dir.path().join("models")).unwrap();
    let cancel = flowrun_engine::step::Cancel::default();
    let found = spec.weights.locate(&world, &cancel).unwrap();
    assert_eq!(std::fs::read_to_string(found.path).unwrap(), "weights");
    let inside = spec.weights.file.as_ref().unwrap();
    assert!(inside.starts_with(WEIGHTS) && inside.ends_with("w.gguf"));
    std::fs::write(folder.join(inside), "others").unwrap();
    assert!(spec.weights.locate(&world, &cancel).is_err());
}

#[test]
fn two_files_of_one_name_are_kept_apart() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("bundle");
    let world = |root: &Path| World {
        root: root.to_owned(),
        ..World::default()
    };
    let vendor = Vendor {
        folder: &folder,
        world: &world(dir.path()),
    };
    let kept = ["a", "b"].map(|model| {
        let file = Path::new(model).join("model.safetensors");
        std::fs::create_dir(dir.path().join(model)).unwrap();
        std::fs::write(dir.path().join(&file), model).unwrap();
        let weights = WeightsRef {
            file: Some(file),
            ..WeightsRef::default()
        };
        vendor.weights(&weights).unwrap()
    });
    let cancel = flowrun_engine::step::Cancel::default();
    for (weights, model) in kept.iter().zip(["a", "b"]) {
        assert_eq!(weights.name(), "model");
        let found = weights.locate(&world(&folder), &cancel).unwrap();
        assert_eq!(std::fs::read_to_string(found.path).unwrap(), model);
    }
}

#[test]
fn the_agreement_that_a_bundle_was_admitted_with_is_kept_where_it_is_not_whole() {
    let dir = tempfile::tempdir().unwrap();
    let remote = json!({"provider": "openai", "base_url": "http://h/v1", "model": "m"});
    let bundle = test_bundle(&dir.path().join("b"), remote, dir.path());
    let path = bundle.folder.join(MANIFEST);
    // As bundles were before there was such an entry.
    assert!(
        !std::fs::read_to_string(&path)
            .unwrap()
            .contains("agreement")
    );
    assert_eq!(
        Bundle::open(&bundle.folder).unwrap().manifest.agreement,
        1.0
    );
    let less = Manifest {
        agreement: 0.95,
        ..bundle.manifest
    };
    write_json(&path, &less).unwrap();
    assert_eq!(Bundle::open(&bundle.folder).unwrap().manifest, less);
}

#[test]
fn what_is_no_bundle_is_refused_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    let message = || Bundle::open(dir.path()).map(|_| ()).unwrap_err().message;
    assert!(message().contains("is no bundle"), "{}", message());
    std::fs::write(dir.path().join(MANIFEST), "{\"version\": 99}").unwrap();
    assert!(message().contains("format 99"), "{}", message());
    std::fs::write(dir.path().join(MANIFEST), "{\"version\": 1, \"nam\": 2}").unwrap();
    assert!(message().contains("`nam`"), "{}", message());

    let remote = model(json!({"provider": "openai", "base_url": "http://h/v1", "model": "m"}));
    let mut both = scores("d");
    both.programs.push(both.programs[0].clone());
    let error = write(&dir.path().join("b"), &remote, &both, dir.path()).map(|_| ());
    assert!(error.unwrap_err().message.contains("2 programs"));
}
