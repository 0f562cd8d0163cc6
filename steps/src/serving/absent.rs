//! Stands where the embedded model was left out of the build. No engine can be opened, so nothing
//! here is ever reached but [`Engine::open`].

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use flowrun_engine::step::StepError;
use flowrun_lm::lm::{Completion, Lm, LmError, OnAnswer, Request};
use tokio::sync::mpsc;

use super::{Ask, EngineSpec, Event, ModelEntry, ModelsError};
use crate::models::Host;

/// A model in memory; there is none.
#[derive(Clone)]
pub struct Loaded(Infallible);

/// The embedded model; there is none.
#[derive(Clone)]
pub struct Engine(Infallible);

/// The engine's model as prompting programs see one; there is none.
pub struct EngineLm(Infallible);

#[allow(missing_docs, clippy::missing_errors_doc, clippy::unused_async)]
impl Engine {
    /// Always an error.
    ///
    /// # Errors
    /// That the embedded model was left out.
    pub fn open(_: EngineSpec<'_>, _: &Host<'_>) -> Result<Self, StepError> {
        Err(crate::models::absent::left_out())
    }
    #[must_use]
    pub fn is_up(&self) -> bool {
        match self.0 {}
    }
    #[must_use]
    pub fn waiting(&self) -> usize {
        match self.0 {}
    }
    #[must_use]
    pub fn active(&self) -> usize {
        match self.0 {}
    }
    #[must_use]
    pub fn adapters_in_memory(&self) -> usize {
        match self.0 {}
    }
    #[must_use]
    pub fn base_id(&self) -> &str {
        match self.0 {}
    }
    #[must_use]
    pub fn models(&self) -> Vec<ModelEntry> {
        match self.0 {}
    }
    pub fn model(&self, _: &str) -> Result<Loaded, ModelsError> {
        match self.0 {}
    }
    pub fn load(&self, _: &str, _: &Path, _: bool) -> Result<(), ModelsError> {
        match self.0 {}
    }
    pub fn unload(&self, _: &str) -> Result<(), ModelsError> {
        match self.0 {}
    }
    pub async fn ask(&self, _: Loaded, _: Ask) -> Result<mpsc::UnboundedReceiver<Event>, LmError> {
        match self.0 {}
    }
    #[must_use]
    pub fn lm(&self, _: Loaded, _: Arc<AtomicBool>) -> EngineLm {
        match self.0 {}
    }
}

impl EngineLm {
    /// Tokens of prompts that were computed for an earlier request; there are no prompts.
    #[must_use]
    pub fn cached_tokens(&self) -> u64 {
        match self.0 {}
    }
}

impl Lm for EngineLm {
    fn id(&self) -> &str {
        match self.0 {}
    }
    fn complete(&self, _: &[Request], _: &OnAnswer<'_>) -> Vec<Result<Completion, LmError>> {
        match self.0 {}
    }
}
