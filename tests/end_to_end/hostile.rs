//! Pipeline files that strangers send: bombs, depth, size, odd bytes, and our own
//! pipelines with random damage. Every one ends in a pipeline or in mistakes with
//! places, never in a panic. `FLOWRUN_FUZZ_SECONDS` says for how long (3).

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use flowrun_engine::{LoadOptions, load_pipeline};

use crate::project::Project;

/// Pieces that mean something to the reader.
const WORDS: &[&[u8]] = &[
    b"${{",
    b"}}",
    b"${{ params.",
    b"${{ item.x }}",
    b"$${{",
    b"&a ",
    b"*a",
    b"<<: ",
    b"!!str ",
    b"!!binary ",
    b"- ",
    b"? ",
    b": ",
    b"{",
    b"}",
    b"[",
    b"]",
    b"\"",
    b"'",
    b"|\n",
    b">-\n",
    b"#",
    b"---\n",
    b"...\n",
    b"%YAML 1.2\n",
    b"\t",
    b"\r\n",
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xc3",
    b"\xe2\x80\xa8",
    b"null",
    b"~",
    b"1e999",
    b"-0x8000000000000000",
    b"steps:\n",
    b"foreach: ",
    b"include: [",
    b"uses: load\n",
    b"run: \"",
    b"in: {",
    b"when: ",
    b"profiles:\n",
    b"timeout: 99999999999999999999h\n",
    b"retry: { times: 4294967296 }\n",
    b"needs: [",
    b"publish: { x: ../../y }\n",
];

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n.max(1) as u64) as usize
    }

    fn mutate(&mut self, bytes: &mut Vec<u8>, others: &[Vec<u8>]) {
        let at = self.below(bytes.len() + 1);
        let end = (at + self.below(60)).min(bytes.len());
        match self.below(8) {
            0 => drop(bytes.drain(at..end)),
            1 => bytes.truncate(at),
            2 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
            3 => {
                let piece = bytes[at..end].to_vec();
                let to = self.below(bytes.len() + 1);
                bytes.splice(to..to, piece);
            }
            4 => {
                let other = &others[self.below(others.len())];
                let from = self.below(other.len());
                let to = (from + self.below(300)).min(other.len());
                bytes.splice(at..end, other[from..to].iter().copied());
            }
            5 => {
                // A line goes deeper, or less deep.
                let spaces = vec![b' '; self.below(6)];
                bytes.splice(at..at, spaces);
            }
            _ => {
                let word = WORDS[self.below(WORDS.len())];
                bytes.splice(at..end.min(at + self.below(3)), word.iter().copied());
            }
        }
    }
}

/// Loads the bytes as a pipeline; true when they are one.
fn load(dir: &Path, bytes: &[u8]) -> bool {
    let file = dir.join("pipeline.yaml");
    std::fs::write(&file, bytes).unwrap();
    match load_pipeline(&file, &flowrun_steps::registry(), &LoadOptions::default()) {
        Ok(_) => true,
        Err(found) => {
            assert!(!found.errors.is_empty());
            assert!(!found.to_string().is_empty());
            for error in &found.errors {
                assert!(error.line >= 1 && error.column >= 1, "{error:?}");
                assert!(error.offset <= bytes.len(), "{error:?}");
            }
            false
        }
    }
}

fn own_pipelines() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let below = |folder: &str| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(root.join(folder)).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    };
    let mut files = below("pipelines");
    files.extend(
        below("examples")
            .iter()
            .map(|dir| dir.join("pipeline.yaml")),
    );
    files.retain(|file| file.is_file());
    files
}

#[test]
fn bombs_depth_size_and_odd_bytes_are_mistakes() {
    let dir = tempfile::tempdir().unwrap();
    let step = "steps:\n  a:\n    run: echo > $out\n    out: { out: o }\n";
    assert!(load(dir.path(), step.as_bytes()), "the base is a pipeline");
    let mut laughs = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x]\n");
    let mut maps = String::from("a0: &a0 { x: 1 }\n");
    for i in 1..30 {
        let list = vec![format!("*a{}", i - 1); 9].join(", ");
        laughs.push_str(&format!("a{i}: &a{i} [{list}]\n"));
        maps.push_str(&format!(
            "a{i}: &a{i} {{ x: *a{0}, y: *a{0}, <<: *a{0} }}\n",
            i - 1
        ));
    }
    let deep_blocks: String = (0..2_000)
        .map(|i| format!("{}k:\n", " ".repeat(i)))
        .collect();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", vec![]),
        ("lists in lists in lists", laughs.into()),
        ("maps in maps in maps", maps.into()),
        ("an alias of itself", b"a: &a [*a]\n".to_vec()),
        ("an alias of nothing", b"a: *b\n".to_vec()),
        ("brackets", vec![b'['; 1_000_000]),
        ("braces", b"{a: ".repeat(200_000)),
        ("dashes", b"- ".repeat(200_000)),
        ("question marks", b"? ".repeat(100_000)),
        ("blocks", deep_blocks.into()),
        ("a NUL", step.replace("echo", "ec\0ho").into()),
        ("not UTF-8", [step.as_bytes(), b"#\xff\xfe\n"].concat()),
        (
            "UTF-16",
            step.encode_utf16().flat_map(u16::to_le_bytes).collect(),
        ),
        (
            "too large",
            [step.as_bytes(), &vec![b'#'; 80 << 20]].concat(),
        ),
        ("many documents", b"---\nsteps: {}\n".repeat(10_000)),
        ("an open quote", b"name: \"x".to_vec()),
        ("an open expression", step.replace("echo", "${{ ").into()),
        (
            "expressions in expressions",
            step.replace("echo", &"${{ (".repeat(2_000)).into(),
        ),
        (
            "brackets in an expression",
            step.replace("echo", &format!("${{{{ {}1 }}}}", "(".repeat(20_000)))
                .into(),
        ),
        ("a number out of range", b"params: { x: 1e999 }\n".to_vec()),
        ("a tag", b"params: !!python/object:os.system x\n".to_vec()),
        ("a key twice", [step.as_bytes(), step.as_bytes()].concat()),
        ("a folder as its own include", b"include: [.]\n".to_vec()),
        (
            "itself as its include",
            b"include: [pipeline.yaml]\n".to_vec(),
        ),
        ("a device", b"include: [/dev/zero]\n".to_vec()),
    ];
    let bombs = expression_bombs(step);
    let bombs = bombs.map(|(name, text)| (name, text.into_bytes()));
    for (name, bytes) in cases.into_iter().chain(bombs) {
        assert!(!load(dir.path(), &bytes), "{name} passed");
    }
}

