//! A candle tensor as a slice.

use std::ops::Deref;

use candle_core::{CpuStorage, Result, Storage, StorageRef, Tensor, bail};

/// A contiguous f32 CPU tensor, borrowed.
pub(crate) struct View<'a> {
    storage: StorageRef<'a>,
    start: usize,
    end: usize,
}

impl<'a> View<'a> {
    /// Borrows `tensor`; an error when it is not contiguous, not f32 or not on the CPU.
    pub(crate) fn new(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        match (&*storage, layout.contiguous_offsets()) {
            (Storage::Cpu(CpuStorage::F32(_)), Some((start, end))) => Ok(Self {
                storage,
                start,
                end,
            }),
            _ => bail!("expected a contiguous f32 tensor on the CPU"),
        }
    }
}

impl Deref for View<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.start..self.end],
            _ => &[],
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn only_contiguous_f32_tensors_are_viewed() {
        let tensor = Tensor::arange(0f32, 6.0, &Device::Cpu)
            .unwrap()
            .reshape((3, 2))
            .unwrap();
        assert_eq!(
            View::new(&tensor.narrow(0, 1, 2).unwrap()).unwrap()[..],
            [2., 3., 4., 5.]
        );
        assert!(View::new(&tensor.t().unwrap()).is_err());
        assert!(View::new(&tensor.to_dtype(DType::F64).unwrap()).is_err());
    }
}
