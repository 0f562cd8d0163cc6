//! `run:` steps.

use std::sync::Arc;

use serde_json::json;

use crate::testing::{Bench, Toy, node, shell, uses};

fn output(bench: &Bench, ran: &crate::testing::Ran, id: &str) -> String {
    let hex = ran.digest(id, "out");
    let path = bench
        .cache_dir()
        .join("objects")
        .join(&hex[..2])
        .join(&hex[2..]);
    std::fs::read_to_string(path).unwrap_or_default()
}

#[test]
fn a_command_sees_its_ports_env_and_secrets_and_nothing_else() {
    let mut bench = Bench::new().unwrap();
    bench.world.env.insert("TOKEN".into(), "s3cret".into());
    bench.world.env.insert("OTHER".into(), "x".into());
    std::fs::write(bench.root().join("script.sh"), "echo hello; ls in").unwrap();
    let command =
        "echo $script $out $MODE ${#TOKEN} ${OTHER:-none} > $out; sh $script >> $out; echo $TOKEN";
    let step = shell("s", command)
        .input("script", "file:script.sh")
        .change(|s| {
            s.env = [("MODE".into(), "fast".into())].into();
            s.secrets = vec!["TOKEN".into()];
        });
    let ran = bench.run(&[step]);
    assert!(ran.summary.ok, "{:?}", ran.summary.first_error);
    assert_eq!(
        output(&bench, &ran, "s"),
        "in/script out/out.txt fast 6 none\nhello\nscript\n"
    );
    let log = std::fs::read_to_string(ran.summary.run_dir.join("logs/s.log")).unwrap();
    assert_eq!(log, "***\n");
}

#[test]
fn a_list_is_a_folder_however_long_it_is() {
    let bench = Bench::new().unwrap();
    let steps = |text: &str| {
        let words = uses("words", Arc::new(Toy::words())).text(text);
        let each = shell("each", "cat $x > $out; echo ${{ item.w }} >> $out")
            .each("w", "words.out")
            .input("x", "item.w");
        let list = shell("list", "ls $parts > $out").input("parts", "each.out");
        [words, each, list]
    };
    let ran = bench.run(&steps("b a"));
    assert_eq!(output(&bench, &ran, "list"), "0000-b\n0001-a\n");
    assert_eq!(output(&bench, &ran, "each[a]"), "aa\n");
    let ran = bench.run(&steps("b"));
    assert_eq!(ran.ran(), ["list", "words"]);
    assert_eq!(output(&bench, &ran, "list"), "0000-b\n");
}

#[test]
fn the_command_and_the_files_it_names_count() {
    let bench = Bench::new().unwrap();
    let file = bench.root().join("tool.py");
    std::fs::write(&file, "1").unwrap();
    let step = |command: &str| [shell("s", command)];
    let command = "echo tool.py > $out";
    bench.run(&step(command));
    assert_eq!(bench.run(&step(command)).summary.cached, 1);
    std::fs::write(&file, "2").unwrap();
    let ran = bench.run(&step(command));
    let why = ran.why("s");
    assert!(why.starts_with("file `tool.py` changed ("), "{why}");
    let ran = bench.run(&step("echo tool.py >$out"));
    assert_eq!(
        ran.why("s"),
        "command: \"echo tool.py > $out\" → \"echo tool.py >$out\""
    );
}

#[test]
fn failures_show_their_output_and_leave_nothing_behind() {
    let bench = Bench::new().unwrap();
    let ran = bench.run(&[shell("s", "echo on stderr >&2; exit 3")]);
    assert_eq!(
        ran.why("s"),
        "the command failed (exit status: 3)\non stderr"
    );
    let ran = bench.run(&[shell("s", "true")]);
    assert_eq!(ran.why("s"), "`s` did not write its output `out` (out.txt)");
    // Each opening of the cache has a folder of its own there.
    let own = std::fs::read_dir(bench.cache_dir().join("tmp"));
    let own = own
        .into_iter()
        .flatten()
        .map(|folder| folder.unwrap().path());
    let left = own.flat_map(|folder| std::fs::read_dir(folder).unwrap());
    assert_eq!(left.count(), 0);
}

#[test]
fn time_up_kills_the_process_group() {
    let bench = Bench::new().unwrap();
    let pid = bench.root().join("pid");
    let command = format!("sleep 100 & echo $! > {}; wait", pid.display());
    let limit = std::time::Duration::from_millis(200);
    let ran = bench.run(&[shell("s", &command).change(|s| s.timeout = Some(limit))]);
    assert_eq!(ran.why("s"), "took longer than its `timeout` of 200ms");
    let pid = std::fs::read_to_string(pid).unwrap();
    // The kill was sent; the system may take a moment.
    let is_gone = || {
        std::thread::sleep(std::time::Duration::from_millis(5));
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
        stat.map_or(true, |stat| stat.contains(") Z "))
    };
    assert!((0..1000).any(|_| is_gone()));
}

#[test]
fn a_folder_is_an_output_and_an_input() {
    let bench = Bench::new().unwrap();
    let make = shell(
        "make",
        "mkdir -p $out/sub; echo 1 > $out/sub/a; echo 2 > $out/b",
    )
    .change(|s| drop(s.out_paths.insert("out".into(), "tree".into())));
    let read = shell("read", "cat $x/sub/a $x/b > $out").input("x", "make.out");
    let steps = [make, read, node("other").with(json!({}))];
    let ran = bench.run(&steps);
    assert_eq!(output(&bench, &ran, "read"), "1\n2\n");
    assert_eq!(bench.run(&steps).summary.cached, 3);
}
