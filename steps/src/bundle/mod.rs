//! [`Bundle`]: the `bundle` artifact: a folder with all that answering takes, and what it was
//! measured to be worth. The server reads nothing else.
//!
//! | file | what |
//! |---|---|
//! | `bundle.json` | [`Manifest`] |
//! | `program.json` | the program with its demos |
//! | `adapter/` | the checkpoint, for a program that asks a model |
//! | `weights/` | files of the project that the model or the sentence encoder needs, each in a folder named by its digest |
//! | `smoke.jsonl` | held-out rows with the answers of the evaluation |
//! | `README.md` | the model card |

mod card;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use flowrun_engine::step::{StepError, World};
use flowrun_lm::program::SavedProgram;
use serde::{Deserialize, Serialize};

use crate::answer::{Answerer, SamplingSpec};
use crate::checkpoint::Checkpoint;
use crate::folder;
use crate::models::weights::WeightsRef;
use crate::models::{EncoderSpec, Host, ModelSpec, encoder_spec};
use crate::program_file::{FittedProgram, ProgramFile};
use crate::rows::{read_json, read_jsonl, write_json, write_jsonl};
use crate::scores::{ProgramKind, ProgramScore, Scores, question};

/// Format of the folder that this program writes and reads.
const VERSION: u32 = 1;
/// The label of an answer that could not be read.
pub const UNKNOWN: &str = "unknown";

const MANIFEST: &str = "bundle.json";
const PROGRAM: &str = "program.json";
pub(crate) const ADAPTER: &str = "adapter";
const WEIGHTS: &str = "weights";
const SMOKE: &str = "smoke.jsonl";
const CARD: &str = "README.md";
/// Hex digits of a digest that name a folder.
const SHORT: usize = 16;

/// Whether a folder is a bundle, by its looks.
#[must_use]
pub fn is_bundle(folder: &Path) -> bool {
    folder.join(MANIFEST).is_file()
}

/// What a bundle says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Format of the folder.
    pub version: u32,
    /// Name of what is deployed.
    pub name: String,
    /// The model's id at the server: `<base model>:<checkpoint>`, or the base model alone.
    pub model_id: String,
    /// The model that the program asks; a classifier asks none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelSpec>,
    /// How the model draws tokens.
    pub sampling: SamplingSpec,
    /// How it did on rows that it was not chosen by.
    pub measured: Measured,
    /// Share of the smoke rows that it must answer as when scored; all, where nothing is said.
    #[serde(default = "all", skip_serializing_if = "is_all")]
    pub agreement: f64,
}

fn all() -> f64 {
    1.0
}

fn is_all(agreement: &f64) -> bool {
    *agreement >= all()
}

/// How the program did on a set of rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// The data set; `stand-in` where it is one.
    pub dataset: String,
    /// Whether the program has optimised demos.
    pub program: ProgramKind,
    /// Rows asked.
    pub n: usize,
    /// Rows answered with the expected label.
    pub correct: usize,
    /// `correct / n`.
    pub accuracy: f64,
    /// Answers that could not be read.
    pub parse_failures: usize,
}

/// A held-out row with the answer of the evaluation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SmokeRow {
    /// Row id.
    pub id: String,
    /// The query.
    pub text: String,
    /// What the program is given, by the names of its inputs, where that is not the text alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inputs: Option<BTreeMap<String, serde_json::Value>>,
    /// The label that was given, right or wrong; [`UNKNOWN`] when the answer could not be read.
    pub label: String,
}

impl SmokeRow {
    /// The row as a server is asked.
    #[must_use]
    pub fn question(&self) -> serde_json::Value {
        question(&self.text, self.inputs.as_ref())
    }
}

/// What goes into a bundle.
pub struct Parts<'a> {
    /// Name of what is deployed.
    pub name: &'a str,
    /// The program.
    pub program: &'a ProgramFile,
    /// The model that it asks.
    pub model: Option<&'a ModelSpec>,
    /// The checkpoint's folder.
    pub adapter: Option<&'a Path>,
    /// How the model draws tokens.
    pub sampling: SamplingSpec,
    /// How it did on the test set.
    pub scores: &'a Scores,
    /// Rows to ask before it is used.
    pub smoke_rows: usize,
    /// Share of them that must be answered as when scored.
    pub agreement: f64,
}

/// A bundle on disk.
pub struct Bundle {
    /// Its folder.
    pub folder: PathBuf,
    /// What it says of itself.
    pub manifest: Manifest,
    /// Its program.
    pub program: ProgramFile,
}

