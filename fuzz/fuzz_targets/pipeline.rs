//! Any bytes as a pipeline file: a pipeline, or mistakes that can be shown.
//!
//! `cargo +nightly fuzz run pipeline -- -dict=fuzz/yaml.dict`, from the project's
//! folder. The same properties are tested on every build for a few seconds
//! (`tests/end_to_end/hostile.rs`).
#![no_main]

use std::cell::OnceCell;

use flowrun_engine::vocabulary::Vocabulary;
use flowrun_engine::{LoadOptions, load_pipeline};
use libfuzzer_sys::fuzz_target;

thread_local! {
    static SETTING: OnceCell<(tempfile::TempDir, Vocabulary)> = const { OnceCell::new() };
}

fuzz_target!(|bytes: &[u8]| {
    SETTING.with(|setting| {
        let (dir, vocabulary) = setting.get_or_init(|| {
            let dir = tempfile::tempdir().expect("a temporary folder");
            (dir, flowrun_steps::registry())
        });
        let file = dir.path().join("pipeline.yaml");
        std::fs::write(&file, bytes).expect("the temporary folder takes a file");
        if let Err(found) = load_pipeline(&file, vocabulary, &LoadOptions::default()) {
            assert!(!found.errors.is_empty());
            assert!(!found.to_string().is_empty());
        }
    });
});
