//! Steps made of steps, for each item of a list.

use super::example;
use crate::project::Project;

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
    assert_eq!(
        project.words("results/all.txt"),
        ["2", "1"],
        "in item order"
    );
    assert_eq!(project.words("results/oak.txt"), ["1"]);
    let again = run("[apple, oak]").ok();
    assert!(again.steps("ran").is_empty(), "{}", again.stdout);
    // Another order runs what reads the list, and nothing else.
    let turned = run("[oak, apple]").ok();
    assert_eq!(turned.steps("ran"), ["all"]);
    assert_eq!(project.words("results/all.txt"), ["1", "2"]);
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
    assert_eq!(project.words("results/all.txt"), ["3", "2", "3", "2"]);
    assert_eq!(project.words("results/two.txt"), ["two", "3", "2"]);
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
    assert_eq!(project.words("results/all.txt"), ["3", "3", "3", "3"]);
    // A new item around brings its own; the others are cached one by one.
    project.edit("pipeline.yaml", "[one, two]", "[two, three]");
    let mut ran = project.run(&args).ok().steps("ran");
    ran.sort();
    let new: Vec<&String> = ran.iter().filter(|id| !id.contains("[three")).collect();
    assert_eq!(new, ["all"], "{ran:?}");
}
