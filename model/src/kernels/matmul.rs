//! Matrix products of f32 slices: a checked face of the `gemm` crate.
//!
//! Knows no model. Invariant: every element that the product touches lies inside the slice that
//! it was given, checked before the call. A result does not depend on the number of threads.

use rayon::current_num_threads;

/// A read-only matrix in a slice; element `(i, j)` is at `i * row_stride + j * col_stride`.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

/// A matrix to write, rows contiguous.
pub(crate) struct MatMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

/// What becomes of the values that the target holds.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Into {
    /// They are replaced, and never read.
    Replace,
    /// The product is added to them.
    Add,
}

/// Whether a product may use more than the calling thread.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Threads {
    /// Only the caller, for products inside a parallel loop.
    One,
    /// The current rayon pool.
    All,
}

impl<'a> Mat<'a> {
    /// A dense row-major matrix.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Rows that lie `row_stride` apart.
    pub(crate) fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        check(data.len(), rows, cols, row_stride);
        Self {
            data,
            rows,
            cols,
            row_stride,
            col_stride: 1,
        }
    }

    /// Number of rows.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Some of its rows. The matrix is no transpose.
    pub(crate) fn some_rows(self, rows: std::ops::Range<usize>) -> Self {
        assert!(
            rows.end <= self.rows && self.col_stride == 1,
            "no such rows"
        );
        let len = rows.end.saturating_sub(rows.start);
        match len {
            0 => Self::strided(&[], 0, self.cols, self.row_stride),
            _ => Self::strided(
                &self.data[rows.start * self.row_stride..],
                len,
                self.cols,
                self.row_stride,
            ),
        }
    }

    /// The transpose, without moving data.
    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

impl<'a> MatMut<'a> {
    /// A dense row-major matrix.
    pub(crate) fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Rows that lie `row_stride` apart.
    pub(crate) fn strided(
        data: &'a mut [f32],
        rows: usize,
        cols: usize,
        row_stride: usize,
    ) -> Self {
        check(data.len(), rows, cols, row_stride);
        assert!(rows < 2 || row_stride >= cols, "rows overlap");
        Self {
            data,
            rows,
            cols,
            row_stride,
        }
    }
}

fn check(len: usize, rows: usize, cols: usize, row_stride: usize) {
    let needed = match (rows, cols) {
        (0, _) | (_, 0) => 0,
        _ => (rows - 1) * row_stride + cols,
    };
    assert!(
        needed <= len,
        "a {rows} x {cols} matrix needs {needed} values, got {len}"
    );
}

/// `target = scale · a · b`, or `target += scale · a · b`.
pub(crate) fn matmul(
    target: MatMut<'_>,
    into: Into,
    scale: f32,
    a: Mat<'_>,
    b: Mat<'_>,
    threads: Threads,
) {
    assert_eq!(
        (a.rows, a.cols, b.cols),
        (target.rows, b.rows, target.cols),
        "matrix sizes do not fit"
    );
    if target.rows == 0 || target.cols == 0 {
        return;
    }
    // Below this the threads cost more than they compute.
    let work = a.rows * a.cols * b.cols;
    let threads = match threads {
        Threads::All if work >= 1 << 19 && current_num_threads() > 1 => gemm::Parallelism::Rayon(0),
        _ => gemm::Parallelism::None,
    };
    run(target, into, scale, a, b, threads);
}

#[allow(unsafe_code)]
fn run(
    target: MatMut<'_>,
    into: Into,
    scale: f32,
    a: Mat<'_>,
    b: Mat<'_>,
    threads: gemm::Parallelism,
) {
    let add = into == Into::Add;
    // SAFETY: `check` made sure, when each matrix was made, that its last element is inside its
    // slice; a transpose touches the same elements. The target is a unique borrow, so it aliases
    // neither input, and its rows do not overlap. Sizes were compared by the only caller.
    unsafe {
        gemm::gemm(
            target.rows,
            target.cols,
            a.cols,
            target.data.as_mut_ptr(),
            1,
            target.row_stride as isize,
            add,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            if add { 1.0 } else { 0.0 },
            scale,
            false,
            false,
            false,
            threads,
        );
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn numbers(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7) % 11) as f32 - 5.0).collect()
    }

    #[test]
    fn products_of_strided_and_transposed_matrices() {
        let (a, b) = (numbers(3 * 5), numbers(4 * 3));
        let mut target = vec![1.0; 2 * 6];
        // a: the first 2 columns of a 3 x 5 matrix, transposed; b: 4 x 3, transposed.
        matmul(
            MatMut::strided(&mut target, 2, 4, 6),
            Into::Add,
            0.5,
            Mat::strided(&a, 3, 2, 5).t(),
            Mat::new(&b, 4, 3).t(),
            Threads::One,
        );
        for i in 0..2 {
            for j in 0..4 {
                let sum: f32 = (0..3).map(|k| a[k * 5 + i] * b[j * 3 + k]).sum();
                assert_eq!(target[i * 6 + j], 1.0 + 0.5 * sum);
            }
            assert_eq!(target[i * 6 + 4], 1.0);
        }
    }

    /// Sizes that the `gemm` crate and this module split over threads, and that are no multiples of
    /// a block.
    #[test]
    fn any_number_of_threads_gives_the_same_bits() {
        let (m, k, n) = (301, 203, 157);
        let value = |i: usize| ((i * 7919) % 1009) as f32 * 1e-3 - 0.5;
        let a: Vec<f32> = (0..m * k).map(value).collect();
        let b: Vec<f32> = (0..k * n).map(|i| value(i + 3)).collect();
        let products = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| {
                let plain = (Mat::new(&a, m, k), Mat::new(&b, k, n));
                let turned = (Mat::new(&a, k, m).t(), Mat::new(&b, n, k).t());
                [plain, turned].map(|(a, b)| {
                    let mut target = vec![0.25; m * n];
                    for into in [Into::Add, Into::Add] {
                        let target = MatMut::new(&mut target, m, n);
                        matmul(target, into, 0.5, a, b, Threads::All);
                    }
                    target
                })
            })
        };
        let wanted = products(1);
        for threads in [2, 3, 4, 7] {
            assert!(products(threads) == wanted, "{threads} threads");
        }
    }

    #[test]
    #[should_panic(expected = "needs 12 values")]
    fn a_matrix_beyond_its_slice_is_refused() {
        Mat::new(&numbers(11), 3, 4);
    }
}
