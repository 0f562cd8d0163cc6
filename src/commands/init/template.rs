//! The pipeline's text, from a template and what is known of the data.

use std::path::PathBuf;

use super::data::Facts;

const HEAD: &str = include_str!("head.yaml");
const TAIL: &str = include_str!("tail.yaml");
/// Rows without a label that make it worth to have a teacher label them.
const WORTH_A_TEACHER: usize = 30;

const TEACH: &str = "  teach:                # labels the rows that have no label: self-training on sentence vectors
    embedding_classifier:
      embedder: ${{ models.embedder }}
      method: self_training
";
const BOOTSTRAP: &str = "
  bootstrap:
    about: The teacher labels the rows without a label.
    uses: bootstrap
    in:
      unlabelled: split.unlabelled
      labelled: split.labelled
      labels: labels.labels
    with:
      program: teach
";
const TEST_ORACLE: &str = "
  test-teacher:
    uses: evaluate
    in:
      rows: labels.test
      program: bootstrap.teacher
    with:
      name: teacher
      role: oracle
";
const REPORT_ORACLE: &str = "      kept: bootstrap.rows
      dropped: bootstrap.dropped
";

/// What the pipeline is made from.
pub(super) struct Plan {
    pub(super) name: String,
    pub(super) data_path: PathBuf,
    pub(super) test_path: Option<PathBuf>,
    pub(super) text: String,
    pub(super) label: String,
    pub(super) facts: Facts,
}

impl Plan {
    /// A teacher labels rows; else the student learns from the labels that there are.
    pub(super) fn distils(&self) -> bool {
        self.facts.unlabelled >= WORTH_A_TEACHER
    }

    /// The pipeline.
    pub(super) fn yaml(&self) -> String {
        let distils = self.distils();
        let either = |yes: &str, no: &str| if distils { yes } else { no }.to_owned();
        let pool = if distils {
            self.facts.unlabelled
        } else {
            self.facts.train
        };
        let about = if distils {
            "A small model that sorts texts, taught by a classifier fitted on the labelled rows."
        } else {
            "A small model that sorts texts, taught by the labelled rows."
        };
        let test = self.test_path.as_ref().map(|path| {
            let path = quoted(&path.to_string_lossy());
            format!("      test:\n        file: {path}\n")
        });
        let fields = [
            ("name", self.name.clone()),
            ("about", quoted(about)),
            ("dev", (pool / 8).clamp(5, 500).to_string()),
            ("val", (pool / 16).clamp(3, 100).to_string()),
            ("train", pool.clamp(1, 2000).to_string()),
            ("teach", either(TEACH, "")),
            ("data", quoted(&self.data_path.to_string_lossy())),
            ("test", test.unwrap_or_default()),
            ("text", quoted(&self.text)),
            ("label", quoted(&self.label)),
            ("n", self.facts.labels.to_string()),
            ("bootstrap", either(BOOTSTRAP, "")),
            ("holdout_rows", either("bootstrap.rows", "split.labelled")),
            (
                "messages_rows",
                either("[holdout.finetune, split.labelled]", "[holdout.finetune]"),
            ),
            (
                "teachers",
                either("      teachers: [bootstrap.teacher]\n", ""),
            ),
            ("test_oracle", either(TEST_ORACLE, "")),
            ("report_oracle", either(REPORT_ORACLE, "")),
            ("report_test", either("        - test-teacher.scores\n", "")),
            (
                "oracle",
                either("self-training on sentence vectors", "none"),
            ),
        ];
        let mut yaml = format!("{HEAD}{TAIL}");
        for (field, value) in fields {
            yaml = yaml.replace(&format!("{{{{{field}}}}}"), &value);
        }
        yaml
    }
}

/// A text as YAML reads it for certain: JSON is YAML.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_field_of_the_template_is_left() {
        for unlabelled in [0, 500] {
            let plan = Plan {
                name: "mine".into(),
                data_path: "a \"b\".csv".into(),
                test_path: Some("t.csv".into()),
                text: "text: x".into(),
                label: "label".into(),
                facts: Facts {
                    labels: 3,
                    labelled: 100,
                    unlabelled,
                    train: 75,
                },
            };
            let yaml = plan.yaml().replace("${{", "");
            assert!(!yaml.contains("{{"), "{yaml}");
            assert_eq!(yaml.contains("uses: bootstrap"), unlabelled > 0);
        }
    }
}
