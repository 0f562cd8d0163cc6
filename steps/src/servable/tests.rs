//! Whole pipelines, through the language.
#![allow(clippy::unwrap_used)]

use flowrun_engine::{Diagnostic, LoadOptions, load_pipeline};

/// A training, a choice among its checkpoints, and its deployment. Words in capitals are filled in.
const MAIN: &str = r#"
models:
  student: MODEL
steps:
  train:
    uses: finetune
    in: { messages: { file: rows } }
    with: { model: LEARNER, TRAIN }
  score:
    uses: evaluate
    foreach: { checkpoint: [train.base, train.checkpoints] }
    in: { rows: { file: rows }, program: { file: rows }, adapter: "${{ item.checkpoint }}" }
    with: { model: student }
  choose:
    uses: select
    in:
      scores: score.scores
      adapters: [train.base, train.checkpoints]
      optimised: { file: rows }
      program: { file: rows }
  ship:
    uses: deploy
    in: { program: { file: rows }, adapter: choose.adapter, scores: { file: rows } }
    with: { name: d, model: student, SHIP }
"#;
const VLLM: &str = "{ provider: openai, base_url: 'http://h/v1', model: org/base, adapters: { folder: a, load: true, server: vllm } }";
const GGUF: &str = "{ provider: embedded, weights: { file: w.gguf } }";
const TRL: &str = "backend: { command: { trainer: trl, base: org/base } }";

/// What is said of a pipeline: `error` or `warning`, and the text as it is shown.
fn found(fills: &[(&str, &str)]) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("rows"), "").unwrap();
    let mut text = MAIN.to_owned();
    let usual = [
        ("LEARNER", "student"),
        ("MODEL", VLLM),
        ("TRAIN", TRL),
        ("SHIP", "target: bundle"),
    ];
    for (word, fill) in fills.iter().chain(&usual) {
        text = text.replace(word, fill);
    }
    let file = dir.path().join("main.yaml");
    std::fs::write(&file, text).unwrap();
    let options = LoadOptions {
        root: Some(dir.path().to_owned()),
        ..LoadOptions::default()
    };
    let shown = |found: &Diagnostic| {
        let text = found.render_plain();
        text.replace(&format!("{}/", dir.path().display()), "")
    };
    let loaded = load_pipeline(&file, &crate::registry(), &options);
    let found = loaded.map_or_else(|errors| errors, |pipeline| pipeline.warnings);
    found.errors.iter().map(shown).collect()
}

/// The same and one more.
fn and<'a>(fills: &[(&'a str, &'a str)], more: (&'a str, &'a str)) -> Vec<(&'a str, &'a str)> {
    fills.iter().copied().chain([more]).collect()
}

/// The only finding, which is in the line of `step`'s `with`.
fn only(fills: &[(&str, &str)], line: usize, words: &[&str]) {
    let all = found(fills);
    assert_eq!(all.len(), 1, "{all:#?}");
    assert!(
        all[0].starts_with(&format!("main.yaml:{line}:")),
        "{all:#?}"
    );
    for word in words {
        assert!(all[0].contains(word), "{word}: {all:#?}");
    }
}

/// Lines of `with` in `train` and `ship`.
const TRAIN: usize = 8;
const SHIP: usize = 24;

#[test]
fn plain_lora_on_vllm_is_nothing_to_speak_of() {
    assert_eq!(found(&[]), Vec::<String>::new());
    let ours = "lora: { invocation: '<|im_start|>assistant', rank: 64 }";
    assert_eq!(
        found(&[("MODEL", GGUF), ("TRAIN", ours)]),
        Vec::<String>::new()
    );
    let hub = "{ provider: embedded, weights: { hf: org/base } }";
    let ships = [
        ("MODEL", hub),
        ("TRAIN", "epochs: 1"),
        ("SHIP", "target: vllm"),
    ];
    assert_eq!(found(&ships), Vec::<String>::new());
}

#[test]
fn an_entry_that_tells_the_template_something_else_than_the_training_is_said() {
    const QUICK: &str = "{ provider: embedded, weights: { file: w.gguf }, chat_template_kwargs: { enable_thinking: false } }";
    const SLOW: &str = "{ provider: embedded, weights: { file: w.gguf }, chat_template_kwargs: { enable_thinking: true } }";
    let found = |asked: &str, trained: &str, train: &str| {
        let models = format!("{asked}\n  learner: {trained}");
        found(&[
            ("MODEL", models.as_str()),
            ("LEARNER", "learner"),
            ("TRAIN", train),
        ])
    };
    let here = "epochs: 1";
    for (asked, trained) in [(GGUF, QUICK), (QUICK, QUICK), (GGUF, GGUF)] {
        assert_eq!(found(asked, trained, here), Vec::<String>::new());
    }
    for (trained, train, words) in [
        (SLOW, here, "are trained with `chat_template_kwargs: "),
        (GGUF, here, "are trained without `chat_template_kwargs`"),
        (SLOW, TRL, "are trained with `chat_template_kwargs: "),
    ] {
        let all = found(QUICK, trained, train);
        // What `score` asks, and what `ship` deploys.
        assert_eq!(all.len(), 2, "{all:#?}");
        for one in &all {
            assert!(one.contains("error: ") && one.contains(words), "{one}");
        }
    }
}

