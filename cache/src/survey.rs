//! [`Survey`]: how much is in a cache folder, by counting its files. Opens none of them.

use std::path::Path;

use serde::Serialize;

/// Files and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Share {
    /// Number of files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// How much is in a cache folder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Survey {
    /// Objects: files and folders that steps made or read.
    pub objects: Share,
    /// Objects that were damaged and set aside.
    pub quarantine: Share,
    /// Results of actions.
    pub results: Share,
    /// Segments of language-model answers.
    pub completions: Share,
    /// Records, logs and reports of runs.
    pub runs: Share,
    /// What unfinished actions left to go on from.
    pub partial: Share,
    /// The index, which can be built anew.
    pub index: Share,
    /// Everything else: the lock, notes, scratch folders.
    pub other: Share,
}

impl Survey {
    /// Counts the files of a cache folder, which need not exist.
    #[must_use]
    pub fn of(dir: &Path) -> Self {
        let mut survey = Self::default();
        for (path, is_dir) in entries(dir) {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let share = match &*name {
                "objects" => {
                    survey.quarantine = Share::of(&path.join("quarantine"));
                    &mut survey.objects
                }
                "actions" => &mut survey.results,
                "completions" => &mut survey.completions,
                "runs" => &mut survey.runs,
                "partial" | "jobs" => &mut survey.partial,
                "index.sled" | "index.closed" => &mut survey.index,
                _ => &mut survey.other,
            };
            share.add(&path, is_dir);
        }
        survey.objects.files -= survey.quarantine.files.min(survey.objects.files);
        survey.objects.bytes -= survey.quarantine.bytes.min(survey.objects.bytes);
        survey
    }

    /// All of it.
    #[must_use]
    pub fn total(&self) -> Share {
        let shares = [
            self.objects,
            self.quarantine,
            self.results,
            self.completions,
            self.runs,
            self.partial,
            self.index,
            self.other,
        ];
        shares.iter().fold(Share::default(), |sum, share| Share {
            files: sum.files + share.files,
            bytes: sum.bytes + share.bytes,
        })
    }
}

impl Share {
    /// A file, or all files below a folder.
    #[must_use]
    pub fn of(path: &Path) -> Self {
        let mut share = Self::default();
        share.add(path, path.is_dir());
        share
    }

    fn add(&mut self, path: &Path, is_dir: bool) {
        if is_dir {
            for (path, is_dir) in entries(path) {
                self.add(&path, is_dir);
            }
        } else if let Ok(meta) = std::fs::symlink_metadata(path) {
            self.files += 1;
            self.bytes += meta.len();
        }
    }
}

/// What lies in a folder; links are not followed.
fn entries(folder: &Path) -> impl Iterator<Item = (std::path::PathBuf, bool)> + use<> {
    std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            Some((entry.path(), entry.file_type().ok()?.is_dir()))
        })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_counted_once() {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in [
            ("objects/ab/cd", 1),
            ("objects/quarantine/x", 2),
            ("actions/ab/c.json", 4),
            ("runs/r/logs/s.log", 8),
            ("lock", 16),
        ] {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, vec![0; bytes]).unwrap();
        }
        let survey = Survey::of(dir.path());
        let share = |files, bytes| Share { files, bytes };
        assert_eq!(survey.objects, share(1, 1));
        assert_eq!(survey.quarantine, share(1, 2));
        assert_eq!(survey.other, share(1, 16));
        assert_eq!(survey.total(), share(5, 31));
        assert_eq!(Survey::of(&dir.path().join("none")), Survey::default());
    }
}
