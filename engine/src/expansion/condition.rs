//! What a condition asks for, as far as its text alone tells: whether it must be asked for each
//! item, and of which lists. Where the text does not tell, the answer is that it may.

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
    // `item[params.x]` may be any.
    let any = when.contains("item[");
    level
        .variables()
        .any(|variable| any || words(when).any(|word| word == variable))
}

/// A condition that is asked for each item, not once.
pub(crate) fn asks_for_item(when: &str) -> bool {
    let mut before = ' ';
    when.split_inclusive(|c: char| !c.is_alphanumeric() && c != '_')
        .any(|piece| {
            let word = piece.trim_end_matches(|c: char| !c.is_alphanumeric() && c != '_');
            // `params.item` is another.
            let found = word == "item" && before != '.';
            before = piece.chars().next_back().unwrap_or(' ');
            found
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::ForeachList;

    #[test]
    fn a_condition_asks_for_what_it_names() {
        assert!(asks_for_item("item.n < 3") && asks_for_item("not item[params.x]"));
        assert!(!asks_for_item("params.item < 3") && !asks_for_item("items > 3"));
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
        let found: Vec<&str> = words("(item._0_n < 9) and item.x").collect();
        assert_eq!(found, ["item", "_0_n", "9", "and", "item", "x"]);
    }
}