#[test]
fn what_vllm_does_not_load_is_said_where_it_is_trained() {
    let activated = "lora: { invocation: x }";
    let trained = [("MODEL", GGUF), ("TRAIN", activated)];
    let ship = "target: vllm, settings: { base_model: org/base }";
    let words = [
        "error: ",
        "the target `vllm` of `ship`",
        "activated adapters",
    ];
    only(&and(&trained, ("SHIP", ship)), TRAIN, &words);
    let llm = "target: ray-serve, settings: { base_model: org/base, adapters_url: 's3://b/a' }";
    let words = [
        "error: ",
        "the target `ray-serve` of `ship`",
        "activated adapters",
    ];
    only(&and(&trained, ("SHIP", llm)), TRAIN, &words);
    // This program's own server is what runs there.
    let own = "target: ray-serve";
    assert_eq!(found(&and(&trained, ("SHIP", own))), Vec::<String>::new());

    let dora = "backend: { command: { trainer: trl, base: org/base, config: { use_dora: true } } }";
    only(
        &[("TRAIN", dora)],
        TRAIN,
        &["error: ", "the server of `org/base`, which is vLLM", "DoRA"],
    );
    let unsaid = VLLM.replace(", server: vllm", "");
    let words = [
        "warning: ",
        "if it is vLLM",
        "adapters: { server: flowrun }",
    ];
    only(&[("MODEL", &unsaid), ("TRAIN", dora)], TRAIN, &words);
}

#[test]
fn a_rank_without_room_is_an_error_or_a_question() {
    let rank = |rank: u32| format!("{TRL}, lora: {{ rank: {rank} }}");
    let words = [
        "warning: ",
        "rank 32",
        "--max-lora-rank",
        "adapters.max_rank",
    ];
    only(&[("TRAIN", &rank(32))], TRAIN, &words);
    let room = VLLM.replace("server: vllm", "server: vllm, max_rank: 32");
    assert_eq!(
        found(&[("MODEL", &room), ("TRAIN", &rank(32))]),
        Vec::<String>::new()
    );
    let words = ["error: ", "rank 32 at most, not 64"];
    only(&[("MODEL", &room), ("TRAIN", &rank(64))], TRAIN, &words);
    // The program's own field wins over the step's.
    let own = TRL.replace("org/base }", "org/base, config: { lora_r: 48 } }");
    only(&[("MODEL", &room), ("TRAIN", &own)], TRAIN, &["not 48"]);
    let odd = format!("{TRL}, lora: {{ target_modules: [q_proj, gate] }}");
    only(&[("TRAIN", &odd)], TRAIN, &["warning: ", "`gate`"]);
}

#[test]
fn what_another_asks_than_was_trained_is_an_error() {
    // Each of those who ask is told of.
    let plain = VLLM.replace(", adapters: { folder: a, load: true, server: vllm }", "");
    let all = found(&[("MODEL", &plain)]);
    assert_eq!(all.len(), 2, "{all:#?}");
    assert!(
        all.iter().all(|one| one.contains("has no `adapters`")),
        "{all:#?}"
    );
    let here = format!("{VLLM}\n  local: {GGUF}");
    let all = found(&[("MODEL", &here), ("model: student }", "model: local }")]);
    assert_eq!(all.len(), 1, "{all:#?}");
    assert!(
        all[0].contains("are for `org/base` of a server"),
        "{all:#?}"
    );
    let other = format!("{VLLM}\n  other: {}", VLLM.replace("org/base", "org/other"));
    let all = found(&[("MODEL", &other), ("LEARNER", "other")]);
    assert_eq!(all.len(), 2, "{all:#?}");
    assert!(
        all[0].contains("are for `org/other`, and `score` asks `org/base`"),
        "{all:#?}"
    );
}

