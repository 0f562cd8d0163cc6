//! [`PythonRandom`]: the numbers that Python's `random.Random(seed)` draws, so
//! that a seed means the same split and the same demos here and in DSPy.
//! MT19937 by Matsumoto and Nishimura (1998), seeded by `init_by_array`; the
//! draws on top follow CPython 3.11's `random.py`.

const N: usize = 624;
const M: usize = 397;

/// A generator that repeats Python's `random.Random(seed)`.
#[derive(Clone)]
pub struct PythonRandom {
    state: [u32; N],
    next: usize,
}

impl PythonRandom {
    /// `random.Random(seed)`; Python seeds with the absolute value of an integer.
    pub fn new(seed: i64) -> Self {
        let seed = seed.unsigned_abs();
        let low = seed as u32;
        let high = (seed >> 32) as u32;
        if high == 0 {
            Self::by_array(&[low])
        } else {
            Self::by_array(&[low, high])
        }
    }

    fn by_array(key: &[u32]) -> Self {
        let mut state = [0u32; N];
        state[0] = 19_650_218;
        for i in 1..N {
            let previous = state[i - 1] ^ (state[i - 1] >> 30);
            state[i] = 1_812_433_253u32
                .wrapping_mul(previous)
                .wrapping_add(i as u32);
        }
        let (mut i, mut j) = (1, 0);
        for _ in 0..N.max(key.len()) {
            let previous = state[i - 1] ^ (state[i - 1] >> 30);
            state[i] = (state[i] ^ previous.wrapping_mul(1_664_525))
                .wrapping_add(key[j])
                .wrapping_add(j as u32);
            (i, j) = (i + 1, (j + 1) % key.len());
            if i == N {
                state[0] = state[N - 1];
                i = 1;
            }
        }
        for _ in 0..N - 1 {
            let previous = state[i - 1] ^ (state[i - 1] >> 30);
            state[i] = (state[i] ^ previous.wrapping_mul(1_566_083_941)).wrapping_sub(i as u32);
            i += 1;
            if i == N {
                state[0] = state[N - 1];
                i = 1;
            }
        }
        state[0] = 0x8000_0000;
        Self { state, next: N }
    }

    fn refill(&mut self) {
        for i in 0..N {
            let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
            let twist = if y & 1 == 0 { 0 } else { 0x9908_b0df };
            self.state[i] = self.state[(i + M) % N] ^ (y >> 1) ^ twist;
        }
        self.next = 0;
    }

    /// The next 32 random bits.
    pub(crate) fn next_u32(&mut self) -> u32 {
        if self.next >= N {
            self.refill();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// `getrandbits(k)` for k from 0 to 64.
    ///
    /// # Panics
    /// When `k` is above 64.
    pub(crate) fn getrandbits(&mut self, k: u32) -> u64 {
        assert!(k <= 64, "at most 64 bits");
        match k {
            0 => 0,
            1..=32 => u64::from(self.next_u32() >> (32 - k)),
            _ => {
                let low = u64::from(self.next_u32());
                let high = u64::from(self.next_u32() >> (64 - k));
                low | (high << 32)
            }
        }
    }

    /// `random()`: a float in [0, 1) with 53 random bits.
    pub fn random(&mut self) -> f64 {
        let a = f64::from(self.next_u32() >> 5);
        let b = f64::from(self.next_u32() >> 6);
        (a * 67_108_864.0 + b) / 9_007_199_254_740_992.0
    }

    /// `_randbelow(n)`: a whole number in [0, n); 0 when `n` is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        if n == 0 {
            return 0;
        }
        let bits = u64::BITS - n.leading_zeros();
        loop {
            let drawn = self.getrandbits(bits);
            if drawn < n {
                return drawn;
            }
        }
    }

    /// `randint(low, high)`, both ends included; `None` when `high < low`, where Python raises.
    pub fn randint(&mut self, low: i64, high: i64) -> Option<i64> {
        let width = u64::try_from(i128::from(high) - i128::from(low) + 1).ok()?;
        if width == 0 {
            return None;
        }
        let drawn = i128::from(low) + i128::from(self.below(width));
        i64::try_from(drawn).ok()
    }

