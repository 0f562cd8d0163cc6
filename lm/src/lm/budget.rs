//! [`Ledger`]: what a budget allows is not overrun, however many requests are under way and
//! whichever processes of this machine send them.
//!
//! A request takes its worst case out of the budget before it is sent and gives back what it did
//! not use. The sums are in a small file, locked while they change; a request whose process was
//! killed keeps its worst case. Knows no provider. Invariant: what was spent and what is taken
//! out are together no more than the budget.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Completion, Prices, Request};

/// What a run may spend on a model.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// US dollars; needs `prices`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0))]
    pub usd: Option<f64>,
    /// Tokens, of prompts and answers together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
}

/// Tokens of one request or of many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Spending {
    /// Of prompts.
    pub prompt: u64,
    /// Of answers.
    pub completion: u64,
}

/// Tokens that a chat template adds to a prompt at most, and to each of its messages.
const TEMPLATE: u64 = 16;

impl Spending {
    /// The most that the messages of a request and its answer may use: no tokenizer makes more
    /// tokens than there are bytes. What else goes up with them, its client adds.
    #[must_use]
    pub fn at_most(request: &Request) -> Self {
        let bytes = request.messages.iter().map(|m| m.content.len() as u64);
        Self {
            prompt: bytes.map(|bytes| bytes + TEMPLATE).sum::<u64>() + TEMPLATE,
            completion: u64::from(request.sampling.max_tokens),
        }
    }

    /// What an answer used; `None` where its server does not count.
    #[must_use]
    pub fn of(answer: &Completion) -> Option<Self> {
        let used = Self {
            prompt: answer.prompt_tokens,
            completion: answer.completion_tokens,
        };
        (used != Self::default()).then_some(used)
    }

    /// Both together.
    #[must_use]
    pub fn tokens(self) -> u64 {
        self.prompt.saturating_add(self.completion)
    }

    fn plus(self, other: Self) -> Self {
        Self {
            prompt: self.prompt.saturating_add(other.prompt),
            completion: self.completion.saturating_add(other.completion),
        }
    }

    fn minus(self, other: Self) -> Self {
        Self {
            prompt: self.prompt.saturating_sub(other.prompt),
            completion: self.completion.saturating_sub(other.completion),
        }
    }
}

/// The sums, as they are in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sums {
    spent: Spending,
    /// Taken out for requests under way.
    taken: Spending,
}

/// Bytes of the file: it is always written whole, so that no kill leaves half of it.
const FILE: usize = 256;

/// Requests under way in this process, by the file of their ledger: each step opens it for itself.
static UNDER_WAY: LazyLock<Mutex<BTreeMap<PathBuf, Weak<AtomicUsize>>>> =
    LazyLock::new(Mutex::default);

/// The count of a ledger's file.
fn under_way(path: PathBuf) -> Arc<AtomicUsize> {
    let mut known = UNDER_WAY.lock().unwrap_or_else(PoisonError::into_inner);
    known.retain(|_, count| count.strong_count() > 0);
    if let Some(count) = known.get(&path).and_then(Weak::upgrade) {
        return count;
    }
    let count = Arc::new(AtomicUsize::new(0));
    known.insert(path, Arc::downgrade(&count));
    count
}

/// A budget with what was spent of it.
#[derive(Debug)]
pub struct Ledger {
    file: Mutex<File>,
    under_way: Arc<AtomicUsize>,
    budget: Budget,
    prices: Prices,
}

/// Why nothing was taken out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refused {
    /// It may fit once requests under way have given back what they did not use.
    Later(Held),
    /// It does not fit: what was spent, and what there is.
    Spent(String),
}

/// The sums of a ledger when there was no place in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held(Sums);

/// A wait for a place in a ledger.
#[derive(Debug)]
pub struct Patience {
    longest: Duration,
    since: Instant,
    seen: Option<Held>,
}

impl Patience {
    /// One that ends `longest` after the last sign of requests that may give something back.
    #[must_use]
    pub fn new(longest: Duration) -> Self {
        Self {
            longest,
            since: Instant::now(),
            seen: None,
        }
    }

