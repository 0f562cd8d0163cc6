//! An NVIDIA GPU, through the driver, NVRTC and cuBLAS.
//!
//! Their libraries are loaded when a GPU is asked for, so the program starts without them. All
//! work goes to the context's default stream, in order. Knows no model.
//!
//! Soundness: handles are made once in [`Cuda::open`] and live as long as the value; the driver and
//! cuBLAS let any thread use them once the context is bound to it, which every call does first.

use std::ffi::{CString, c_void};
use std::sync::Arc;

use cudarc::cublas::{result as blas, sys as blas_sys};
use cudarc::driver::result::{self as driver, DriverError};
use cudarc::driver::{CudaContext, sys};
use cudarc::nvrtc::{result as nvrtc, sys as nvrtc_sys};

use super::backend::{Arg, Backend, Kernel, SOURCE, Sgemm};
use crate::error::ModelError;

/// Oldest compute capability: Pascal, which CUDA 12 still compiles for; CUDA 13 begins at 7.5.
const OLDEST: (i32, i32) = (6, 0);

/// Threads of a block that works on one row, and of one of attention, where the GPU allows them.
const THREADS: [u32; 2] = [256, 128];

/// Freed bytes that the driver keeps.
const KEPT: u64 = 256 << 20;

/// The default stream.
const STREAM: sys::CUstream = std::ptr::null_mut();

pub(super) struct Cuda {
    context: Arc<CudaContext>,
    name: String,
    module: sys::CUmodule,
    threads: [u32; 2],
    /// In the order of [`Kernel::ALL`].
    functions: Vec<sys::CUfunction>,
    blas: blas_sys::cublasHandle_t,
}

// SAFETY: see the module's soundness.
unsafe impl Send for Cuda {}
// SAFETY: see the module's soundness.
unsafe impl Sync for Cuda {}

impl Cuda {
    /// The first GPU that the driver shows (`CUDA_VISIBLE_DEVICES` chooses), with products in f32
    /// or with inputs rounded to TF32.
    pub(super) fn open(tf32: bool) -> Result<Self, ModelError> {
        libraries()?;
        let count = CudaContext::device_count();
        if count.map_err(|e| no_gpu(&describe(e)))? == 0 {
            return Err(no_gpu("the driver shows none"));
        }
        let context = CudaContext::new(0).map_err(|e| no_gpu(&describe(e)))?;
        let failed = |what: &'static str| {
            move |e: DriverError| ModelError::NoDevice(format!("{what}: {}", describe(e)))
        };
        let name = context.name().map_err(failed("its name"))?;
        let capability = context.compute_capability();
        let capability = capability.map_err(failed("its compute capability"))?;
        if capability < OLDEST {
            let (major, minor) = capability;
            return Err(ModelError::NoDevice(format!(
                "{name} has compute capability {major}.{minor}, at least {}.{} is needed; use the CPU",
                OLDEST.0, OLDEST.1
            )));
        }
        let most = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK;
        let most = context.attribute(most).map_err(failed("its threads"))?;
        let most = u32::try_from(most).unwrap_or(1).max(1).ilog2();
        keep_freed(&context).map_err(failed("its memory pool"))?;
        let cubin = compile(&format!("sm_{}{}", capability.0, capability.1))?;
        // SAFETY: the context is bound to this thread; `cubin` is a whole image.
        let module = unsafe { driver::module::load_data(cubin.as_ptr().cast()) };
        let module = module.map_err(failed("its kernels cannot be loaded"))?;
        let mut this = Self {
            context,
            name,
            threads: THREADS.map(|threads| threads.min(1 << most)),
            module,
            functions: Vec::new(),
            blas: std::ptr::null_mut(),
        };
        for kernel in Kernel::ALL {
            let name = CString::new(kernel.name()).unwrap_or_default();
            // SAFETY: the module was just loaded.
            let function = unsafe { driver::module::get_function(this.module, name) };
            this.functions
                .push(function.map_err(failed(kernel.name()))?);
        }
        let failed = |e: blas::CublasError| ModelError::NoDevice(format!("cuBLAS: {e:?}"));
        this.blas = blas::create_handle().map_err(failed)?;
        let math = match tf32 {
            true => blas_sys::cublasMath_t::CUBLAS_TF32_TENSOR_OP_MATH,
            false => blas_sys::cublasMath_t::CUBLAS_DEFAULT_MATH,
        };
        // SAFETY: the handle was just made.
        unsafe { blas_sys::cublasSetMathMode(this.blas, math) }
            .result()
            .map_err(failed)?;
        Ok(this)
    }

    fn bind(&self) -> Result<(), ModelError> {
        let bound = self.context.bind_to_thread();
        bound.map_err(|e| self.error("the context", e))
    }

    fn error(&self, what: &str, error: DriverError) -> ModelError {
        let text = format!("{}: {what}: {}", self.name, describe(error));
        match error.0 {
            // The one error that passes.
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => ModelError::NoDevice(text),
            _ => ModelError::Device(text),
        }
    }
}

