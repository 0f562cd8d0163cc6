//! `hooks:`.

use std::time::Duration;

use super::{load_options, mistakes_in, project, vocabulary};
use crate::hook::{HookAction, HookEvent};
use crate::language::load_pipeline;

const MAIN: &str = "\
params: { channel: team }
hooks:
  tell: { command: [sh, notify.sh, '${{ params.channel }}'] }
  chat:
    on: [failed]
    secrets: [TOKEN]
    timeout: 5s
    webhook: { url: 'https://chat/${TOKEN}', headers: { authorization: 'Bearer ${TOKEN}' } }
profiles:
  quiet:
    hooks: { tell: null, chat: { webhook: { retries: 0 } } }
steps:
  a: { run: ls }
";

#[test]
fn a_hook_is_a_command_or_a_webhook_and_a_profile_changes_it() {
    let dir = project(&[("main.yaml", MAIN)]);
    let mut options = load_options(dir.path());
    let file = dir.path().join("main.yaml");
    let pipeline = load_pipeline(&file, &vocabulary(), &options).unwrap();
    let tell = &pipeline.hooks["tell"];
    assert_eq!(tell.on, [HookEvent::Finished]);
    assert_eq!(tell.timeout, Duration::from_secs(30));
    let HookAction::Command(command) = &tell.action else {
        unreachable!("{tell:?}");
    };
    assert_eq!(command, &["sh", "notify.sh", "team"]);
    let chat = &pipeline.hooks["chat"];
    assert_eq!(chat.on, [HookEvent::Failed]);
    let HookAction::Webhook(webhook) = &chat.action else {
        unreachable!("{chat:?}");
    };
    // The secret itself is not in the pipeline.
    assert_eq!(webhook.url, "https://chat/${TOKEN}");
    assert_eq!(webhook.retries, 2);
    options.profiles = vec!["quiet".into()];
    let quiet = load_pipeline(&file, &vocabulary(), &options).unwrap();
    assert!(!quiet.hooks.contains_key("tell"));
    let HookAction::Webhook(webhook) = &quiet.hooks["chat"].action else {
        unreachable!("{:?}", quiet.hooks);
    };
    assert_eq!(webhook.retries, 0);
}

#[test]
fn what_is_wrong_with_a_hook_is_told_where_it_stands() {
    for (from, to, line, words) in [
        ("secrets: [TOKEN]", "secrets: []", 8, "secrets: [TOKEN]"),
        ("secrets: [TOKEN]", "secrets: [TOKEN, OTHER]", 6, "`OTHER`"),
        ("timeout: 5s", "timeout: soon", 7, "`soon`"),
        ("on: [failed]", "on: [fails]", 5, "`fails`"),
        ("'https://chat/${TOKEN}'", "chat", 8, "`chat`"),
        ("authorization:", "'a b':", 8, "`a b`"),
        ("command:", "comand:", 3, "`comand`"),
        ("timeout: 5s", "command: [ls]", 8, "not both"),
        (
            "command: [sh, notify.sh, '${{ params.channel }}']",
            "about: nothing",
            3,
            "does nothing",
        ),
    ] {
        assert!(MAIN.contains(from), "{from}");
        let text = MAIN.replace(from, to);
        let found = mistakes_in(&[("main.yaml", &text)]);
        let told =
            |shown: &String| shown.contains(&format!("main.yaml:{line}:")) && shown.contains(words);
        assert!(found.iter().any(told), "{to}: {found:#?}");
    }
}
