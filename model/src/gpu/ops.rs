//! The operations of a model on a device, each with its sizes checked: the only callers of
//! kernels and matrix products.
//!
//! Soundness: an operation asserts that its views have the sizes that the kernel touches, and the
//! kernels touch nothing else. Two exceptions read addresses from tables on the device: `append`
//! and attention. Their tables are made by `attention` and the caches of `llama` from buffers that
//! the caller holds until the operation was started, after which the device's order protects
//! them; indices of rows come from tokens and targets that were checked against the vocabulary.

use super::attention::{KeyTiles, Plan, Sizes};
use super::backend::{Arg, Gpu, Kernel, Sgemm, View};
use crate::config::Activation;
use crate::error::ModelError;

/// Blocks of an elementwise kernel at most.
const BLOCKS: usize = 4096;

/// A row-major matrix, or one that is read transposed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matrix<'a> {
    values: View<'a, f32>,
    /// Of the matrix as it is stored.
    rows: usize,
    columns: usize,
    stride: usize,
    transposed: bool,
}

impl<'a> Matrix<'a> {
    pub(crate) fn new(values: View<'a, f32>, rows: usize, columns: usize) -> Self {
        Self::strided(values, rows, columns, columns)
    }

    /// Rows that begin `stride` values apart.
    pub(crate) fn strided(
        values: View<'a, f32>,
        rows: usize,
        columns: usize,
        stride: usize,
    ) -> Self {
        let fits = rows == 0 || (rows - 1) * stride + columns <= values.len();
        assert!(columns <= stride && fits, "a matrix outside of its buffer");
        Self {
            values,
            rows,
            columns,
            stride,
            transposed: false,
        }
    }

    /// The transposed matrix.
    pub(crate) fn t(self) -> Self {
        Self {
            transposed: !self.transposed,
            ..self
        }
    }

    fn shape(self) -> [usize; 2] {
        match self.transposed {
            true => [self.columns, self.rows],
            false => [self.rows, self.columns],
        }
    }
}

/// An RMS norm that is done or to be undone: weight, width by it, and `1 / rms` of the rows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Norm<'a> {
    pub(crate) weight: View<'a, f32>,
    pub(crate) inverse: View<'a, f32>,
}

/// Attention's values of a pass: queries by rows, and what they gave.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attended<'a> {
    pub(crate) q: View<'a, f32>,
    pub(crate) out: View<'a, f32>,
    /// `[rows, heads]`.
    pub(crate) log_sums: View<'a, f32>,
}

/// Which layer attends, and how far it sees.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layer {
    /// Which of the layers that the segments hold.
    pub(crate) slot: usize,
    /// Columns that a row sees at most; none for all.
    pub(crate) window: Option<usize>,
}

fn int(value: usize) -> Arg {
    // Sizes of one model; the largest is a vocabulary.
    Arg::Int(i32::try_from(value).expect("a size below 2³¹"))
}

impl Gpu {
    /// `c = alpha · a · b`, added to `c` or in its place.
    pub(crate) fn product(
        &self,
        c: Matrix<'_>,
        add: bool,
        alpha: f32,
        a: Matrix<'_>,
        b: Matrix<'_>,
    ) -> Result<(), ModelError> {
        let ([rows, inner], [inner_b, columns]) = (a.shape(), b.shape());
        assert_eq!(inner, inner_b, "inner sizes");
        assert!(!c.transposed && c.shape() == [rows, columns], "result size");
        if rows == 0 || columns == 0 {
            return Ok(());
        }
        // A row-major matrix is a column-major one transposed: Cᵀ = Bᵀ · Aᵀ.
        let product = Sgemm {
            transpose: [b.transposed, a.transposed],
            sizes: [columns, rows, inner],
            alpha,
            beta: if add { 1.0 } else { 0.0 },
            at: [b, a, c].map(|matrix| matrix.values.address()),
            leading: [b, a, c].map(|matrix| matrix.stride),
        };
        // SAFETY: the matrices lie in their buffers, and their sizes fit each other.
        unsafe { self.0.sgemm(&product) }
    }

    /// Starts one block a row.
    ///
    /// # Safety
    /// As [`Backend::launch`](super::backend::Backend::launch).
    unsafe fn rows(&self, kernel: Kernel, rows: usize, args: &[Arg]) -> Result<(), ModelError> {
        if rows == 0 {
            return Ok(());
        }
        let rows = u32::try_from(rows).expect("rows below 2³²");
        let [threads, _] = self.0.threads();
        // SAFETY: the caller's. Sums over a row have room for a value of each thread.
        unsafe {
            self.0
                .launch(kernel, [rows, 1], threads, threads as usize, args)
        }
    }

