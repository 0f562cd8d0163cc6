//! What the pipeline language promises, through the real binary.

use std::path::{Path, PathBuf};

use crate::project::{Project, Run};

fn example(name: &str) -> Project {
    let project = Project::new();
    project.copy_example(name, "");
    project
}

#[test]
fn definitions_run_are_cached_and_shown_as_steps_of_their_use() {
    let project = example("definitions");
    let args = ["pipeline.yaml", "--json"];
    let first = project.run(&args).ok();
    let mut ran = first.steps("ran");
    ran.sort();
    let inner = ["fruit/rank", "fruit/split", "trees/rank", "trees/split"];
    assert_eq!(ran[0], "both");
    assert_eq!(ran[1..], inner);
    let counts = |name: &str| {
        project
            .read(name)
            .split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        counts("results/all.txt"),
        ["3", "apple", "2", "and", "3", "oak"]
    );
    assert_eq!(counts("results/trees.txt"), ["3", "oak"]);
    // Another name of the use is the same work.
    project.edit("pipeline.yaml", "  fruit:\n", "  berries:\n");
    project.edit("pipeline.yaml", "fruit: fruit.top", "fruit: berries.top");
    let renamed = project.run(&args).ok();
    assert!(
        renamed.steps("ran").is_empty(),
        "{:?}",
        renamed.steps("ran")
    );
    // A param of one use touches that one alone, and only the step that reads it.
    let changed = project
        .run(&["pipeline.yaml", "--json", "--set", "n=1"])
        .ok();
    assert_eq!(changed.steps("ran"), ["berries/rank", "both"]);
    let plan = project.run(&["plan", "pipeline.yaml"]).ok().stdout;
    assert!(
        plan.contains("berries/split") && plan.contains("trees/rank"),
        "{plan}"
    );
    let why = project
        .run(&["why", "berries", "pipeline.yaml", "--set", "n=3"])
        .ok()
        .stdout;
    assert!(why.contains("cached berries/split"), "{why}");
    assert!(
        why.contains("head -n 1 > ") && why.contains("→ …2 | head -n 3 > "),
        "{why}"
    );
    let graph = project.run(&["graph", "pipeline.yaml"]).ok().stdout;
    assert!(
        graph.contains("trees/rank") && graph.contains("← trees/split"),
        "{graph}"
    );
    let from = project
        .run(&["pipeline.yaml", "--json", "--from", "trees"])
        .ok();
    let mut again = from.steps("ran");
    again.sort();
    assert_eq!(again, ["both", "trees/rank", "trees/split"]);
}

#[test]
fn a_mistake_in_a_definition_is_shown_there_and_at_its_uses() {
    let project = example("definitions");
    project.edit("top-words.yaml", "words: split.words", "words: split.wrods");
    let run = project.run(&["check", "pipeline.yaml"]);
    assert_eq!(run.code, Some(3));
    for part in [
        "top-words.yaml:17:18: error: the step `split` has no output `wrods`",
        "note: used by the step `fruit` at pipeline.yaml:8:11",
        "note: used by the step `trees` at pipeline.yaml:13:11",
        "did you mean `split.words`?",
        "1 error; nothing was run",
    ] {
        assert!(run.stderr.contains(part), "{part} in\n{}", run.stderr);
    }
}

/// How often a word stands in a text.
const COUNT: &str = "\
params:
  word:
in: { text: file }
out: { count: count.count, metrics: count.metrics }
steps:
  pick:
    run: tr ' ' '\\n' < \"$text\" | grep -x '${{ params.word }}' > \"$found\" || true
    in: { text: in.text }
    out: { found: found.txt }
  count:
    run: wc -l < \"$found\" > \"$count\"; printf '{\"n\":%d}' \"$(cat \"$count\")\" > \"$metrics\"
    in: { found: pick.found }
    out: { count: count.txt, metrics: metrics.json }
";

