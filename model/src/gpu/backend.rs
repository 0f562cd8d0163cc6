//! A device that kernels run on, and memory there.
//!
//! Two are behind [`Backend`]: an NVIDIA GPU (`cuda`) and, for the tests, the CPU that runs the
//! same kernels compiled as C++ (`host`). Knows no model. Invariant: a [`Buffer`] is freed in the
//! order of the device's work, so nothing that was started before reads freed memory.

use std::marker::PhantomData;
use std::sync::Arc;

use crate::error::ModelError;

/// What kernels are launched on.
pub(super) trait Backend: Send + Sync {
    /// The device's name, for people.
    fn name(&self) -> String;
    /// Free bytes and all bytes.
    fn memory(&self) -> Result<(usize, usize), ModelError>;
    /// Threads of a block that works on one row, and of one of attention; powers of two.
    fn threads(&self) -> [u32; 2];
    /// Waits until all that was started is done.
    fn finish(&self) -> Result<(), ModelError>;
    /// An address of so many bytes, not cleared.
    fn allocate(&self, bytes: usize) -> Result<u64, ModelError>;
    /// Gives back what [`Backend::allocate`] gave, once what was started before is done.
    ///
    /// # Safety
    /// `address` came from there with as many bytes, and is used no more.
    unsafe fn free(&self, address: u64, bytes: usize);
    /// Copies to the device.
    ///
    /// # Safety
    /// Both places have so many bytes.
    unsafe fn upload(&self, to: u64, from: *const u8, bytes: usize) -> Result<(), ModelError>;
    /// Copies from the device, once all that was started before is done.
    ///
    /// # Safety
    /// Both places have so many bytes.
    unsafe fn download(&self, to: *mut u8, from: u64, bytes: usize) -> Result<(), ModelError>;
    /// Copies on the device.
    ///
    /// # Safety
    /// Both places are on the device and have so many bytes that do not overlap.
    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), ModelError>;
    /// Sets bytes to zero.
    ///
    /// # Safety
    /// The place has so many bytes.
    unsafe fn clear(&self, to: u64, bytes: usize) -> Result<(), ModelError>;
    /// Starts a kernel of `kernels.cu` with blocks in two dimensions; `shared` floats a block.
    ///
    /// # Safety
    /// `args` are of the number and types of the kernel's parameters, and with them it touches
    /// only memory that was allocated here.
    unsafe fn launch(
        &self,
        kernel: Kernel,
        blocks: [u32; 2],
        threads: u32,
        shared: usize,
        args: &[Arg],
    ) -> Result<(), ModelError>;
    /// `C = alpha · op(A) · op(B) + beta · C` on column-major matrices, as BLAS defines `sgemm`.
    ///
    /// # Safety
    /// The three matrices lie in memory that was allocated here.
    unsafe fn sgemm(&self, product: &Sgemm) -> Result<(), ModelError>;
}

/// The arguments of BLAS' `sgemm`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sgemm {
    pub(super) transpose: [bool; 2],
    /// Rows and columns of `C`, and the inner dimension.
    pub(super) sizes: [usize; 3],
    pub(super) alpha: f32,
    pub(super) beta: f32,
    /// Addresses of `A`, `B` and `C`.
    pub(super) at: [u64; 3],
    /// Their leading dimensions.
    pub(super) leading: [usize; 3],
}

/// An argument of a kernel, by its type there.
#[derive(Debug, Clone, Copy)]
pub(super) enum Arg {
    /// A pointer.
    Address(u64),
    /// `int`.
    Int(i32),
    /// `float`.
    Float(f32),
    /// `u64`.
    Long(u64),
}

impl Arg {
    /// The value in the first bytes of a word, where launches read it.
    pub(super) fn bits(self) -> u64 {
        match self {
            Self::Address(value) | Self::Long(value) => value.to_le(),
            Self::Int(value) => u64::from(value.cast_unsigned()).to_le(),
            Self::Float(value) => u64::from(value.to_bits()).to_le(),
        }
    }
}

macro_rules! kernels {
    ($($kernel:ident $name:literal),* $(,)?) => {
        /// The kernels of `kernels.cu`.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(super) enum Kernel { $($kernel),* }

        impl Kernel {
            /// All of them, in the order of their numbers.
            pub(super) const ALL: &[Self] = &[$(Self::$kernel),*];

            pub(super) fn name(self) -> &'static str {
                match self { $(Self::$kernel => $name),* }
            }
        }
    };
}

kernels! {
    Gather "gather",
    ScatterAdd "scatter_add",
    RmsNorm "rms_norm",
    RmsNormAgain "rms_norm_again",
    RmsNormBackward "rms_norm_backward",
    AddBias "add_bias",
    Rotate "rotate",
    Add "add",
    Glu "glu",
    GluBackward "glu_backward",
    Dropout "dropout",
    Append "append",
    CrossEntropy "cross_entropy",
    Attention "attention",
    AttentionDots "attention_dots",
    AttentionBackwardQ "attention_backward_q",
    AttentionBackwardKv "attention_backward_kv",
}

/// Their source.
pub(super) const SOURCE: &str = include_str!("kernels.cu");