/// Has the driver keep a little of what is freed: every pass takes some small buffers, and what is
/// not kept is given back whenever somebody waits for the GPU.
fn keep_freed(context: &CudaContext) -> Result<(), DriverError> {
    if !context.has_async_alloc() {
        return Ok(());
    }
    let mut pool = std::ptr::null_mut();
    let mut bytes: u64 = KEPT;
    // SAFETY: the device is the context's; the attribute is a `cuuint64_t`.
    unsafe {
        sys::cuDeviceGetDefaultMemPool(&raw mut pool, context.cu_device()).result()?;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut bytes).cast()).result()
    }
}

/// Whether a GPU may be asked for: the libraries are there, and the driver shows one.
pub(super) fn is_there() -> bool {
    libraries().is_ok() && CudaContext::device_count().is_ok_and(|count| count > 0)
}

/// Everything that is loaded at run time, each with its remedy.
fn libraries() -> Result<(), ModelError> {
    let missing = |name: &str, remedy: &str| {
        let text = format!("{name} cannot be loaded; {remedy}, or use the CPU");
        Err(ModelError::NoDevice(text))
    };
    // SAFETY: loading NVIDIA's libraries has no preconditions.
    let [cuda, nvrtc, cublas] = unsafe {
        [
            sys::is_culib_present(),
            nvrtc_sys::is_culib_present(),
            blas_sys::is_culib_present(),
        ]
    };
    if !cuda {
        return missing("NVIDIA's driver (libcuda)", "install it");
    }
    let path = "install CUDA 12 or 13 and have LD_LIBRARY_PATH name its folder of libraries";
    if !nvrtc {
        return missing("NVRTC (libnvrtc)", path);
    }
    if !cublas {
        return missing("cuBLAS (libcublas)", path);
    }
    Ok(())
}

/// Whether NVRTC can be loaded.
#[cfg(test)]
pub(super) fn has_compiler() -> bool {
    // SAFETY: loading it has no preconditions.
    unsafe { nvrtc_sys::is_culib_present() }
}

/// The kernels for one architecture (`sm_90`), as the driver loads them. Machine code and no PTX:
/// a driver of the same major version may be older than the compiler.
pub(super) fn compile(architecture: &str) -> Result<Vec<u8>, ModelError> {
    let failed = |e: nvrtc::NvrtcError| ModelError::NoDevice(format!("NVRTC: {e:?}"));
    let source = CString::new(SOURCE)
        .map_err(|_| ModelError::NoDevice("the kernels' source has a zero byte".to_owned()))?;
    let program = nvrtc::create_program(&source, Some(c"kernels.cu")).map_err(failed)?;
    let options = [
        format!("--gpu-architecture={architecture}"),
        "--std=c++14".to_owned(),
    ];
    // SAFETY: the program was just made and is destroyed at the end; the buffer has the size that
    // NVRTC tells.
    unsafe {
        let compiled = nvrtc::compile_program(program, &options).map_err(|e| {
            let log = nvrtc::get_program_log(program).unwrap_or_default();
            let log: Vec<u8> = log.iter().map(|c| c.cast_unsigned()).collect();
            let log = String::from_utf8_lossy(&log);
            let log = log.trim_end_matches(['\0', '\n']);
            ModelError::NoDevice(format!(
                "NVRTC cannot compile the kernels for {architecture}: {e:?}; is CUDA as new as the GPU?\n{log}"
            ))
        });
        let image = compiled.and_then(|()| {
            let mut size = 0;
            nvrtc_sys::nvrtcGetCUBINSize(program, &raw mut size)
                .result()
                .map_err(failed)?;
            let mut image = vec![0u8; size];
            nvrtc_sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast())
                .result()
                .map_err(failed)?;
            Ok(image)
        });
        nvrtc::destroy_program(program).map_err(failed)?;
        image
    }
}

impl Backend for Cuda {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn memory(&self) -> Result<(usize, usize), ModelError> {
        self.bind()?;
        driver::mem_get_info().map_err(|e| self.error("its memory", e))
    }

    fn threads(&self) -> [u32; 2] {
        self.threads
    }

    fn finish(&self) -> Result<(), ModelError> {
        self.bind()?;
        // SAFETY: the default stream is always there.
        unsafe { driver::stream::synchronize(STREAM) }.map_err(|e| self.error("its work", e))
    }