impl Bundle {
    /// Writes a bundle into `folder`, which is made. Equal parts give equal bytes.
    ///
    /// # Errors
    /// Invalid when the parts do not belong together; failed when a file cannot be copied.
    pub fn write(folder: &Path, parts: &Parts<'_>, world: &World) -> Result<Self, StepError> {
        std::fs::create_dir_all(folder).map_err(|e| StepError::io(folder, &e))?;
        let [score] = parts.scores.programs.as_slice() else {
            return Err(StepError::invalid(format!(
                "the scores are of {} programs; a bundle holds one",
                parts.scores.programs.len()
            ))
            .help("give the scores of the chosen program alone on the test set"));
        };
        let vendor = Vendor { folder, world };
        let (program, model, model_id) = match parts.program {
            ProgramFile::Prompt(saved) => {
                let model = parts.model.ok_or_else(|| {
                    StepError::invalid("the program asks a language model, but none is named")
                        .help("set `model` to a name of `models:`")
                })?;
                let checkpoint = parts.adapter.map(Checkpoint::load).transpose()?;
                // What does not fit is found before anything is copied.
                model.template_arguments(checkpoint.as_ref())?;
                if let Some(from) = parts.adapter {
                    folder::copy(from, &folder.join(ADAPTER))?;
                }
                let id = match checkpoint {
                    Some(Checkpoint {
                        hosted: Some(id), ..
                    }) => id,
                    Some(checkpoint) if checkpoint.adapter.is_some() => {
                        format!("{}:{}", model.name(), checkpoint.name)
                    }
                    _ => model.name(),
                };
                (vendor.prompt(saved)?, Some(vendor.model(model)?), id)
            }
            ProgramFile::Classifier(fitted) => {
                let encoder = encoder_spec(&fitted.spec.embedder)?;
                let id = format!("{}-classifier", encoder.weights.name());
                let program = ProgramFile::Classifier(vendor.classifier(fitted, &encoder)?);
                (program, None, id)
            }
        };
        let manifest = Manifest {
            version: VERSION,
            name: parts.name.to_owned(),
            model_id,
            model,
            sampling: parts.sampling,
            measured: Measured {
                dataset: parts.scores.dataset.clone(),
                program: score.program,
                n: score.n,
                correct: score.correct,
                accuracy: score.accuracy,
                parse_failures: score.parse_failures,
            },
            agreement: parts.agreement,
        };
        program.save(&folder.join(PROGRAM))?;
        let smoke = smoke_rows(score, parts.smoke_rows);
        write_jsonl(&folder.join(SMOKE), &smoke)?;
        write_json(&folder.join(MANIFEST), &manifest)?;
        let path = folder.join(CARD);
        std::fs::write(
            &path,
            card::render(&manifest, &program, score.leakage.as_ref())?,
        )
        .map_err(|e| StepError::io(&path, &e))?;
        Ok(Self {
            folder: folder.to_owned(),
            manifest,
            program,
        })
    }

    /// Opens a bundle.
    ///
    /// # Errors
    /// Invalid when the folder is no bundle, or one of another format.
    pub fn open(folder: &Path) -> Result<Self, StepError> {
        let path = folder.join(MANIFEST);
        if !path.is_file() {
            return Err(
                StepError::invalid(format!("{} is no bundle: it has no {MANIFEST}", folder.display()))
                    .help("a `deploy` step writes bundles; publish its output `bundle` or take its path from `flowrun show`"),
            );
        }
        let manifest: serde_json::Value = read_json(&path)?;
        if manifest["version"] != VERSION {
            return Err(StepError::invalid(format!(
                "{}: format {} of bundles; this program reads format {VERSION}",
                path.display(),
                manifest["version"]
            )));
        }
        Ok(Self {
            folder: folder.to_owned(),
            manifest: serde_json::from_value(manifest)
                .map_err(|e| StepError::invalid(format!("{}: {e}", path.display())))?,
            program: ProgramFile::load(&folder.join(PROGRAM))?,
        })
    }

    /// Loads what answers. Files of the bundle are found in its folder: `host`'s root must be it.
    ///
    /// # Errors
    /// When weights cannot be had or do not belong together.
    pub fn answerer(&self, host: &Host<'_>) -> Result<Answerer, StepError> {
        let adapter = self.folder.join(ADAPTER);
        let checkpoint = self.checkpoint()?;
        let manifest = &self.manifest;
        let given = checkpoint.as_ref().map(|c| (adapter.as_path(), c));
        let model = manifest.model.as_ref();
        Answerer::open(&self.program, model, given, manifest.sampling, host)
    }

    /// The folder of its adapter, if its model has one.
    ///
    /// # Errors
    /// When it says what it is and that cannot be read.
    pub fn adapter(&self) -> Result<Option<PathBuf>, StepError> {
        let adapter = self.checkpoint()?.and_then(|checkpoint| checkpoint.adapter);
        Ok(adapter.map(|_| self.folder.join(ADAPTER)))
    }

