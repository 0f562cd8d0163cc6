//! Products of rounded weights and inputs, against those of f32 and each other.

use super::*;

fn values(n: usize, seed: usize) -> Vec<f32> {
    (0..n)
        .map(|i| ((i * 7919 + seed * 31) % 1009) as f32 / 504.5 - 1.0)
        .collect()
}

/// Rows, inputs and outputs around the sizes of tiles and panels.
const SHAPES: [(usize, usize, usize); 5] = [
    (1, 32, 1),
    (3, 64, 16),
    (4, 96, 17),
    (9, 576, 40),
    (130, 64, 300),
];

#[test]
fn products_are_close_to_those_of_f32() {
    for (rows, inputs, outputs) in SHAPES {
        let (x, w) = (values(rows * inputs, 1), values(outputs * inputs, 2));
        let matrix = Int8Matrix::new(&w, inputs).expect("whole blocks");
        let mut out = vec![1.0; rows * outputs];
        matrix.linear(&x, &mut out, Into::Add, Threads::All);
        for (at, got) in out.iter().enumerate() {
            let x = &x[at / outputs * inputs..][..inputs];
            let w = &w[at % outputs * inputs..][..inputs];
            let want: f32 = x.iter().zip(w).map(|(x, w)| x * w).sum();
            // Half a level of weights up to 1, whose errors add as noise.
            let bound = 0.01 * (inputs as f32).sqrt();
            assert!((got - 1.0 - want).abs() < bound, "{got} is not 1 + {want}");
        }
    }
}

#[test]
fn every_instruction_set_and_thread_plan_gives_the_same_bits() {
    for (rows, inputs, outputs) in SHAPES {
        let (x, w) = (values(rows * inputs, 3), values(outputs * inputs, 4));
        let matrix = Int8Matrix::new(&w, inputs).expect("whole blocks");
        let run = |kernel, threads| {
            let mut out = vec![0.5; rows * outputs];
            matrix.linear_by(kernel, &x, &mut out, Into::Add, threads);
            out.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        };
        let portable = run(Kernel::Portable, Threads::One);
        for kernel in Kernel::all() {
            assert_eq!(run(kernel, Threads::One), portable, "{kernel:?}");
            assert_eq!(run(kernel, Threads::All), portable, "{kernel:?}");
        }
    }
}

#[test]
fn a_row_does_not_depend_on_the_others() {
    let (x, w) = (values(9 * 64, 5), values(20 * 64, 6));
    let matrix = Int8Matrix::new(&w, 64).expect("whole blocks");
    let mut all = vec![0.0; 9 * 20];
    matrix.linear(&x, &mut all, Into::Replace, Threads::One);
    for (x, want) in x.chunks(64).zip(all.chunks(20)) {
        let mut out = vec![0.0; 20];
        matrix.linear(x, &mut out, Into::Replace, Threads::One);
        assert_eq!(out, want);
    }
}

#[test]
fn weights_of_four_and_eight_bits_are_kept() {
    let level = |i: usize, levels: usize| ((i * 7) % levels) as f32;
    let blocks = |value: &dyn Fn(usize) -> f32| (0..64).map(value).collect::<Vec<_>>();
    for w in [
        // Q4_1: 16 even levels, both ends in use.
        blocks(&|i| -0.3 + 0.04 * level(i, 16)),
        // Q4_0: the largest value is 8 steps from zero, on either side; 15 levels are used.
        blocks(&|i| 0.02 * (level(i, 15) - 8.0)),
        blocks(&|i| -0.02 * (level(i, 15) - 8.0)),
        // Q8_0: the largest value is 127 steps from zero.
        blocks(&|i| match i % 32 {
            0 => 0.127,
            _ => 0.001 * (level(i, 255) - 127.0),
        }),
    ] {
        let matrix = Int8Matrix::new(&w, 64).expect("whole blocks");
        for unit in 0..64 {
            let mut x = vec![0.0; 64];
            x[unit] = 1.0;
            let mut out = vec![0.0];
            matrix.linear(&x, &mut out, Into::Replace, Threads::One);
            assert!((out[0] - w[unit]).abs() < 1e-6, "{} {}", out[0], w[unit]);
        }
    }
}

#[test]
fn a_row_is_given_back_as_it_was_rounded() {
    let w = values(40 * 96, 7);
    let matrix = Int8Matrix::new(&w, 96).expect("whole blocks");
    for (output, want) in w.chunks(96).enumerate() {
        let row = matrix.row(output);
        assert_eq!(row.len(), 96);
        for (got, want) in row.iter().zip(want) {
            assert!((got - want).abs() < 0.005, "{got} is not {want}");
        }
    }
}

#[test]
fn extremes_do_not_overflow() {
    let x = vec![-1.0f32; 64];
    let w: Vec<f32> = (0..64)
        .map(|i| if i % 32 == 0 { 0.0 } else { 1.0 })
        .collect();
    let matrix = Int8Matrix::new(&w, 64).expect("whole blocks");
    for kernel in Kernel::all() {
        let mut out = vec![0.0];
        matrix.linear_by(kernel, &x, &mut out, Into::Replace, Threads::One);
        assert!((out[0] + 62.0).abs() < 1e-3, "{kernel:?}: {}", out[0]);
    }
    assert!(Int8Matrix::new(&w, 16 + 32).is_none());
}
