//! The arithmetic of a transformer on plain f32 slices.
//!
//! Knows no model and no file format. Candle's own CPU operations allocate and synchronise at
//! every step; these write into buffers of the caller. Invariant: matrices are row-major.

pub(crate) mod int8;
pub(crate) mod matmul;
pub(crate) mod rows;
pub(crate) mod vector;
mod view;
pub(crate) mod window;

pub(crate) use view::View;
