//! `FLOWRUN_REQUIRE`: what it names may not be skipped. These tests run others of this program's.

use std::process::{Command, Output};

use crate::required::is_required;

/// Another test, without the component that it needs.
fn without_llama(required: Option<&str>) -> Output {
    let test = "llama_server::llama_cpp_labels_is_refused_and_goes_on";
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", test, "--nocapture"])
        .env_remove("FLOWRUN_LLAMA_PYTHON")
        .env_remove("FLOWRUN_REQUIRE");
    if let Some(required) = required {
        command.env("FLOWRUN_REQUIRE", required);
    }
    command.output().unwrap()
}

fn said(output: &Output) -> String {
    let [out, err] =
        [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned());
    format!("{out}{err}")
}

/// This run's own variable names components alone, whatever is skipped.
#[test]
fn what_this_run_requires_is_known() {
    is_required("ray");
}

#[test]
fn a_test_without_its_component_is_skipped_and_says_so() {
    for required in [None, Some(""), Some("s3, ray")] {
        let output = without_llama(required);
        let said = said(&output);
        assert!(output.status.success(), "{required:?}: {said}");
        // The test is there, and ran.
        assert!(said.contains("1 passed"), "{said}");
        assert!(
            said.contains("skipped: ") && said.contains("FLOWRUN_LLAMA_PYTHON names no Python"),
            "{said}"
        );
    }
}

#[test]
fn a_test_whose_component_is_required_fails_and_names_the_variables() {
    for required in ["llama", " s3 , llama,"] {
        let output = without_llama(Some(required));
        let said = said(&output);
        assert!(!output.status.success(), "{said}");
        let why = "FLOWRUN_REQUIRE requires `llama`, but FLOWRUN_LLAMA_PYTHON names no Python";
        assert!(said.contains(why), "{said}");
    }
}

#[test]
fn an_unknown_component_is_an_error() {
    let output = without_llama(Some("s3,lama"));
    let said = said(&output);
    assert!(!output.status.success(), "{said}");
    let why = "FLOWRUN_REQUIRE names `lama`, which is no component";
    assert!(said.contains(why), "{said}");
    // It lists them; CONTRIBUTING.md says what each is.
    let (_, known) = said.split_once("there are ").unwrap();
    let known: Vec<&str> = known.lines().next().unwrap().split(", ").collect();
    assert!(known.contains(&"llama"), "{said}");
    let explained = include_str!("../../CONTRIBUTING.md");
    let rows = explained.lines().filter(|line| line.starts_with("| `"));
    let names: Vec<&str> = rows.filter_map(|row| row.split('|').nth(1)).collect();
    for component in known {
        let name = format!("`{component}`");
        assert!(names.iter().any(|n| n.contains(&name)), "{component}");
    }
}
