//! The pipeline language: from a YAML file to a checked [`Pipeline`].
//!
//! `load` reads the file and those it includes, `overlay` lays profiles and `--set`
//! over them, `resolution` fills in `${{ }}`, `check` finds every mistake and makes the
//! pipeline; `profiles` tries each profile. Knows no step kind (the [`Vocabulary`] does), runs
//! nothing, prints nothing.

mod check;
mod conditions;
mod definition;
mod diagnostic;
mod draft;
mod expr;
mod handed;
mod hooks;
mod inliner;
mod load;
mod mismatch;
mod node;
mod order;
mod overlay;
mod params;
mod profiles;
mod published;
mod reader;
mod resolution;
mod scalar;
mod schema;
mod settings;
mod source;
mod source_map;
pub mod spec;
mod suggest;
#[cfg(test)]
mod tests;
mod token;
mod tracking;
mod variant;
mod walk;
mod wiring;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub use diagnostic::{Diagnostic, Diagnostics};
pub use expr::{eval_bool, resolve_item};
pub use profiles::{InProfile, check_profiles};
pub use scalar::{bytes as parse_bytes, duration as parse_duration};
pub use schema::{definition_schema, pipeline_schema, step_schema};

use crate::pipeline::Pipeline;
use crate::vocabulary::Vocabulary;

/// How to load a pipeline.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// `--set name=value`, in order. The value is YAML and has the type of the param's default;
    /// the name may be dotted.
    pub sets: Vec<(String, String)>,
    /// Profiles to lay over the file, in order.
    pub profiles: Vec<String>,
    /// Environment variables that are set: `secrets` must be among them.
    pub env: BTreeMap<String, String>,
    /// Project root. None: see [`project_root`].
    pub root: Option<PathBuf>,
    /// The folder that the remote cache is, if it is one.
    pub remote_folder: Option<PathBuf>,
}

/// The folder of the pipeline file; if that is named `pipelines`, the folder around it.
#[must_use]
pub fn project_root(file: &Path) -> PathBuf {
    let folder = file.parent().unwrap_or(Path::new(""));
    let named = folder.file_name().is_some_and(|name| name == "pipelines");
    match folder.parent().filter(|_| named) {
        Some(around) => around.to_path_buf(),
        None => folder.to_path_buf(),
    }
}

/// Reads and checks a pipeline file.
///
/// # Errors
/// All mistakes in it and in the files it includes.
pub fn load_pipeline(
    file: &Path,
    vocabulary: &Vocabulary,
    options: &LoadOptions,
) -> Result<Pipeline, Diagnostics> {
    let mut map = source_map::SourceMap::default();
    let variants = variants(vocabulary);
    let Some(mut tree) = load::load(&mut map, file, &variants) else {
        return Err(map.into_diagnostics());
    };
    overlay::apply_profiles(&mut map, &mut tree, &options.profiles, &variants);
    overlay::apply_sets(&mut map, &mut tree, &options.sets);
    let setting = check::Setting {
        file,
        root: options.root.clone().unwrap_or_else(|| project_root(file)),
        profiles: &options.profiles,
        environment: &options.env,
        remote_folder: options.remote_folder.as_deref(),
        vocabulary,
    };
    match check::check(&mut map, tree, &setting) {
        Some(pipeline) => Ok(Pipeline {
            warnings: map.into_warnings(),
            ..pipeline
        }),
        None => Err(map.into_diagnostics()),
    }
}

fn variants(vocabulary: &Vocabulary) -> overlay::Variants<'_> {
    overlay::Variants {
        model: &vocabulary.model_schema,
        program: &vocabulary.program_schema,
    }
}