    /// Whether to wait no longer, to be asked each time there was no place: the sums have not
    /// changed for so long, and no request of this process is under way.
    pub fn is_over(&mut self, ledger: &Ledger, held: Held) -> bool {
        let mine = ledger.under_way.load(Ordering::SeqCst);
        if mine > 0 || self.seen != Some(held) {
            self.seen = Some(held);
            self.since = Instant::now();
            return false;
        }
        self.since.elapsed() >= self.longest
    }
}

impl Ledger {
    /// The ledger in this file, which is made when it is not there.
    ///
    /// # Errors
    /// When there can be no such file.
    pub fn open(path: &Path, budget: Budget, prices: Option<Prices>) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        Ok(Self {
            file: Mutex::new(file),
            under_way: under_way(path.canonicalize()?),
            budget,
            prices: prices.unwrap_or_default(),
        })
    }

    /// Takes the worst case of a request out of the budget.
    ///
    /// # Errors
    /// The outer one when the file fails, the inner one when it does not fit.
    pub fn take(&self, need: Spending) -> io::Result<Result<Taken<'_>, Refused>> {
        let refused = self.change(|sums| {
            if self.fits(sums.spent.plus(sums.taken).plus(need)) {
                sums.taken = sums.taken.plus(need);
                None
            } else if self.fits(sums.spent.plus(need)) {
                Some(Refused::Later(Held(*sums)))
            } else {
                Some(Refused::Spent(self.told(sums.spent, "", need)))
            }
        })?;
        Ok(match refused {
            None => {
                self.under_way.fetch_add(1, Ordering::SeqCst);
                Ok(Taken {
                    ledger: self,
                    need,
                    settled: false,
                })
            }
            Some(refused) => Err(refused),
        })
    }

    /// Says that requests under way hold back what is left of the budget, and do not end.
    ///
    /// # Errors
    /// When the file fails.
    pub fn stuck(&self, need: Spending) -> io::Result<String> {
        let also = " or are held back";
        self.change(|sums| self.told(sums.spent.plus(sums.taken), also, need))
    }

    fn fits(&self, all: Spending) -> bool {
        let cost = self.prices.cost(all.prompt, all.completion);
        self.budget.usd.is_none_or(|usd| cost <= usd)
            && self.budget.tokens.is_none_or(|most| all.tokens() <= most)
    }

    fn told(&self, spent: Spending, also: &str, need: Spending) -> String {
        let cost = |s: Spending| self.prices.cost(s.prompt, s.completion);
        let mut parts = Vec::new();
        if let Some(usd) = self.budget.usd {
            parts.push(format!(
                "${:.4} of ${usd} were spent{also} and one more request may cost ${:.4}",
                cost(spent),
                cost(need)
            ));
        }
        if let Some(most) = self.budget.tokens {
            parts.push(format!(
                "{} of {most} tokens were used{also} and one more request may need {}",
                spent.tokens(),
                need.tokens()
            ));
        }
        parts.join(", ")
    }

    fn change<T>(&self, change: impl FnOnce(&mut Sums) -> T) -> io::Result<T> {
        let file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.lock()?;
        let changed = Self::changed(&file, change);
        file.unlock()?;
        changed
    }

    fn changed<T>(file: &File, change: impl FnOnce(&mut Sums) -> T) -> io::Result<T> {
        let mut sums = Sums::default();
        if file.metadata()?.len() > 0 {
            let mut bytes = [0; FILE];
            file.read_exact_at(&mut bytes, 0)?;
            sums = serde_json::from_slice(&bytes)?;
        }
        let before = sums;
        let result = change(&mut sums);
        if sums != before {
            let text = format!("{:FILE$}", serde_json::to_string(&sums)?);
            file.write_all_at(text.as_bytes(), 0)?;
        }
        Ok(result)
    }
}

/// The worst case of a request that is under way. Dropped without a word it is spent: nobody knows
/// what became of the request.
#[derive(Debug)]
pub struct Taken<'a> {
    ledger: &'a Ledger,
    need: Spending,
    settled: bool,
}

