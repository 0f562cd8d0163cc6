//! The model on an NVIDIA GPU, in f32.
//!
//! | file | what |
//! |---|---|
//! | `backend` | a device and memory there |
//! | `cuda` | an NVIDIA GPU |
//! | `host` | for the tests: the CPU, with the same kernels |
//! | `ops` | a model's operations, with their sizes checked |
//! | `attention` | which rows see what, and which block takes them |
//! | `weights` | a base model there |
//! | `rate` | how fast it multiplies and copies |
//! | `kernels.cu`, `shim.h` | the kernels, and what they need to run on the CPU |
//!
//! The passes are beside those of the CPU: `llama/on_gpu.rs` and `train/on_gpu.rs`. Tokens, losses,
//! adapters, their gradients and logits cross the bus; all else stays on the device.
//! Knows no text. Invariant: only `backend`, `cuda`, `host` and `ops` have `unsafe` in them.

mod attention;
#[allow(unsafe_code)]
mod backend;
#[allow(unsafe_code)]
mod cuda;
#[cfg(test)]
#[allow(unsafe_code, clippy::unwrap_used)]
pub(crate) mod host;
#[allow(unsafe_code)]
mod ops;
mod rate;
#[cfg(test)]
mod tests;
mod weights;

use std::sync::{Arc, Mutex, PoisonError};

pub(crate) use attention::{KeyTiles, Plan, Run, Segment, Sizes, segment_of};
pub(crate) use backend::{Buffer, Gpu, View};
pub(crate) use ops::{Attended, Layer, Matrix, Norm};
pub(crate) use rate::rates;
pub(crate) use weights::{GpuLayer, GpuModel};

use crate::error::ModelError;

/// Opened GPUs, with products in f32 and in TF32: opening one takes seconds.
static OPEN: Mutex<[Option<Gpu>; 2]> = Mutex::new([None, None]);

impl Gpu {
    /// The GPU of this process.
    ///
    /// # Errors
    /// [`ModelError::NoDevice`] with what is missing.
    pub(crate) fn open(tf32: bool) -> Result<Self, ModelError> {
        // Held while opening: whoever else wants it waits.
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        let place = &mut open[usize::from(tf32)];
        match place {
            Some(gpu) => Ok(gpu.clone()),
            None => {
                let gpu = Self(Arc::new(cuda::Cuda::open(tf32)?));
                *place = Some(gpu.clone());
                Ok(gpu)
            }
        }
    }

    /// Whether there is a GPU, with all that it takes to use one.
    pub(crate) fn is_there() -> bool {
        cuda::is_there()
    }
}
