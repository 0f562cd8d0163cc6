//! [`diff`]: what differs between two manifests, in words.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

/// Characters of a value in an explanation.
const SHORT: usize = 48;
/// Characters shown before the place where two long values differ.
const BEFORE: usize = 12;
/// Characters of a digest in an explanation.
const DIGEST_START: usize = 4;
/// Items of a list input that an explanation names.
const NAMED_ITEMS: usize = 3;

/// What differs between two stored manifests, one line each, in the order of
/// their fields. Empty exactly when they are equal.
#[must_use]
pub fn diff(old: &Value, new: &Value) -> Vec<String> {
    let mut lines = Vec::new();
    walk("", Some(old), Some(new), &mut lines);
    lines
}

fn walk(path: &str, old: Option<&Value>, new: Option<&Value>, lines: &mut Vec<String>) {
    if old == new {
        return;
    }
    if let Some(port) = path.strip_prefix("inputs.") {
        lines.push(input_line(port, old, new));
        return;
    }
    let none = Value::Object(serde_json::Map::new());
    let (mut old, mut new) = (old, new);
    if matches!(path, "files" | "out_paths") {
        // These are left out when they are empty.
        old = old.or(Some(&none));
        new = new.or(Some(&none));
    }
    let (Some(Value::Object(a)), Some(Value::Object(b))) = (old, new) else {
        lines.push(line(path, old, new));
        return;
    };
    let keys: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    for key in keys {
        let path = if path.is_empty() {
            key.clone()
        } else {
            format!("{path}.{key}")
        };
        walk(&path, a.get(key), b.get(key), lines);
    }
}

fn line(path: &str, old: Option<&Value>, new: Option<&Value>) -> String {
    let change = || change(old, new);
    match path.split_once('.') {
        Some(("params", name)) => format!("param `{name}`: {}", change()),
        Some(("env", name)) => format!("env `{name}`: {}", change()),
        Some(("files", name)) => file_line(name, old, new),
        Some(("observed", name)) => format!("{name}: {}", change()),
        Some(("out_paths", port)) => format!("path of output `{port}`: {}", change()),
        _ => match path {
            "command" => format!("command: {}", command_change(old, new)),
            "kind" => format!("step kind {}", change()),
            "kind_version" => format!("step kind version {}", change()),
            "version" => format!("version of action keys {}", change()),
            _ => format!("{path}: {}", change()),
        },
    }
}

fn file_line(name: &str, old: Option<&Value>, new: Option<&Value>) -> String {
    match (old, new) {
        (Some(old), Some(new)) => {
            let (old, new) = (prefix(old.as_str()), prefix(new.as_str()));
            format!("file `{name}` changed ({old} → {new})")
        }
        (None, _) => format!("file `{name}` is new to the command"),
        (_, None) => format!("file `{name}` is gone, or the command names it no more"),
    }
}

/// The first line in which two commands differ.
fn command_change(old: Option<&Value>, new: Option<&Value>) -> String {
    let (Some(a), Some(b)) = (old.and_then(Value::as_str), new.and_then(Value::as_str)) else {
        return change(old, new);
    };
    let count = a.lines().count().max(b.lines().count());
    let line = |text: &str, at: usize| text.lines().nth(at).map(|l| Value::from(l.trim()));
    let differs = |at: &usize| line(a, *at) != line(b, *at);
    match (0..count).find(differs) {
        Some(at) => change(line(a, at).as_ref(), line(b, at).as_ref()),
        None => "its white space changed".to_owned(),
    }
}

/// `old → new`. Long texts are shown from shortly before the place where they differ.
fn change(old: Option<&Value>, new: Option<&Value>) -> String {
    let text = |value: Option<&Value>| value.map_or_else(|| "unset".to_owned(), Value::to_string);
    let (old, new) = (text(old), text(new));
    let long = old.chars().count().max(new.chars().count()) > SHORT;
    let same = old.chars().zip(new.chars()).take_while(|(a, b)| a == b);
    let skip = if long {
        same.count().saturating_sub(BEFORE)
    } else {
        0
    };
    format!("{} → {}", short(&old, skip), short(&new, skip))
}

fn short(text: &str, skip: usize) -> String {
    let mut left = text.chars().skip(skip);
    let mut out = if skip > 0 { "…" } else { "" }.to_owned();
    out.extend(left.by_ref().take(SHORT));
    if left.next().is_some() {
        out.push('…');
    }
    out
}

