//! Where the outputs of a step go in a folder. Planning and running share it, so that a plan says
//! of what is published what a run does. Asks no cache, and looks at no file.
//!
//! Invariant: no path that a step or a pipeline names leaves the folder it is relative to.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use flowrun_cache::{Artifact, OutputRecord, OutputValue};

use crate::step::StepError;

/// The artifacts that are published, each with its place: `publish` says of an output port which
/// path of the project in `root` it takes. An item of a list takes its label below that path. A port
/// that the step did not give has none.
///
/// # Errors
/// Invalid when a path would leave the project.
pub(crate) fn published<'a>(
    root: &Path,
    publish: &BTreeMap<String, String>,
    outputs: &'a BTreeMap<String, OutputRecord>,
) -> Result<Vec<(&'a Artifact, PathBuf)>, StepError> {
    let mut all = Vec::new();
    for (port, path) in publish {
        let dest = inside(root, path)?;
        match outputs.get(port).map(|output| &output.value) {
            Some(OutputValue::One(artifact)) => all.push((artifact, dest)),
            Some(OutputValue::List(items)) => {
                for item in items {
                    all.push((&item.artifact, inside(&dest, &item.label)?));
                }
            }
            None => {}
        }
    }
    Ok(all)
}

/// `path` below `folder`; an error if it would leave it.
pub(crate) fn inside(folder: &Path, path: &str) -> Result<PathBuf, StepError> {
    let parts = Path::new(path).components();
    let mut parts = parts.filter(|c| !matches!(c, Component::CurDir)).peekable();
    let is_there = parts.peek().is_some();
    let tidy: Option<PathBuf> = parts
        .map(|c| matches!(c, Component::Normal(_)).then_some(c.as_os_str()))
        .collect();
    if let Some(tidy) = tidy.filter(|_| is_there) {
        return Ok(folder.join(tidy));
    }
    let text = format!("`{path}` must be a relative path without `..`");
    Err(StepError::invalid(text))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use flowrun_cache::{ArtifactKind, Digest, ListItem};

    use super::*;

    #[test]
    fn a_path_never_leaves_its_folder() {
        let root = Path::new("/p");
        for bad in ["", ".", "..", "/etc/x", "a/../../b", "a/.."] {
            assert!(inside(root, bad).is_err(), "{bad}");
        }
        for good in ["a/b", "./a/b", "a/./b/"] {
            assert_eq!(inside(root, good).ok(), Some(PathBuf::from("/p/a/b")));
        }
    }

    #[test]
    fn the_items_of_a_list_lie_below_its_path() {
        let artifact = |text: &str| Artifact {
            digest: Digest::of_bytes(text.as_bytes()),
            kind: ArtifactKind::File,
            size: text.len() as u64,
            executable: false,
        };
        let item = |label: &str| ListItem {
            label: label.to_owned(),
            artifact: artifact(label),
        };
        let output = |value| OutputRecord {
            ty: "file".to_owned(),
            value,
        };
        let outputs = BTreeMap::from([
            ("one".to_owned(), output(OutputValue::One(artifact("one")))),
            (
                "many".to_owned(),
                output(OutputValue::List(vec![item("b"), item("a")])),
            ),
        ]);
        let publish = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            let pairs = pairs.iter();
            pairs
                .map(|(port, path)| ((*port).to_owned(), (*path).to_owned()))
                .collect()
        };
        let root = Path::new("/p");
        let paths = publish(&[("many", "r/all"), ("none", "r/none"), ("one", "./r/one")]);
        let all = published(root, &paths, &outputs).unwrap();
        let all: Vec<_> = all
            .iter()
            .map(|(artifact, dest)| (artifact.digest, dest.to_str().unwrap()))
            .collect();
        let digest = |text: &str| artifact(text).digest;
        assert_eq!(
            all,
            [
                (digest("b"), "/p/r/all/b"),
                (digest("a"), "/p/r/all/a"),
                (digest("one"), "/p/r/one"),
            ]
        );
        assert!(published(root, &publish(&[("one", "../one")]), &outputs).is_err());
    }
}
