//! What callers note of an order (`metadata`).

use std::collections::BTreeMap;

use crate::serve::problem::Problem;

/// What callers note of an order at most, as at OpenAI: entries, bytes of a name, bytes of a value.
const NOTES: [usize; 3] = [16, 64, 512];

/// What a caller noted of an order, if it is not too much.
///
/// # Errors
/// 400 with the field.
pub(in crate::serve) fn metadata(
    given: Option<BTreeMap<String, String>>,
) -> Result<BTreeMap<String, String>, Problem> {
    let given = given.unwrap_or_default();
    let [most, name, value] = NOTES;
    let fits = |(key, text): (&String, &String)| key.len() <= name && text.len() <= value;
    if given.len() <= most && given.iter().all(fits) {
        return Ok(given);
    }
    let text = format!(
        "`metadata` has at most {most} entries, their names {name} bytes and their values {value}"
    );
    Err(Problem::bad(text).of("metadata"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_callers_note_is_bounded() {
        let one = |key: usize, text: usize| {
            let note = ("k".repeat(key), "v".repeat(text));
            metadata(Some(BTreeMap::from([note])))
        };
        assert_eq!(one(64, 512).unwrap().len(), 1);
        assert!(metadata(None).unwrap().is_empty());
        let many = (0..17).map(|at| (at.to_string(), String::new()));
        for refused in [one(65, 1), one(1, 513), metadata(Some(many.collect()))] {
            assert_eq!(refused.unwrap_err().body()["error"]["param"], "metadata");
        }
    }
}
