//! The same with AVX2 and with AVX-512 VNNI. Knows no thread; sizes are the callers'.

use std::arch::x86_64::*;

use super::inputs::{Int8Rows, round_blocks};
use super::{BLOCK, Int8Matrix, PANEL, STEPS, TILE};

/// Four values of a row as the bits that are broadcast to all lanes.
#[inline(always)]
fn four(values: &[i8; BLOCK], group: usize) -> i32 {
    let v = &values[4 * group..4 * group + 4];
    i32::from_le_bytes([v[0] as u8, v[1] as u8, v[2] as u8, v[3] as u8])
}

/// # Safety
/// The processor must have AVX2.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn round_avx2(
    x: &[f32],
    values: &mut [i8],
    scales: &mut [f32],
    sums: &mut [f32],
) {
    round_blocks(x, values, scales, sums);
}

/// # Safety
/// The processor must have AVX-512F and AVX-512 VNNI.
#[target_feature(enable = "avx512f,avx512vnni")]
pub(super) unsafe fn tile_vnni(
    matrix: &Int8Matrix,
    panel: usize,
    first: usize,
    count: usize,
    x: &Int8Rows,
    sums: &mut [[f32; PANEL]; TILE],
) {
    let blocks = matrix.inputs / BLOCK;
    let mut totals = [_mm512_setzero_ps(); TILE];
    for index in 0..blocks {
        let block = matrix.block(panel, index);
        // SAFETY: a block has 8 · 64 bytes, its factors 16 values of 4 bytes each.
        let (weights, scales, lows) = unsafe {
            let from = block.weights.as_ptr();
            let weights: [__m512i; 8] =
                std::array::from_fn(|g| _mm512_loadu_si512(from.add(64 * g).cast()));
            (
                weights,
                _mm512_loadu_ps(block.scales.as_ptr()),
                _mm512_loadu_ps(block.lows.as_ptr()),
            )
        };
        for (row, total) in totals.iter_mut().enumerate().take(count) {
            let (coarse, fine, scale, sum) = x.block(first + row, index, blocks);
            let (mut a, mut b) = (_mm512_setzero_si512(), _mm512_setzero_si512());
            for (group, weights) in weights.iter().enumerate() {
                a = _mm512_dpbusd_epi32(a, *weights, _mm512_set1_epi32(four(coarse, group)));
                b = _mm512_dpbusd_epi32(b, *weights, _mm512_set1_epi32(four(fine, group)));
            }
            let a = _mm512_mullo_epi32(a, _mm512_set1_epi32(STEPS));
            let whole = _mm512_cvtepi32_ps(_mm512_add_epi32(a, b));
            let product = _mm512_mul_ps(whole, scales);
            *total = _mm512_fmadd_ps(product, _mm512_set1_ps(scale), *total);
            *total = _mm512_fmadd_ps(lows, _mm512_set1_ps(sum), *total);
        }
    }
    for (sums, total) in sums.iter_mut().zip(totals) {
        // SAFETY: 16 values.
        unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), total) };
    }
}

/// # Safety
/// The processor must have AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn tile_avx2(
    matrix: &Int8Matrix,
    panel: usize,
    first: usize,
    count: usize,
    x: &Int8Rows,
    sums: &mut [[f32; PANEL]; TILE],
) {
    let blocks = matrix.inputs / BLOCK;
    for half in 0..2 {
        let mut totals = [_mm256_setzero_ps(); TILE];
        for index in 0..blocks {
            let block = matrix.block(panel, index);
            // SAFETY: half a row of 64 bytes in each of 8 groups; 8 of 16 factors.
            let (weights, scales, lows) = unsafe {
                let from = block.weights.as_ptr().add(32 * half);
                let weights: [__m256i; 8] =
                    std::array::from_fn(|g| _mm256_loadu_si256(from.add(64 * g).cast()));
                (
                    weights,
                    _mm256_loadu_ps(block.scales.as_ptr().add(8 * half)),
                    _mm256_loadu_ps(block.lows.as_ptr().add(8 * half)),
                )
            };
            for (row, total) in totals.iter_mut().enumerate().take(count) {
                let (coarse, fine, scale, sum) = x.block(first + row, index, blocks);
                let a = dot_avx2(&weights, coarse);
                let a = _mm256_mullo_epi32(a, _mm256_set1_epi32(STEPS));
                let whole = _mm256_add_epi32(a, dot_avx2(&weights, fine));
                let whole = _mm256_cvtepi32_ps(whole);
                let product = _mm256_mul_ps(whole, scales);
                *total = _mm256_fmadd_ps(product, _mm256_set1_ps(scale), *total);
                *total = _mm256_fmadd_ps(lows, _mm256_set1_ps(sum), *total);
            }
        }
        for (sums, total) in sums.iter_mut().zip(totals) {
            // SAFETY: 8 of 16 values.
            unsafe { _mm256_storeu_ps(sums.as_mut_ptr().add(8 * half), total) };
        }
    }
}

/// The sums of 8 lanes.
#[inline]
#[target_feature(enable = "avx2")]
fn dot_avx2(weights: &[__m256i; 8], values: &[i8; BLOCK]) -> __m256i {
    // Products of whole bytes would not fit 16 bits; of halves, 8 sums do.
    let nibble = _mm256_set1_epi8(15);
    let (mut low, mut high) = (_mm256_setzero_si256(), _mm256_setzero_si256());
    for (group, weights) in weights.iter().enumerate() {
        let four = _mm256_set1_epi32(four(values, group));
        let part = _mm256_and_si256(*weights, nibble);
        low = _mm256_add_epi16(low, _mm256_maddubs_epi16(part, four));
        let part = _mm256_and_si256(_mm256_srli_epi16(*weights, 4), nibble);
        high = _mm256_add_epi16(high, _mm256_maddubs_epi16(part, four));
    }
    let ones = _mm256_set1_epi16(1);
    let low = _mm256_madd_epi16(low, ones);
    let high = _mm256_slli_epi32(_mm256_madd_epi16(high, ones), 4);
    _mm256_add_epi32(low, high)
}
