//! "Did you mean": the known word nearest to a mistaken one. Knows only words.

/// The candidate nearest to `word`, when it is near enough to be a slip of the hand.
pub(crate) fn nearest<'a>(
    word: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    let lower = word.to_lowercase().replace('_', "-");
    if lower.chars().count() > 64 {
        return None;
    }
    candidates
        .into_iter()
        .filter(|c| c.len() <= 128)
        .filter_map(|candidate| {
            let other = candidate.to_lowercase().replace('_', "-");
            let distance = strsim::damerau_levenshtein(&lower, &other);
            let longest = lower.chars().count().max(other.chars().count());
            let extends =
                lower.len() >= 3 && (other.starts_with(&lower) || other.ends_with(&lower));
            (distance <= (longest / 3).max(1) || extends).then_some((distance, candidate))
        })
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Help for an unknown word: the nearest candidate, else the list of all of them
/// (`what` names them: "step kinds"). None when there are no candidates.
pub(crate) fn help<'a>(
    word: &str,
    what: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<String> {
    let candidates: Vec<&str> = candidates.into_iter().collect();
    if let Some(best) = nearest(word, candidates.iter().copied()) {
        return Some(format!("did you mean `{best}`?"));
    }
    (!candidates.is_empty()).then(|| format!("{what}: {}", list(&candidates)))
}

/// `a`, `b`, `c` and how many more.
pub(crate) fn list(words: &[&str]) -> String {
    const SHOWN: usize = 12;
    let mut text = words
        .iter()
        .take(SHOWN)
        .map(|w| format!("`{w}`"))
        .collect::<Vec<_>>()
        .join(", ");
    if words.len() > SHOWN {
        text.push_str(&format!(" and {} more", words.len() - SHOWN));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_slips_and_nothing_far_fetched() {
        let known = ["filter-top-25", "load", "evaluate", "train"];
        assert_eq!(nearest("filter-top25", known), Some("filter-top-25"));
        assert_eq!(nearest("filter_top_25", known), Some("filter-top-25"));
        assert_eq!(nearest("laod", known), Some("load"));
        assert_eq!(nearest("eval", known), Some("evaluate"));
        assert_eq!(nearest("deploy", known), None);
        assert_eq!(nearest("", known), None);
    }

    #[test]
    fn lists_what_is_known() {
        assert_eq!(
            help("zzz", "kinds", ["a", "b"]).as_deref(),
            Some("kinds: `a`, `b`")
        );
        assert_eq!(help("zzz", "kinds", []), None);
    }
}
