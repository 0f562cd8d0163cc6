//! Which rows form which step: a new shuffle every epoch.
//!
//! Batches are not sorted by length: rows are laid out without padding, so mixed lengths cost
//! nothing. Invariant: the order is a function of seed, epoch and number of rows alone, so a
//! resumed training needs nothing but its step.

use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The order of `rows` rows in `epoch`: Fisher and Yates' shuffle.
pub(super) fn shuffled(rows: usize, seed: u64, epoch: usize) -> Vec<usize> {
    let mut rng = ChaCha8Rng::seed_from_u64(mix(seed ^ mix(epoch as u64)));
    let mut order: Vec<usize> = (0..rows).collect();
    for last in (1..rows).rev() {
        // The bias of the remainder is below 2⁻³² for any number of rows that fits in memory.
        let other = rng.next_u64() % (last as u64 + 1);
        order.swap(last, other as usize);
    }
    order
}

/// Spreads a counter over 64 bits: the finaliser of SplitMix64 (Steele et al. 2014).
pub(super) fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_is_another_permutation_and_repeatable() {
        let orders: Vec<_> = (0..3).map(|epoch| shuffled(50, 7, epoch)).collect();
        for (epoch, order) in orders.iter().enumerate() {
            assert_eq!(order, &shuffled(50, 7, epoch));
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..50).collect::<Vec<_>>());
        }
        assert_ne!(orders[0], orders[1]);
        assert_ne!(orders[0], shuffled(50, 8, 0));
    }

    #[test]
    fn the_order_is_pinned() {
        assert_eq!(shuffled(8, 0, 0), [4, 5, 7, 0, 1, 2, 3, 6]);
        assert!(shuffled(0, 0, 0).is_empty());
    }
}
