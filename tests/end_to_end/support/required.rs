//! Components: what tests may need and a machine may lack. A test without its component says so and
//! is skipped; where `FLOWRUN_REQUIRE` names the component (`ray,s3`), it fails instead. The tests
//! of several crates share this file.
#![allow(clippy::panic)]

use std::io::Write;

const VARIABLE: &str = "FLOWRUN_REQUIRE";

/// The names that it may hold. CONTRIBUTING.md says what each is.
const COMPONENTS: [&str; 26] = [
    "axolotl",
    "azure",
    "banking77",
    "curl",
    "dev-full",
    "dspy",
    "kubectl",
    "kubernetes",
    "kubernetes-validate",
    "llama",
    "llama-factory",
    "minilm",
    "mlflow",
    "mount",
    "peft",
    "ray",
    "s3",
    "sdk",
    "serve-llm",
    "slurm",
    "smollm2",
    "tensorboard",
    "terminal",
    "transformers",
    "trl",
    "vllm",
];

/// Says on stderr why a test, or a part of it, is skipped that needs the component; fails where that
/// is required. Past the test harness, which keeps to itself what a test that passes prints.
pub(crate) fn skip(component: &str, why: &str) {
    assert!(
        !is_required(component),
        "{VARIABLE} requires `{component}`, but {why}"
    );
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    // As one write, so that lines of several tests do not mix.
    let line = format!("skipped: {test}: {why}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// Whether the component must be there. Fails when the variable names what is no component.
pub(crate) fn is_required(component: &str) -> bool {
    let is_one = |name: &str| COMPONENTS.contains(&name);
    assert!(is_one(component), "`{component}` is no component");
    let Some(names) = std::env::var_os(VARIABLE) else {
        return false;
    };
    let names = names.to_string_lossy();
    let names = names.split(',').map(str::trim);
    let names: Vec<&str> = names.filter(|name| !name.is_empty()).collect();
    if let Some(unknown) = names.iter().find(|name| !is_one(name)) {
        let known = COMPONENTS.join(", ");
        panic!("{VARIABLE} names `{unknown}`, which is no component; there are {known}");
    }
    names.contains(&component)
}
