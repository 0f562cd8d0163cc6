//! The stand-in data set: queries over banking77's 25 most frequent intents,
//! written for this project, for where the real data cannot be had.
//!
//! Its rows' ids begin with `stand-in:`, so no score on it can pass for another.

use flowrun_engine::step::StepError;

use crate::load::{DataSetInfo, RowsOf};
use crate::rows::Row;
use crate::table::csv_records;

/// The data set's name.
pub const NAME: &str = "stand-in";

const TRAIN: &str = include_str!("../data/stand-in/train.csv");
const TEST: &str = include_str!("../data/stand-in/test.csv");

/// Digest of its bytes.
#[must_use]
pub fn digest() -> String {
    flowrun_cache::Digest::of_record("stand-in", &(TRAIN, TEST)).to_hex()
}

/// Its description, training rows and test rows.
///
/// # Errors
/// Never for the files as they are; a test reads them.
pub fn rows() -> Result<(DataSetInfo, Vec<Row>, Vec<Row>), StepError> {
    let read = |text: &'static str, split: &'static str| -> Result<Vec<Row>, StepError> {
        let rows = RowsOf {
            dataset: NAME,
            split,
            text: "text",
            label: "category",
            origin: NAME,
        };
        let records = csv_records(text.as_bytes(), NAME.to_owned())?;
        rows.of(records).collect()
    };
    let (train, test) = (read(TRAIN, "train")?, read(TEST, "test")?);
    let info = DataSetInfo {
        dataset: NAME.to_owned(),
        stand_in: true,
        source: "the queries that come with the program".to_owned(),
        train_rows: train.len(),
        test_rows: test.len(),
    };
    Ok((info, train, test))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    #[test]
    fn it_holds_25_intents_and_no_text_twice() {
        let (info, train, test) = rows().unwrap();
        assert!(info.stand_in && train.len() >= 1000 && test.len() >= 250);
        let texts: BTreeSet<String> = train
            .iter()
            .chain(&test)
            .map(|r| r.text.to_lowercase())
            .collect();
        assert_eq!(texts.len(), train.len() + test.len());
        for (rows, least) in [(&train, 40), (&test, 10)] {
            let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
            for row in rows {
                assert_eq!(row.dataset(), NAME);
                *counts.entry(row.label.as_deref().unwrap()).or_default() += 1;
            }
            assert_eq!(counts.len(), 25);
            assert!(counts.values().all(|&n| n >= least), "{counts:?}");
        }
    }
}
