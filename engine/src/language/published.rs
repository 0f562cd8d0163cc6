//! [`Published`]: the paths that the steps publish to, and what stands in the way of one.
//!
//! An output that is put into the project takes its whole place. So no path may lie within
//! another's, and none may hold the files that the pipeline is read from.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

/// The paths that steps publish to, so far.
pub(crate) struct Published<'a> {
    root: &'a Path,
    /// The pipeline file, what it includes, and the definitions that it uses.
    sources: Vec<PathBuf>,
    places: BTreeMap<PathBuf, Place<'a>>,
}

struct Place<'a> {
    step: &'a str,
    /// A folder of entries with names of their own, in which others may lie too.
    shared: bool,
}

impl<'a> Published<'a> {
    /// None yet, in the project at `root` whose pipeline is read from `sources`.
    pub(crate) fn new(root: &'a Path, sources: impl Iterator<Item = PathBuf>) -> Self {
        let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
        Self {
            root,
            sources: sources.map(absolute).collect(),
            places: BTreeMap::new(),
        }
    }

    /// Takes a path for an output of `step`; `list` when the output is one.
    ///
    /// # Errors
    /// What is wrong with it, for a message.
    pub(crate) fn add(&mut self, path: &str, step: &'a str, list: bool) -> Result<(), String> {
        let tidy = tidy(path);
        let place = std::path::absolute(self.root.join(&tidy)).unwrap_or_default();
        if let Some(source) = self.sources.iter().find(|s| s.starts_with(&place)) {
            let name = source.file_name().unwrap_or_default().to_string_lossy();
            return Err(format!(
                "`{path}` would replace `{name}`, from which the pipeline is read"
            ));
        }
        if let Some(taken) = self.places.get(&tidy) {
            return Err(format!(
                "`{path}` is already published by the step `{}`",
                taken.step
            ));
        }
        let mut above = tidy.ancestors().skip(1);
        let around = above.find_map(|p| self.places.get_key_value(p).filter(|(_, t)| !t.shared));
        if let Some((outer, taken)) = around {
            let (outer, by) = (outer.display(), taken.step);
            return Err(format!(
                "`{path}` lies in `{outer}`, which the step `{by}` publishes"
            ));
        }
        // Paths are ordered part by part: what lies in this one comes right after it.
        let next = self.places.range(tidy.clone()..).next();
        if let Some((inner, taken)) = next.filter(|(p, _)| !list && p.starts_with(&tidy)) {
            let (inner, by) = (inner.display(), taken.step);
            return Err(format!(
                "`{inner}`, which the step `{by}` publishes, lies in `{path}`"
            ));
        }
        let place = Place { step, shared: list };
        self.places.insert(tidy, place);
        Ok(())
    }
}

/// Without `.` parts.
fn tidy(path: &str) -> PathBuf {
    let parts = Path::new(path).components();
    parts.filter(|c| !matches!(c, Component::CurDir)).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn published(paths: &[(&str, bool)]) -> Result<(), String> {
        let sources = ["/p/pipelines/a.yaml".into()].into_iter();
        let mut all = Published::new(Path::new("/p"), sources);
        paths
            .iter()
            .try_for_each(|(p, list)| all.add(p, "s", *list))
    }

    #[test]
    fn an_output_has_its_place_to_itself() {
        for good in [
            &[("results/a", false), ("results/ab", false)][..],
            &[("results", true), ("results/report.html", false)],
            &[("results/report.html", false), ("results", true)],
            &[("pipelines/b.yaml", false), ("pipelines/out", false)],
        ] {
            assert_eq!(published(good), Ok(()), "{good:?}");
        }
        for bad in [
            &[("results/a", false), ("./results/a", false)][..],
            &[("results", false), ("results/a", false)],
            &[("results/a/b", false), ("results", false)],
            &[("results", true), ("results", true)],
            &[("results/a", false), ("results/a/b", true)],
        ] {
            assert!(published(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_pipeline_itself_is_not_replaced() {
        for path in ["pipelines", "pipelines/a.yaml"] {
            let error = published(&[(path, false)]).unwrap_err();
            assert!(error.contains("would replace `a.yaml`"), "{error}");
        }
    }
}
