//! How fast a device multiplies and copies: what floors of a model's times come from.

use std::time::Instant;

use super::backend::Gpu;
use super::ops::Matrix;
use crate::error::ModelError;

/// Seconds that each is repeated for.
const SECONDS: f64 = 1.0;
/// Values of a copy: more than any cache holds.
const COPIED: usize = 64 << 20;

/// Operations a second of the product `[rows, inputs] · [inputs, outputs]`, and bytes a second that
/// a copy reads and writes; the best of a second each.
///
/// # Errors
/// Those of the device.
pub(crate) fn rates(
    gpu: &Gpu,
    [rows, inputs, outputs]: [usize; 3],
) -> Result<(f64, f64), ModelError> {
    let x = gpu.copy_of(&vec![0.5; rows * inputs])?;
    let w = gpu.copy_of(&vec![0.25; outputs * inputs])?;
    let out = gpu.room(rows * outputs)?;
    let product = best(gpu, || {
        let target = Matrix::new(out.all(), rows, outputs);
        let x = Matrix::new(x.all(), rows, inputs);
        let w = Matrix::new(w.all(), outputs, inputs);
        gpu.product(target, false, 1.0, x, w.t())
    })?;
    let [from, to] = [gpu.room::<f32>(COPIED)?, gpu.room::<f32>(COPIED)?];
    from.all().clear(gpu)?;
    let copy = best(gpu, || to.all().copy_from(gpu, from.all()))?;
    let operations = (2 * rows * inputs * outputs) as f64;
    Ok((
        operations / product,
        (2 * COPIED * size_of::<f32>()) as f64 / copy,
    ))
}

/// Seconds of the fastest ten calls in a row, each.
fn best(gpu: &Gpu, work: impl Fn() -> Result<(), ModelError>) -> Result<f64, ModelError> {
    work()?;
    gpu.finish()?;
    let (start, mut best) = (Instant::now(), f64::INFINITY);
    while start.elapsed().as_secs_f64() < SECONDS {
        let once = Instant::now();
        for _ in 0..10 {
            work()?;
        }
        gpu.finish()?;
        best = best.min(once.elapsed().as_secs_f64() / 10.0);
    }
    Ok(best)
}
