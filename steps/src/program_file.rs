//! [`ProgramFile`]: the `program` artifact: a prompt with its demos, or a fitted classifier.

use std::path::Path;

use flowrun_engine::step::StepError;
use flowrun_lm::classifier::{Classifier, ClassifierError, ClassifierSpec, Method, fit};
use flowrun_lm::lineage::Lineage;
use flowrun_lm::optimize::KnnFewShot;
use flowrun_lm::program::{Program, ProgramSpec, RowInput, SavedProgram};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::format_version::FormatVersion;
use crate::leakage::id_and_text;
use crate::models::{EncoderSpec, Host, ModelSpec, encoder_spec, open_encoder};
use crate::rows::{Row, read_json, write_json};

/// Column and field of the label of programs that have no fields of their own.
const LABEL: &str = "label";

/// Column of the text that classifiers read.
pub(crate) const TEXT: &str = "text";

/// Labelled rows that are most like a query as its demos.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct KnnSpec {
    /// Demos for each query.
    #[serde(default = "default_k")]
    #[schemars(range(min = 1))]
    pub k: usize,
    /// Name of the model in `models:` that turns texts into vectors.
    #[schemars(with = "String", extend("x-flowrun-ref" = "models"))]
    pub embedder: serde_json::Value,
    /// Whether the model first answers every row, so that what it gets right is shown with all its
    /// outputs, such as the reasoning: one call a row.
    #[serde(default)]
    pub bootstrap: bool,
}

fn default_k() -> usize {
    5
}

impl KnnSpec {
    /// The optimizer with its encoder opened, and the encoder's entry, pinned.
    ///
    /// # Errors
    /// When the encoder cannot be had.
    pub fn open(&self, host: &Host<'_>) -> Result<(KnnFewShot, serde_json::Value), StepError> {
        let pinned = pinned(&encoder_spec(&self.embedder)?, host)?;
        let knn = KnnFewShot {
            k: self.k,
            bootstrap: self.bootstrap,
            embedder: open_encoder(&pinned, host)?,
        };
        Ok((knn, entry_of(pinned)?))
    }
}

/// The encoder by digest: what was made of one encoder's vectors means nothing on another's.
fn pinned(named: &EncoderSpec, host: &Host<'_>) -> Result<EncoderSpec, StepError> {
    let config = named
        .config
        .as_ref()
        .map(|config| config.pinned(host.world));
    Ok(EncoderSpec {
        weights: named.weights.pinned(host.world)?,
        tokenizer: named.tokenizer.pinned(host.world)?,
        config: config.transpose()?,
    })
}

fn entry_of(encoder: EncoderSpec) -> Result<serde_json::Value, StepError> {
    serde_json::to_value(ModelSpec::SentenceEncoder(Box::new(encoder)))
        .map_err(|e| StepError::failed(e.to_string()))
}

/// A program that is ready to run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProgramFile {
    /// Asks a language model.
    Prompt(SavedProgram),
    /// Calls none.
    Classifier(FittedProgram),
}

/// A fitted classifier with the settings that it was fitted by.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FittedProgram {
    /// Version of this format.
    #[serde(default, skip_serializing_if = "FormatVersion::is_first")]
    pub version: FormatVersion<1>,
    /// Its settings, with its sentence encoder.
    pub spec: ClassifierSpec,
    /// The classifier.
    pub classifier: Classifier,
    /// The rows that it was fitted on; not known when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lineage: Option<Lineage>,
}

impl ProgramFile {
    /// A prompt without demos for these labels.
    ///
    /// # Errors
    /// Invalid when the declaration contradicts itself.
    pub fn plain(spec: &ProgramSpec, labels: &[String]) -> Result<Self, StepError> {
        let program = spec
            .build(labels)
            .map_err(|e| StepError::invalid(format!("the program: {e}")))?;
        let mut saved = SavedProgram::new(spec.clone(), labels.to_vec(), &program);
        saved.lineage = Some(Lineage::default());
        Ok(Self::Prompt(saved))
    }

