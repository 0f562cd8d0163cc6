//! What a condition asks for, as far as its text alone tells: whether it must be asked for each
//! item, and at which level. Where the text does not tell, the answer is that it may.

use crate::pipeline::Level;

/// The names and numbers of an expression.
pub(super) fn words(expression: &str) -> impl Iterator<Item = &str> {
    let words = expression.split(|c: char| !c.is_alphanumeric() && c != '_');
    words.filter(|word| !word.is_empty())
}

/// The level at whose items a condition is asked: the innermost that has a variable which it may
/// ask for.
pub(crate) fn level_of(when: &str, levels: &[Level]) -> usize {
    let names = |level: &Level| names_one_of(when, level);
    levels.iter().rposition(names).unwrap_or(0)
}

/// A condition may ask for one of the variables of a level.
fn names_one_of(when: &str, level: &Level) -> bool {
    let any = asks_for_any(when);
    let names = names(when);
    level
        .variables()
        .any(|variable| any || names.iter().any(|name| name.text == variable))
}

/// `item[params.x]` may be any variable.
fn asks_for_any(when: &str) -> bool {
    let indexed = when.match_indices("item[");
    let mut inside = indexed.map(|(at, found)| when[at + found.len()..].trim_start());
    inside.any(|text| !text.starts_with(QUOTES))
}

/// A condition that is asked for each item, not once.
pub(crate) fn asks_for_item(when: &str) -> bool {
    // `params.item` is another, and so is a text.
    let mut names = names(when).into_iter();
    names.any(|name| name.text == "item" && name.is_first)
}

/// What texts stand in.
const QUOTES: [char; 3] = ['"', '\'', '`'];

/// A name in an expression.
struct Name<'a> {
    text: &'a str,
    /// Nothing that it is a part of stands before it.
    is_first: bool,
}

/// The names that an expression may hold. Text in quotes is one where it stands for a part of
/// another: `item["n"]`.
fn names(expression: &str) -> Vec<Name<'_>> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut names = Vec::new();
    let mut rest = expression;
    let mut before = ' ';
    while let Some(c) = rest.chars().next() {
        let length = if QUOTES.contains(&c) {
            let inner = &rest[1..];
            let end = inner.find(c).unwrap_or(inner.len());
            if before == '[' {
                names.push(Name {
                    text: &inner[..end],
                    is_first: false,
                });
            }
            (end + 2).min(rest.len())
        } else if is_word(c) {
            let end = rest.find(|c: char| !is_word(c)).unwrap_or(rest.len());
            names.push(Name {
                text: &rest[..end],
                is_first: before != '.',
            });
            end
        } else {
            c.len_utf8()
        };
        if !c.is_whitespace() {
            before = rest[..length].chars().next_back().unwrap_or(c);
        }
        rest = &rest[length..];
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::ForeachList;

    #[test]
    fn a_condition_asks_for_what_it_names() {
        assert!(asks_for_item("item.n < 3") && asks_for_item("not item[params.x]"));
        assert!(!asks_for_item("params.item < 3") && !asks_for_item("items > 3"));
        assert!(!asks_for_item(
            "params.kind == \"item\" or params[\"item\"]"
        ));
        assert!(asks_for_item("params.kind == 'it' and (item.n > 2)"));
        let level = |variable: &str, bound: &str| Level {
            vars: [(variable.to_owned(), ForeachList::Values(Vec::new()))].into(),
            bound: vec![(bound.to_owned(), serde_json::Value::Null)],
            ..Level::default()
        };
        let levels = [level("n", "_0_k"), level("half", "_1_k")];
        for when in ["item.half != 3", "item[\"half\"] > 1", "item[params.x] > 1"] {
            assert_eq!(level_of(when, &levels), 1, "{when}");
            assert_eq!(level_of(when, &levels[..1]), 0, "{when}");
        }
        for when in ["item.n < 3", "item.half_n > 1", "params.n > 1", "item._0_k"] {
            assert_eq!(level_of(when, &levels), 0, "{when}");
        }
        assert_eq!(level_of("item._0_k < item._1_k", &levels), 1);
        // A text is no name, but for the part of one; nor is half a text.
        assert_eq!(level_of("item.n == 'half'", &levels), 0);
        assert_eq!(level_of("item[ 'n' ] > 1", &levels), 0);
        assert_eq!(level_of("item.n == \"half", &levels), 0);
        let found: Vec<&str> = words("(item._0_n < 9) and item.x").collect();
        assert_eq!(found, ["item", "_0_n", "9", "and", "item", "x"]);
    }
}
