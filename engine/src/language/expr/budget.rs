//! [`Budget`]: how much expressions may hold. Without bounds a short text makes a value that no
//! machine has room for: filters that each double what the one before gave, or a large param that
//! is named again and again.
//!
//! Invariant: what an expression reads, and what each of its filters gives, counts. Where a filter
//! may give far more than it gets, that is told before it is made.

use std::cell::Cell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::LazyLock;

use serde_json::Value;

/// Most bytes of one expression: what it reads and what its filters give, together.
const MAX_ONE: usize = 16 << 20;
/// Most bytes of all expressions of a pipeline.
const MAX_ALL: usize = 256 << 20;
/// Bytes of each expression that do not count among those of all: how many expressions there are is
/// bounded by the size of the file.
const FREE: usize = 256;
/// Bytes of a value, beside its text.
pub(super) const VALUE: usize = 32;
/// tera's filters, but for `default` and `safe`, which give what they get.
const FILTERS: [&str; 41] = [
    "abs",
    "addslashes",
    "as_str",
    "capitalize",
    "concat",
    "escape",
    "escape_xml",
    "filter",
    "first",
    "float",
    "get",
    "group_by",
    "indent",
    "int",
    "join",
    "json_encode",
    "last",
    "length",
    "linebreaksbr",
    "lower",
    "map",
    "nth",
    "pluralize",
    "replace",
    "reverse",
    "round",
    "slice",
    "sort",
    "spaceless",
    "split",
    "striptags",
    "title",
    "trim",
    "trim_end",
    "trim_end_matches",
    "trim_start",
    "trim_start_matches",
    "truncate",
    "unique",
    "upper",
    "wordcount",
];

thread_local! {
    /// Bytes that the expression at hand may still take.
    static LEFT: Cell<usize> = const { Cell::new(0) };
}

/// Has the filters as tera made them.
static PLAIN: LazyLock<tera::Tera> = LazyLock::new(tera::Tera::default);

/// Bytes that the expressions of a pipeline have taken. Clones share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Budget(Rc<Cell<usize>>);

impl Budget {
    /// Does the work of one expression; what it takes is told by [`spend`].
    pub(super) fn within<T>(&self, work: impl FnOnce() -> T) -> T {
        let most = MAX_ONE.min(MAX_ALL.saturating_sub(self.0.get()));
        LEFT.set(most);
        let done = work();
        let taken = most - LEFT.get();
        self.0.set(self.0.get() + taken.saturating_sub(FREE));
        done
    }
}

/// Takes bytes for the expression at hand.
///
/// # Errors
/// What to say when there are not so many left.
pub(super) fn spend(bytes: usize) -> Result<(), String> {
    let left = LEFT.get().checked_sub(bytes);
    LEFT.set(left.unwrap_or_default());
    match left {
        Some(_) => Ok(()),
        None => Err(format!(
            "it gives too much: an expression has {} MiB for what it reads and what its filters give, and all of a pipeline have {} MiB",
            MAX_ONE >> 20,
            MAX_ALL >> 20
        )),
    }
}

/// Bytes of a value in memory, about.
pub(super) fn weight(value: &Value) -> usize {
    let inner = match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(weight).sum::<usize>(),
        Value::Object(map) => map.iter().map(|(k, v)| k.len() + weight(v)).sum::<usize>(),
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
    };
    VALUE + inner
}

/// Has every filter's result counted.
pub(super) fn bound_filters(tera: &mut tera::Tera) {
    for name in FILTERS {
        tera.register_filter(name, Bounded(name));
    }
}

/// The filter of this name, with its result counted.
struct Bounded(&'static str);

impl tera::Filter for Bounded {
    fn filter(&self, value: &Value, args: &HashMap<String, Value>) -> tera::Result<Value> {
        let added = added(self.0, value, args);
        if added > LEFT.get() {
            spend(added).map_err(tera::Error::msg)?;
        }
        let given = PLAIN.get_filter(self.0)?.filter(value, args)?;
        spend(weight(&given)).map_err(tera::Error::msg)?;
        Ok(given)
    }
}

/// Bytes that a filter adds to what it gets, where they may be many times as many.
fn added(name: &str, value: &Value, args: &HashMap<String, Value>) -> usize {
    let arg = |name: &str| args.get(name).and_then(Value::as_str);
    let length = |name: &str| arg(name).map_or(4, str::len);
    let (times, bytes) = match (name, value) {
        ("replace", Value::String(text)) => {
            let from = arg("from").unwrap_or_default();
            (text.matches(from).count(), length("to"))
        }
        ("indent", Value::String(text)) => (text.matches('\n').count() + 1, length("prefix")),
        ("split", Value::String(text)) => {
            let at = arg("pat").unwrap_or_default();
            (text.matches(at).count() + 2, 2 * VALUE)
        }
        ("join", Value::Array(items)) => (items.len(), length("sep")),
        _ => (0, 0),
    };
    times.saturating_mul(bytes)
}
