//! `check` tries each profile of a file, unless one is named.

use serde_json::Value;

use crate::project::Project;

const PIPELINE: &str = "\
params: { word: a }
steps:
  say: { run: 'echo ${{ params.word }} > \"$out\"', out: { out: out.txt } }
  show: { run: 'cat \"$text\"', in: { text: say.out } }
profiles:
  loud:
    params: { word: A }
  more:
    steps:
      more: { run: 'true' }
  most:
    steps:
      most: { run: 'true', needs: [more] }
";

#[test]
fn what_is_wrong_with_a_profile_is_said_without_naming_it() {
    let project = Project::new();
    project.write("p.yaml", PIPELINE);
    let well = project.run(&["check", "p.yaml"]).ok();
    assert_eq!(well.stdout, "p.yaml: 2 steps, no errors\n");
    assert_eq!(well.stderr, "", "`most` is for a run with `more`");

    project.edit("p.yaml", "needs: [more]", "needs: [moer]");
    let warned = project.run(&["check", "p.yaml"]).ok();
    assert_eq!(warned.stdout, "p.yaml: 2 steps, no errors, 1 warning\n");
    let place = "p.yaml:13:36: warning: profile `most` alone: there is no step `moer`";
    assert!(warned.stderr.contains(place), "{}", warned.stderr);
    let named = project.run(&["check", "p.yaml", "--profile", "loud"]).ok();
    assert_eq!(named.stderr, "", "only what is named is looked at");
    let named = project.run(&["check", "p.yaml", "--profile", "most"]);
    assert_eq!(named.code, Some(3), "{}", named.stderr);
    let place = "p.yaml:13:36: error: there is no step `moer`";
    assert!(named.stderr.contains(place), "{}", named.stderr);

    // A param that the file has not is wrong whatever lies beneath.
    project.edit("p.yaml", "word: A", "wrod: A");
    let wrong = project.run(&["check", "p.yaml"]);
    assert_eq!(wrong.code, Some(3), "{}", wrong.stderr);
    for part in [
        "p.yaml:7:15: error: profile `loud`: unknown param `wrod`",
        "did you mean `word`?",
        "profile `most` alone",
        "1 error; nothing was run",
    ] {
        assert!(wrong.stderr.contains(part), "{part}: {}", wrong.stderr);
    }
    let json = project.run(&["check", "p.yaml", "--json"]);
    assert_eq!(json.code, Some(3), "{}", json.stderr);
    let about: Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(about["ok"], false);
    for (list, profile, line) in [("errors", "loud", 7), ("warnings", "most", 13)] {
        assert_eq!(about[list].as_array().unwrap().len(), 1, "{about}");
        assert_eq!(about[list][0]["profile"], profile);
        assert_eq!(about[list][0]["line"], line);
    }
    project.run(&["p.yaml"]).ok();
}