/// Short files whose expressions would give values that no machine has room for.
fn expression_bombs(step: &str) -> [(&'static str, String); 4] {
    let wide = "a".repeat(32);
    let replace = format!("| replace(from=\"a\", to=\"{wide}\") ").repeat(16);
    let slashes = "| addslashes ".repeat(70);
    let large = format!("params: {{ x: {} }}\n", "x".repeat(4 << 20));
    let named = "${{ params.x }} ".repeat(100_000);
    let joined = "${{ params.x ~ params.x ~ params.x ~ params.x ~ params.x }} ".repeat(10_000);
    let with = |text: &str| step.replace("echo", text);
    [
        (
            "text that grows with each filter",
            with(&format!("${{{{ \"a\" {replace}}}}}")),
        ),
        (
            "text that doubles with each filter",
            with(&format!("${{{{ \"'\" {slashes}}}}}")),
        ),
        ("a large param named often", large.clone() + &with(&named)),
        ("a large param joined to itself", large + &with(&joined)),
    ]
}

#[test]
fn check_tells_of_expressions_that_give_too_much() {
    let project = Project::new();
    let step = "steps:\n  a:\n    run: echo > $out\n    out: { out: o }\n";
    for (name, text) in expression_bombs(step) {
        project.write("pipeline.yaml", &text);
        let run = project.run(&["check", "pipeline.yaml"]);
        assert_eq!(run.code, Some(3), "{name}: {}", run.stderr);
        assert!(run.stderr.contains("too much"), "{name}: {}", run.stderr);
    }
}

#[test]
fn check_does_not_wait_for_a_pipe() {
    let project = Project::new();
    let pipe = project.path("pipe.yaml");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(made.unwrap().success());
    for text in [
        "include: [pipe.yaml]\nsteps:\n  a: { run: ls }\n",
        "steps:\n  a: { uses: ./pipe.yaml }\n",
    ] {
        project.write("pipeline.yaml", text);
        let run = project.run(&["check", "pipeline.yaml"]);
        assert_eq!(run.code, Some(3), "{}", run.stderr);
        let expected = "neither a file nor a folder";
        assert!(run.stderr.contains(expected), "{}", run.stderr);
    }
}

#[test]
fn no_damage_to_our_own_pipelines_makes_the_reader_panic() {
    let dir = tempfile::tempdir().unwrap();
    let texts: Vec<Vec<u8>> = own_pipelines()
        .iter()
        .map(|f| std::fs::read(f).unwrap())
        .collect();
    assert!(texts.len() >= 3);
    let seconds = std::env::var("FLOWRUN_FUZZ_SECONDS").map_or(3, |text| text.parse().unwrap());
    let seed = std::env::var("FLOWRUN_FUZZ_SEED")
        .map_or(u64::from(std::process::id()) << 16, |text| {
            text.parse().unwrap()
        });
    println!("FLOWRUN_FUZZ_SEED={seed}");
    let mut random = Random(seed | 1);
    let until = Instant::now() + Duration::from_secs(seconds);
    let (mut tried, mut passed) = (0, 0);
    while Instant::now() < until {
        let mut bytes = texts[random.below(texts.len())].clone();
        for _ in 0..=random.below(6) {
            random.mutate(&mut bytes, &texts);
        }
        let result = std::panic::catch_unwind(|| load(dir.path(), &bytes));
        let text = String::from_utf8_lossy(&bytes);
        assert!(result.is_ok(), "this file makes the reader panic:\n{text}");
        tried += 1;
        passed += usize::from(result.is_ok_and(|good| good));
    }
    println!("{tried} files, {passed} of them pipelines");
}