    fn allocate(&self, bytes: usize) -> Result<u64, ModelError> {
        self.bind()?;
        // SAFETY: nobody takes the memory for values before it is written.
        let address = unsafe {
            match self.context.has_async_alloc() {
                true => driver::malloc_async(STREAM, bytes),
                false => driver::malloc_sync(bytes),
            }
        };
        address.map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let (free, all) = driver::mem_get_info().unwrap_or_default();
                ModelError::NoDevice(too_little(&self.name, bytes, free, all))
            }
            _ => self.error("allocating", error),
        })
    }

    unsafe fn free(&self, address: u64, _bytes: usize) {
        // What cannot be freed any more, since the context failed, is lost either way.
        if self.bind().is_err() {
            return;
        }
        // SAFETY: the caller's; the memory was allocated in the same way.
        let _ = unsafe {
            match self.context.has_async_alloc() {
                true => driver::free_async(address, STREAM),
                false => driver::free_sync(address),
            }
        };
    }

    unsafe fn upload(&self, to: u64, from: *const u8, bytes: usize) -> Result<(), ModelError> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the caller's.
        let copied = unsafe {
            let from = std::slice::from_raw_parts(from, bytes);
            driver::memcpy_htod_sync(to, from)
        };
        copied.map_err(|e| self.error("copying to it", e))
    }

    unsafe fn download(&self, to: *mut u8, from: u64, bytes: usize) -> Result<(), ModelError> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the caller's. It waits for the default stream.
        let copied = unsafe {
            let to = std::slice::from_raw_parts_mut(to, bytes);
            driver::memcpy_dtoh_sync(to, from)
        };
        copied.map_err(|e| self.error("copying from it", e))
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), ModelError> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the caller's.
        unsafe { driver::memcpy_dtod_async(to, from, bytes, STREAM) }
            .map_err(|e| self.error("copying on it", e))
    }

    unsafe fn clear(&self, to: u64, bytes: usize) -> Result<(), ModelError> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the caller's.
        unsafe { driver::memset_d8_async(to, 0, bytes, STREAM) }
            .map_err(|e| self.error("clearing", e))
    }

    unsafe fn launch(
        &self,
        kernel: Kernel,
        blocks: [u32; 2],
        threads: u32,
        shared: usize,
        args: &[Arg],
    ) -> Result<(), ModelError> {
        self.bind()?;
        let mut bits: Vec<u64> = args.iter().map(|arg| arg.bits()).collect();
        let mut pointers: Vec<*mut c_void> = bits
            .iter_mut()
            .map(|bits| std::ptr::from_mut(bits).cast())
            .collect();
        let function = self.functions[kernel as usize];
        // SAFETY: the caller's; the driver reads the arguments before it returns.
        let launched = unsafe {
            driver::launch_kernel(
                function,
                (blocks[0], blocks[1], 1),
                (threads, 1, 1),
                (shared * size_of::<f32>()) as u32,
                STREAM,
                &mut pointers,
            )
        };
        launched.map_err(|e| self.error(kernel.name(), e))
    }

    unsafe fn sgemm(&self, product: &Sgemm) -> Result<(), ModelError> {
        self.bind()?;
        let op = |transpose| match transpose {
            true => blas_sys::cublasOperation_t::CUBLAS_OP_T,
            false => blas_sys::cublasOperation_t::CUBLAS_OP_N,
        };
        let int = |size: usize| {
            let size = i32::try_from(size);
            size.map_err(|_| ModelError::Device("a matrix is too large for cuBLAS".to_owned()))
        };
        let [m, n, k] = product.sizes;
        let [a, b, c] = product.at;
        let [lda, ldb, ldc] = product.leading;
        // SAFETY: the caller's; scalars are read before the call returns.
        let result = unsafe {
            blas::sgemm(
                self.blas,
                op(product.transpose[0]),
                op(product.transpose[1]),
                int(m)?,
                int(n)?,
                int(k)?,
                &raw const product.alpha,
                a as *const f32,
                int(lda)?,
                b as *const f32,
                int(ldb)?,
                &raw const product.beta,
                c as *mut f32,
                int(ldc)?,
            )
        };
        result.map_err(|e| {
            let text = format!("{}: cuBLAS: {e:?}", self.name);
            match e.0 {
                blas_sys::cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED => ModelError::NoDevice(text),
                _ => ModelError::Device(text),
            }
        })
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        if self.bind().is_err() {
            return;
        }
        // SAFETY: both were made by `open` and nobody uses them any more.
        unsafe {
            if !self.blas.is_null() {
                let _ = blas::destroy_handle(self.blas);
            }
            let _ = driver::module::unload(self.module);
        }
    }
}

/// That memory does not suffice, with the sizes.
pub(super) fn too_little(name: &str, bytes: usize, free: usize, all: usize) -> String {
    let gb = |bytes: usize| bytes as f64 / 1e9;
    format!(
        "{name} has too little memory: {:.2} GB are needed, {:.2} of {:.2} GB are free; \
         use fewer tokens or requests at once, a smaller model, or the CPU",
        gb(bytes),
        gb(free),
        gb(all)
    )
}

fn no_gpu(why: &str) -> ModelError {
    ModelError::NoDevice(format!("no NVIDIA GPU can be used: {why}; use the CPU"))
}

fn describe(error: DriverError) -> String {
    let text = error.error_string().ok();
    let text = text.map(|text| text.to_string_lossy().into_owned());
    text.unwrap_or_else(|| format!("{:?}", error.0))
}
