//! Banking77 itself, which a machine may lack.

use std::path::{Path, PathBuf};

use crate::required::is_required;

/// The folder with the real files, where there is one; `FLOWRUN_E2E=full` demands it, and
/// so does `banking77` in `FLOWRUN_REQUIRE`.
pub(crate) fn distdir() -> Option<PathBuf> {
    let named = std::env::var_os("FLOWRUN_DISTDIR").map(PathBuf::from);
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/dist");
    let mut folders = named.into_iter().chain([beside]);
    let found = folders.find(|d| d.join("banking77/train.csv").is_file());
    let demanded = std::env::var("FLOWRUN_E2E").is_ok_and(|value| value == "full");
    let demanded = demanded || is_required("banking77");
    assert!(
        found.is_some() || !demanded,
        "banking77 is required, and FLOWRUN_DISTDIR names no folder that has it"
    );
    found
}
