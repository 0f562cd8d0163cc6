//! The values of secrets.

use crate::files;
use crate::oracle::Oracle;
use crate::project::{Project, Run};
use crate::tiny;

#[test]
fn the_value_of_a_secret_is_written_nowhere() {
    const SECRET: &str = "hunter2-swordfish";
    let project = Project::new();
    let inside = "steps:\n  tell: { run: \"echo inner $TOKEN >&2; echo \\\"${#TOKEN}\\\" > $n\", out: { n: n } }\nout: { n: tell.n }\n";
    project.write("inner.yaml", inside);
    project.write(
        "p.yaml",
        "steps:
  used: { uses: ./inner.yaml, secrets: [TOKEN] }
  says: { run: \"echo $TOKEN; printf %s ${TOKEN%-*}; echo note >&2; echo -${TOKEN#*-}; echo ok > $n\", secrets: [TOKEN], out: { n: n }, publish: { n: n.txt } }
  fails: { run: \"echo the token is $TOKEN >&2; exit 3\", secrets: [TOKEN], needs: [used, says] }
",
    );
    let mut shown = String::new();
    let mut run = |args: &[&str], token: &str| {
        let run = Run::of(project.command(args).env("TOKEN", token).output().unwrap());
        shown.push_str(&run.stdout);
        shown.push_str(&run.stderr);
        run
    };
    assert_eq!(run(&["p.yaml", "--json", "-v"], SECRET).code, Some(4));
    assert_eq!(run(&["p.yaml"], SECRET).code, Some(4));
    for args in [
        &["plan", "p.yaml", "--json"][..],
        &["why", "fails", "p.yaml"],
        &["graph", "p.yaml", "--status"],
        &["graph", "p.yaml", "--status", "-o", "g.html"],
        &["show"],
        &["runs", "--json"],
    ] {
        assert_eq!(run(args, SECRET).code, Some(0), "{args:?}");
    }
    // Another value is the same key: it is in none.
    let again = run(&["p.yaml", "--json"], "another-swordfish");
    assert_eq!(again.steps("cached").len(), 2, "{}", again.stdout);
    let unset = project
        .command(&["check", "p.yaml"])
        .env_remove("TOKEN")
        .output()
        .unwrap();
    let unset = Run::of(unset);
    assert_eq!(unset.code, Some(3));
    assert!(
        unset.stderr.contains("the secret `TOKEN` is not set"),
        "{}",
        unset.stderr
    );
    assert!(shown.contains("the token is ***"), "{shown}");
    assert!(!shown.contains("swordfish"), "{shown}");
    let here = project.path(".");
    assert!(files::below(&here).len() > 10);
    let holding = files::holding(&here, "swordfish");
    assert!(holding.is_empty(), "{holding:?}");
}

const REPORTED: &str = "
  says:
    run: echo \"the token is $TOKEN\" >&2; echo ok > \"$n\"
    secrets: [TOKEN]
    out: { n: n }
  ask:
    uses: evaluate
    in: { rows: labels.test, program: chats.program }
    with: { model: oracle, role: oracle }
    secrets: [TOKEN]
  report:
    uses: report
    needs: [says]
    secrets: [TOKEN]
    in:
      about: load.about
      labels: labels.labels
      train: labels.train
      labelled: labels.train
      dev: [score.scores]
      test: [ask.scores]
    with: { title: secrets, about: secrets, pipeline: secrets }
    publish: { json: report.json, report: report.html }
";

#[test]
fn no_report_holds_the_value_of_a_secret_of_the_steps_that_it_tells_of() {
    const SECRET: &str = "hunter2-swordfish";
    let oracle = Oracle::start(|_| Some("card_arrival".to_owned()));
    let project = tiny::project();
    let model = format!(
        "  oracle: {{ provider: openai, base_url: '{}', model: big, api_key_env: TOKEN, max_retries: 0 }}\n",
        oracle.url
    );
    let student = "    weights: { file: tiny }\n";
    project.edit("pipeline.yaml", student, &format!("{student}{model}"));
    // A server that cannot be held to the labels.
    project.edit("pipeline.yaml", "      constrain: true\n", "");
    let text = project.read("pipeline.yaml") + REPORTED;
    project.write("pipeline.yaml", &text);
    let mut command = project.command(&["pipeline.yaml", "--json", "-v"]);
    let run = Run::of(command.env("TOKEN", SECRET).output().unwrap()).ok();
    assert!(oracle.calls() > 0, "the secret was the oracle's key");
    let page = project.read("report.html");
    assert!(page.contains("says") && page.contains("ask"), "the steps");
    let folder = run.events().last().unwrap()["run_dir"].clone();
    let kept = format!("{}/report.html", folder.as_str().unwrap());
    assert_eq!(project.read(&kept), page, "the run has it too");
    assert!(project.read("report.json").contains("\"says\""));
    let said = run.stdout + &run.stderr;
    assert!(!said.contains("swordfish"), "{said}");
    let holding = files::holding(&project.path("."), "swordfish");
    assert!(holding.is_empty(), "{holding:?}");
}
