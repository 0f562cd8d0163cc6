//! [`FormatVersion`]: the version of a file's format, as the first field of the file.
//!
//! A file that says none is of version 1, and version 1 is not written: what was made before
//! formats had versions reads as it did, and equal content keeps its digest.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Versions 1 to `NEWEST` are read, `NEWEST` is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FormatVersion<const NEWEST: u32>;

impl<const NEWEST: u32> FormatVersion<NEWEST> {
    /// Whether the file need not say it.
    pub(crate) fn is_first(&self) -> bool {
        NEWEST == 1
    }
}

impl<const NEWEST: u32> Serialize for FormatVersion<NEWEST> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(NEWEST)
    }
}

impl<'de, const NEWEST: u32> Deserialize<'de> for FormatVersion<NEWEST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let found = u32::deserialize(deserializer)?;
        if (1..=NEWEST).contains(&found) {
            return Ok(Self);
        }
        let known = match NEWEST {
            1 => "version 1".to_owned(),
            _ => format!("versions 1 to {NEWEST}"),
        };
        Err(D::Error::custom(format!(
            "the file's format has version {found}, and flowrun {} reads {known}: use the flowrun \
             that wrote it, or a newer one",
            env!("CARGO_PKG_VERSION")
        )))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::program_file::ProgramFile;
    use crate::scores::Scores;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Third {
        #[serde(default, skip_serializing_if = "FormatVersion::is_first")]
        version: FormatVersion<3>,
        name: String,
    }

    fn third(text: &str) -> Result<Third, String> {
        serde_json::from_str(text).map_err(|e| e.to_string())
    }

    #[test]
    fn older_versions_are_read_and_the_newest_is_written() {
        let written = r#"{"version":3,"name":"a"}"#;
        for text in [r#"{"name":"a"}"#, r#"{"version":2,"name":"a"}"#, written] {
            let read = third(text).unwrap();
            assert_eq!(serde_json::to_string(&read).unwrap(), written, "{text}");
        }
        // What a later format adds is not what the message is about.
        let newer = third(r#"{"version":4,"name":"a","more":1}"#).unwrap_err();
        let said = format!(
            "the file's format has version 4, and flowrun {} reads versions 1 to 3",
            env!("CARGO_PKG_VERSION")
        );
        assert!(newer.starts_with(&said), "{newer}");
        assert!(third(r#"{"version":0,"name":"a"}"#).is_err());
    }

    /// A file as it was written before formats had versions.
    fn stays_as_it_is<T>(old: &str)
    where
        T: Serialize + serde::de::DeserializeOwned,
    {
        let read: T = serde_json::from_str(old).unwrap();
        assert_eq!(serde_json::to_string(&read).unwrap(), old);
    }

    /// The same file, as a later flowrun writes it.
    fn is_refused<T: serde::de::DeserializeOwned>(newer: &str, version: u32, known: &str) {
        let Err(error) = serde_json::from_str::<T>(newer) else {
            panic!("{newer} was read");
        };
        let error = error.to_string();
        let said = format!("format has version {version}, and flowrun ");
        assert!(error.contains(&said), "{error}");
        assert!(error.contains(&format!("reads {known}:")), "{error}");
    }

    #[test]
    fn a_checkpoint_of_the_first_version_is_read_and_a_newer_one_is_refused() {
        let old = r#"{"name":"base","epoch":0,"step":0,"lineage":{}}"#;
        let versioned = |version: u32| old.replacen('{', &format!(r#"{{"version":{version},"#), 1);
        for text in [old.to_owned(), versioned(1), versioned(2)] {
            let read: Checkpoint = serde_json::from_str(&text).unwrap();
            assert_eq!(read, Checkpoint::base(), "{text}");
            assert_eq!(serde_json::to_string(&read).unwrap(), versioned(2));
        }
        let newer = versioned(3).replacen(r#""name""#, r#""tokens":9,"name""#, 1);
        is_refused::<Checkpoint>(&newer, 3, "versions 1 to 2");
    }

    #[test]
    fn scores_without_a_version_keep_their_bytes_and_newer_ones_are_refused() {
        let old = r#"{"dataset":"d","model":"m","programs":[]}"#;
        stays_as_it_is::<Scores>(old);
        let newer = old.replacen('{', r#"{"version":2,"tasks":[],"#, 1);
        is_refused::<Scores>(&newer, 2, "version 1");
    }

    #[test]
    fn a_classifier_without_a_version_keeps_its_bytes_and_a_newer_one_is_refused() {
        let spec = serde_json::to_string(&flowrun_lm::classifier::ClassifierSpec::new("e"));
        let old = format!(
            concat!(
                r#"{{"classifier":{{"spec":{},"classifier":{{"version":1,"labels":["a","b"],"#,
                r#""width":1,"model":{{"linear":{{"weights":[[2.0],[-2.0]],"#,
                r#""intercepts":[0.0,0.0]}}}}}}}}}}"#
            ),
            spec.unwrap()
        );
        stays_as_it_is::<ProgramFile>(&old);
        let newer = old.replacen(r#"{"spec""#, r#"{"version":2,"more":1,"spec""#, 1);
        is_refused::<ProgramFile>(&newer, 2, "version 1");
    }
}