#[test]
fn a_definition_is_run_for_each_item_and_gated_by_its_metrics() {
    let project = Project::new();
    project.write("text.txt", "apple oak apple\n");
    project.write("count.yaml", COUNT);
    project.write(
        "pipeline.yaml",
        "\
params: { words: [apple, oak] }
steps:
  each:
    uses: ./count.yaml
    foreach:
      word: ${{ params.words }}
    in: { text: { file: text.txt } }
    with:
      word: ${{ item.word }}
    expect: [n > 0]
    publish: { count: \"results/${{ item.word }}.txt\" }
  all:
    run: cat \"$counts\"/* > \"$all\"
    in: { counts: each.count }
    out: { all: all.txt }
    publish: { all: results/all.txt }
",
    );
    let run = |words: &str| {
        let set = format!("words={words}");
        project.run(&["pipeline.yaml", "--json", "--set", &set])
    };
    let first = run("[apple, oak]").ok();
    let mut ran = first.steps("ran");
    ran.sort();
    let all = [
        "all",
        "each/count[apple]",
        "each/count[oak]",
        "each/pick[apple]",
        "each/pick[oak]",
    ];
    assert_eq!(ran, all);
    let numbers = |name: &str| {
        let text = project.read(name);
        text.split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(numbers("results/all.txt"), ["2", "1"], "in item order");
    assert_eq!(numbers("results/oak.txt"), ["1"]);
    let again = run("[apple, oak]").ok();
    assert!(again.steps("ran").is_empty(), "{}", again.stdout);
    // Another order runs what reads the list, and nothing else.
    let turned = run("[oak, apple]").ok();
    assert_eq!(turned.steps("ran"), ["all"]);
    assert_eq!(numbers("results/all.txt"), ["1", "2"]);
    // A new item runs alone; its gate is not met.
    let gated = run("[apple, ash, oak]");
    assert_eq!(gated.code, Some(5), "{}", gated.stderr);
    assert_eq!(gated.steps("ran"), ["each/pick[ash]"]);
    assert_eq!(gated.steps("failed"), ["each/count[ash]"]);
    let why = project.run(&["why", "each", "pipeline.yaml"]).ok().stdout;
    assert!(
        why.contains("each/pick") && why.contains("each/count"),
        "{why}"
    );
    // One file changed, and with it both items.
    project.write("text.txt", "oak apple apple\n");
    let changed = run("[apple, oak]").ok();
    let mut ran = changed.steps("ran");
    ran.sort();
    assert_eq!(
        ran,
        ["each/pick[apple]", "each/pick[oak]"],
        "equal counts stop it there"
    );
}

#[test]
fn an_item_that_one_definition_leaves_out_is_left_out_of_the_next_by_the_same_params() {
    let project = Project::new();
    project.write(
        "pipeline.yaml",
        "\
steps:
  each:
    uses: ./outer.yaml
    foreach: { n: [3, 12] }
    in: { text: { file: text.txt } }
    with: { n: \"${{ item.n }}\" }
    publish: { copy: \"results/${{ item.n }}.txt\" }
",
    );
    project.write(
        "outer.yaml",
        "\
params:
  n:
in: { text: file }
out: { copy: two.copy }
steps:
  one:
    uses: ./first.yaml
    in: { text: in.text }
    with: { n: \"${{ params.n }}\" }
  two:
    uses: ./copy.yaml
    in: { text: one.first }
    with: { n: \"${{ params.n * 10 }}\" }
",
    );
    project.write(
        "first.yaml",
        "\
params:
  n:
in: { text: file }
out: { first: head.first }
steps:
  head:
    when: ${{ params.n < 9 }}
    run: head -c ${{ params.n }} \"$text\" > \"$first\"
    in: { text: in.text }
    out: { first: first.txt }
",
    );
    project.write(
        "copy.yaml",
        "\
params:
  n:
in: { text: file }
out: { copy: copy.copy }
steps:
  copy:
    run: cat \"$text\" > \"$copy\"; echo ' ${{ params.n }}' >> \"$copy\"
    in: { text: in.text }
    out: { copy: copy.txt }
",
    );
    for (text, copy) in [("some words\n", "som 30\n"), ("more words\n", "mor 30\n")] {
        project.write("text.txt", text);
        let run = project.run(&["pipeline.yaml", "--json"]).ok();
        let mut ran = run.steps("ran");
        ran.sort();
        assert_eq!(ran, ["each/one/head[3]", "each/two/copy[3]"]);
        assert_eq!(project.read("results/3.txt"), copy);
        assert!(!project.path("results/12.txt").exists());
        let again = project.run(&["pipeline.yaml", "--json"]).ok();
        assert!(again.steps("ran").is_empty(), "{}", again.stdout);
    }
}

#[test]
fn a_definition_walks_a_list_that_exists_only_at_run_time() {
    let project = example("shards");
    project.write(
        "lines.yaml",
        "\
in: { rows: any }
out: { both: both.both }
steps:
  lines:
    run: wc -l < \"$rows\" > \"$lines\"
    in: { rows: in.rows }
    out: { lines: lines.txt }
  both:
    run: cat \"$rows\" \"$lines\" > \"$both\"
    in: { rows: in.rows, lines: lines.lines }
    out: { both: both.txt }
",
    );
    project.write(
        "pipeline.yaml",
        "\
steps:
  load:
    uses: load
    with: { name: queries, train: { file: known.csv }, test: { file: queries.csv } }
  shard:
    uses: shard
    in: { rows: load.test }
    with: { size: 4 }
  each:
    uses: ./lines.yaml
    foreach: { shard: shard.shards }
    in:
      rows: ${{ item.shard }}
  all:
    run: cat \"$parts\"/* > \"$all\"
    in: { parts: each.both }
    out: { all: all.txt }
",
    );
    let run = project.run(&["pipeline.yaml", "--json"]).ok();
    let ran = run.steps("ran");
    for id in [
        "each/lines[000000]",
        "each/both[000000]",
        "each/both[000001]",
    ] {
        assert!(ran.iter().any(|step| step == id), "{id} in {ran:?}");
    }
    let again = project.run(&["pipeline.yaml", "--json"]).ok();
    assert!(again.steps("ran").is_empty(), "{}", again.stdout);
    let plan = project.run(&["plan", "pipeline.yaml"]).ok().stdout;
    assert!(plan.contains("each/both"), "{plan}");
}

/// The lines of a text, each counted by a definition of its own.
const BOOK: &str = "\
params:
  name:
in: { text: file }
out: { counts: count.count, all: all.all }
steps:
  line:
    foreach: { number: [1, 2] }
    run: sed -n '${{ item.number }}p' \"$text\" | sed 's/^/${{ params.name }} /' > \"$line\"
    in: { text: in.text }
    out: { line: line.txt }
  count:
    uses: ./count.yaml
    foreach:
      line: line.line
      max_parallel: 1
    in: { text: \"${{ item.line }}\" }
  all:
    run: (echo '${{ params.name }}'; cat \"$counts\"/*) > \"$all\"
    in: { counts: count.count }
    out: { all: all.txt }
";

#[test]
fn a_definition_is_walked_within_the_items_of_another() {
    let project = Project::new();
    project.write("text.txt", "a b\nc\n");
    project.write("book.yaml", BOOK);
    project.write(
        "count.yaml",
        "\
in: { text: file }
out: { count: count.count }
steps:
  words:
    run: tr ' ' '\\n' < \"$text\" > \"$words\"
    in: { text: in.text }
    out: { words: words.txt }
  count:
    run: wc -l < \"$words\" > \"$count\"
    in: { words: words.words }
    out: { count: count.txt }
",
    );
    project.write(
        "pipeline.yaml",
        "\
steps:
  book:
    uses: ./book.yaml
    foreach: { name: [one, two] }
    in: { text: { file: text.txt } }
    with: { name: \"${{ item.name }}\" }
    publish: { all: \"results/${{ item.name }}.txt\" }
  all:
    run: cat \"$counts\"/* > \"$all\"
    in: { counts: book.counts }
    out: { all: all.txt }
    publish: { all: results/all.txt }
",
    );
    let numbers = |name: &str| -> Vec<String> {
        let text = project.read(name);
        text.split_whitespace().map(str::to_owned).collect()
    };
    let args = ["pipeline.yaml", "--json"];
    let first = project.run(&args).ok();
    let ran = first.steps("ran");
    for id in [
        "book/line[two/1]",
        "book/count/words[one/2]",
        "book/count/count[two/1]",
        "book/all[one]",
    ] {
        assert!(ran.iter().any(|step| step == id), "{id} in {ran:?}");
    }
    assert_eq!(numbers("results/all.txt"), ["3", "2", "3", "2"]);
    assert_eq!(numbers("results/two.txt"), ["two", "3", "2"]);
    assert!(project.run(&args).ok().steps("ran").is_empty());
    // One line changed, and with it one item inside each item around.
    project.write("text.txt", "a b\nc d\n");
    let mut ran = project.run(&args).ok().steps("ran");
    ran.sort();
    assert_eq!(
        ran,
        [
            "all",
            "book/all[one]",
            "book/all[two]",
            "book/count/count[one/2]",
            "book/count/count[two/2]",
            "book/count/words[one/2]",
            "book/count/words[two/2]",
            "book/line[one/1]",
            "book/line[one/2]",
            "book/line[two/1]",
            "book/line[two/2]",
        ]
    );
    assert_eq!(numbers("results/all.txt"), ["3", "3", "3", "3"]);
    // A new item around brings its own; the others are cached one by one.
    project.edit("pipeline.yaml", "[one, two]", "[two, three]");
    let mut ran = project.run(&args).ok().steps("ran");
    ran.sort();
    let new: Vec<&String> = ran.iter().filter(|id| !id.contains("[three")).collect();
    assert_eq!(new, ["all"], "{ran:?}");
}

#[test]
fn the_pools_example_runs() {
    let project = example("pools");
    let run = project.run(&["pipeline.yaml", "--json", "-j", "4"]).ok();
    assert_eq!(run.steps("ran").len(), 5);
    assert_eq!(project.read("results/heaviest.txt").trim(), "apple 5");
    let one_less = [
        "pipeline.yaml",
        "--json",
        "--set",
        "fruit=[pear, apple, plum]",
    ];
    let run = project.run(&one_less);
    assert_eq!(run.code, Some(5), "the gate asks for four items");
    assert_eq!(
        run.steps("cached").len(),
        3,
        "items are cached one by one, in any order"
    );
    assert!(
        run.stdout.contains("the gate `items == 4` was not met"),
        "{}",
        run.stdout
    );
}

/// The most lines `start` without their `end` at once.
fn most_at_once(log: &Path) -> usize {
    let (mut now, mut most) = (0usize, 0);
    for line in std::fs::read_to_string(log).unwrap().lines() {
        match line {
            "start" => now += 1,
            _ => now -= 1,
        }
        most = most.max(now);
    }
    most
}

#[test]
fn a_pool_bounds_what_runs_at_once_across_steps() {
    let project = Project::new();
    let log = project.path("log");
    let step = |name: &str| {
        format!(
            "  {name}:\n    foreach: {{ i: [1, 2, 3] }}\n    pool: narrow\n    env: {{ LOG: {} }}\n    \
             run: echo start >> $LOG; sleep 0.02; echo end >> $LOG; echo '${{{{ item.i }}}} {name}'\n",
            log.display()
        )
    };
    for places in [1, 2] {
        let text = format!(
            "pools: {{ narrow: {places} }}\nsteps:\n{}{}",
            step("a"),
            step("b")
        );
        project.write("p.yaml", &text);
        let _ = std::fs::remove_file(&log);
        let run = project
            .run(&["p.yaml", "--json", "-j", "6", "--force"])
            .ok();
        assert_eq!(run.steps("ran").len(), 6);
        assert!(most_at_once(&log) <= places, "{places}");
    }
}

#[test]
fn more_than_the_machine_has_is_told_and_runs_alone() {
    let project = Project::new();
    let text = "steps:\n  big: { run: \"true\", resources: { cpu: 9999, memory: 900TB } }\n";
    project.write("p.yaml", text);
    let run = project.run(&["p.yaml"]).ok();
    assert!(
        run.stderr.contains("asks for 9999 cores of"),
        "{}",
        run.stderr
    );
    assert!(
        run.stderr
            .contains("it runs when no other that asks for the same does"),
        "{}",
        run.stderr
    );
}

#[test]
fn a_step_whose_when_is_false_takes_those_with_it_that_need_its_data() {
    let project = Project::new();
    let text = "\
params: { deep: false }
steps:
  a: { run: \"echo a > $x\", out: { x: x } }
  b:
    when: ${{ params.deep and run.name == 'p' }}
    run: echo b > $x
    out: { x: x }
  reads-b: { run: cat $x, in: { x: b.x } }
  waits-for-b: { run: cat $x, in: { x: a.x }, needs: [b] }
";
    project.write("p.yaml", text);
    let run = project.run(&["p.yaml", "--json"]).ok();
    assert_eq!(run.steps("skipped"), ["b", "reads-b"]);
    assert_eq!(run.steps("ran"), ["a", "waits-for-b"]);
    let deep = project
        .run(&["p.yaml", "--json", "--set", "deep=true"])
        .ok();
    assert!(deep.steps("skipped").is_empty());
}

#[test]
fn a_command_that_declares_retry_is_tried_again_and_a_time_limit_ends_it() {
    let project = Project::new();
    let mark = project.path("mark");
    let flaky = format!(
        "steps:\n  flaky:\n    retry: {{ times: 2, backoff: 5ms }}\n    env: {{ MARK: {} }}\n    \
         run: \"echo x >> $MARK; [ $(wc -l < $MARK) -ge 3 ]\"\n",
        mark.display()
    );
    project.write("p.yaml", &flaky);
    let run = project.run(&["p.yaml", "--json"]).ok();
    let retries = run
        .events()
        .iter()
        .filter(|e| e["event"] == "step_retry")
        .count();
    assert_eq!(retries, 2);
    std::fs::remove_file(&mark).unwrap();
    project.write(
        "p.yaml",
        &flaky.replace("    retry: { times: 2, backoff: 5ms }\n", ""),
    );
    let run = project.run(&["p.yaml", "--json", "--force"]);
    assert_eq!(run.code, Some(4));
    assert_eq!(std::fs::read_to_string(&mark).unwrap().lines().count(), 1);
    project.write(
        "p.yaml",
        "steps:\n  slow: { run: sleep 60, timeout: 100ms }\n",
    );
    let slow = project.run(&["p.yaml"]);
    assert_eq!(slow.code, Some(4));
    assert!(
        slow.stderr
            .contains("took longer than its `timeout` of 100ms"),
        "{}",
        slow.stderr
    );
}

#[test]
fn a_published_output_is_put_back_when_it_is_missing_or_changed() {
    let project = example("definitions");
    let args = ["pipeline.yaml", "--json"];
    project.run(&args).ok();
    let kept = project.read("results/all.txt");
    std::fs::remove_file(project.path("results/all.txt")).unwrap();
    project.write("results/trees.txt", "something else");
    let run = project.run(&args).ok();
    assert!(run.steps("ran").is_empty());
    assert_eq!(project.read("results/all.txt"), kept);
    assert_eq!(project.read("results/trees.txt").trim(), "3 oak");
}

fn files_below(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => files_below(&entry.path(), into),
            kind if kind.is_file() => into.push(entry.path()),
            _ => {}
        }
    }
}

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
    let mut files = Vec::new();
    files_below(&project.path("."), &mut files);
    assert!(files.len() > 10);
    for file in files {
        let bytes = std::fs::read(&file).unwrap();
        let found = bytes.windows(9).any(|w| w == b"swordfish");
        assert!(!found, "{}", file.display());
    }
}
