//! [`Keys`]: of actions with one key, one is attempted at a time, and the others are looked up
//! after it: what it made is theirs, too, unless they are to run anyway.
//!
//! Knows no action. Whoever was looked up before an attempt at its key ended knows nothing of it.

use std::collections::HashMap;

use flowrun_cache::ActionKey;

use super::Place;

/// Attempts by their keys.
#[derive(Default)]
pub(super) struct Keys {
    /// Those under way, and who else wants their keys.
    under_way: HashMap<ActionKey, Vec<Place>>,
    /// How many ended.
    ended: u64,
    /// How many had ended when one made a result for a key last, itself counted.
    made: HashMap<ActionKey, u64>,
}

/// When an action may be attempted.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Now. Its key is taken.
    Now,
    /// Not while another attempt at its key is under way, which tells of it when it ends.
    Later,
    /// When it was looked up once more: its key has got a result since.
    LookFirst,
}

impl Keys {
    /// The number of attempts that ended, by which lookups are told from earlier ones.
    pub(super) fn ended(&self) -> u64 {
        self.ended
    }

    /// Takes the key for an action that was looked up when so many attempts had ended; `None` for one
    /// that no result keeps from running.
    pub(super) fn take(&mut self, key: ActionKey, place: Place, looked_after: Option<u64>) -> Turn {
        if let Some(waiting) = self.under_way.get_mut(&key) {
            waiting.push(place);
            return Turn::Later;
        }
        let made = self.made.get(&key);
        if made
            .zip(looked_after)
            .is_some_and(|(made, looked)| *made > looked)
        {
            return Turn::LookFirst;
        }
        self.under_way.insert(key, Vec::new());
        Turn::Now
    }

    /// An attempt ended; gives who waited for its key.
    pub(super) fn give_back(&mut self, key: Option<ActionKey>, made_result: bool) -> Vec<Place> {
        self.ended += 1;
        let Some(key) = key else {
            return Vec::new();
        };
        if made_result {
            self.made.insert(key, self.ended);
        }
        self.under_way.remove(&key).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use flowrun_cache::Digest;

    use super::*;

    #[test]
    fn a_result_is_seen_by_all_that_were_looked_up_before_it() {
        let [one, two] = [b"1", b"2"].map(|bytes| Digest::of_bytes(bytes));
        let mut keys = Keys::default();
        assert_eq!(keys.take(one, (0, 0), Some(0)), Turn::Now);
        assert_eq!(keys.take(one, (0, 1), Some(0)), Turn::Later);
        assert_eq!(keys.take(two, (0, 2), Some(0)), Turn::Now);
        assert_eq!(keys.give_back(Some(one), true), [(0, 1)]);
        assert_eq!(keys.take(one, (0, 3), Some(0)), Turn::LookFirst);
        assert_eq!(keys.take(one, (0, 3), Some(keys.ended())), Turn::Now);
        assert!(keys.give_back(Some(one), true).is_empty());
        assert_eq!(keys.take(one, (0, 4), None), Turn::Now);
        // One that failed made nothing to look for.
        assert!(keys.give_back(Some(two), false).is_empty());
        assert_eq!(keys.take(two, (0, 5), Some(0)), Turn::Now);
    }
}
