//! [`Limits`]: requests and tokens per minute, as providers count them. Two buckets that fill
//! steadily and hold a second's worth, so that no minute sees more than was allowed (and that
//! second). Places are given out in the order asked for.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::OpenAiSpec;
use crate::lm::Completion;

/// Longest time that no request is sent because a server asked for it: it may err.
const LONGEST_HOLD: Duration = Duration::from_secs(3600);

/// What may be sent when.
#[derive(Debug)]
pub(super) struct Limits {
    requests: Option<Mutex<Bucket>>,
    tokens: Option<Mutex<Bucket>>,
    /// The server wants no request before.
    held: Mutex<Option<Instant>>,
}

impl Limits {
    pub(super) fn new(spec: &OpenAiSpec) -> Self {
        let bucket = |per_minute: Option<u64>| Some(Mutex::new(Bucket::new(per_minute?)));
        Self {
            requests: bucket(spec.requests_per_minute),
            tokens: bucket(spec.tokens_per_minute),
            held: Mutex::default(),
        }
    }

    /// The server asked to be left alone so long.
    pub(super) fn hold(&self, wait: Duration) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let until = Instant::now().checked_add(wait.min(LONGEST_HOLD));
        *held = (*held).max(until);
    }

    /// How long the server still wants to be left alone.
    pub(super) fn held(&self) -> Option<Duration> {
        let held = *self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let left = held?.saturating_duration_since(Instant::now());
        Some(left).filter(|left| !left.is_zero())
    }

    /// Takes a place for one request; returns how long to wait for it.
    pub(super) fn reserve(&self, estimate: u64) -> Duration {
        let now = Instant::now();
        let wait = |bucket: &Option<Mutex<Bucket>>, amount| {
            bucket
                .as_ref()
                .map_or(Duration::ZERO, |bucket| lock(bucket).reserve(amount, now))
        };
        wait(&self.requests, 1.0).max(wait(&self.tokens, estimate as f64))
    }

    /// Corrects the estimate by what was used. The count is the server's word: it counts for no
    /// more than `most`, or than a minute's tokens where nothing bounds an answer, so that a
    /// nonsensical one does not hold up all requests for years.
    pub(super) fn settle(&self, estimate: u64, most: Option<u64>, answer: &Completion) {
        let used = answer
            .prompt_tokens
            .saturating_add(answer.completion_tokens);
        if let (Some(bucket), 1..) = (&self.tokens, used) {
            let mut bucket = lock(bucket);
            let most = most.map_or(bucket.per_second * 60.0, |most| most as f64);
            bucket.level += estimate as f64 - (used as f64).min(most);
        }
    }
}

fn lock(bucket: &Mutex<Bucket>) -> std::sync::MutexGuard<'_, Bucket> {
    bucket.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct Bucket {
    per_second: f64,
    capacity: f64,
    /// Below zero: given out in advance.
    level: f64,
    at: Option<Instant>,
}

impl Bucket {
    fn new(per_minute: u64) -> Self {
        let per_second = per_minute.max(1) as f64 / 60.0;
        let capacity = per_second.max(1.0);
        Self {
            per_second,
            capacity,
            level: capacity,
            at: None,
        }
    }

    /// Takes `amount`; the wait is until it would have been there. More than the bucket holds
    /// is given from a full bucket, and those who come later wait for it.
    fn reserve(&mut self, amount: f64, now: Instant) -> Duration {
        let passed = self.at.map_or(Duration::ZERO, |at| now - at);
        self.at = Some(now);
        self.level = (self.level + passed.as_secs_f64() * self.per_second).min(self.capacity);
        let lacking = amount.min(self.capacity) - self.level;
        self.level -= amount;
        Duration::try_from_secs_f64(lacking / self.per_second).unwrap_or_default()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::completion;

    #[test]
    fn a_nonsensical_count_holds_up_nothing_for_long() {
        let spec = serde_json::json!({
            "base_url": "http://h/v1", "model": "m", "tokens_per_minute": 600,
        });
        let spec: OpenAiSpec = serde_json::from_value(spec).unwrap();
        let answer = Completion {
            prompt_tokens: u64::MAX,
            completion_tokens: u64::MAX,
            ..completion("x")
        };
        // Ten tokens a second: what is used beyond the estimate is waited for.
        for (most, at_most) in [(Some(100), 11.0), (None, 61.0)] {
            let limits = Limits::new(&spec);
            limits.reserve(10);
            limits.settle(10, most, &answer);
            let wait = limits.reserve(1).as_secs_f64();
            assert!(wait > at_most - 3.0 && wait <= at_most, "{most:?}: {wait}");
        }
    }

    fn seconds(bucket: &mut Bucket, amount: f64, now: Instant) -> f64 {
        let wait = bucket.reserve(amount, now).as_secs_f64();
        (wait * 1e3).round() / 1e3
    }

    #[test]
    fn places_are_given_out_one_after_another() {
        let start = Instant::now();
        let mut bucket = Bucket::new(30);
        let waits: Vec<f64> = (0..4).map(|_| seconds(&mut bucket, 1.0, start)).collect();
        assert_eq!(waits, [0.0, 2.0, 4.0, 6.0]);
        assert_eq!(
            seconds(&mut bucket, 1.0, start + Duration::from_secs(7)),
            1.0
        );
        // However long nothing was asked, no more than a full bucket is there.
        let later = start + Duration::from_secs(999);
        assert_eq!(seconds(&mut bucket, 1.0, later), 0.0);
        assert_eq!(seconds(&mut bucket, 1.0, later), 2.0);
    }

    #[test]
    fn a_large_amount_passes_and_the_next_ones_pay() {
        let start = Instant::now();
        let mut bucket = Bucket::new(600);
        assert_eq!(seconds(&mut bucket, 100.0, start), 0.0);
        assert_eq!(seconds(&mut bucket, 5.0, start), 9.5);
        // The server counted less than was guessed.
        bucket.level += 50.0;
        assert_eq!(seconds(&mut bucket, 5.0, start), 5.0);
    }
}