    /// A classifier fitted on labelled rows and, where its method uses them, unlabelled ones.
    ///
    /// # Errors
    /// Invalid when a setting or a label cannot be used; failed when the encoder fails.
    pub fn fit(
        spec: &ClassifierSpec,
        labels: &[String],
        labelled: &[Row],
        unlabelled: &[Row],
        host: &Host<'_>,
    ) -> Result<Self, StepError> {
        let named = encoder_spec(&spec.embedder)?;
        let pinned = pinned(&named, host)?;
        let encoder = open_encoder(&pinned, host)?;
        let gold: Vec<(&str, &str)> = labelled
            .iter()
            .filter_map(|row| Some((row.text.as_str(), row.label.as_deref()?)))
            .collect();
        let texts: Vec<&str> = unlabelled.iter().map(|row| row.text.as_str()).collect();
        let classifier =
            fit(spec, encoder.as_ref(), labels, &gold, &texts).map_err(|error| match error {
                ClassifierError::Embed(_) => StepError::failed(error.to_string()),
                _ => StepError::invalid(error.to_string()),
            })?;
        let mut lineage = Lineage::default();
        lineage.train(id_and_text(labelled));
        if spec.method == Method::SelfTraining {
            lineage.train(id_and_text(unlabelled));
        }
        let embedder = entry_of(pinned)?;
        Ok(Self::Classifier(FittedProgram {
            version: FormatVersion,
            spec: ClassifierSpec {
                embedder,
                ..spec.clone()
            },
            classifier,
            lineage: Some(lineage),
        }))
    }

    /// Reads a file.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn load(path: &Path) -> Result<Self, StepError> {
        read_json(path)
    }

    /// Writes a file.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), StepError> {
        write_json(path, self)
    }

    /// The prompt, ready to run.
    ///
    /// # Errors
    /// Invalid for a classifier, or when the saved form does not fit.
    pub fn prompt(&self) -> Result<(&SavedProgram, Program), StepError> {
        match self {
            Self::Prompt(saved) => {
                let program = saved
                    .build()
                    .map_err(|e| StepError::invalid(e.to_string()))?;
                Ok((saved, program))
            }
            Self::Classifier(_) => Err(StepError::invalid(
                "an `embedding_classifier` has no prompt",
            )),
        }
    }

    /// What it reads of a row.
    ///
    /// # Errors
    /// Invalid when the saved form does not fit.
    pub fn row_inputs(&self) -> Result<Vec<RowInput>, StepError> {
        match self {
            Self::Prompt(_) => Ok(self.prompt()?.1.row_inputs()),
            Self::Classifier(_) => Ok(vec![RowInput::text(TEXT)]),
        }
    }

    /// The labels to choose from.
    #[must_use]
    pub fn labels(&self) -> &[String] {
        match self {
            Self::Prompt(saved) => &saved.labels,
            Self::Classifier(fitted) => fitted.classifier.labels(),
        }
    }

    /// The labels, where it has no other answers: a classifier, or a prompt whose answer is of
    /// type `label`.
    #[must_use]
    pub fn closed_labels(&self) -> Option<&[String]> {
        let closed = match self {
            Self::Prompt(saved) => {
                let prompt = saved.spec.prompt();
                prompt.is_some_and(|prompt| prompt.label_output().is_some())
            }
            Self::Classifier(_) => true,
        };
        Some(self.labels()).filter(|labels| closed && !labels.is_empty())
    }

    /// The rows that it came from; `None` when that is not known.
    #[must_use]
    pub fn lineage(&self) -> Option<&Lineage> {
        match self {
            Self::Prompt(saved) => saved.lineage.as_ref(),
            Self::Classifier(fitted) => fitted.lineage.as_ref(),
        }
    }

    /// Where that is written; a program whose rows are not known stays so.
    pub(crate) fn lineage_mut(&mut self) -> Option<&mut Lineage> {
        match self {
            Self::Prompt(saved) => saved.lineage.as_mut(),
            Self::Classifier(fitted) => fitted.lineage.as_mut(),
        }
    }

    /// Says which rows it came from; none where that is not known.
    pub(crate) fn set_lineage(&mut self, lineage: Option<Lineage>) {
        match self {
            Self::Prompt(saved) => saved.lineage = lineage,
            Self::Classifier(fitted) => fitted.lineage = lineage,
        }
    }

    /// The field that its label is in.
    #[must_use]
    pub fn label_field(&self) -> &str {
        let prompt = match self {
            Self::Prompt(saved) => saved.spec.prompt(),
            Self::Classifier(_) => None,
        };
        prompt
            .and_then(|prompt| prompt.label_output())
            .map_or(LABEL, |output| &output.name)
    }
}