impl Taken<'_> {
    /// The request was answered; without a count the worst case is spent.
    pub fn answered(mut self, used: Option<Spending>) {
        self.settle(used.unwrap_or(self.need));
    }

    /// The server computed nothing.
    pub fn refused(mut self) {
        self.settle(Spending::default());
    }

    fn settle(&mut self, used: Spending) {
        self.settled = true;
        let need = self.need;
        let written = self.ledger.change(|sums| {
            sums.taken = sums.taken.minus(need);
            sums.spent = sums.spent.plus(used);
        });
        // The worst case then stays taken out, which overruns nothing.
        if let Err(error) = written {
            tracing::warn!("the ledger of a budget cannot be written: {error}");
        }
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if !self.settled {
            self.settle(self.need);
        }
        self.ledger.under_way.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const NEED: Spending = Spending {
        prompt: 60,
        completion: 40,
    };

    fn ledger(folder: &Path, usd: Option<f64>, tokens: Option<u64>) -> Ledger {
        let prices = Prices {
            input: 1.0,
            output: 10.0,
        };
        let budget = Budget { usd, tokens };
        Ledger::open(&folder.join("ledger"), budget, Some(prices)).unwrap()
    }

    fn used(prompt: u64, completion: u64) -> Option<Spending> {
        Some(Spending { prompt, completion })
    }

    #[test]
    fn what_is_under_way_counts_as_its_worst_case_until_it_ends() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = ledger(folder.path(), None, Some(250));
        let first = ledger.take(NEED).unwrap().unwrap();
        let second = ledger.take(NEED).unwrap().unwrap();
        assert!(matches!(
            ledger.take(NEED).unwrap().unwrap_err(),
            Refused::Later(_)
        ));
        first.answered(used(10, 5));
        let third = ledger.take(NEED).unwrap().unwrap();
        second.refused();
        // Nobody heard what became of it.
        drop(third);
        let more = Spending {
            prompt: 100,
            completion: 40,
        };
        let told = "115 of 250 tokens were used and one more request may need 140";
        assert_eq!(
            ledger.take(more).unwrap().unwrap_err(),
            Refused::Spent(told.to_owned())
        );
        ledger.take(NEED).unwrap().unwrap().answered(None);
        assert!(matches!(
            ledger.take(NEED).unwrap().unwrap_err(),
            Refused::Spent(_)
        ));
    }

    #[test]
    fn dollars_are_shared_by_all_who_open_the_file() {
        let folder = tempfile::tempdir().unwrap();
        // 100 requests of 60 and 40 tokens cost $0.046.
        let usd = Some(0.046);
        let threads: Vec<usize> = std::thread::scope(|scope| {
            let work = || {
                let ledger = ledger(folder.path(), usd, None);
                let mut done = 0;
                loop {
                    match ledger.take(NEED).unwrap() {
                        Ok(taken) => taken.answered(Some(NEED)),
                        Err(Refused::Later(_)) => continue,
                        Err(Refused::Spent(_)) => return done,
                    }
                    done += 1;
                }
            };
            let all: Vec<_> = (0..4).map(|_| scope.spawn(work)).collect();
            all.into_iter().map(|one| one.join().unwrap()).collect()
        });
        assert_eq!(threads.iter().sum::<usize>(), 100);
    }

    #[test]
    fn a_wait_is_over_when_nothing_changes_and_nobody_of_this_process_is_under_way() {
        let folder = tempfile::tempdir().unwrap();
        // A killed process has left this.
        let sums = r#"{"spent":{"prompt":0,"completion":0},"taken":{"prompt":60,"completion":40}}"#;
        std::fs::write(folder.path().join("ledger"), format!("{sums:FILE$}")).unwrap();
        let narrow = ledger(folder.path(), None, Some(150));
        let mut patience = Patience::new(Duration::ZERO);
        let mut over = || match narrow.take(NEED).unwrap().unwrap_err() {
            Refused::Later(held) => patience.is_over(&narrow, held),
            Refused::Spent(told) => unreachable!("{told}"),
        };
        assert!(!over());
        assert!(over());
        // As another step opens it.
        let wide = ledger(folder.path(), None, Some(250));
        let taken = wide.take(NEED).unwrap().unwrap();
        for _ in 0..3 {
            assert!(!over());
        }
        taken.refused();
        assert!(!over(), "the sums have changed");
        assert!(over());
        let told = "100 of 150 tokens were used or are held back and one more request may need 100";
        assert_eq!(narrow.stuck(NEED).unwrap(), told);
    }

    #[test]
    fn a_ledger_that_cannot_be_read_allows_nothing() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("ledger"), "x".repeat(FILE)).unwrap();
        assert!(ledger(folder.path(), None, Some(1000)).take(NEED).is_err());
    }
}
