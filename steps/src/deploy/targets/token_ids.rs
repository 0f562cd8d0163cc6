//! What the target `hugging-face` writes, read by `transformers` and `tokenizers` themselves: every
//! text has the ids that it has here. `FLOWRUN_PYTHON` (or `FLOWRUN_TRANSFORMERS_PYTHON`) names a
//! Python that has both; `FLOWRUN_SMOLLM2_GGUF` adds a real model's tokenizer.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use flowrun_model::BaseModel;
use serde_json::json;

use super::{File, World, render, text, write};
use crate::bundle::test_bundle;
use crate::models::local;
use crate::required::skip;

/// Reads texts; prints the ids that each of the two packages gives them.
const ENCODE: &str = "
import json, sys
from tokenizers import Tokenizer
from transformers import AutoTokenizer
folder, texts = sys.argv[1], json.load(sys.stdin)
hub = AutoTokenizer.from_pretrained(folder)
raw = Tokenizer.from_file(folder + '/tokenizer.json')
ids = [[hub(t, add_special_tokens=False)['input_ids'], raw.encode(t, add_special_tokens=False).ids] for t in texts]
print(json.dumps(ids))
";

/// What splits, joins and special tokens are made of.
const HARD: [&str; 16] = [
    "",
    " ",
    "\n\n\t  \r\n x",
    "a  b   c    d",
    "I'll say: it's, they'RE, don't",
    "12 345 6789 1,000,000.50",
    "card_arrival pin-change (exchange|rate) {x: [1, 2]}",
    "naïve café, São Paulo, Ǆ, e\u{301}",
    "мои карты 我的卡在哪里 بطاقتي कार्ड",
    "😀👩‍👩‍👧‍👦 €£¥ ™ ½ ﬁ",
    "<|im_start|>user\nWhere is my card?<|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|>b <|im_end|> c",
    "<|im_end",
    "\u{200b}\u{feff}\u{a0}zero width",
    "fn main() { println!(\"{}\", 1 << 20); } // ünïcode",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
];

/// Queries of bank customers, and what is hard.
fn corpus() -> Vec<String> {
    let queries = include_str!("../../../data/stand-in/test.csv").lines();
    queries.chain(HARD).map(str::to_owned).collect()
}

/// The ids of every text, by both packages; none without a Python.
fn theirs(folder: &Path, texts: &[String]) -> Option<Vec<[Vec<u32>; 2]>> {
    let names = ["FLOWRUN_PYTHON", "FLOWRUN_TRANSFORMERS_PYTHON"];
    let Some(python) = names.iter().find_map(std::env::var_os) else {
        skip(
            "transformers",
            "FLOWRUN_PYTHON names no Python with `transformers`",
        );
        return None;
    };
    let mut child = Command::new(python)
        .args(["-c", ENCODE])
        .arg(folder)
        .env("HF_HUB_OFFLINE", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let asked = json!(texts).to_string();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(asked.as_bytes())
        .unwrap();
    let done = child.wait_with_output().unwrap();
    assert!(done.status.success(), "transformers ended: {}", done.status);
    Some(serde_json::from_slice(&done.stdout).unwrap())
}

/// Compares, for the layout in `folder` that was made of `weights`.
fn compare(folder: &Path, weights: &Path) {
    let texts = corpus();
    let Some(theirs) = theirs(folder, &texts) else {
        return;
    };
    let ours = BaseModel::load(weights, "w").unwrap().tokenizer;
    assert_eq!(theirs.len(), texts.len());
    for (text, [hub, raw]) in texts.iter().zip(theirs) {
        let ids = ours.encode(text, true).unwrap();
        assert_eq!(hub, ids, "transformers, {text:?}");
        assert_eq!(raw, ids, "tokenizers, {text:?}");
    }
}

#[test]
fn the_exported_tokenizer_gives_our_ids_in_python() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../model/parity/tiny/mixed.gguf"
    );
    let weights = dir.path().join("w.gguf");
    std::fs::copy(tiny, &weights).unwrap();
    let model = json!({"provider": "embedded", "weights": {"file": "w.gguf"}});
    let bundle = test_bundle(&dir.path().join("bundle"), model, dir.path());
    let settings = super::Settings::default();
    let files = render("hugging-face", &bundle, &settings, &World::default()).unwrap();
    let folder = dir.path().join("hub");
    write(&files, &folder).unwrap();
    compare(&folder, &weights);
}

#[test]
fn so_does_that_of_a_real_model() {
    let Some(weights) = std::env::var_os("FLOWRUN_SMOLLM2_GGUF").map(PathBuf::from) else {
        skip(
            "smollm2",
            "FLOWRUN_SMOLLM2_GGUF names no weights of SmolLM2",
        );
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let made = local::tokenizer_files(&weights).unwrap();
    let files = made.into_iter().map(|(name, content)| text(name, content));
    let files: Vec<File> = files.collect();
    write(&files, dir.path()).unwrap();
    compare(dir.path(), &weights);
}
