//! Files of a model that are damaged or made to do harm: an error with its reason, never a crash.

use std::path::Path;
use std::process::Stdio;

use crate::project::{Project, Run};
use crate::tiny::write_model;

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
        ("nothing", vec![]),
    ];
    let project = Project::new();
    for (what, parts) in cases {
        let path = project.path("x.gguf");
        std::fs::write(&path, parts.concat()).unwrap();
        assert_refused(&open(&project, &path), what);
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