/// A device, shared by all that is on it.
#[derive(Clone)]
pub(crate) struct Gpu(pub(super) Arc<dyn Backend>);

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gpu({})", self.0.name())
    }
}

impl PartialEq for Gpu {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// A value that is its bytes.
pub(crate) trait Plain: Copy + Default {}
impl Plain for f32 {}
impl Plain for i32 {}
impl Plain for u32 {}
impl Plain for u64 {}

/// Values on a device.
#[derive(Debug)]
pub(crate) struct Buffer<T: Plain> {
    gpu: Gpu,
    address: u64,
    len: usize,
    values: PhantomData<T>,
}

/// Some of a buffer's values.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a, T: Plain> {
    address: u64,
    len: usize,
    buffer: PhantomData<&'a Buffer<T>>,
}

impl Gpu {
    /// The device's name.
    pub(crate) fn name(&self) -> String {
        self.0.name()
    }

    /// Free bytes and all bytes of its memory.
    pub(crate) fn memory(&self) -> Result<(usize, usize), ModelError> {
        self.0.memory()
    }

    /// Waits until all that was started is done.
    pub(crate) fn finish(&self) -> Result<(), ModelError> {
        self.0.finish()
    }

    /// Room for `len` values, which are not set.
    pub(crate) fn room<T: Plain>(&self, len: usize) -> Result<Buffer<T>, ModelError> {
        let bytes = len.checked_mul(size_of::<T>()).filter(|b| *b < 1 << 62);
        let bytes =
            bytes.ok_or_else(|| ModelError::Device(format!("{len} values are too many")))?;
        Ok(Buffer {
            // Some address even for nothing, so that every view has one.
            address: self.0.allocate(bytes.max(16))?,
            gpu: self.clone(),
            len,
            values: PhantomData,
        })
    }

    /// A copy of `values`.
    pub(crate) fn copy_of<T: Plain>(&self, values: &[T]) -> Result<Buffer<T>, ModelError> {
        let buffer = self.room(values.len())?;
        buffer.set(values)?;
        Ok(buffer)
    }
}

impl<T: Plain> Buffer<T> {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// All values.
    pub(crate) fn all(&self) -> View<'_, T> {
        View {
            address: self.address,
            len: self.len,
            buffer: PhantomData,
        }
    }

    /// `len` values from `start` on.
    pub(crate) fn at(&self, start: usize, len: usize) -> View<'_, T> {
        self.all().at(start, len)
    }

    /// Writes `values` to the front.
    pub(crate) fn set(&self, values: &[T]) -> Result<(), ModelError> {
        assert!(values.len() <= self.len, "more values than room");
        // SAFETY: both places have these bytes; `T` is plain.
        unsafe {
            let from = values.as_ptr().cast();
            let bytes = size_of_val(values);
            self.gpu.0.upload(self.address, from, bytes)
        }
    }

    /// Makes room for at least `len` values; what is there may be lost.
    pub(crate) fn fit(&mut self, len: usize) -> Result<(), ModelError> {
        if self.len < len {
            let gpu = self.gpu.clone();
            // What is too small makes place first.
            *self = gpu.room(0)?;
            *self = gpu.room(len)?;
        }
        Ok(())
    }
}

impl<T: Plain> Drop for Buffer<T> {
    fn drop(&mut self) {
        let bytes = (self.len * size_of::<T>()).max(16);
        // SAFETY: `Gpu::room` allocated it with as many bytes, and no view outlives it.
        unsafe { self.gpu.0.free(self.address, bytes) }
    }
}

impl<'a, T: Plain> View<'a, T> {
    pub(crate) fn len(self) -> usize {
        self.len
    }

    /// `len` values from `start` on.
    pub(crate) fn at(self, start: usize, len: usize) -> View<'a, T> {
        let end = start.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= self.len),
            "outside of a buffer"
        );
        View {
            address: self.address + (start * size_of::<T>()) as u64,
            len,
            ..self
        }
    }

    /// Where it lies on the device.
    pub(crate) fn address(self) -> u64 {
        self.address
    }

    pub(super) fn arg(self) -> Arg {
        Arg::Address(self.address)
    }

    /// Its values, once all that was started is done.
    pub(crate) fn read(self, gpu: &Gpu) -> Result<Vec<T>, ModelError> {
        let mut values = vec![T::default(); self.len];
        let to = values.as_mut_ptr().cast();
        // SAFETY: both places have these bytes; all of them are a `T`.
        unsafe {
            let bytes = self.len * size_of::<T>();
            gpu.0.download(to, self.address, bytes)?;
        }
        Ok(values)
    }

    /// Takes the values of `from`.
    pub(crate) fn copy_from(self, gpu: &Gpu, from: View<'_, T>) -> Result<(), ModelError> {
        assert_eq!(self.len, from.len, "as many values");
        // SAFETY: both have these bytes; different buffers or parts, as all callers have them.
        unsafe {
            let bytes = self.len * size_of::<T>();
            gpu.0.copy(self.address, from.address, bytes)
        }
    }

    /// Sets all to zero.
    pub(crate) fn clear(self, gpu: &Gpu) -> Result<(), ModelError> {
        // SAFETY: it has these bytes.
        unsafe { gpu.0.clear(self.address, self.len * size_of::<T>()) }
    }
}
