//! Fits on small synthetic clusters.
#![allow(clippy::unwrap_used)]

use super::*;

const WIDTH: usize = 12;

/// A sentence "class index" becomes a noisy unit vector near its class's axis.
struct Clusters;

/// A repeatable number in -1..1.
fn noise(seed: usize) -> f32 {
    let mixed = (seed as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    ((mixed >> 40) as f32 / (1u64 << 23) as f32) - 1.0
}

fn vector(class: usize, row: usize) -> Vec<f32> {
    let mut v: Vec<f32> = (0..WIDTH)
        .map(|j| 0.45 * noise(1 + row * WIDTH + j))
        .collect();
    v[class] += 1.0;
    let norm = v.iter().map(|x| x * x).sum::<f32>().sqrt();
    v.iter().map(|x| x / norm).collect()
}

impl Embedder for Clusters {
    fn embed(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, String> {
        let one = |text: &&str| {
            let (class, row) = text
                .split_once(' ')
                .ok_or_else(|| format!("odd text `{text}`"))?;
            let class = LABELS
                .iter()
                .position(|l| l.starts_with(class))
                .ok_or("odd class")?;
            Ok(vector(class, row.parse().unwrap_or(77)))
        };
        texts.iter().map(one).collect()
    }
}

const LABELS: [&str; 3] = ["ant_hill", "bee_hive", "cat_house"];

fn labels() -> Vec<String> {
    LABELS.iter().map(|l| (*l).to_owned()).collect()
}

fn spec(method: Method) -> ClassifierSpec {
    ClassifierSpec {
        method,
        ..ClassifierSpec::new("minilm")
    }
}

fn rows(from: usize, count: usize) -> Vec<(String, usize)> {
    let class = ["ant", "bee", "cat"];
    (from..from + count)
        .map(|i| (format!("{} {i}", class[i % 3]), i % 3))
        .collect()
}

fn fitted(spec: &ClassifierSpec) -> Classifier {
    let pool = rows(1000, 240);
    let pool: Vec<&str> = pool.iter().map(|(text, _)| text.as_str()).collect();
    let labelled = [
        ("ant 1", "ant_hill"),
        ("bee 2", "bee_hive"),
        ("cat 3", "cat_house"),
    ];
    fit(spec, &Clusters, &labels(), &labelled, &pool).unwrap()
}

fn accuracy(classifier: &Classifier) -> f64 {
    let test = rows(5000, 300);
    let texts: Vec<&str> = test.iter().map(|(text, _)| text.as_str()).collect();
    let predicted = classifier.predict(&Clusters, &texts).unwrap();
    let right = predicted
        .iter()
        .zip(&test)
        .filter(|(p, t)| p.label == LABELS[t.1])
        .count();
    for p in &predicted {
        assert!((p.probs.iter().sum::<f32>() - 1.0).abs() < 1e-4);
        assert_eq!(p.confidence, p.probs.iter().copied().fold(0.0, f32::max));
    }
    right as f64 / test.len() as f64
}

#[test]
fn every_method_learns_the_clusters() {
    for method in [
        Method::SelfTraining,
        Method::Centroid,
        Method::Knn,
        Method::LogisticRegression,
    ] {
        let found = accuracy(&fitted(&spec(method)));
        assert!(found > 0.8, "{method:?}: {found}");
    }
}

#[test]
fn unlabelled_rows_help() {
    let alone = accuracy(&fitted(&spec(Method::LogisticRegression)));
    let with_pool = accuracy(&fitted(&spec(Method::SelfTraining)));
    assert!(with_pool > alone, "{with_pool} {alone}");
}

#[test]
fn a_saved_classifier_predicts_the_same() {
    for method in [Method::SelfTraining, Method::Centroid, Method::Knn] {
        let classifier = fitted(&spec(method));
        let text = serde_json::to_string(&classifier).unwrap();
        let read: Classifier = serde_json::from_str(&text).unwrap();
        assert_eq!(read, classifier);
        let texts = ["ant 9", "bee 8"];
        assert_eq!(
            read.predict(&Clusters, &texts).unwrap(),
            classifier.predict(&Clusters, &texts).unwrap()
        );
    }
}

#[test]
fn the_first_saved_form_is_still_read() {
    let old = r#"{"version":1,"labels":["a","b"],"width":1,
        "model":{"linear":{"weights":[[2.0],[-2.0]],"intercepts":[0.0,0.0]}}}"#;
    let read: Classifier = serde_json::from_str(old).unwrap();
    assert_eq!(read.predict_vectors(&[vec![1.0]]).unwrap()[0].label, "a");
    for (from, to, say) in [
        ("\"version\":1", "\"version\":9", "version 9"),
        ("[[2.0],", "[[2.0, 1.0],", "do not fit"),
        ("[\"a\",\"b\"]", "[\"a\",\"b\",\"c\"]", "do not fit"),
    ] {
        let broken = old.replacen(from, to, 1);
        let error = serde_json::from_str::<Classifier>(&broken)
            .unwrap_err()
            .to_string();
        assert!(error.contains(say), "{error}");
    }
}

#[test]
fn without_a_pool_self_training_is_logistic_regression() {
    let spec = ClassifierSpec {
        final_c: 100.0,
        weight_labelled: 1.0,
        ..spec(Method::SelfTraining)
    };
    let labelled = [
        ("ant 1", "ant_hill"),
        ("bee 2", "bee_hive"),
        ("cat 3", "cat_house"),
    ];
    let one = fit(&spec, &Clusters, &labels(), &labelled, &[]).unwrap();
    let plain = ClassifierSpec {
        method: Method::LogisticRegression,
        ..spec
    };
    assert_eq!(
        one,
        fit(&plain, &Clusters, &labels(), &labelled, &[]).unwrap()
    );
}

#[test]
fn a_label_without_rows_is_learnt_from_its_name_or_refused() {
    let labelled = [("ant 1", "ant_hill"), ("bee 2", "bee_hive")];
    let by_name = fit(
        &spec(Method::Centroid),
        &Clusters,
        &labels(),
        &labelled,
        &[],
    )
    .unwrap();
    assert_eq!(
        by_name.predict(&Clusters, &["cat 5"]).unwrap()[0].label,
        "cat_house"
    );
    let without = ClassifierSpec {
        label_names: false,
        ..spec(Method::Centroid)
    };
    let error = fit(&without, &Clusters, &labels(), &labelled, &[]).unwrap_err();
    assert_eq!(
        error,
        ClassifierError::EmptyClass {
            label: "cat_house".to_owned()
        }
    );
}

#[test]
fn input_that_cannot_be_used_is_named() {
    let spec = spec(Method::Knn);
    let message = |labels: &[String], labelled: &[(&str, &str)]| {
        fit(&spec, &Clusters, labels, labelled, &[])
            .unwrap_err()
            .to_string()
    };
    let unknown = message(&labels(), &[("ant 1", "ant_hill"), ("cat 1", "dog")]);
    assert!(unknown.contains("row 1 has the label `dog`"), "{unknown}");
    let twice = message(&["a".to_owned(), "a".to_owned()], &[]);
    assert!(twice.contains("`a` is in the list twice"), "{twice}");
    let odd = message(&labels(), &[("whatever", "ant_hill")]);
    assert!(odd.contains("odd text `whatever`"), "{odd}");

    let classifier = fitted(&spec);
    let short = classifier
        .predict_vectors(&[vec![0.5; 3]])
        .unwrap_err()
        .to_string();
    assert!(short.contains("has 3 numbers, expected 12"), "{short}");
    let nan = classifier
        .predict_vectors(&[vec![f32::NAN; WIDTH]])
        .unwrap_err()
        .to_string();
    assert!(nan.contains("not finite"), "{nan}");
    for broken in [
        ClassifierSpec {
            c: 0.0,
            ..spec.clone()
        },
        ClassifierSpec {
            final_c: f64::NAN,
            ..spec.clone()
        },
        ClassifierSpec {
            weight_labelled: -1.0,
            ..spec.clone()
        },
        ClassifierSpec {
            k: 0,
            ..spec.clone()
        },
        ClassifierSpec {
            keep: vec![0],
            ..spec.clone()
        },
    ] {
        assert!(
            matches!(broken.check(), Err(ClassifierError::Setting { .. })),
            "{broken:?}"
        );
    }
}

#[test]
fn settings_have_defaults_and_a_schema() {
    let spec: ClassifierSpec = serde_json::from_str(r#"{"embedder": "minilm"}"#).unwrap();
    assert_eq!(spec, ClassifierSpec::new("minilm"));
    assert!(serde_json::from_str::<ClassifierSpec>(r#"{"embedder": "m", "kk": 1}"#).is_err());
    let schema = schemars::schema_for!(ClassifierSpec);
    let schema = serde_json::to_value(schema).unwrap();
    assert_eq!(schema["properties"]["embedder"]["x-flowrun-ref"], "models");
    assert_eq!(schema["required"], serde_json::json!(["embedder"]));
    assert_eq!(
        schema["properties"]["keep"]["default"],
        serde_json::json!([20, 50, 90, 130, 150])
    );
}