    /// The checkpoint that answers, if it came with one.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(crate) fn checkpoint(&self) -> Result<Option<Checkpoint>, StepError> {
        let folder = self.folder.join(ADAPTER);
        match folder.is_dir() {
            true => Checkpoint::load(&folder).map(Some),
            false => Ok(None),
        }
    }

    /// What the model's chat template is told when the program asks it; nothing for a program that
    /// asks no model.
    ///
    /// # Errors
    /// When the checkpoint cannot be read, or was trained with something else than the model's
    /// entry says.
    pub(crate) fn template_arguments(
        &self,
    ) -> Result<BTreeMap<String, serde_json::Value>, StepError> {
        match &self.manifest.model {
            Some(model) => model.template_arguments(self.checkpoint()?.as_ref()),
            None => Ok(BTreeMap::new()),
        }
    }

    /// The rows to ask before it is used, with the labels that a server gives: what is none of the
    /// program's labels is [`UNKNOWN`].
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn smoke_rows(&self) -> Result<Vec<SmokeRow>, StepError> {
        let mut rows: Vec<SmokeRow> = read_jsonl(&self.folder.join(SMOKE))?;
        if let Some(labels) = self.program.closed_labels() {
            for row in rows.iter_mut().filter(|row| !labels.contains(&row.label)) {
                UNKNOWN.clone_into(&mut row.label);
            }
        }
        Ok(rows)
    }
}

/// `count` rows, spread evenly over those that were scored.
fn smoke_rows(score: &ProgramScore, count: usize) -> Vec<SmokeRow> {
    let all = score.rows.len();
    let count = count.min(all);
    let row = |at: usize| {
        let row = &score.rows[at * all / count];
        SmokeRow {
            id: row.id.clone(),
            text: row.text.clone(),
            inputs: row.inputs.clone(),
            label: row.predicted.clone().unwrap_or_else(|| UNKNOWN.to_owned()),
        }
    };
    (0..count).map(row).collect()
}

/// Copies files of the project into the bundle; what has a name of its own (a package, a
/// repository) stays a name with its digest.
struct Vendor<'a> {
    folder: &'a Path,
    world: &'a World,
}

impl Vendor<'_> {
    fn model(&self, model: &ModelSpec) -> Result<ModelSpec, StepError> {
        let mut model = model.clone();
        match &mut model {
            ModelSpec::Embedded(spec) => spec.weights = self.weights(&spec.weights)?,
            // Its server reads them there, wherever the bundle lies.
            ModelSpec::OpenAi(spec) => {
                let place = spec.adapters.as_mut();
                if let Some(folder) = place.and_then(|place| place.folder.as_mut()) {
                    let here = self.world.root.join(folder.as_path());
                    *folder = std::path::absolute(&here).map_err(|e| StepError::io(&here, &e))?;
                }
            }
            ModelSpec::SentenceEncoder(_) => {}
        }
        Ok(model)
    }

    /// The program with the encoders of its demos by similarity.
    fn prompt(&self, saved: &SavedProgram) -> Result<ProgramFile, StepError> {
        let mut saved = saved.clone();
        for neighbours in saved.neighbours.values_mut() {
            neighbours.embedder = self.encoder(&encoder_spec(&neighbours.embedder)?)?;
        }
        Ok(ProgramFile::Prompt(saved))
    }

    /// An encoder's entry, its files copied.
    fn encoder(&self, encoder: &EncoderSpec) -> Result<serde_json::Value, StepError> {
        let config = encoder.config.as_ref().map(|config| self.weights(config));
        let encoder = EncoderSpec {
            weights: self.weights(&encoder.weights)?,
            tokenizer: self.weights(&encoder.tokenizer)?,
            config: config.transpose()?,
        };
        serde_json::to_value(ModelSpec::SentenceEncoder(Box::new(encoder)))
            .map_err(|e| StepError::failed(e.to_string()))
    }

    fn classifier(
        &self,
        fitted: &FittedProgram,
        encoder: &EncoderSpec,
    ) -> Result<FittedProgram, StepError> {
        let mut fitted = fitted.clone();
        fitted.spec.embedder = self.encoder(encoder)?;
        Ok(fitted)
    }

    fn weights(&self, weights: &WeightsRef) -> Result<WeightsRef, StepError> {
        let pinned = weights.pinned(self.world)?;
        let (None, None, Some(file)) = (&weights.pip, &weights.hf, &weights.file) else {
            return Ok(pinned);
        };
        let from = self.world.root.join(file);
        let name = from.file_name().ok_or_else(|| {
            StepError::invalid(format!("the weights `{}` are no file", from.display()))
        })?;
        // Files of one name may be of several models; the name itself stays, it is the model's.
        let digest = pinned.sha256.iter().flat_map(|digest| digest.chars());
        let short: String = digest.filter(char::is_ascii_hexdigit).take(SHORT).collect();
        let inside = Path::new(WEIGHTS).join(short).join(name);
        folder::copy(&from, &self.folder.join(&inside))?;
        Ok(WeightsRef {
            file: Some(inside),
            ..pinned
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
#[cfg(test)]
pub(crate) use tests::test_bundle;
