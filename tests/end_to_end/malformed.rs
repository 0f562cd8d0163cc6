//! Files of a model that are damaged or made to do harm: an error with its reason, never a crash.

use std::path::Path;
use std::process::Stdio;

use serde_json::Value;

use crate::project::{Project, Run};
use crate::server::{Server, chat};
use crate::tiny::{write_adapter, write_model};

/// Opens a model and ends at once if that goes well.
fn open(project: &Project, path: &Path) -> Run {
    let mut command = project.command(&["serve", "--port", "0", "--until-stdin-closes"]);
    command
        .arg(path)
        .env_remove("RUST_BACKTRACE")
        .env_remove("FLOWRUN_API_KEY")
        .stdin(Stdio::null());
    Run::of(command.output().unwrap())
}

/// Exit code 3 and one line that names the file.
fn assert_refused(run: &Run, what: &str) {
    assert_eq!(run.code, Some(3), "{what}: {}", run.stderr);
    assert!(run.stderr.starts_with("error: "), "{what}: {}", run.stderr);
    assert!(!run.stderr.contains("panicked"), "{what}: {}", run.stderr);
}

#[test]
fn a_made_up_gguf_is_an_error() {
    let head = |tensors: u64, entries: u64| {
        let version = 3u32.to_le_bytes();
        [
            b"GGUF",
            &version[..],
            &tensors.to_le_bytes(),
            &entries.to_le_bytes(),
        ]
        .concat()
    };
    let text = |text: &[u8]| [&(text.len() as u64).to_le_bytes(), text].concat();
    let kind = |kind: u32| kind.to_le_bytes().to_vec();
    let long = |length: u64| length.to_le_bytes().to_vec();
    let array = [kind(9), long(1)].concat();
    let cases = [
        ("endless counts", vec![head(u64::MAX, u64::MAX)]),
        ("more tensors than bytes", vec![head(1 << 40, 0)]),
        (
            "a text without end",
            vec![head(0, 1), long(1 << 62), b"abc".to_vec()],
        ),
        (
            "an array without end",
            vec![head(0, 1), text(b"a"), kind(9), kind(4), long(1 << 60)],
        ),
        (
            "arrays in arrays",
            vec![head(0, 1), text(b"a"), kind(9), array.repeat(100_000)],
        ),
        ("an unknown type", vec![head(0, 1), text(b"a"), kind(99)]),
        (
            "a tensor of too many dimensions",
            vec![head(1, 0), text(b"t"), kind(1 << 31)],
        ),
        (
            "a tensor of too many values",
            vec![
                head(1, 0),
                text(b"t"),
                kind(2),
                long(1 << 40),
                long(1 << 40),
                kind(0),
                long(0),
            ],
        ),
        (
            "an alignment of 0",
            vec![
                head(0, 1),
                text(b"general.alignment"),
                kind(4),
                0u32.to_le_bytes().to_vec(),
            ],
        ),
        ("nothing", vec![]),
    ];
    let project = Project::new();
    for (what, parts) in cases {
        let path = project.path("x.gguf");
        std::fs::write(&path, parts.concat()).unwrap();
        assert_refused(&open(&project, &path), what);
    }
}