    /// Starts threads that share `n` values.
    ///
    /// # Safety
    /// As [`Backend::launch`](super::backend::Backend::launch).
    unsafe fn values(&self, kernel: Kernel, n: usize, args: &[Arg]) -> Result<(), ModelError> {
        if n == 0 {
            return Ok(());
        }
        let [threads, _] = self.0.threads();
        let blocks = n.div_ceil(threads as usize).min(BLOCKS) as u32;
        // SAFETY: the caller's.
        unsafe { self.0.launch(kernel, [blocks, 1], threads, 0, args) }
    }

    /// `out[i] = table[index[i]]`, in rows of `width`. The indices are those of rows of `table`.
    pub(crate) fn gather(
        &self,
        out: View<'_, f32>,
        table: View<'_, f32>,
        index: View<'_, u32>,
        width: usize,
    ) -> Result<(), ModelError> {
        assert_eq!(out.len(), index.len() * width);
        let args = [out.arg(), table.arg(), index.arg(), int(width)];
        // SAFETY: sizes; the indices are the caller's.
        unsafe { self.rows(Kernel::Gather, index.len(), &args) }
    }

    /// `x[index[i]] += from[i]`, in rows of `width`; indices as for [`Gpu::gather`], none twice.
    pub(crate) fn scatter_add(
        &self,
        x: View<'_, f32>,
        from: View<'_, f32>,
        index: View<'_, u32>,
        width: usize,
    ) -> Result<(), ModelError> {
        assert_eq!(from.len(), index.len() * width);
        let args = [x.arg(), from.arg(), index.arg(), int(width)];
        // SAFETY: sizes; the indices are the caller's.
        unsafe { self.rows(Kernel::ScatterAdd, index.len(), &args) }
    }

    /// Normalises rows as wide as the weight and records `1 / rms`; `out` may be `x`.
    pub(crate) fn rms_norm(
        &self,
        out: View<'_, f32>,
        x: View<'_, f32>,
        norm: Norm<'_>,
        eps: f64,
    ) -> Result<(), ModelError> {
        let (width, rows) = (norm.weight.len(), norm.inverse.len());
        assert!(x.len() == rows * width && out.len() == x.len());
        let Norm { weight, inverse } = norm;
        let args = [
            out.arg(),
            inverse.arg(),
            x.arg(),
            weight.arg(),
            Arg::Float(eps as f32),
            int(width),
        ];
        // SAFETY: sizes.
        unsafe { self.rows(Kernel::RmsNorm, rows, &args) }
    }

    /// The same result again.
    pub(crate) fn rms_norm_again(
        &self,
        out: View<'_, f32>,
        x: View<'_, f32>,
        norm: Norm<'_>,
    ) -> Result<(), ModelError> {
        let (width, rows) = (norm.weight.len(), norm.inverse.len());
        assert!(x.len() == rows * width && out.len() == x.len());
        let Norm { weight, inverse } = norm;
        let args = [out.arg(), inverse.arg(), x.arg(), weight.arg(), int(width)];
        // SAFETY: sizes.
        unsafe { self.rows(Kernel::RmsNormAgain, rows, &args) }
    }

    /// The gradient of a norm's input, added to `dx` or in its place.
    pub(crate) fn rms_norm_backward(
        &self,
        dx: View<'_, f32>,
        add: bool,
        dy: View<'_, f32>,
        x: View<'_, f32>,
        norm: Norm<'_>,
    ) -> Result<(), ModelError> {
        let (width, rows) = (norm.weight.len(), norm.inverse.len());
        assert!([x, dx, dy].iter().all(|v| v.len() == rows * width));
        let Norm { weight, inverse } = norm;
        let args = [
            dx.arg(),
            dy.arg(),
            inverse.arg(),
            x.arg(),
            weight.arg(),
            int(width),
            Arg::Int(i32::from(add)),
        ];
        // SAFETY: sizes.
        unsafe { self.rows(Kernel::RmsNormBackward, rows, &args) }
    }

    /// Adds `bias` to every row of `x`.
    pub(crate) fn add_bias(&self, x: View<'_, f32>, bias: View<'_, f32>) -> Result<(), ModelError> {
        let rows = x.len() / bias.len();
        assert_eq!(x.len(), rows * bias.len());
        let args = [x.arg(), bias.arg(), int(bias.len())];
        // SAFETY: sizes.
        unsafe { self.rows(Kernel::AddBias, rows, &args) }
    }

