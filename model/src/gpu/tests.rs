//! The device's passes against the CPU's: with the same kernels run on the CPU where there is a
//! C++ compiler, and with `FLOWRUN_CUDA=1` on a GPU.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod attention;
mod generation;
mod training;

use super::{Gpu, cuda, host};
use crate::error::ModelError;
use crate::llama::{Llama, Precision};
use crate::tiny;

/// The devices at hand: the CPU as one with few threads, in both orders, and a real one.
fn devices() -> Vec<Gpu> {
    let as_one = [host::gpu([4, 8], false), host::gpu([8, 4], true)];
    as_one.into_iter().flatten().chain(real()).collect()
}

/// A GPU, where `FLOWRUN_CUDA=1` asks for one.
fn real() -> Option<Gpu> {
    match std::env::var("FLOWRUN_CUDA").as_deref() {
        Ok("1") => Some(Gpu::open(false).unwrap()),
        _ => {
            eprintln!("skipped: no GPU, since FLOWRUN_CUDA=1 does not ask for one");
            None
        }
    }
}

/// Every value within `tolerance` of its size or of the largest value's.
fn assert_close(got: &[f32], wanted: &[f32], tolerance: f32, what: &str) {
    assert_eq!(got.len(), wanted.len(), "{what}");
    let size = wanted.iter().fold(0f32, |most, v| most.max(v.abs()));
    for (at, (got, wanted)) in got.iter().zip(wanted).enumerate() {
        let off = (got - wanted).abs();
        assert!(
            off <= tolerance * size,
            "{what}: {got} is not {wanted} at {at}"
        );
    }
}

#[test]
fn a_model_that_does_not_fit_is_refused_with_the_sizes() {
    let Some(gpu) = host::small(1 << 20) else {
        return;
    };
    let base = tiny::base(1);
    let llama = Llama::new(base, None, Precision::F32).unwrap();
    let error = llama.moved_to(&gpu).err().unwrap();
    assert!(matches!(error, ModelError::NoDevice(_)));
    let text = error.to_string();
    assert!(
        text.contains("too little memory: 0.54 GB are needed"),
        "{text}"
    );
    assert!(text.contains("0.00 of 0.00 GB are free"), "{text}");
}

#[test]
fn nvrtc_compiles_the_kernels() {
    if !cuda::has_compiler() {
        eprintln!(
            "skipped: NVRTC cannot be loaded; LD_LIBRARY_PATH names its folder \
             (`pip install nvidia-cuda-nvrtc-cu12` brings one)"
        );
        return;
    }
    for architecture in ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90"] {
        let image = cuda::compile(architecture).unwrap();
        assert!(image.starts_with(b"\x7fELF"), "{architecture}");
    }
    let error = cuda::compile("sm_1").unwrap_err().to_string();
    assert!(
        error.contains("cannot compile the kernels for sm_1"),
        "{error}"
    );
}

/// What a machine without a GPU says. One with a GPU has nothing to say.
#[test]
fn a_missing_gpu_is_a_clear_error() {
    if let Err(error) = Gpu::open(false) {
        let text = error.to_string();
        assert!(
            text.starts_with("GPU: ") && text.contains("use the CPU"),
            "{text}"
        );
        assert_eq!(crate::Device::Auto.gpu_name().unwrap_or_default(), None);
    }
}

/// The calls that reach a GPU, with a library in the place of NVIDIA's: all the tests above once
/// more, in a process that finds it.
#[test]
fn a_gpus_libraries_are_called_as_their_headers_say() {
    let folder = tempfile::tempdir().unwrap();
    if std::env::var_os("FLOWRUN_CUDA").is_some() || host::stubs(folder.path()).is_none() {
        eprintln!("skipped: there is a GPU, or no compiler");
        return;
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["gpu::tests::", "--skip", "a_gpus_libraries"])
        .env("LD_LIBRARY_PATH", folder.path())
        .env("FLOWRUN_CUDA", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{errors}");
    let asked = "a_real_gpu_is_the_one_that_was_asked_for ... ok";
    assert!(text.contains(asked), "{text}");
}

/// What `FLOWRUN_CUDA=1` opens is no test's own device, and says how fast it is.
#[test]
fn a_real_gpu_is_the_one_that_was_asked_for() {
    let Some(gpu) = real() else { return };
    eprintln!("on {gpu:?}");
    assert!(!gpu.name().contains("as a GPU"));
    let (free, all) = gpu.memory().unwrap();
    assert!(0 < free && free <= all);
    let (gemm, copy) = super::rates(&gpu, [32, 16, 16]).unwrap();
    assert!(gemm > 0.0 && copy > 0.0);
    let error = gpu.room::<f32>(1 << 45).unwrap_err().to_string();
    assert!(error.contains("too little memory"), "{error}");
}
