//! `init`: a first pipeline for texts of one's own.

use serde_json::Value;

use crate::project::Project;
use crate::terminal::on_a_terminal;

fn rows(labelled: usize, unlabelled: usize) -> String {
    let mut csv = "id,query,intent\n".to_owned();
    for i in 0..labelled + unlabelled {
        let (text, label) = [
            ("my card is lost", "lost"),
            ("send money abroad", "transfer"),
        ][i % 2];
        let label = if i < labelled { label } else { "" };
        csv.push_str(&format!("{i},\"{text}, please {i}\",{label}\n"));
    }
    csv
}

#[test]
fn a_first_pipeline_passes_the_checks() {
    let project = Project::new();
    project.write("data/My Queries.csv", &rows(80, 0));
    let told = project.run(&["init", "data/My Queries.csv"]).ok().stdout;
    assert!(told.contains("2 labels, 80 rows with a label"), "{told}");
    project.run(&["check", "pipelines/my-queries.yaml"]).ok();
    let yaml = project.read("pipelines/my-queries.yaml");
    assert!(
        yaml.contains("text: \"query\"") && yaml.contains("file: \"data/My Queries.csv\""),
        "{yaml}"
    );
    assert!(!yaml.contains("uses: bootstrap"), "{yaml}");
    let there = project.run(&["init", "data/My Queries.csv"]);
    assert_eq!(there.code, Some(2));
    assert!(there.stderr.contains("--force"), "{}", there.stderr);

    project.write("part.csv", &rows(80, 60));
    let told = project
        .run(&["init", "part.csv", "--name", "part", "--json"])
        .ok();
    assert_eq!(told.events()[0]["unlabelled"], 60);
    project.run(&["check", "pipelines/part.yaml"]).ok();
    assert!(
        project
            .read("pipelines/part.yaml")
            .contains("uses: bootstrap")
    );

    project.write("odd.csv", "a,b,c\n1,2,3\n");
    let unclear = project.run(&["init", "odd.csv"]);
    assert_eq!(unclear.code, Some(2));
    assert!(
        unclear.stderr.contains("--text COLUMN"),
        "{}",
        unclear.stderr
    );
    let few = project.run(&["init", "odd.csv", "--text", "a", "--label", "b"]);
    assert_eq!(few.code, Some(3), "{}", few.stderr);
    assert_eq!(project.run(&["init"]).code, Some(2));
}

#[test]
fn a_first_pipeline_is_asked_for_on_a_terminal() {
    let project = Project::new();
    project.write("part.csv", &rows(80, 60));
    let answers = "part.csv\n\nintent\nmine\n";
    let Some(asked) = on_a_terminal(&project, "init", answers, &[]) else {
        return;
    };
    for part in [
        "Column of the texts (id, intent, query) [query]:",
        "Name of the pipeline [part]:",
    ] {
        assert!(asked.contains(part), "{part} in\n{asked}");
    }
    project.run(&["check", "pipelines/mine.yaml"]).ok();
}

#[test]
fn the_data_steps_of_a_first_pipeline_run() {
    let project = Project::new();
    project.write("part.csv", &rows(80, 60));
    project.run(&["init", "part.csv"]).ok();
    let run = project
        .run(&["pipelines/part.yaml", "--until", "split", "--json"])
        .ok();
    let events = run.events();
    let metrics = |step: &str| {
        let ended = |e: &&Value| e["event"] == "step_finished" && e["step"] == step;
        events.iter().find(ended).unwrap()["metrics"].clone()
    };
    let (train, test) = (
        &metrics("load")["train_rows"],
        &metrics("load")["test_rows"],
    );
    assert_eq!(train.as_u64().unwrap() + test.as_u64().unwrap(), 140);
    assert!((5..30).contains(&test.as_u64().unwrap()), "{test}");
    assert_eq!(metrics("split")["unlabelled"], 60);
    assert_eq!(
        metrics("split")["labelled"].as_u64().unwrap(),
        train.as_u64().unwrap() - 60
    );
}
