//! What a model computes on.

use std::fmt;
use std::str::FromStr;

use crate::error::ModelError;

/// Where training and generation compute. Results of two devices may differ in their last bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// The processor.
    #[default]
    Cpu,
    /// The first NVIDIA GPU, in f32.
    Cuda,
    /// The same, matrix products with inputs rounded to TF32 (10 bits of mantissa): some times
    /// faster where the GPU has tensor cores, and about as exact as bf16.
    CudaTf32,
    /// The first NVIDIA GPU in f32 where this build and this machine can use one, else the processor.
    Auto,
}

impl FromStr for Device {
    type Err = ModelError;

    fn from_str(text: &str) -> Result<Self, ModelError> {
        match text {
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda),
            "cuda-tf32" => Ok(Self::CudaTf32),
            "auto" => Ok(Self::Auto),
            other => Err(ModelError::Config {
                name: "device",
                reason: format!("`{other}` is none of `cpu`, `cuda`, `cuda-tf32` and `auto`"),
            }),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::CudaTf32 => "cuda-tf32",
            Self::Auto => "auto",
        })
    }
}

impl Device {
    /// The GPU that is meant; none for the processor.
    ///
    /// # Errors
    /// [`ModelError::NoDevice`] when one is asked for and cannot be used, with what is missing.
    #[cfg(feature = "cuda")]
    pub(crate) fn open(self) -> Result<Option<crate::gpu::Gpu>, ModelError> {
        use crate::gpu::Gpu;
        match self {
            Self::Auto if Gpu::is_there() => Gpu::open(false).map(Some),
            Self::Cpu | Self::Auto => Ok(None),
            Self::Cuda => Gpu::open(false).map(Some),
            Self::CudaTf32 => Gpu::open(true).map(Some),
        }
    }

    /// The name of the GPU that is meant; none for the processor.
    ///
    /// # Errors
    /// [`ModelError::NoDevice`] when one is asked for and cannot be used, with what is missing.
    #[cfg(feature = "cuda")]
    pub fn gpu_name(self) -> Result<Option<String>, ModelError> {
        Ok(self.open()?.map(|gpu| gpu.name()))
    }

    /// The name of the GPU that is meant; none for the processor.
    ///
    /// # Errors
    /// [`ModelError::NoDevice`] when one is asked for, which this build cannot use.
    #[cfg(not(feature = "cuda"))]
    pub fn gpu_name(self) -> Result<Option<String>, ModelError> {
        match self {
            Self::Cpu | Self::Auto => Ok(None),
            Self::Cuda | Self::CudaTf32 => Err(ModelError::NoDevice(format!(
                "this program was built without GPUs, so `{self}` cannot be had; \
                 build it with `--features cuda`, or use `cpu`"
            ))),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_known_by_their_names() {
        for device in [Device::Cpu, Device::Cuda, Device::CudaTf32, Device::Auto] {
            assert_eq!(device.to_string().parse::<Device>().unwrap(), device);
        }
        let error = "gpu".parse::<Device>().unwrap_err().to_string();
        assert!(error.contains("`gpu` is none of `cpu`"), "{error}");
        assert_eq!(Device::Cpu.gpu_name().unwrap(), None);
    }

    #[test]
    #[cfg(not(feature = "cuda"))]
    fn a_build_without_gpus_says_so() {
        let error = Device::Cuda.gpu_name().unwrap_err().to_string();
        assert!(error.contains("--features cuda"), "{error}");
        assert_eq!(Device::Auto.gpu_name().unwrap(), None);
    }
}
