//! [`Rates`]: what the machine does at best, which floors are computed from.
//!
//! Knows no training and no generation. Invariant: every rate is the best of a second's worth of
//! calls of what the model itself calls.

use std::hint::black_box;
use std::time::Instant;

use crate::base_model::BaseModel;
use crate::device::Device;
use crate::error::ModelError;
use crate::kernels::int8::{self, Int8Matrix};
use crate::kernels::matmul::{Into, Mat, MatMut, Threads, matmul};
use crate::kernels::vector::sum_of_squares;
use crate::llama::Precision;

/// Tokens of the products that are measured.
const ROWS: usize = 512;
/// Values that are read: 256 MiB, more than caches hold.
const READ: usize = 64 << 20;

/// The best of the machine.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rates {
    /// Operations of f32 matrix products a second; on a GPU of TF32 where that was asked for.
    pub(super) gemm: f64,
    /// The same on weights of 8 bits, where the processor does that.
    pub(super) int8: Option<f64>,
    /// Bytes a second: those that a GPU copies in its memory, read and written; those that the
    /// processor reads.
    pub(super) memory: f64,
}

impl Rates {
    /// Measures them with the shapes of the model's largest layer.
    pub(super) fn of(base: &BaseModel, device: Device) -> Result<Self, ModelError> {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = device.open()? {
            let c = &base.weights.config;
            let (gemm, memory) = crate::gpu::rates(&gpu, [ROWS, c.hidden, c.ffn])?;
            return Ok(Self {
                gemm,
                int8: None,
                memory,
            });
        }
        device.gpu_name()?;
        let (gemm, int8) = products(base);
        Ok(Self {
            gemm,
            int8,
            memory: reading(),
        })
    }

    /// Operations of matrix products a second.
    pub(super) fn products(&self, precision: Precision) -> f64 {
        match precision {
            Precision::Int8 => self.int8.unwrap_or(self.gemm),
            Precision::F32 => self.gemm,
        }
    }
}

/// Operations a second of the largest layer's product, in f32 and on 8-bit weights.
fn products(base: &BaseModel) -> (f64, Option<f64>) {
    let c = &base.weights.config;
    let (inputs, outputs) = (c.hidden, c.ffn);
    let values = |n: usize| (0..n).map(|i| (i % 13) as f32 * 0.1).collect::<Vec<_>>();
    let (x, w) = (values(ROWS * inputs), values(outputs * inputs));
    let mut out = vec![0.0; ROWS * outputs];
    let operations = (2 * ROWS * inputs * outputs) as f64;
    let gemm = shortest(|| {
        let (x, w) = (Mat::new(&x, ROWS, inputs), Mat::new(&w, outputs, inputs));
        let target = MatMut::new(&mut out, ROWS, outputs);
        rayon::scope(|_| matmul(target, Into::Replace, 1.0, x, w.t(), Threads::All));
    });
    let rounded = int8::is_fast().then(|| Int8Matrix::new(&w, inputs));
    let int8 = rounded.flatten().map(|matrix| {
        shortest(|| {
            rayon::scope(|_| matrix.linear(&x, &mut out, Into::Replace, Threads::All));
        })
    });
    (operations / gemm, int8.map(|seconds| operations / seconds))
}

/// Bytes a second that all threads read together.
fn reading() -> f64 {
    let values = vec![1f32; READ];
    let seconds = shortest(|| {
        black_box(sum_of_squares(black_box(&values)));
    });
    size_of_val(&values[..]) as f64 / seconds
}

/// Seconds of the shortest call of a second's worth.
fn shortest(mut compute: impl FnMut()) -> f64 {
    let (start, mut best) = (Instant::now(), f64::INFINITY);
    while start.elapsed().as_secs_f64() < 1.0 {
        let once = Instant::now();
        compute();
        best = best.min(once.elapsed().as_secs_f64());
    }
    best
}
