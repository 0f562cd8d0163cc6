//! Files that go in parts.

use object_store::PutPayload;

use super::{Machine, files, folder};
use crate::remote::PART;
use crate::remote::bucket::Bucket;

/// Bytes that no part of is like another.
fn large(length: u64) -> Vec<u8> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"large");
    let mut bytes = vec![0; length as usize];
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

#[test]
fn a_large_file_goes_in_parts_and_goes_on_after_a_kill() {
    let bucket = Bucket::memory();
    let a = Machine::new(bucket.clone(), false);
    let bytes = large(2 * PART + 5);
    let artifact = a.cache.store().put_bytes(&bytes).unwrap();
    let made = a.result("large", [("large", artifact.clone())]);

    // As a killed run left it: the second part is there, and the note's last line is torn.
    let path = bucket.object(&artifact.digest);
    let parts = bucket.parts.clone().unwrap();
    let run = |work| a.remote.wait(work);
    let upload = run(parts.create_multipart(&path)).unwrap();
    let second = bytes[PART as usize..2 * PART as usize].to_vec();
    a.remote
        .wait(parts.put_part(&path, &upload, 1, PutPayload::from(second)))
        .unwrap();
    let note = a.remote.shared.folder.join("uploads");
    std::fs::create_dir_all(&note).unwrap();
    let note = note.join(artifact.digest.to_hex());
    let size = bytes.len();
    let head = format!("{{\"part\":{PART},\"size\":{size},\"upload\":\"{upload}\",\"version\":1}}");
    std::fs::write(
        &note,
        format!("{head}\n{{\"id\":\"\",\"part\":1}}\n{{\"id\":"),
    )
    .unwrap();
    a.remote.outbox_add(&made.key);
    a.remote.send_waiting(&a.cache);
    let sent = a.flush();
    assert_eq!(
        (sent.results, sent.bytes),
        (1, PART + 5),
        "one part was there"
    );
    assert!(!note.exists());
    Machine::new(bucket.clone(), true).has_whole(&made.key);

    // The server forgot the upload: it begins anew.
    let b = Machine::new(Bucket::memory(), false);
    let artifact = b.cache.store().put_bytes(&bytes).unwrap();
    let made = b.result("large", [("large", artifact.clone())]);
    let note = b.remote.shared.folder.join("uploads");
    std::fs::create_dir_all(&note).unwrap();
    std::fs::write(
        note.join(artifact.digest.to_hex()),
        head.replace(&upload, "9"),
    )
    .unwrap();
    assert_eq!(b.send(&made).bytes, bytes.len() as u64);

    // In a folder, without parts.
    let shared = tempfile::tempdir().unwrap();
    let c = Machine::new(folder(&shared), false);
    let artifact = c.cache.store().put_bytes(&bytes).unwrap();
    let made = c.result("large", [("large", artifact.clone())]);
    assert_eq!(c.send(&made).bytes, bytes.len() as u64);
    Machine::new(folder(&shared), true).has_whole(&made.key);
    let object = files(&shared.path().join("objects")).remove(0);
    let mut spoilt = bytes.clone();
    spoilt[PART as usize + 3] ^= 1;
    std::fs::write(&object, &spoilt).unwrap();
    let why = Machine::new(folder(&shared), true).flawed(&made.key);
    assert!(why.contains("is damaged"), "{why}");
}