    /// `shuffle(items)`, in place.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }

    /// `sample(range(n), k)`: k different indices in the order drawn; `None` when `k > n`, where
    /// Python raises.
    pub fn sample_indices(&mut self, n: usize, k: usize) -> Option<Vec<usize>> {
        if k > n {
            return None;
        }
        let mut result = Vec::with_capacity(k);
        if n <= sample_set_size(k) {
            let mut pool: Vec<usize> = (0..n).collect();
            for i in 0..k {
                let j = self.below((n - i) as u64) as usize;
                result.push(pool[j]);
                pool[j] = pool[n - i - 1];
            }
        } else {
            let mut seen = std::collections::HashSet::with_capacity(k);
            while result.len() < k {
                let j = self.below(n as u64) as usize;
                if seen.insert(j) {
                    result.push(j);
                }
            }
        }
        Some(result)
    }

    /// `sample(items, k)` with clones; `None` when `k` exceeds the number of items.
    pub fn sample<T: Clone>(&mut self, items: &[T], k: usize) -> Option<Vec<T>> {
        let indices = self.sample_indices(items.len(), k)?;
        Some(indices.into_iter().map(|i| items[i].clone()).collect())
    }
}

/// From how many items on Python draws with a set instead of a pool.
fn sample_set_size(k: usize) -> usize {
    let mut size = 21;
    if k > 5 {
        // 4 ** ceil(log(k * 3, 4)), in whole numbers.
        let mut power = 1usize;
        while power < k.saturating_mul(3) {
            power = power.saturating_mul(4);
        }
        size += power;
    }
    size
}

impl std::fmt::Debug for PythonRandom {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PythonRandom")
            .field("next", &self.next)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn draws_what_python_draws() {
        let mut items: Vec<u32> = (0..10).collect();
        PythonRandom::new(0).shuffle(&mut items);
        assert_eq!(items, [7, 8, 1, 5, 3, 4, 2, 0, 9, 6]);
        let drawn: Vec<i64> = (0..16)
            .map(|seed| PythonRandom::new(seed).randint(1, 3).unwrap())
            .collect();
        assert_eq!(drawn, [2, 1, 1, 1, 1, 3, 3, 2, 1, 2, 3, 2, 2, 2, 1, 1]);
        assert_eq!(PythonRandom::new(0).random(), 0.844_421_851_525_048_1);
        assert_eq!(PythonRandom::new(1 << 40).getrandbits(64), PYTHON_BITS_64);
        assert_eq!(
            PythonRandom::new(0).sample_indices(1000, 3).unwrap(),
            [864, 394, 776]
        );
    }

    /// `random.Random(1 << 40).getrandbits(64)` of CPython 3.11.
    const PYTHON_BITS_64: u64 = 6515814827016330625;

    #[test]
    fn impossible_draws_are_refused() {
        assert_eq!(PythonRandom::new(0).randint(1, 0), None);
        assert_eq!(PythonRandom::new(0).sample_indices(2, 3), None);
        assert_eq!(PythonRandom::new(0).sample_indices(0, 0), Some(vec![]));
    }

    proptest::proptest! {
        #[test]
        fn shuffles_and_samples_keep_their_items(seed in 0i64..1000, n in 0usize..200, k in 0usize..200) {
            let mut items: Vec<usize> = (0..n).collect();
            PythonRandom::new(seed).shuffle(&mut items);
            items.sort_unstable();
            proptest::prop_assert_eq!(items, (0..n).collect::<Vec<_>>());
            if let Some(mut sample) = PythonRandom::new(seed).sample_indices(n, k) {
                proptest::prop_assert_eq!(sample.len(), k);
                sample.sort_unstable();
                sample.dedup();
                proptest::prop_assert_eq!(sample.len(), k);
            }
        }
    }
}
