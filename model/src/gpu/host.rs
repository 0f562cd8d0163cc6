//! The CPU as a device: `kernels.cu` compiled as C++, for the tests.
//!
//! Invariant: fresh memory is NaN, so that what nobody wrote shows, and words behind every buffer
//! must stay as they are.
//!
//! Soundness: addresses are those of allocations of this process; the shim's state is used by one
//! launch at a time.

use std::ffi::c_void;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, LazyLock, Mutex};

use super::backend::{Arg, Backend, Gpu, Kernel, SOURCE, Sgemm};
use crate::error::ModelError;

/// Words behind a buffer that nobody may touch.
const GUARD: usize = 8;
const MARK: u32 = 0xdead_beef;

type Launch = unsafe extern "C" fn(u32, u32, u32, *mut f32, bool, *mut *mut c_void) -> u32;

/// The compiled kernels, in the order of [`Kernel::ALL`]; none without a compiler.
static KERNELS: LazyLock<Option<Vec<Launch>>> = LazyLock::new(compile);
/// Taken by a launch.
static ONE: Mutex<()> = Mutex::new(());

struct Host {
    threads: [u32; 2],
    /// The order of a block's threads between two barriers.
    backwards: bool,
    bytes: usize,
}

/// The CPU as a device with so many threads a block; none, and a word on stderr, without a C++
/// compiler (`CXX`, else `c++`).
pub(crate) fn gpu(threads: [u32; 2], backwards: bool) -> Option<Gpu> {
    KERNELS.as_ref()?;
    Some(Gpu(Arc::new(Host {
        threads,
        backwards,
        bytes: 1 << 40,
    })))
}

/// The same with so many bytes of memory, as it says.
pub(crate) fn small(bytes: usize) -> Option<Gpu> {
    KERNELS.as_ref()?;
    Some(Gpu(Arc::new(Host {
        threads: [4, 4],
        backwards: false,
        bytes,
    })))
}

fn compile() -> Option<Vec<Launch>> {
    let folder = tempfile::tempdir().unwrap();
    let library = folder.path().join("kernels.so");
    build(&library, "")?;
    // SAFETY: our own library, which does nothing when it is loaded; its functions have this type.
    let functions = unsafe {
        let library = libloading::Library::new(&library).unwrap();
        let get = |kernel: &Kernel| {
            let name = format!("host_{}", kernel.name());
            *library.get::<Launch>(name.as_bytes()).unwrap()
        };
        let functions = Kernel::ALL.iter().map(get).collect();
        std::mem::forget(library);
        functions
    };
    Some(functions)
}

/// Libraries in `folder` that stand for NVIDIA's; none without a compiler.
pub(super) fn stubs(folder: &Path) -> Option<()> {
    let mut table =
        "typedef unsigned (*Launch)(unsigned, unsigned, unsigned, float*, bool, void**);\n\
                     struct Named { const char* name; Launch launch; };\n\
                     static const Named KERNELS[] = {\n"
            .to_owned();
    for kernel in Kernel::ALL {
        let name = kernel.name();
        table.push_str(&format!("{{\"{name}\", host_{name}}},\n"));
    }
    table.push_str("};\n");
    let library = folder.join("libcuda.so");
    build(&library, &format!("{table}{}", include_str!("stub.cc")))?;
    for other in ["libnvrtc.so", "libcublas.so"] {
        std::fs::copy(&library, folder.join(other)).unwrap();
    }
    Some(())
}

/// Compiles the kernels, and `more`, as a library.
#[allow(clippy::print_stderr)]
fn build(library: &Path, more: &str) -> Option<()> {
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let mut source = format!("{}\n{SOURCE}\n", include_str!("shim.h"));
    for kernel in Kernel::ALL {
        source.push_str(&format!("EXPORT({})\n", kernel.name()));
    }
    source.push_str(more);
    let input = library.with_extension("cc");
    std::fs::write(&input, source).unwrap();
    let mut command = Command::new(&compiler);
    command.args(["-std=c++17", "-O2", "-shared", "-fPIC", "-o"]);
    let output = match command.arg(library).arg(&input).output() {
        Ok(output) => output,
        Err(error) => {
            let name = compiler.to_string_lossy();
            eprintln!("skipped: the kernels need a C++ compiler, `{name}`: {error}");
            return None;
        }
    };
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    Some(())
}

impl Backend for Host {
    fn name(&self) -> String {
        "the CPU as a GPU".to_owned()
    }

    fn memory(&self) -> Result<(usize, usize), ModelError> {
        Ok((self.bytes, self.bytes))
    }

