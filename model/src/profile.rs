//! Where the time of a pass goes, by operation.
//!
//! A clock belongs to one thread, the one that coordinates a pass, and measures wall-clock time:
//! what other threads compute for it counts as the operation that it waits for. Off until
//! [`start`] is called on that thread; then a scope costs one look at a thread's variable. While a
//! clock runs, what else goes side by side goes one after the other ([`join`]), so that it can be
//! told apart. Knows no model. Invariant: every moment counts for one operation, the innermost.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use serde::Serialize;

/// What time is spent on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Operation {
    /// Products with the frozen matrices of the layers, their gradients too.
    Products,
    /// Products with an adapter's factors.
    Lora,
    /// Scores, softmax and mixing of values; rotations and the layout by heads.
    Attention,
    /// Norms, activations, biases, and adding to the residual stream.
    Elementwise,
    /// Products with the output head; in training the loss too.
    Head,
    /// Size of the gradient, and the update of the trained values.
    Optimizer,
    /// All that is none of these.
    Else,
}

impl Operation {
    /// All of them, in the order of a table.
    pub const ALL: [Self; 7] = [
        Self::Products,
        Self::Lora,
        Self::Attention,
        Self::Elementwise,
        Self::Head,
        Self::Optimizer,
        Self::Else,
    ];

    /// What a table calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Products => "matrix products",
            Self::Lora => "LoRA",
            Self::Attention => "attention",
            Self::Elementwise => "norms, activations",
            Self::Head => "head, loss",
            Self::Optimizer => "optimizer",
            Self::Else => "else",
        }
    }
}

thread_local! {
    static CLOCK: RefCell<Option<Clock>> = const { RefCell::new(None) };
}

struct Clock {
    /// What time counts for now, and since when.
    now: Operation,
    since: Instant,
    spent: Spent,
}

/// Time by operation.
pub(crate) type Spent = [Duration; Operation::ALL.len()];

impl Clock {
    /// Counts what passed so far; returns what it was.
    fn turn(&mut self, to: Operation) -> Operation {
        let moment = Instant::now();
        self.spent[self.now as usize] += moment - self.since;
        self.since = moment;
        std::mem::replace(&mut self.now, to)
    }
}

/// Starts a clock on this thread.
pub(crate) fn start() {
    CLOCK.set(Some(Clock {
        now: Operation::Else,
        since: Instant::now(),
        spent: Spent::default(),
    }));
}

/// Takes this thread's clock away; what it measured, in the order of [`Operation::ALL`]. Nothing
/// where none was started.
pub(crate) fn stop() -> Spent {
    let clock = CLOCK.take().map(|mut clock| {
        clock.turn(Operation::Else);
        clock.spent
    });
    clock.unwrap_or_default()
}

/// Until it is dropped, time counts for one operation, but for that of scopes within.
#[must_use = "it ends where it is dropped"]
pub(crate) struct Scope {
    before: Option<Operation>,
}

/// Begins to count for `operation`, where a clock runs on this thread.
pub(crate) fn scope(operation: Operation) -> Scope {
    Scope {
        before: turn(operation),
    }
}

fn turn(to: Operation) -> Option<Operation> {
    CLOCK.with_borrow_mut(|clock| clock.as_mut().map(|clock| clock.turn(to)))
}

impl Drop for Scope {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            turn(before);
        }
    }
}

/// Both results, computed side by side; one after the other while a clock runs on this thread.
pub(crate) fn join<A: Send, B: Send>(
    a: impl FnOnce() -> A + Send,
    b: impl FnOnce() -> B + Send,
) -> (A, B) {
    if CLOCK.with_borrow(Option::is_some) {
        let a = a();
        return (a, b());
    }
    rayon::join(a, b)
}

/// Runs `compute` on a thread of the current pool, which takes this thread's clock along. From
/// outside, each of the thousands of small parallel loops of a step would put the caller to sleep
/// and wake it.
pub(crate) fn in_pool<R: Send>(compute: impl FnOnce() -> R + Send) -> R {
    let clock = CLOCK.take();
    let (result, clock) = rayon::scope(|_| with_clock(clock, compute));
    CLOCK.set(clock);
    result
}

