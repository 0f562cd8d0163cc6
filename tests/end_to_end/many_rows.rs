//! Many rows: the bench that measures them, and that memory does not grow with them.

use serde_json::{Value, json};

use crate::classify;
use crate::project::{Project, Run};

const STEPS: [&str; 5] = [
    "bootstrap",
    "convert-to-messages",
    "filter-top-n",
    "load",
    "split",
];

/// The last of the steps that hold no rows.
const CONVERT: &str = "  convert:
    uses: convert-to-messages
    in: { rows: [labels.train], labels: labels.labels }
    with: { program: classify }
    publish: { messages: messages.jsonl }
";

#[test]
fn every_step_is_measured_and_nothing_is_left_behind() {
    let project = Project::new();
    let bench = |more: &[&str]| {
        let args = [&["bench", "rows"], more].concat();
        let mut command = project.command(&args);
        command.env("TMPDIR", project.path(""));
        Run::of(command.output().unwrap()).ok()
    };
    let run = bench(&["--rows", "20,30", "--label-rows", "20", "--json"]);
    let said: Value = serde_json::from_str(&run.stdout).unwrap();
    let measured = said["measured"].as_array().unwrap();
    assert_eq!(measured.len(), 2, "{said}");
    for (one, (rows, labelled)) in measured.iter().zip([(20_u64, true), (30, false)]) {
        assert_eq!(one["rows"], json!(rows), "{said}");
        assert_eq!(one["labelled"], json!(labelled), "{said}");
        let bytes = one["csv_bytes"].as_u64().unwrap();
        assert!((60 * rows..90 * rows).contains(&bytes), "{said}");
        let steps = one["steps"].as_object().unwrap();
        let mut names: Vec<&str> = steps.keys().map(String::as_str).collect();
        names.sort_unstable();
        let expected = &STEPS[usize::from(!labelled)..];
        assert_eq!(names, expected, "{said}");
        for figure in steps.values().chain([&one["chain"]]) {
            for name in ["peak_mb", "seconds", "cpu_seconds"] {
                assert!(figure[name].is_number(), "{name} {said}");
            }
        }
    }
    let table = bench(&["--rows", "10"]).stdout;
    assert!(table.starts_with("| rows | CSV | `load` |"), "{table}");
    assert!(table.contains("\n| 10 | "), "{table}");
    let left = std::fs::read_dir(project.path("")).unwrap();
    let left = left.map(|entry| entry.unwrap().file_name().display().to_string());
    let left: Vec<String> = left.filter(|name| name.contains("bench")).collect();
    assert_eq!(left, Vec::<String>::new());
    let none = project.run(&["bench", "rows", "--rows", "0"]);
    assert_eq!(none.code, Some(2), "{}", none.stderr);
}

/// Peak memory of a run that loads, filters and converts so many rows, in MiB.
fn peak_mib(rows: usize) -> f64 {
    let project = Project::new();
    let query = |row: usize| {
        let text = format!("query {row:08}: why has my new card not come yet and where is it");
        (text, ["card_arrival", "pin"][row % 2])
    };
    classify::write_rows(&project, "train.csv", (0..rows).map(query));
    let test = [("one", "pin"), ("another", "card_arrival")];
    let test = test.map(|(text, label)| (text.to_owned(), label));
    classify::write_rows(&project, "test.csv", test);
    let text = format!("name: many\n{}{CONVERT}", classify::ROWS);
    project.write("p.yaml", &text);
    let flowrun = env!("CARGO_BIN_EXE_flowrun");
    let run = project
        .run(&["bench", "engine", "--measure", flowrun, "p.yaml", "--quiet"])
        .ok();
    assert_eq!(project.read("messages.jsonl").lines().count(), rows);
    let cost: Value = serde_json::from_str(&run.stdout).unwrap();
    cost["rss_mib"].as_f64().unwrap()
}

/// A row in memory takes more than 300 bytes with its texts, so that a step that held 200,000 would
/// take 57 MiB more. What may grow are buffers and the part of the lineage that memory holds.
#[test]
fn memory_does_not_grow_with_the_rows() {
    let (few, many) = (peak_mib(2_000), peak_mib(200_000));
    assert!(many - few < 30.0, "{few} MiB, then {many} MiB");
}
