//! Damage there and here.

use std::os::unix::fs::PermissionsExt;

use super::{Machine, files, folder};
use crate::digest::Digest;

#[test]
fn what_is_damaged_there_is_never_used_and_is_written_anew() {
    let shared = tempfile::tempdir().unwrap();
    let a = Machine::new(folder(&shared), false);
    let made = a.make("made");
    a.send(&made);
    for path in files(shared.path()) {
        let good = std::fs::read(&path).unwrap();
        let mut flipped = good.clone();
        flipped[good.len() / 2] ^= 1;
        let longer = [&good[..], b"x"].concat();
        for bad in [
            Some(&good[..good.len() / 2]),
            Some(&[]),
            Some(&flipped),
            Some(&longer),
            None,
        ] {
            match bad {
                Some(bytes) => std::fs::write(&path, bytes).unwrap(),
                None => std::fs::remove_file(&path).unwrap(),
            }
            let b = Machine::new(folder(&shared), false);
            let is_result = path.extension().is_some();
            if bad.is_some() || !is_result {
                let why = b.flawed(&made.key);
                let told = match (is_result, bad) {
                    (true, _) => "cannot be read",
                    (false, Some(_)) => "is damaged",
                    (false, None) => "is not there",
                };
                assert!(why.contains(told), "{why}");
            }
            // The step runs, and what it made takes the place of what was there.
            b.send(&b.make("made"));
            Machine::new(folder(&shared), true).has_whole(&made.key);
            assert_eq!(std::fs::read(&path).unwrap(), good);
        }
    }
}

#[test]
fn damage_here_is_not_sent() {
    let shared = tempfile::tempdir().unwrap();
    let a = Machine::new(folder(&shared), false);
    let made = a.make("made");
    let path = a.cache.store().object_path(&Digest::of_bytes(b"made"));
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    std::fs::write(&path, "mode").unwrap();
    let sent = a.send(&made);
    assert_eq!((sent.results, sent.waiting), (0, 0));
    assert!(files(&shared.path().join("actions")).is_empty());
}
