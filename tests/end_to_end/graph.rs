//! `flowrun graph`: every format, small and large.

use std::fmt::Write;

use crate::project::Project;

#[test]
fn the_graph_is_drawn_in_every_format() {
    let project = Project::shell();
    let text = project.run(&["graph", "pipeline.yaml"]).ok().stdout;
    assert!(text.contains("← count"), "{text}");
    for (name, part) in [
        ("g.svg", "<svg"),
        ("g.mmd", "strip --> count"),
        ("g.dot", "\"strip\" -> \"count\""),
        ("g.json", "\"needs\""),
        ("g.html", "<svg"),
        ("g.txt", "← count"),
    ] {
        project.run(&["graph", "pipeline.yaml", "-o", name]).ok();
        assert!(project.read(name).contains(part), "{name}");
    }
    project.run(&["graph", "pipeline.yaml", "-o", "g.png"]).ok();
    let png = std::fs::read(project.path("g.png")).unwrap();
    assert!(
        png.starts_with(b"\x89PNG") && png.len() > 5_000,
        "{}",
        png.len()
    );
    assert_eq!(
        project.run(&["graph", "pipeline.yaml", "-o", "g.xyz"]).code,
        Some(2)
    );
}

#[test]
fn the_last_run_colours_it() {
    let project = Project::shell();
    let none = project.run(&["graph", "pipeline.yaml", "--status"]);
    assert_eq!(none.code, Some(2));
    assert!(
        none.stderr.contains("holds no run of `shell`"),
        "{}",
        none.stderr
    );
    project.edit("pipeline.yaml", "run: grep -c", "run: exit 3; grep -c");
    assert_eq!(project.run(&["pipeline.yaml"]).code, Some(4));
    // A run of another pipeline in between changes nothing.
    project.write("other.yaml", "steps:\n  count: { run: \"true\" }\n");
    project.run(&["other.yaml"]).ok();
    let status = |name: &str| {
        project
            .run(&["graph", "pipeline.yaml", "--status", "-o", name])
            .ok();
        project.read(name)
    };
    let svg = status("g.svg");
    for word in ["ran", "failed", "skipped"] {
        assert!(svg.contains(&format!("class=\"node {word}\"")), "{word}");
    }
    let text = project
        .run(&["graph", "pipeline.yaml", "--status"])
        .ok()
        .stdout;
    assert!(
        text.lines()
            .any(|l| l.starts_with("failed") && l.contains("count")),
        "{text}"
    );
    assert!(status("g.mmd").contains(":::failed"));
    assert!(status("g.dot").contains("#b3261e"));
    assert!(status("g.json").contains("\"status\": \"failed\""));
    assert!(status("g.html").contains("<td class=\"failed\">failed</td>"));
}

#[test]
fn ten_thousand_steps_can_be_read() {
    let project = Project::new();
    let mut text = String::from("steps:\n  split: { run: ls }\n");
    for i in 0..9_998 {
        writeln!(text, "  part-{i}: {{ run: ls, needs: [split] }}").unwrap();
    }
    text.push_str("  join:\n    run: ls\n    needs:\n");
    for i in 0..9_998 {
        writeln!(text, "      - part-{i}").unwrap();
    }
    project.write("p.yaml", &text);
    let shown = project.run(&["graph", "p.yaml"]).ok().stdout;
    assert_eq!(shown.lines().count(), 5, "{shown}");
    assert!(
        shown.contains("part-0 … part-9997") && shown.contains("9,998 steps"),
        "{shown}"
    );
    project.run(&["graph", "p.yaml", "-o", "g.svg"]).ok();
    assert!(project.read("g.svg").len() < 20_000);
    let all = project
        .run(&["graph", "p.yaml", "--format", "json"])
        .ok()
        .stdout;
    let all: serde_json::Value = serde_json::from_str(&all).unwrap();
    assert_eq!(
        all["nodes"].as_array().unwrap().len(),
        10_000,
        "data has every step"
    );
    let every = project.run(&["graph", "p.yaml", "--all"]).ok().stdout;
    assert!(every.lines().count() > 10_000);
}
