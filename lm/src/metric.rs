//! Metrics: how right a prediction is. DSPy's exact match, plain label equality,
//! and the label sanitiser. Knows no program.

use crate::example::{Example, Prediction};
use crate::python_text::strip;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use unicode_normalization::UnicodeNormalization;
use unicode_normalization::char::is_combining_mark;

/// Scores a prediction against its row: 1 right, 0 wrong, in between as the metric likes. An
/// error counts as a failed row.
pub type Metric<'a> = dyn Fn(&Example, &Prediction) -> Result<f64, String> + Sync + 'a;

/// The metrics that pipelines may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MetricKind {
    /// DSPy's `answer_exact_match`: equal without case, punctuation, articles and extra spaces.
    #[default]
    ExactMatch,
    /// The very same text.
    LabelEquality,
}

impl MetricKind {
    /// The metric over the prediction's `field` and the row's column of the same name.
    pub fn metric(
        self,
        field: impl Into<String>,
    ) -> impl Fn(&Example, &Prediction) -> Result<f64, String> + Send + Sync {
        let field = field.into();
        move |example, prediction| {
            let gold = example
                .text(&field)
                .ok_or_else(|| format!("row `{}` has no text in column `{field}`", example.id))?;
            let predicted = prediction
                .text(&field)
                .ok_or_else(|| format!("the prediction has no text in field `{field}`"))?;
            let right = match self {
                Self::ExactMatch => answer_exact_match(gold, predicted),
                Self::LabelEquality => gold == predicted,
            };
            Ok(f64::from(u8::from(right)))
        }
    }
}

impl MetricKind {
    /// Two of these labels that it would take for one.
    pub fn takes_for_one(self, labels: &[String]) -> Option<(&str, &str)> {
        match self {
            Self::ExactMatch => alike(labels),
            Self::LabelEquality => None,
        }
    }
}

/// The first two labels that [`answer_exact_match`] takes for one.
pub fn alike(labels: &[String]) -> Option<(&str, &str)> {
    let mut seen: BTreeMap<String, &str> = BTreeMap::new();
    labels.iter().find_map(|label| {
        let before = seen.insert(normalize_text(label), label);
        before
            .filter(|other| other != label)
            .map(|other| (other, label.as_str()))
    })
}

/// `text.lower().strip().replace(" ", "_")`: what a label looks like.
pub fn sanitize_label(text: &str) -> String {
    strip(&text.to_lowercase()).replace(' ', "_")
}

/// The label that an answer means although it is spelled otherwise: equal in letters and digits
/// (`Card Arrival.` for `card_arrival`), else the only label whose words the answer holds in a row.
/// `None` when there is none or the answer holds several.
pub fn normalize_label<'a>(answer: &str, labels: &'a [String]) -> Option<&'a str> {
    let answer = words_of(answer);
    let all: Vec<(Vec<String>, &str)> = (labels.iter())
        .map(|label| (words_of(label), label.as_str()))
        .filter(|(words, _)| !words.is_empty())
        .collect();
    if let Some((_, label)) = all.iter().find(|(w, _)| w.concat() == answer.concat()) {
        return Some(label);
    }
    let holds = |text: &[String], words: &[String]| text.windows(words.len()).any(|w| w == words);
    let held: Vec<&(Vec<String>, &str)> = all.iter().filter(|(w, _)| holds(&answer, w)).collect();
    // A label within another one that the answer holds is not meant by itself.
    let own = |(words, _): &&&(Vec<String>, &str)| {
        !held
            .iter()
            .any(|(other, _)| other != words && holds(other, words))
    };
    match held.iter().filter(own).collect::<Vec<_>>().as_slice() {
        [(_, label)] => Some(label),
        _ => None,
    }
}

/// Runs of letters and digits, in lower case.
fn words_of(text: &str) -> Vec<String> {
    text.split(|c: char| !c.is_alphanumeric())
        .filter(|word| !word.is_empty())
        .map(str::to_lowercase)
        .collect()
}

/// DSPy's `answer_exact_match`: equality of [`normalize_text`].
pub fn answer_exact_match(gold: &str, predicted: &str) -> bool {
    normalize_text(gold) == normalize_text(predicted)
}

/// DSPy's `normalize_text`: decomposed (NFD), lower case, without ASCII punctuation (`_` too) and
/// the words a, an, the; single spaces.
pub fn normalize_text(text: &str) -> String {
    let decomposed: String = text.nfd().collect();
    let plain: String = decomposed
        .to_lowercase()
        .chars()
        .filter(|c| !c.is_ascii_punctuation())
        .collect();
    let plain = without_articles(&plain);
    let words: Vec<&str> = plain
        .split(crate::python_text::is_python_space)
        .filter(|word| !word.is_empty())
        .collect();
    words.join(" ")
}

/// Replaces the words a, an, the by a space. Words are runs of Python's `\w`, to which combining
/// marks do not belong.
fn without_articles(text: &str) -> String {
    let is_word = |c: char| (c.is_alphanumeric() && !is_combining_mark(c)) || c == '_';
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        out.push_str(if matches!(word, "a" | "an" | "the") {
            " "
        } else {
            word
        });
        let end = after.find(is_word).unwrap_or(after.len());
        out.push_str(&after[..end]);
        rest = &after[end..];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_sanitised() {
        assert_eq!(sanitize_label(" Card Arrival\n"), "card_arrival");
        assert_eq!(sanitize_label("a  b"), "a__b");
    }

    #[test]
    fn labels_are_recognised_in_other_spellings() {
        let labels = ["card_arrival", "arrival", "pin"].map(str::to_owned);
        let meant = |answer| normalize_label(answer, &labels);
        assert_eq!(meant("Card-Arrival."), Some("card_arrival"));
        assert_eq!(meant("The label is `card_arrival`"), Some("card_arrival"));
        assert_eq!(meant("pin or arrival"), None);
        assert_eq!(meant("refund"), None);
        assert_eq!(meant("Cardarrival"), Some("card_arrival"));
        // A label within a word is none.
        assert_eq!(meant("in my opinion"), None);
        assert_eq!(meant("not helping"), None);
    }

    #[test]
    fn labels_that_only_punctuation_tells_apart_are_found() {
        let of = |labels: &[&str]| labels.iter().map(|l| (*l).to_owned()).collect::<Vec<_>>();
        assert_eq!(alike(&of(&["c", "java", "c++"])), Some(("c", "c++")));
        assert_eq!(
            alike(&of(&["card_arrival", "card arrival", "the_pin"])),
            None
        );
        let labels = of(&["-1", "1"]);
        assert_eq!(MetricKind::LabelEquality.takes_for_one(&labels), None);
        assert_eq!(
            MetricKind::ExactMatch.takes_for_one(&labels),
            Some(("-1", "1"))
        );
    }

    #[test]
    fn exact_match_ignores_what_dspy_ignores() {
        assert!(answer_exact_match("card_arrival", "Cardarrival."));
        assert!(!answer_exact_match("card_arrival", "card arrival"));
        assert!(answer_exact_match("the café", "cafe\u{301}"));
        assert!(!answer_exact_match("theory", "the ory"));
        assert_eq!(normalize_text("An apple,  the\u{a0}pie a"), "apple pie");
    }
}