/// A list input names the items that differ, by label.
fn input_line(port: &str, old: Option<&Value>, new: Option<&Value>) -> String {
    let (Some(old), Some(new)) = (old.and_then(Value::as_array), new.and_then(Value::as_array))
    else {
        let word = if old.is_none() { "added" } else { "removed" };
        return format!("input `{port}` was {word}");
    };
    if let ([a], [b]) = (old.as_slice(), new.as_slice()) {
        if a.get("digest") == b.get("digest") && shape(a) != shape(b) {
            return format!("input `{port}`: {} → {}", shape(a), shape(b));
        }
        if a.get("digest") == b.get("digest") {
            return format!("input `{port}`: {} → {}", label(a), label(b));
        }
        return format!("input `{port}` changed ({} → {})", digest(a), digest(b));
    }
    let by_label = |list: &[Value]| {
        let mut all: BTreeMap<String, (String, &str)> = BTreeMap::new();
        for input in list {
            let base = label(input);
            // Outputs of several steps may have one name.
            let numbered = (2..).map(|n| format!("{base}#{n}"));
            let mut names = std::iter::once(base.clone()).chain(numbered);
            if let Some(name) = names.find(|name| !all.contains_key(name)) {
                all.insert(name, (digest(input), shape(input)));
            }
        }
        all
    };
    let (a, b) = (by_label(old), by_label(new));
    let labels: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    let changes: Vec<String> = labels
        .into_iter()
        .filter_map(|name| match (a.get(name), b.get(name)) {
            (Some(x), Some(y)) => (x != y).then(|| format!("`{name}` changed")),
            (None, _) => Some(format!("`{name}` is new")),
            (_, None) => Some(format!("`{name}` is gone")),
        })
        .collect();
    if changes.is_empty() {
        return format!("input `{port}` is in another order");
    }
    let more = match changes.len().saturating_sub(NAMED_ITEMS) {
        0 => String::new(),
        n => format!(", and {n} more"),
    };
    let named = &changes[..changes.len().min(NAMED_ITEMS)];
    format!("input `{port}`: {}{more}", named.join(", "))
}

fn shape(input: &Value) -> &'static str {
    let is = |field: &str| input.get(field).and_then(Value::as_bool) == Some(true);
    match (is("folder"), is("executable")) {
        (true, _) => "a folder",
        (false, true) => "a program",
        (false, false) => "a file",
    }
}

fn label(input: &Value) -> String {
    let text = input.get("label").and_then(Value::as_str);
    text.unwrap_or_default().to_owned()
}

fn digest(input: &Value) -> String {
    prefix(input.get("digest").and_then(Value::as_str))
}

/// The start of a digest.
fn prefix(hex: Option<&str>) -> String {
    let mut text: String = hex.unwrap_or_default().chars().take(DIGEST_START).collect();
    text.push('…');
    text
}

#[cfg(test)]
mod tests {
    use flowrun_cache::Digest;
    use proptest::prelude::*;
    use serde_json::json;

    use super::super::{ActionManifest, InputKey, MANIFEST_VERSION};
    use super::*;

    fn input(bytes: &str, label: Option<&str>) -> InputKey {
        InputKey {
            digest: Digest::of_bytes(bytes.as_bytes()),
            label: label.map(str::to_owned),
            folder: false,
            executable: false,
        }
    }

    fn manifest() -> ActionManifest {
        ActionManifest {
            version: MANIFEST_VERSION,
            kind: "finetune".into(),
            kind_version: 1,
            params: json!({ "lr": 0.001, "lora": { "rank": 16 } }),
            inputs: BTreeMap::from([
                ("messages".to_owned(), vec![input("a", None)]),
                (
                    "scores".to_owned(),
                    vec![input("x", Some("epoch-1")), input("y", Some("epoch-2"))],
                ),
            ]),
            observed: BTreeMap::new(),
            env: BTreeMap::from([("THREADS".into(), "4".into())]),
            command: None,
            files: BTreeMap::new(),
            out_paths: BTreeMap::new(),
        }
    }

    fn changed(change: impl FnOnce(&mut ActionManifest)) -> Vec<String> {
        let (old, mut new) = (manifest(), manifest());
        change(&mut new);
        assert_eq!(
            old.key() == new.key(),
            old.to_value() == new.to_value(),
            "the key and the record must agree"
        );
        diff(&old.to_value(), &new.to_value())
    }

    #[test]
    fn every_part_has_its_own_line() {
        assert!(changed(|_| {}).is_empty());
        let lr = json!({ "lr": 0.002, "lora": { "rank": 16 } });
        assert_eq!(changed(|m| m.params = lr), ["param `lr`: 0.001 → 0.002"]);
        let rank = json!({ "lr": 0.001, "lora": {} });
        assert_eq!(
            changed(|m| m.params = rank),
            ["param `lora.rank`: 16 → unset"]
        );
        assert_eq!(changed(|m| m.kind_version = 2), ["step kind version 1 → 2"]);
        assert_eq!(
            changed(|m| drop(m.env.insert("THREADS".into(), "8".into()))),
            ["env `THREADS`: \"4\" → \"8\""]
        );
        assert_eq!(
            changed(|m| drop(m.inputs.insert("messages".into(), vec![input("b", None)]))),
            ["input `messages` changed (1776… → 10e5…)"]
        );
        assert_eq!(
            changed(|m| drop(m.inputs.remove("messages"))),
            ["input `messages` was removed"]
        );
        assert_eq!(
            changed(|m| m.command = Some("true".into())),
            ["command: unset → \"true\""]
        );
    }

