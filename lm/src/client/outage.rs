//! [`Outage`]: when a server that takes connections answers nobody. One request that is given up
//! after all its tries says little; many in a row, without one answer in between, say that the
//! others would only wait, and perhaps be charged, in vain.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

/// Requests in a row that make an outage at least, however few may be in flight.
const LEAST: usize = 8;
/// Different reasons that are told.
const TOLD: usize = 3;

/// The requests of a client that were given up in a row.
#[derive(Debug)]
pub(super) struct Outage {
    /// As many make an outage.
    most: usize,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    in_row: usize,
    /// Why, of the last ones, each different text once.
    reasons: VecDeque<String>,
}

impl Outage {
    /// One of a client with so many requests in flight: all of them may fail for one cause.
    pub(super) fn new(concurrency: usize) -> Self {
        Self {
            most: concurrency.max(LEAST),
            seen: Mutex::default(),
        }
    }

    /// A request was answered.
    pub(super) fn answered(&self) {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Seen::default();
    }

    /// Whether the last requests make an outage.
    pub(super) fn is_on(&self) -> bool {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.in_row >= self.most
    }

    /// A request was given up after its last try, and why; says so of all once they make an outage.
    pub(super) fn gave_up(&self, why: &str) -> Option<String> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.in_row = seen.in_row.saturating_add(1);
        seen.reasons.retain(|reason| reason != why);
        seen.reasons.push_back(why.to_owned());
        if seen.reasons.len() > TOLD {
            seen.reasons.pop_front();
        }
        if seen.in_row < self.most {
            return None;
        }
        let reasons: Vec<&str> = seen.reasons.iter().map(String::as_str).collect();
        Some(format!(
            "{} requests in a row got no answer, so no other is sent; the last: {}",
            seen.in_row,
            reasons.join("; ")
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_requests_in_a_row_make_an_outage() {
        let outage = Outage::new(1);
        for _ in 0..LEAST - 1 {
            assert_eq!(outage.gave_up("a"), None);
        }
        outage.answered();
        for _ in 0..LEAST - 1 {
            assert_eq!(outage.gave_up("a"), None);
        }
        assert!(!outage.is_on());
        let told = outage.gave_up("b");
        assert_eq!(
            told.as_deref(),
            Some("8 requests in a row got no answer, so no other is sent; the last: a; b")
        );
        assert!(outage.is_on());
        outage.answered();
        assert!(!outage.is_on());
    }

    #[test]
    fn it_takes_as_many_as_may_be_in_flight_and_tells_the_last_reasons() {
        let outage = Outage::new(20);
        let reasons = ["a", "b", "c", "a", "d"];
        let told: Vec<_> = (0..20).map(|i| outage.gave_up(reasons[i % 5])).collect();
        assert!(told[..19].iter().all(Option::is_none));
        let last = told[19].as_deref().unwrap_or_default();
        assert!(last.starts_with("20 requests in a row"), "{last}");
        assert!(last.ends_with("the last: c; a; d"), "{last}");
    }
}