/// Runs `compute` with `clock` on this thread, and gives it back. The thread keeps its own: it may
/// be one that waits within another call of [`in_pool`] and does this meanwhile.
fn with_clock<R>(clock: Option<Clock>, compute: impl FnOnce() -> R) -> (R, Option<Clock>) {
    let _own = Kept(CLOCK.replace(clock));
    let result = compute();
    (result, CLOCK.take())
}

/// A thread's clock, which it has again when this is dropped, after a panic too.
struct Kept(Option<Clock>);

impl Drop for Kept {
    fn drop(&mut self) {
        CLOCK.set(self.0.take());
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::lora::LoraConfig;
    use crate::tiny;
    use crate::train::tiny::rows;
    use crate::train::{Hooks, TrainConfig, Trainer};

    const BRIEF: Duration = Duration::from_millis(2);

    fn of(spent: &Spent, operation: Operation) -> Duration {
        spent[operation as usize]
    }

    #[test]
    fn time_counts_for_the_innermost_scope_also_on_a_thread_of_the_pool() {
        start();
        let from = Instant::now();
        let outer = scope(Operation::Attention);
        in_pool(|| {
            let inner = scope(Operation::Lora);
            std::thread::sleep(BRIEF);
            drop(inner);
            std::thread::sleep(BRIEF);
        });
        drop(outer);
        let all = from.elapsed();
        let spent = stop();
        assert!(of(&spent, Operation::Lora) >= BRIEF);
        assert!(of(&spent, Operation::Attention) >= BRIEF);
        // Were a moment counted twice, the sum would be larger than what passed.
        let both = of(&spent, Operation::Lora) + of(&spent, Operation::Attention);
        assert!(both <= all);
        assert_eq!(of(&spent, Operation::Products), Duration::ZERO);
        assert_eq!(stop(), Spent::default());
    }

    #[test]
    fn a_thread_has_its_clock_again_after_it_computed_for_another() {
        start();
        let (turned, clock) = with_clock(None, || turn(Operation::Head));
        assert!(turned.is_none() && clock.is_none());
        assert_eq!(turn(Operation::Lora), Some(Operation::Else));
        let compute = || with_clock(None, || assert!(turn(Operation::Head).is_some()));
        assert!(std::panic::catch_unwind(compute).is_err());
        assert_eq!(turn(Operation::Head), Some(Operation::Lora));
        stop();
    }

    #[test]
    fn without_a_clock_nothing_is_measured_and_results_are_the_same() {
        drop(scope(Operation::Head));
        assert_eq!(join(|| 1, || "two"), (1, "two"));
        assert_eq!(stop(), Spent::default());
        start();
        assert_eq!(join(|| 1, || "two"), (1, "two"));
        let order = std::sync::Mutex::new(Vec::new());
        let tell = |who: u8| order.lock().unwrap().push(who);
        join(|| tell(1), || tell(2));
        assert_eq!(order.into_inner().unwrap(), [1, 2]);
        stop();
    }

    #[test]
    fn a_training_is_told_apart_and_its_result_stays() {
        let base = tiny::base(1);
        let rows = rows(4, 1);
        let losses = || {
            let (lora, config) = (LoraConfig::default(), TrainConfig::default());
            let trainer = Trainer::new(&base.weights, lora, config, &rows);
            trainer.unwrap().run(Hooks::default()).unwrap().losses
        };
        let plain = losses();
        start();
        let measured = losses();
        let spent = stop();
        assert_eq!(plain, measured);
        for operation in Operation::ALL {
            assert!(of(&spent, operation) > Duration::ZERO, "{operation:?}");
        }
    }

    #[test]
    fn operations_are_in_the_order_of_their_places() {
        for (place, operation) in Operation::ALL.into_iter().enumerate() {
            assert_eq!(operation as usize, place);
        }
    }
}