#[test]
fn adapters_in_an_object_store_are_where_their_server_looks() {
    let of = |adapters: &str, model: &str| {
        let entry = VLLM.replace("{ folder: a, load: true, server: vllm }", adapters);
        found(&[("MODEL", &entry.replace("org/base", model))])
    };
    for good in [
        "{ url: 's3://b/a', server: vllm, max_rank: 64 }",
        "{ url: 'az://b/a' }",
    ] {
        assert_eq!(of(good, "org/base"), Vec::<String>::new(), "{good}");
    }
    // Of each of the two steps that ask.
    for (bad, model, words) in [
        (
            "{ url: 's3://b/a', load: true }",
            "m",
            "error: the entry of `m`: `adapters.load`",
        ),
        (
            "{ url: 's3://k:s@b/a' }",
            "m",
            "error: the entry of `m`: `adapters.url`",
        ),
        (
            "{ url: 'az://b/a', server: vllm }",
            "m",
            "error: the server of `m` is vLLM",
        ),
        (
            "{ url: 's3://b/a', server: vllm }",
            "'m:1'",
            "error: the adapters of `m:1`",
        ),
        (
            "{ url: 's3://b/a' }",
            "'m:1'",
            "warning: the adapters of `m:1`",
        ),
    ] {
        let all = of(bad, model);
        assert_eq!(all.len(), 2, "{bad}: {all:#?}");
        assert!(all.iter().all(|one| one.contains(words)), "{bad}: {all:#?}");
    }
    // Of the entry itself.
    for (bad, words) in [
        ("{ folder: a, url: 's3://b/a' }", "exclude each other"),
        (
            "{ load: true }",
            "one of the fields `folder`, `url` is missing",
        ),
        ("{ url: 'https://h/a' }", "does not match"),
        ("{ url: a }", "does not match"),
    ] {
        let all = of(bad, "org/base");
        assert_eq!(all.len(), 1, "{bad}: {all:#?}");
        assert!(
            all[0].starts_with("main.yaml:3:") && all[0].contains(words),
            "{bad}: {all:#?}"
        );
    }
}

#[test]
fn a_server_that_keeps_what_it_trains_is_asked_itself() {
    let openai = "backend: { openai: {} }";
    let plain = VLLM.replace(", adapters: { folder: a, load: true, server: vllm }", "");
    assert_eq!(
        found(&[("MODEL", &plain), ("TRAIN", openai)]),
        Vec::<String>::new()
    );
    let two = format!(
        "{plain}\n  other: {}",
        plain.replace("http://h", "http://i")
    );
    let all = found(&[("MODEL", &two), ("LEARNER", "other"), ("TRAIN", openai)]);
    assert_eq!(all.len(), 2, "{all:#?}");
    assert!(all.iter().all(|one| one.contains("warning: ")), "{all:#?}");
    let words = ["only their server has them"];
    let ships = [("TRAIN", openai), ("SHIP", "target: vllm")];
    only(&ships, SHIP, &words);
    let activated = format!("{openai}, lora: {{ invocation: x }}");
    only(
        &[("MODEL", &plain), ("TRAIN", &activated)],
        TRAIN,
        &["trains no activated adapters"],
    );
}

#[test]
fn what_the_training_itself_refuses_is_told_before_it() {
    let here = "epochs: 1";
    let words = [
        "`org/base` cannot be trained in this process",
        "say with `backend`",
    ];
    only(&[("TRAIN", here)], TRAIN, &words);
    let openai = "backend: { openai: {} }";
    let all = found(&[("MODEL", GGUF), ("TRAIN", openai)]);
    assert!(all[0].contains("`w` is trained by no server"), "{all:#?}");
    for (settings, words) in [
        ("trainer: trl", "`backend.command.base` is missing"),
        (
            "trainer: llama-factory, base: x",
            "needs `backend.command.template`",
        ),
        (
            "trainer: trl, base: x, micro_batch: 3",
            "`micro_batch` 3 does not divide `batch_size` 8",
        ),
    ] {
        let train = format!("backend: {{ command: {{ {settings} }} }}");
        only(&[("MODEL", GGUF), ("TRAIN", &train)], TRAIN, &[words]);
    }
}

#[test]
fn a_base_that_a_target_cannot_load_is_told_before_the_training() {
    let ships = [
        ("MODEL", GGUF),
        ("TRAIN", "epochs: 1"),
        ("SHIP", "target: vllm"),
    ];
    only(
        &ships,
        SHIP,
        &["cannot load the weights `w`", "settings.base_model"],
    );
    let named = "target: vllm, settings: { base_model: org/base }";
    let ships = [("MODEL", GGUF), ("TRAIN", "epochs: 1"), ("SHIP", named)];
    assert_eq!(found(&ships), Vec::<String>::new());
}

#[test]
fn what_a_condition_may_leave_out_is_no_error() {
    let named = "target: vllm, settings: { base_model: org/base }";
    let base = [
        ("MODEL", GGUF),
        ("TRAIN", "epochs: 1"),
        ("SHIP", "target: vllm"),
    ];
    let trained = [
        ("MODEL", GGUF),
        ("TRAIN", "lora: { invocation: x }"),
        ("SHIP", named),
    ];
    // The step that deploys, the one that trains, and one between them.
    for (fills, uses) in [
        (&base, "uses: deploy"),
        (&trained, "uses: deploy"),
        (&trained, "uses: finetune"),
        (&trained, "uses: select"),
    ] {
        for (when, severity) in [("false", "warning: "), ("true", "error: ")] {
            let with_condition = format!("{uses}\n    when: \"{when}\"");
            let all = found(&and(fills, (uses, &with_condition)));
            assert_eq!(all.len(), 1, "{uses}: {all:#?}");
            assert!(all[0].contains(severity), "{uses}: {all:#?}");
        }
    }
}
