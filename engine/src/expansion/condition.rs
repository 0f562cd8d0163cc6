//! What a condition asks for, as far as its text alone tells: whether it must be asked for each
//! item, and of which lists. Where the text does not tell, the answer is that it may.

use std::collections::BTreeMap;

use crate::pipeline::ForeachList;

/// The names and numbers of an expression.
pub(super) fn words(expression: &str) -> impl Iterator<Item = &str> {
    let words = expression.split(|c: char| !c.is_alphanumeric() && c != '_');
    words.filter(|word| !word.is_empty())
}

/// A condition may ask for one of these variables of `item`.
pub(crate) fn names_one_of(when: &str, variables: &BTreeMap<String, ForeachList>) -> bool {
    // `item[params.x]` may be any.
    let any = when.contains("item[");
    !variables.is_empty() && (any || words(when).any(|word| variables.contains_key(word)))
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

    #[test]
    fn a_condition_asks_for_what_it_names() {
        assert!(asks_for_item("item.n < 3") && asks_for_item("not item[params.x]"));
        assert!(!asks_for_item("params.item < 3") && !asks_for_item("items > 3"));
        let list = ForeachList::Values(Vec::new());
        let inner = BTreeMap::from([("half".to_owned(), list)]);
        for when in ["item.half != 3", "item[\"half\"] > 1", "item[params.x] > 1"] {
            assert!(names_one_of(when, &inner), "{when}");
            assert!(!names_one_of(when, &BTreeMap::new()), "{when}");
        }
        for when in ["item.n < 3", "item.half_n > 1", "params.n > 1"] {
            assert!(!names_one_of(when, &inner), "{when}");
        }
        let found: Vec<&str> = words("(item._0_n < 9) and item.x").collect();
        assert_eq!(found, ["item", "_0_n", "9", "and", "item", "x"]);
    }
}
