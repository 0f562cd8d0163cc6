//! What a training resumes from: one safetensors file.
//!
//! | value | where |
//! |---|---|
//! | format version, step, digest of everything that decides the result | metadata |
//! | trained values and AdamW's two moments | `params`, `first`, `second` |
//! | losses of the steps so far | `losses` |
//! | validation losses of the epochs so far | `validations` |
//!
//! The epoch, the order of the rows and the dropout masks follow from the step and the seed.
//! Invariant: a file that another training wrote is refused, never continued.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

use crate::error::ModelError;
use crate::lora::replace;

const VERSION: &str = "2";

/// The state of a training between two steps.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainerState {
    /// Digest of the rows, the settings and the base model.
    pub(super) digest: String,
    /// Finished steps.
    pub(super) step: usize,
    pub(super) params: Vec<f32>,
    pub(super) first: Vec<f32>,
    pub(super) second: Vec<f32>,
    pub(super) losses: Vec<f32>,
    pub(super) validations: Vec<f32>,
}

impl TrainerState {
    /// Finished steps.
    pub fn step(&self) -> usize {
        self.step
    }

    /// Writes the state; a reader sees the old file or the new one.
    ///
    /// # Errors
    /// [`ModelError::Io`] naming the file.
    pub fn save(&self, path: &Path) -> Result<(), ModelError> {
        let arrays = [
            ("params", &self.params),
            ("first", &self.first),
            ("second", &self.second),
            ("losses", &self.losses),
            ("validations", &self.validations),
        ];
        let arrays = arrays.map(|(name, values)| {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            (name, values.len(), bytes)
        });
        let views = arrays.iter().map(|(name, len, bytes)| {
            TensorView::new(safetensors::Dtype::F32, vec![*len], bytes).map(|view| (*name, view))
        });
        let metadata = HashMap::from([
            ("flowrun_train_state".to_owned(), VERSION.to_owned()),
            ("digest".to_owned(), self.digest.clone()),
            ("step".to_owned(), self.step.to_string()),
        ]);
        let bytes = views
            .collect::<Result<Vec<_>, _>>()
            .and_then(|views| safetensors::serialize(views, Some(metadata)))
            .map_err(|e| ModelError::format(path, e))?;
        replace(path, &bytes)
    }

    /// Reads a state.
    ///
    /// # Errors
    /// [`ModelError::Io`] when the file cannot be read; [`ModelError::Format`] when it is
    /// damaged, or of a version that this program does not know.
    pub fn load(path: &Path) -> Result<Self, ModelError> {
        let bytes = fs::read(path).map_err(ModelError::io(path))?;
        Self::parse(&bytes).map_err(|reason| {
            let remedy = "delete it to train from the start";
            ModelError::format(path, format!("{reason}; {remedy}"))
        })
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| e.to_string())?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let get = |key: &str| metadata.get(key).ok_or(format!("it has no `{key}`"));
        let version = get("flowrun_train_state")?;
        if version != VERSION {
            return Err(format!(
                "its version is {version}, this program knows {VERSION}"
            ));
        }
        let file = SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?;
        let values = |name: &str| {
            let view = file.tensor(name).map_err(|e| e.to_string())?;
            if view.dtype() != safetensors::Dtype::F32 {
                return Err(format!("`{name}` is not f32"));
            }
            let (values, _) = view.data().as_chunks::<4>();
            Ok(values
                .iter()
                .map(|v| f32::from_le_bytes(*v))
                .collect::<Vec<_>>())
        };
        let state = Self {
            digest: get("digest")?.clone(),
            step: get("step")?.parse().map_err(|_| "`step` is not a number")?,
            params: values("params")?,
            first: values("first")?,
            second: values("second")?,
            losses: values("losses")?,
            validations: values("validations")?,
        };
        let sizes = [state.first.len(), state.second.len()];
        if sizes != [state.params.len(); 2] || state.losses.len() != state.step {
            return Err("its parts do not fit each other".to_owned());
        }
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_state_of_another_version_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.safetensors");
        let metadata = HashMap::from([("flowrun_train_state".to_owned(), "1".to_owned())]);
        let none: [(&str, TensorView<'_>); 0] = [];
        let old = safetensors::serialize(none, Some(metadata)).unwrap();
        fs::write(&path, old).unwrap();
        let error = TrainerState::load(&path).unwrap_err().to_string();
        assert!(
            error.contains("its version is 1, this program knows 2"),
            "{error}"
        );
    }

    #[test]
    fn a_state_survives_its_file_and_damage_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.safetensors");
        let state = TrainerState {
            digest: "d".to_owned(),
            step: 2,
            params: vec![1.0, -2.5, f32::MIN_POSITIVE],
            first: vec![0.1; 3],
            second: vec![0.2; 3],
            losses: vec![3.0, 2.0],
            validations: vec![2.5],
        };
        state.save(&path).unwrap();
        assert_eq!(TrainerState::load(&path).unwrap(), state);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);

        let good = fs::read(&path).unwrap();
        for len in [0, 7, good.len() / 2, good.len() - 1] {
            fs::write(&path, &good[..len]).unwrap();
            let error = TrainerState::load(&path).unwrap_err().to_string();
            assert!(
                error.contains("delete it to train from the start"),
                "{error}"
            );
        }
    }
}
