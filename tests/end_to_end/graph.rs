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
    let picture = |args: &[&str]| {
        let args = [&["graph", "pipeline.yaml", "-o", "g.png"], args].concat();
        project.run(&args).ok();
        std::fs::read(project.path("g.png")).unwrap()
    };
    let (plain, failed) = (picture(&[]), picture(&["--status"]));
    assert_eq!(
        picture(&["--status"]),
        failed,
        "it is drawn alike each time"
    );
    let ((_, without), (width, height)) = (size(&plain), size(&failed));
    assert!(height > without, "there is room for what the colours mean");
    project.edit("pipeline.yaml", "run: exit 3; grep -c", "run: grep -c");
    project.run(&["pipeline.yaml"]).ok();
    let whole = picture(&["--status"]);
    assert_eq!(size(&whole), (width, height));
    assert_ne!(whole, failed, "other colours");
}

/// Width and height of a PNG picture, by its header.
fn size(png: &[u8]) -> (u32, u32) {
    assert!(png.starts_with(b"\x89PNG\r\n\x1a\n"));
    let number = |at: usize| u32::from_be_bytes(png[at..at + 4].try_into().unwrap());
    (number(16), number(20))
}

/// A number that an element of an SVG has.
fn number(element: &str, name: &str) -> f64 {
    let (_, rest) = element.split_once(&format!(" {name}=\"")).unwrap();
    rest.split('"').next().unwrap().parse().unwrap()
}

/// The picture shows all of the drawing, twice as large.
fn assert_is_picture_of(png: &[u8], svg: &str) {
    let twice = |name: &str| 2 * number(svg, name) as u32;
    assert_eq!(size(png), (twice("width"), twice("height")));
    assert!(png.len() > 5_000, "something is drawn: {}", png.len());
}

#[test]
fn twelve_steps_can_be_read() {
    let steps = [
        ("load", ""),
        ("filter-top-25", "load"),
        ("split", "filter-top-25"),
        ("bootstrap", "split, filter-top-25"),
        ("split-synthetic", "bootstrap"),
        ("convert-to-messages", "split-synthetic"),
        ("finetune", "convert-to-messages, split-synthetic"),
        ("optimize", "split-synthetic, finetune"),
        ("evaluate", "optimize, finetune, split-synthetic"),
        ("select", "evaluate"),
        ("test", "select, filter-top-25, optimize"),
        ("report", "test, evaluate, bootstrap, finetune"),
    ];
    let project = Project::new();
    let mut text = String::from("steps:\n");
    for (name, needs) in steps {
        writeln!(text, "  {name}: {{ run: ls, needs: [{needs}] }}").unwrap();
    }
    project.write("p.yaml", &text);
    let shown = project.run(&["graph", "p.yaml"]).ok().stdout;
    assert_eq!(shown.lines().count(), 13, "a line a step: {shown}");
    for name in ["g.svg", "g.png"] {
        project.run(&["graph", "p.yaml", "-o", name]).ok();
    }
    let svg = project.read("g.svg");
    for (name, _) in steps {
        assert!(svg.contains(&format!(">{name}</text>")), "{name}");
    }
    let boxes: Vec<[f64; 4]> = svg
        .split("<rect class=\"node \"")
        .skip(1)
        .map(|element| ["x", "y", "width", "height"].map(|name| number(element, name)))
        .collect();
    assert_eq!(boxes.len(), 12);
    for (i, [x, y, width, height]) in boxes.iter().enumerate() {
        for [left, top, wide, high] in &boxes[..i] {
            let beside = x + width <= *left || left + wide <= *x;
            let apart = y + height <= *top || top + high <= *y;
            assert!(beside || apart, "two boxes overlap: {boxes:?}");
        }
    }
    assert_is_picture_of(&std::fs::read(project.path("g.png")).unwrap(), &svg);
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
    let svg = project.read("g.svg");
    assert!(svg.len() < 20_000);
    project.run(&["graph", "p.yaml", "-o", "g.png"]).ok();
    assert_is_picture_of(&std::fs::read(project.path("g.png")).unwrap(), &svg);
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
