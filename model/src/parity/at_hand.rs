//! Weights that tests take where they are at hand, and do not fetch.
use std::path::{Path, PathBuf};

use crate::required::skip;

/// Whether nothing may be skipped.
pub(super) fn full() -> bool {
    std::env::var("FLOWRUN_E2E").is_ok_and(|value| value == "full")
}

/// The file of a component with a digest, at the path in the variable `named` or where flowrun keeps
/// downloads. Without it a test says that it skips, or fails where nothing, or not that, may be
/// skipped.
pub(super) fn file(component: &str, named: &str, sha256: &str) -> Option<PathBuf> {
    let given = std::env::var_os(named).map(PathBuf::from);
    let caches = ["XDG_CACHE_HOME", "FLOWRUN_DISTDIR"];
    let caches = caches.iter().filter_map(std::env::var_os);
    let home = std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
    // The end-to-end tests have flowrun keep its downloads here.
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tmp");
    let folders = caches.map(PathBuf::from).chain(home).chain([target]);
    let kept = folders.flat_map(|folder| {
        let kept = folder.join("flowrun").join("downloads").join(sha256);
        [kept, folder.join(sha256)]
    });
    let found = given.into_iter().chain(kept).find(|path| path.is_file());
    if found.is_none() {
        let why = format!("a file of {component} is not at hand (set {named})");
        assert!(!full(), "{why}");
        skip(component, &why);
    }
    found
}