/// A GGUF file with all that a Llama needs but its tensors' bytes, and `more` entries.
fn gguf(more: &[(&str, Entry)]) -> Vec<u8> {
    let tokens = ["a", "b", "<end>"].map(str::to_owned).to_vec();
    let mut entries = vec![
        ("general.architecture", Entry::Text("llama".to_owned())),
        ("llama.embedding_length", Entry::Count(32)),
        ("llama.attention.head_count", Entry::Count(2)),
        ("llama.block_count", Entry::Count(1)),
        ("llama.feed_forward_length", Entry::Count(32)),
        ("llama.context_length", Entry::Count(64)),
        ("llama.attention.layer_norm_rms_epsilon", Entry::Share(1e-5)),
        ("tokenizer.ggml.model", Entry::Text("gpt2".to_owned())),
        ("tokenizer.ggml.tokens", Entry::Texts(tokens)),
        ("tokenizer.ggml.merges", Entry::Texts(vec![])),
    ];
    entries.extend(more.iter().cloned());
    let text = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    let mut file = [b"GGUF", &3u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat();
    file.extend((entries.len() as u64).to_le_bytes());
    for (key, entry) in entries {
        file.extend(text(key));
        let (kind, value) = match entry {
            Entry::Count(count) => (10u32, count.to_le_bytes().to_vec()),
            Entry::Share(share) => (6, share.to_le_bytes().to_vec()),
            Entry::Text(value) => (8, text(&value)),
            Entry::Texts(values) => {
                let head = [
                    &8u32.to_le_bytes()[..],
                    &(values.len() as u64).to_le_bytes(),
                ]
                .concat();
                let values = values.iter().flat_map(|value| text(value));
                (9, head.into_iter().chain(values).collect())
            }
        };
        file.extend(kind.to_le_bytes());
        file.extend(value);
    }
    file.extend(text("token_embd.weight"));
    file.extend(2u32.to_le_bytes());
    for number in [32u64, 3] {
        file.extend(number.to_le_bytes());
    }
    file.extend(0u32.to_le_bytes());
    file.extend(0u64.to_le_bytes());
    file
}

#[derive(Clone)]
enum Entry {
    Count(u64),
    Share(f32),
    Text(String),
    Texts(Vec<String>),
}

#[test]
fn a_gguf_whose_numbers_do_not_fit_is_an_error_that_names_them() {
    let linear = ("llama.rope.scaling.type", Entry::Text("linear".to_owned()));
    let factor = ("llama.rope.scaling.factor", Entry::Share(2.0));
    let project = Project::new();
    for (more, wanted) in [
        (
            vec![
                ("llama.attention.key_length", Entry::Count(1 << 62)),
                linear,
                factor,
            ],
            "larger than any memory",
        ),
        (
            vec![("tokenizer.ggml.eos_token_id", Entry::Count(100_000))],
            "`tokenizer.ggml.eos_token_id` names none of the 3 tokens",
        ),
        // The rest is in order: only the bytes of the tensors are missing.
        (vec![], "token_embd.weight"),
    ] {
        let path = project.path("x.gguf");
        std::fs::write(&path, gguf(&more)).unwrap();
        let run = open(&project, &path);
        assert_refused(&run, wanted);
        assert!(run.stderr.contains("x.gguf"), "{}", run.stderr);
        assert!(run.stderr.contains(wanted), "{wanted}: {}", run.stderr);
    }
}

#[test]
fn a_tokenizer_with_more_tokens_than_the_model_has_rows_is_an_error() {
    let project = Project::new();
    let folder = project.path("tiny");
    write_model(&folder, 1);
    let path = folder.join("tokenizer.json");
    let mut tokenizer: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let mut added = tokenizer["added_tokens"][1].clone();
    added["id"] = 258.into();
    added["content"] = "<|pad|>".into();
    tokenizer["added_tokens"]
        .as_array_mut()
        .unwrap()
        .push(added);
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    let run = open(&project, &folder);
    assert_refused(&run, "one token too many");
    for wanted in ["tokenizer.json", "`<|pad|>`", "258"] {
        assert!(run.stderr.contains(wanted), "{wanted}: {}", run.stderr);
    }
}

#[test]
fn damaged_files_of_a_model_are_errors() {
    let project = Project::new();
    let folder = project.path("tiny");
    write_model(&folder, 1);
    let run = open(&project, &folder);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    for name in ["model.safetensors", "config.json", "tokenizer.json"] {
        let path = folder.join(name);
        let good = std::fs::read(&path).unwrap();
        for length in [0, 7, good.len() / 2, good.len() - 1] {
            std::fs::write(&path, &good[..length]).unwrap();
            assert_refused(
                &open(&project, &folder),
                &format!("{length} bytes of {name}"),
            );
        }
        // Bits turned over, in the head above all: it may still be a model, but is never a crash.
        for round in 0..8usize {
            let mut bad = good.clone();
            for at in 0..4 {
                let place = (round * 7919 + at * 104_729) % good.len().min(4000);
                bad[place] ^= 1 << ((round + at) % 8);
            }
            std::fs::write(&path, &bad).unwrap();
            let run = open(&project, &folder);
            if run.code != Some(0) {
                assert_refused(&run, &format!("round {round} of {name}"));
            }
        }
        std::fs::write(&path, &good).unwrap();
    }
    let config = folder.join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    for (from, to) in [
        ("\"hidden_size\":16", "\"hidden_size\":9223372036854775807"),
        ("\"hidden_size\":16", "\"hidden_size\":0"),
        ("\"num_key_value_heads\":1", "\"num_key_value_heads\":0"),
        (
            "\"num_hidden_layers\":2",
            "\"num_hidden_layers\":4611686018427387904",
        ),
        ("\"vocab_size\":258", "\"vocab_size\":1"),
    ] {
        assert!(text.contains(from), "{from}");
        std::fs::write(&config, text.replace(from, to)).unwrap();
        assert_refused(&open(&project, &folder), to);
    }
}

/// `good` with a few bits turned over among its first `head` bytes, cut off, or with bytes between;
/// another one each round.
fn damaged(good: &[u8], head: usize, round: usize) -> Vec<u8> {
    let mut bad = good.to_vec();
    let end = bad.len().min(head);
    let place = |at: usize| (round * 7919 + at * 104_729) % end;
    match round % 4 {
        0 => bad.truncate(place(1)),
        1 => {
            let number = u64::MAX >> (round % 64);
            let at = place(2).min(bad.len().saturating_sub(8));
            bad[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        2 => {
            let again = bad[..place(3)].to_vec();
            bad = [again, bad].concat();
        }
        _ => {
            for at in 0..4 {
                bad[place(at)] ^= 1 << ((round + at) % 8);
            }
        }
    }
    bad
}

#[test]
fn no_damage_to_a_gguf_is_a_crash() {
    let good = concat!(env!("CARGO_MANIFEST_DIR"), "/model/parity/tiny/mixed.gguf");
    let good = std::fs::read(good).unwrap();
    let project = Project::new();
    let path = project.path("x.gguf");
    std::fs::write(&path, &good).unwrap();
    let run = open(&project, &path);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    for round in 0..64 {
        std::fs::write(&path, damaged(&good, 8000, round)).unwrap();
        let run = open(&project, &path);
        // It may still be a model.
        if run.code != Some(0) {
            assert_refused(&run, &format!("round {round}"));
        }
    }
}

#[test]
fn no_damage_to_an_adapter_ends_the_server_or_spoils_other_adapters() {
    let project = Project::new();
    write_model(&project.path("tiny"), 1);
    for (name, seed) in [("good", 11), ("bad", 12)] {
        write_adapter(&project.path(&format!("adapters/{name}")), seed);
    }
    let mut command = project.command(&["serve", "tiny", "--adapters", "adapters"]);
    command.env_remove("FLOWRUN_API_KEY");
    let server = Server::start(command);
    let said = |id: &str| -> (u16, Value) {
        let answer = server.ask("/v1/chat/completions", &chat(id, "hello", 4));
        (answer.status().as_u16(), answer.json().unwrap())
    };
    let before = said("tiny:good").1["choices"].clone();
    let mut refused = 0;
    for name in ["adapter_model.safetensors", "adapter_config.json"] {
        let path = project.path("adapters/bad").join(name);
        let good = std::fs::read(&path).unwrap();
        for round in 0..100 {
            // Another file each time, whatever the clock says: it is read anew.
            std::fs::remove_file(&path).unwrap();
            std::fs::write(&path, damaged(&good, 2000, round)).unwrap();
            let (status, body) = said("tiny:bad");
            assert!(
                [200, 400].contains(&status),
                "{name}, round {round}: {body}"
            );
            if status == 400 {
                assert!(body["error"]["message"].is_string(), "{body}");
                refused += 1;
            }
        }
        std::fs::write(&path, good).unwrap();
    }
    assert!(refused > 100, "{refused}");
    let (status, answer) = said("tiny:good");
    assert_eq!((status, &answer["choices"]), (200, &before));
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn what_python_would_run_is_never_read() {
    let project = Project::new();
    let folder = project.path("tiny");
    write_model(&folder, 1);
    let weights = folder.join("model.safetensors");
    std::fs::rename(&weights, folder.join("pytorch_model.bin")).unwrap();
    let run = open(&project, &folder);
    assert_refused(&run, "a pickled model");
    assert!(run.stderr.contains("safetensors"), "{}", run.stderr);
    std::fs::rename(folder.join("pytorch_model.bin"), weights).unwrap();
    write_adapter(&project.path("adapters/one"), 11);
    let adapter = project.path("adapters/one/adapter_model.safetensors");
    std::fs::rename(&adapter, adapter.with_extension("bin")).unwrap();
    let mut command = project.command(&["serve", "tiny", "--adapters", "adapters"]);
    command.env_remove("FLOWRUN_API_KEY");
    let server = Server::start(command);
    let models: Value = server.get("/v1/models").json().unwrap();
    assert_eq!(models["data"].as_array().unwrap().len(), 1);
    let (status, _) = server.problem("/v1/chat/completions", &chat("tiny:one", "a", 1));
    assert_eq!(status, 404);
}
