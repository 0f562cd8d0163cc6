//! Programs that a machine may lack.

use std::path::PathBuf;

use crate::required::{is_required, skip};

/// The component that a variable says the place of.
fn component(variable: &str) -> &'static str {
    match variable {
        "FLOWRUN_AXOLOTL" => "axolotl",
        "FLOWRUN_AZURITE" => "azure",
        "FLOWRUN_DSPY_PYTHON" => "dspy",
        "FLOWRUN_KUBECTL" => "kubectl",
        "FLOWRUN_KUBERNETES_VALIDATE" => "kubernetes-validate",
        "FLOWRUN_LLAMA_FACTORY" => "llama-factory",
        "FLOWRUN_LLAMA_PYTHON" => "llama",
        "FLOWRUN_MLFLOW_PYTHON" => "mlflow",
        "FLOWRUN_OPENAI_PYTHON" => "sdk",
        "FLOWRUN_RAY_LLM_PYTHON" => "serve-llm",
        "FLOWRUN_RAY_PYTHON" => "ray",
        "FLOWRUN_TENSORBOARD_PYTHON" => "tensorboard",
        "FLOWRUN_TRANSFORMERS_PYTHON" => "transformers",
        "FLOWRUN_TRL" => "trl",
        "FLOWRUN_VLLM_PYTHON" => "vllm",
        "FLOWRUN_WEED" => "s3",
        _ => panic!("`{variable}` says the place of no component that is known here"),
    }
}

/// The program that an environment variable names. Where it names none, that the test is skipped
/// is said on stderr; where it is required, the test fails.
pub(crate) fn named(variable: &str, what: &str) -> Option<PathBuf> {
    let component = component(variable);
    // Skipped or not, a name that is none is an error.
    is_required(component);
    let path = set(variable);
    if path.is_none() {
        skip(component, &format!("{variable} names no {what}"));
    }
    path
}

/// The path that a variable holds, if any.
pub(crate) fn set(variable: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).filter(|path| !path.is_empty());
    path.map(PathBuf::from)
}
