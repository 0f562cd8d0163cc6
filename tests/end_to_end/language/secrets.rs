//! The values of secrets.

use crate::files;
use crate::project::{Project, Run};

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
  says: { run: \"echo $TOKEN; echo ok > $n\", secrets: [TOKEN], out: { n: n }, publish: { n: n.txt } }
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