    #[test]
    fn a_long_value_is_shown_where_it_differs() {
        let shown = |old: &str, new: &str| {
            let mut before = manifest();
            before.command = Some(old.into());
            let mut after = before.clone();
            after.command = Some(new.into());
            diff(&before.to_value(), &after.to_value())
        };
        assert_eq!(
            shown("set -e\nsort a > b\n", "set -e\nsort -u a > b\n"),
            ["command: \"sort a > b\" → \"sort -u a > b\""]
        );
        let long = "x".repeat(100);
        assert_eq!(
            shown(&format!("{long} --old"), &format!("{long} --new")),
            ["command: …xxxxxxxxx --old\" → …xxxxxxxxx --new\""]
        );
        assert_eq!(shown("a\n", "  a"), ["command: its white space changed"]);
    }

    #[test]
    fn a_named_file_shows_its_digests() {
        let of =
            |text: &str| BTreeMap::from([("a.sh".to_owned(), Digest::of_bytes(text.as_bytes()))]);
        let mut before = manifest();
        before.files = of("a");
        let mut after = before.clone();
        after.files = of("b");
        assert_eq!(
            diff(&before.to_value(), &after.to_value()),
            ["file `a.sh` changed (1776… → 10e5…)"]
        );
        after.files.clear();
        let gone = diff(&before.to_value(), &after.to_value());
        assert_eq!(
            gone,
            ["file `a.sh` is gone, or the command names it no more"]
        );
    }

    #[test]
    fn a_folder_is_no_file_whatever_bytes_stand_for_it() {
        let folder = InputKey {
            folder: true,
            ..input("a", None)
        };
        assert_eq!(
            changed(|m| drop(m.inputs.insert("messages".into(), vec![folder]))),
            ["input `messages`: a file → a folder"]
        );
        let mut other = manifest();
        if let Some(inputs) = other.inputs.get_mut("messages") {
            inputs[0].folder = true;
        }
        assert_ne!(manifest().key(), other.key());
    }

    #[test]
    fn a_program_is_no_other_file_of_the_same_bytes() {
        let program = |label: Option<&str>| InputKey {
            executable: true,
            ..input("a", label)
        };
        let one = vec![program(None)];
        assert_eq!(
            changed(|m| drop(m.inputs.insert("messages".into(), one))),
            ["input `messages`: a file → a program"]
        );
        let list = |first: InputKey| {
            let mut list = manifest();
            let inputs = vec![first, input("y", Some("other"))];
            list.inputs.insert("tools".into(), inputs);
            list.to_value()
        };
        let (old, new) = (list(input("a", Some("tool"))), list(program(Some("tool"))));
        assert_eq!(diff(&old, &new), ["input `tools`: `tool` changed"]);
    }

    #[test]
    fn a_list_input_names_what_differs() {
        let scores =
            |list: Vec<InputKey>| changed(|m| drop(m.inputs.insert("scores".into(), list)));
        let (one, two) = (input("x", Some("epoch-1")), input("y", Some("epoch-2")));
        assert_eq!(
            scores(vec![two.clone(), one.clone()]),
            ["input `scores` is in another order"]
        );
        let (a, b) = (input("x", Some("scores")), input("y", Some("scores")));
        let (mut before, mut after) = (manifest(), manifest());
        before
            .inputs
            .insert("scores".into(), vec![a.clone(), b.clone()]);
        after
            .inputs
            .insert("scores".into(), vec![input("z", Some("scores")), b]);
        assert_eq!(
            diff(&before.to_value(), &after.to_value()),
            ["input `scores`: `scores` changed"]
        );
        assert_eq!(
            scores(vec![
                one,
                input("z", Some("epoch-2")),
                input("z", Some("epoch-3"))
            ]),
            ["input `scores`: `epoch-2` changed, `epoch-3` is new"]
        );
        let many = (3..9)
            .map(|i| input("z", Some(&format!("epoch-{i}"))))
            .collect();
        assert_eq!(
            scores(many),
            ["input `scores`: `epoch-1` is gone, `epoch-2` is gone, `epoch-3` is new, and 5 more"]
        );
    }

    fn json_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            (0..4i64).prop_map(Value::from),
            "[ab]{0,2}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
                proptest::collection::btree_map("[abc.]{1,2}", inner, 0..4)
                    .prop_map(|m| Value::Object(m.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn the_explanation_is_empty_exactly_when_the_keys_are_equal(
            a in json_value(), b in json_value(), port in proptest::bool::ANY,
        ) {
            let of = |params: &Value| {
                let mut m = manifest();
                m.params = params.clone();
                if port {
                    let inputs = vec![input(&params.to_string(), None)];
                    m.inputs.insert("messages".into(), inputs);
                }
                m
            };
            let (a, b) = (of(&a), of(&b));
            let lines = diff(&a.to_value(), &b.to_value());
            prop_assert_eq!(a.key() == b.key(), lines.is_empty());
        }
    }
}