    fn threads(&self) -> [u32; 2] {
        self.threads
    }

    fn finish(&self) -> Result<(), ModelError> {
        Ok(())
    }

    fn allocate(&self, bytes: usize) -> Result<u64, ModelError> {
        let mut room = vec![u64::MAX; bytes.div_ceil(8)];
        let mark = u64::from(MARK) << 32 | u64::from(MARK);
        room.extend([mark; GUARD / 2]);
        Ok(Box::into_raw(room.into_boxed_slice()).cast::<u64>() as u64)
    }

    unsafe fn free(&self, address: u64, bytes: usize) {
        let words = bytes.div_ceil(8) + GUARD / 2;
        let slice = std::ptr::slice_from_raw_parts_mut(address as *mut u64, words);
        // SAFETY: `allocate` made it so.
        let room = unsafe { Box::from_raw(slice) };
        let mark = u64::from(MARK) << 32 | u64::from(MARK);
        let untouched = room[words - GUARD / 2..].iter().all(|word| *word == mark);
        assert!(
            untouched || std::thread::panicking(),
            "written behind a buffer"
        );
    }

    unsafe fn upload(&self, to: u64, from: *const u8, bytes: usize) -> Result<(), ModelError> {
        // SAFETY: the caller's.
        unsafe { std::ptr::copy_nonoverlapping(from, to as *mut u8, bytes) };
        Ok(())
    }

    unsafe fn download(&self, to: *mut u8, from: u64, bytes: usize) -> Result<(), ModelError> {
        // SAFETY: the caller's.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to, bytes) };
        Ok(())
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), ModelError> {
        assert!(to + bytes as u64 <= from || from + bytes as u64 <= to);
        // SAFETY: the caller's.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }

    unsafe fn clear(&self, to: u64, bytes: usize) -> Result<(), ModelError> {
        // SAFETY: the caller's.
        unsafe { std::ptr::write_bytes(to as *mut u8, 0, bytes) };
        Ok(())
    }

    unsafe fn launch(
        &self,
        kernel: Kernel,
        [x, y]: [u32; 2],
        threads: u32,
        shared: usize,
        args: &[Arg],
    ) -> Result<(), ModelError> {
        let function = KERNELS.as_ref().unwrap()[kernel as usize];
        let mut bits: Vec<u64> = args.iter().map(|arg| arg.bits()).collect();
        let mut pointers: Vec<*mut c_void> = bits
            .iter_mut()
            .map(|bits| std::ptr::from_mut(bits).cast())
            .collect();
        let mut room = vec![f32::NAN; shared + GUARD];
        let _one = ONE
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        // SAFETY: the caller's; as many arguments as parameters.
        unsafe {
            let none = std::ptr::null_mut();
            let wanted = function(0, 0, 0, std::ptr::null_mut(), false, none);
            assert_eq!(wanted as usize, args.len(), "{}", kernel.name());
            let (shared, args) = (room.as_mut_ptr(), pointers.as_mut_ptr());
            function(x, y, threads, shared, self.backwards, args);
        }
        let behind = &room[shared..];
        assert!(behind.iter().all(|v| v.is_nan()), "{}", kernel.name());
        Ok(())
    }

    unsafe fn sgemm(&self, product: &Sgemm) -> Result<(), ModelError> {
        let [m, n, k] = product.sizes;
        let [lda, ldb, ldc] = product.leading;
        let rows = |transposed, rows, columns| if transposed { columns } else { rows };
        // As BLAS checks them.
        assert!(lda >= rows(product.transpose[0], m, k).max(1));
        assert!(ldb >= rows(product.transpose[1], k, n).max(1) && ldc >= m.max(1));
        let at = |transposed, row, column, leading| match transposed {
            true => column + row * leading,
            false => row + column * leading,
        };
        let [a, b] = [product.at[0] as *const f32, product.at[1] as *const f32];
        let c = product.at[2] as *mut f32;
        for column in 0..n {
            for row in 0..m {
                let mut sum = 0.0;
                // SAFETY: the caller's.
                unsafe {
                    for inner in 0..k {
                        sum += f64::from(*a.add(at(product.transpose[0], row, inner, lda)))
                            * f64::from(*b.add(at(product.transpose[1], inner, column, ldb)));
                    }
                    let to = c.add(row + column * ldc);
                    let before = match product.beta == 0.0 {
                        true => 0.0,
                        false => product.beta * *to,
                    };
                    *to = product.alpha * sum as f32 + before;
                }
            }
        }
        Ok(())
    }
}