    /// Turns the heads (`dim` wide) of each row by its angles, `[rows, dim / 2]`, or back.
    pub(crate) fn rotate(
        &self,
        x: View<'_, f32>,
        [cosines, sines]: [View<'_, f32>; 2],
        dim: usize,
        back: bool,
    ) -> Result<(), ModelError> {
        let rows = cosines.len() / (dim / 2);
        assert_eq!(cosines.len(), sines.len());
        let heads = x.len() / dim / rows.max(1);
        assert_eq!(x.len(), rows * heads * dim);
        let sign = if back { -1.0 } else { 1.0 };
        let args = [
            x.arg(),
            cosines.arg(),
            sines.arg(),
            int(heads),
            int(dim),
            Arg::Float(sign),
        ];
        // SAFETY: sizes.
        unsafe { self.rows(Kernel::Rotate, rows, &args) }
    }

    /// `x += y`.
    pub(crate) fn add(&self, x: View<'_, f32>, y: View<'_, f32>) -> Result<(), ModelError> {
        assert_eq!(x.len(), y.len());
        let args = [x.arg(), y.arg(), Arg::Long(x.len() as u64)];
        // SAFETY: sizes.
        unsafe { self.values(Kernel::Add, x.len(), &args) }
    }

    /// `out = activation(gate) · up`; `out` may be `gate`.
    pub(crate) fn glu(
        &self,
        activation: Activation,
        out: View<'_, f32>,
        gate: View<'_, f32>,
        up: View<'_, f32>,
    ) -> Result<(), ModelError> {
        // SAFETY: the kernel takes these.
        unsafe { self.gated(Kernel::Glu, activation, [out, gate, up]) }
    }

    /// As the CPU's `vector::glu_backward`.
    pub(crate) fn glu_backward(
        &self,
        activation: Activation,
        d: View<'_, f32>,
        gate: View<'_, f32>,
        up: View<'_, f32>,
    ) -> Result<(), ModelError> {
        // SAFETY: the kernel takes these.
        unsafe { self.gated(Kernel::GluBackward, activation, [d, gate, up]) }
    }

    /// Starts threads that share the values of a gated unit: of its result or gradient, its gate
    /// and what is gated, all of one size.
    ///
    /// # Safety
    /// The kernel takes these views, their size and the activation.
    unsafe fn gated(
        &self,
        kernel: Kernel,
        activation: Activation,
        views: [View<'_, f32>; 3],
    ) -> Result<(), ModelError> {
        let [out, gate, up] = views;
        assert!(out.len() == gate.len() && gate.len() == up.len());
        let args = [
            out.arg(),
            gate.arg(),
            up.arg(),
            Arg::Long(up.len() as u64),
            number(activation),
        ];
        // SAFETY: sizes; the kernel is the caller's.
        unsafe { self.values(kernel, up.len(), &args) }
    }

    /// As the CPU's `Dropout::masked`: a draw below `limit` of 2³² drops a value, the others are
    /// multiplied by `keep`. `out` may be `x`.
    pub(crate) fn dropout(
        &self,
        out: View<'_, f32>,
        x: View<'_, f32>,
        key: u64,
        limit: u64,
        keep: f32,
    ) -> Result<(), ModelError> {
        assert_eq!(out.len(), x.len());
        let args = [
            out.arg(),
            x.arg(),
            Arg::Long(x.len() as u64),
            Arg::Long(key),
            Arg::Long(limit),
            Arg::Float(keep),
        ];
        // SAFETY: sizes.
        unsafe { self.values(Kernel::Dropout, x.len(), &args) }
    }

    /// Writes rows of keys and values to their places, three numbers a row; see the kernel. The
    /// places are in buffers that the caller holds.
    pub(crate) fn append(
        &self,
        k: View<'_, f32>,
        v: View<'_, f32>,
        slots: View<'_, u64>,
        layer: usize,
    ) -> Result<(), ModelError> {
        let rows = slots.len() / 3;
        let width = k.len() / rows.max(1);
        assert!(k.len() == rows * width && v.len() == k.len());
        let args = [k.arg(), v.arg(), slots.arg(), int(layer), int(width)];
        // SAFETY: sizes; the places are the caller's.
        unsafe { self.rows(Kernel::Append, rows, &args) }
    }

    /// Turns rows of logits into probabilities, less one at each row's target; `losses` gets two
    /// values a row: cross entropy, and 1 when no token is likelier. Targets are below the
    /// vocabulary.
    pub(crate) fn cross_entropy(
        &self,
        logits: View<'_, f32>,
        targets: View<'_, u32>,
        losses: View<'_, f32>,
    ) -> Result<(), ModelError> {
        let rows = targets.len();
        let vocab = logits.len() / rows.max(1);
        assert!(logits.len() == rows * vocab && losses.len() == 2 * rows);
        let args = [logits.arg(), targets.arg(), losses.arg(), int(vocab)];
        // SAFETY: sizes; the targets are the caller's.
        unsafe { self.rows(Kernel::CrossEntropy, rows, &args) }
    }

    /// Causal attention of all runs of `plan`.
    pub(crate) fn attention(
        &self,
        plan: &Plan,
        layer: Layer,
        values: Attended<'_>,
    ) -> Result<(), ModelError> {
        let sizes = plan.sizes;
        sizes.check(plan.rows, values);
        let tiles = &plan.forward;
        let args = [
            values.out.arg(),
            values.log_sums.arg(),
            values.q.arg(),
            plan.runs.all().arg(),
            tiles.table.all().arg(),
            plan.segments.all().arg(),
            int(layer.slot),
            int(sizes.heads),
            int(sizes.kv_heads),
            int(sizes.dim),
            int(layer.window.unwrap_or(0)),
            Arg::Float(sizes.scale()),
            int(tiles.block.rows),
            int(tiles.block.keys),
        ];
        let shared = sizes.shared_forward(tiles.block);
        // SAFETY: sizes; the segments are the plan's.
        unsafe { self.attend(Kernel::Attention, tiles.count, sizes, shared, &args) }
    }

    /// The gradients of queries, keys and values of a pass whose own keys and values are `k` and
    /// `v`; `dots` is room for a value of every head of every row. `key_tiles` belong to `plan`.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn attention_backward(
        &self,
        plan: &Plan,
        key_tiles: &KeyTiles,
        layer: Layer,
        values: Attended<'_>,
        [k, v]: [View<'_, f32>; 2],
        d_out: View<'_, f32>,
        dots: View<'_, f32>,
        [dq, dk, dv]: [View<'_, f32>; 3],
    ) -> Result<(), ModelError> {
        let sizes = plan.sizes;
        sizes.check(plan.rows, values);
        let kv = plan.rows * sizes.kv_heads * sizes.dim;
        assert!([k, v, dk, dv].iter().all(|view| view.len() == kv));
        assert!([d_out, dq].iter().all(|view| view.len() == values.q.len()));
        assert_eq!(dots.len(), values.log_sums.len());
        let n = dots.len();
        let args = [
            dots.arg(),
            values.out.arg(),
            d_out.arg(),
            Arg::Long(n as u64),
            int(sizes.dim),
        ];
        // SAFETY: sizes.
        unsafe { self.values(Kernel::AttentionDots, n, &args)? };
        let window = int(layer.window.unwrap_or(0));
        let tiles = &key_tiles.queries;
        let args = [
            dq.arg(),
            values.q.arg(),
            d_out.arg(),
            values.log_sums.arg(),
            dots.arg(),
            plan.runs.all().arg(),
            tiles.table.all().arg(),
            plan.segments.all().arg(),
            int(layer.slot),
            int(sizes.heads),
            int(sizes.kv_heads),
            int(sizes.dim),
            window,
            Arg::Float(sizes.scale()),
            int(tiles.block.rows),
            int(tiles.block.keys),
        ];
        let shared = sizes.shared_backward_q(tiles.block);
        // SAFETY: sizes; the segments are the plan's.
        unsafe {
            self.attend(
                Kernel::AttentionBackwardQ,
                tiles.count,
                sizes,
                shared,
                &args,
            )?;
        }
        let tiles = &key_tiles.keys;
        let args = [
            dk.arg(),
            dv.arg(),
            values.q.arg(),
            k.arg(),
            v.arg(),
            d_out.arg(),
            values.log_sums.arg(),
            dots.arg(),
            key_tiles.positions.all().arg(),
            tiles.table.all().arg(),
            int(sizes.heads),
            int(sizes.kv_heads),
            int(sizes.dim),
            window,
            Arg::Float(sizes.scale()),
            int(tiles.block.rows),
            int(tiles.block.keys),
        ];
        let shared = sizes.shared_backward_kv(tiles.block);
        // SAFETY: sizes; the tiles cover rows of the pass.
        unsafe {
            self.attend(
                Kernel::AttentionBackwardKv,
                tiles.count,
                sizes,
                shared,
                &args,
            )
        }
    }

    /// Starts one block a tile and key head.
    ///
    /// # Safety
    /// As [`Backend::launch`](super::backend::Backend::launch).
    unsafe fn attend(
        &self,
        kernel: Kernel,
        tiles: usize,
        sizes: Sizes,
        shared: usize,
        args: &[Arg],
    ) -> Result<(), ModelError> {
        if tiles == 0 {
            return Ok(());
        }
        let blocks = [tiles, sizes.kv_heads].map(|n| u32::try_from(n).expect("below 2³²"));
        let [_, threads] = self.0.threads();
        // SAFETY: the caller's.
        unsafe { self.0.launch(kernel, blocks, threads, shared, args) }
    }
}

/// As the kernels number them.
fn number(activation: Activation) -> Arg {
    Arg::Int(match activation {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
    })
}
