use super::*;
use crate::artifact::TreeEntry;

fn store() -> (tempfile::TempDir, ArtifactStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = ArtifactStore::new(
        dir.path().join("objects"),
        Some(Arc::new(Unsynced::new(dir.path()))),
    );
    (dir, store)
}

fn damage(path: &Path, bytes: &[u8]) {
    std::fs::set_permissions(path, Permissions::from_mode(0o644)).unwrap();
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_folder_round_trips_with_its_modes() {
    let (dir, store) = store();
    let source = dir.path().join("source");
    std::fs::create_dir_all(source.join("sub")).unwrap();
    std::fs::write(source.join("a"), "1").unwrap();
    std::fs::write(source.join("sub/run.sh"), "2").unwrap();
    std::fs::set_permissions(source.join("sub/run.sh"), Permissions::from_mode(0o755)).unwrap();
    let address = ArtifactStore::address_of(&source).unwrap();
    assert!(!store.contains(&address));
    let tree = store.put_path(&source).unwrap();
    assert_eq!(address, tree);
    assert_eq!((tree.kind, tree.size), (ArtifactKind::Tree, 2));
    assert!(store.contains(&tree));
    for link in [false, true] {
        let dest = dir.path().join(format!("dest{link}"));
        if link {
            store.link_read_only(&tree, &dest).unwrap();
        } else {
            store.materialize(&tree, &dest).unwrap();
            std::fs::write(dest.join("stray"), "x").unwrap();
            store.materialize(&tree, &dest).unwrap();
            assert!(!dest.join("stray").exists());
        }
        assert_eq!(
            std::fs::read_to_string(dest.join("sub/run.sh")).unwrap(),
            "2"
        );
        assert_eq!(store.put_path(&dest).unwrap(), tree);
    }
}

#[test]
fn damage_at_every_byte_is_refused_and_set_aside() {
    let (dir, store) = store();
    let bytes = b"some bytes";
    for at in 0..bytes.len() {
        let artifact = store.put_bytes(bytes).unwrap();
        let mut bad = bytes.to_vec();
        bad[at] ^= 1;
        damage(&store.object_path(&artifact.digest), &bad);
        let error = store
            .materialize(&artifact, &dir.path().join("dest"))
            .unwrap_err();
        assert!(matches!(error, CacheError::Damaged { .. }));
        assert!(!dir.path().join("dest").exists());
        assert!(!store.contains(&artifact));
        let again = store.read(&artifact.digest).unwrap_err();
        assert!(matches!(again, CacheError::Missing { .. }));
    }
}

#[test]
fn what_is_taken_is_moved_and_what_has_another_name_is_copied() {
    let (dir, store) = store();
    let place = |name: &str| dir.path().join(name);
    std::fs::create_dir_all(place("tree/sub")).unwrap();
    for (name, text) in [
        ("tree/a", "1"),
        ("tree/sub/b", "2"),
        ("own", "3"),
        ("two", "4"),
    ] {
        std::fs::write(place(name), text).unwrap();
    }
    std::fs::hard_link(place("two"), place("names")).unwrap();
    std::os::unix::fs::symlink(place("two"), place("link")).unwrap();
    let expected = ArtifactStore::address_of(&place("tree")).unwrap();
    assert_eq!(store.take_path(&place("tree")).unwrap(), expected);
    let own = store.take_path(&place("own")).unwrap();
    assert!(!place("own").exists() && !place("tree/a").exists());
    assert_eq!(store.read(&own.digest).unwrap(), b"3");
    store.verify(&expected).unwrap();
    for name in ["link", "two"] {
        let taken = store.take_path(&place(name)).unwrap();
        std::fs::write(place("names"), "5").unwrap();
        assert_eq!(store.read(&taken.digest).unwrap(), b"4");
        std::fs::write(place("names"), "4").unwrap();
    }
}

#[test]
fn what_others_do_with_the_same_object_is_no_change_of_what_is_taken() {
    let (dir, store) = store();
    let own = dir.path().join("own");
    std::fs::write(&own, "x").unwrap();
    let own_meta = own.metadata().unwrap();
    let artifact = store.put_bytes(b"x").unwrap();
    let (digest, object) = (artifact.digest, store.object_path(&artifact.digest));
    // Another thread's file lies there.
    store.check_taken(&digest, &own, &own_meta).unwrap();
    // Its own, which a step has by now.
    let meta = object.metadata().unwrap();
    std::fs::hard_link(&object, dir.path().join("link")).unwrap();
    store.check_taken(&digest, &own, &meta).unwrap();
    assert!(store.contains(&artifact));
    // Its own, which was written to; and another thread's, which is damaged.
    damage(&object, b"xy");
    let error = store.check_taken(&digest, &own, &meta).unwrap_err();
    assert!(matches!(error, CacheError::Unstorable { .. }), "{error}");
    assert!(!object.exists(), "it is set aside");
    store.put_bytes(b"x").unwrap();
    damage(&object, b"y");
    assert!(store.check_taken(&digest, &own, &own_meta).is_err());
    assert!(!object.exists(), "it is set aside");
}

#[test]
fn what_a_power_cut_spoilt_is_found() {
    let (_dir, store) = store();
    let (old, new) = (
        store.put_bytes(b"old").unwrap(),
        store.put_bytes(b"new").unwrap(),
    );
    let hour = std::time::Duration::from_secs(3600);
    let path = store.object_path(&old.digest);
    std::fs::File::open(&path)
        .unwrap()
        .set_modified(SystemTime::now() - 2 * hour)
        .unwrap();
    damage(&store.object_path(&new.digest), b"\0\0\0");
    assert!(store.contains(&new), "the length alone says nothing");
    assert_eq!(store.verify_since(SystemTime::now() - hour), 1);
    assert!(!store.contains(&new) && store.contains(&old));
}

#[test]
fn a_write_through_a_link_is_noticed_and_another_link_is_not() {
    let (dir, store) = store();
    let artifact = store.put_bytes(b"0123456789").unwrap();
    let lend = |name: &str| store.link_read_only(&artifact, &dir.path().join(name));
    let first = lend("first").unwrap();
    lend("second").unwrap();
    first.check(&store).unwrap();
    let path = dir.path().join("first");
    std::fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    std::fs::write(&path, b"0123456780").unwrap();
    let second = lend("third").unwrap_err();
    assert!(matches!(second, CacheError::Damaged { .. }), "{second}");
    assert!(!store.contains(&artifact));
    // Made anew: whoever had the old one still had something else.
    store.put_bytes(b"0123456789").unwrap();
    assert!(first.check(&store).is_err());
    lend("fourth").unwrap().check(&store).unwrap();
}

#[test]
fn a_truncated_object_is_not_contained_and_is_written_anew() {
    let (_dir, store) = store();
    let artifact = store.put_bytes(b"0123456789").unwrap();
    damage(&store.object_path(&artifact.digest), b"01234");
    assert!(!store.contains(&artifact));
    store.put_bytes(b"0123456789").unwrap();
    assert_eq!(store.read(&artifact.digest).unwrap(), b"0123456789");
}

#[test]
fn a_tree_that_points_outside_is_refused() {
    let (dir, store) = store();
    let file = store.put_bytes(b"x").unwrap();
    for path in ["../evil", "/etc/evil", "a/../../evil", ""] {
        let entry = TreeEntry {
            path: path.into(),
            digest: file.digest,
            size: 1,
            executable: false,
        };
        for (entries, folders) in [(vec![entry], vec![]), (vec![], vec![path.to_owned()])] {
            let tree = TreeObject {
                record: "tree".into(),
                version: TREE_VERSION,
                entries,
                folders,
            };
            let object = store
                .put_bytes(crate::canonical_json(&tree).as_bytes())
                .unwrap();
            let artifact = Artifact {
                kind: ArtifactKind::Tree,
                ..object
            };
            assert!(
                store
                    .materialize(&artifact, &dir.path().join("out"))
                    .is_err(),
                "{path}"
            );
        }
    }
}

#[test]
fn nothing_is_moved_where_there_is_a_link() {
    let (dir, store) = store();
    let outside = dir.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("weights"), "w").unwrap();
    let out = dir.path().join("out");
    std::fs::create_dir_all(out.join("epoch-2")).unwrap();
    std::fs::write(out.join("epoch-2/model"), "m").unwrap();
    std::os::unix::fs::symlink("epoch-2", out.join("best")).unwrap();
    std::os::unix::fs::symlink(&outside, out.join("base")).unwrap();
    let address = ArtifactStore::address_of(&out).unwrap();
    let taken = store.take_path(&out).unwrap();
    assert_eq!(taken, address);
    assert_eq!(store.tree(&taken.digest).unwrap().entries.len(), 3);
    assert!(store.contains(&taken));
    assert_eq!(
        std::fs::read_to_string(outside.join("weights")).unwrap(),
        "w"
    );
    let link = out.join("base");
    store.take_path(&link).unwrap();
    assert!(outside.join("weights").exists());
}

#[test]
fn what_is_staged_touches_nothing_until_it_is_put() {
    let (dir, store) = store();
    let source = dir.path().join("source");
    std::fs::create_dir_all(&source).unwrap();
    std::fs::write(source.join("a"), "new").unwrap();
    std::fs::write(source.join("b"), "new").unwrap();
    let tree = store.put_path(&source).unwrap();
    let project = dir.path().join("project");
    let dest = project.join("dest");
    std::fs::create_dir_all(&dest).unwrap();
    std::fs::write(dest.join("a"), "old").unwrap();
    let a = || std::fs::read_to_string(dest.join("a")).unwrap();
    let names = || std::fs::read_dir(&project).unwrap().count();

    // Stopped between its two files.
    let asked = std::cell::Cell::new(0);
    let stop = || asked.replace(asked.get() + 1) >= 1;
    let mut staging = Staging::new(&store);
    assert!(staging.add(&tree, &dest, &stop).unwrap().is_none());
    drop(staging);
    assert_eq!((a(), names()), ("old".to_owned(), 1));

    let mut staging = Staging::new(&store);
    let staged = staging.add(&tree, &dest, &|| false).unwrap().unwrap();
    let other = project.join("other");
    let never_put = staging.add(&tree, &other, &|| false).unwrap();
    assert!(never_put.is_some());
    assert_eq!(a(), "old");
    staged.put().unwrap();
    drop(staging);
    assert_eq!(a(), "new");
    assert_eq!(names(), 1, "nothing is left of what was not put");
}

#[test]
fn what_was_put_is_taken_back_whatever_was_there_before() {
    let (dir, store) = store();
    let source = dir.path().join("source");
    std::fs::create_dir_all(&source).unwrap();
    std::fs::write(source.join("a"), "new").unwrap();
    let artifacts = [
        store.put_path(&source).unwrap(),
        store.put_path(&source.join("a")).unwrap(),
    ];
    let project = dir.path().join("project");
    let dest = project.join("dest");
    let before: [&dyn Fn(); 4] = [
        &|| {},
        &|| std::fs::write(&dest, "old").unwrap(),
        &|| {
            std::fs::create_dir(&dest).unwrap();
            std::fs::write(dest.join("old"), "old").unwrap();
        },
        &|| std::os::unix::fs::symlink("nowhere", &dest).unwrap(),
    ];
    // What lies there: a file's text, a folder's entries, where a link leads.
    let there = || {
        let meta = dest.symlink_metadata().ok()?;
        Some(match std::fs::read_link(&dest) {
            Ok(target) => target.display().to_string(),
            Err(_) if meta.is_dir() => {
                let entries = std::fs::read_dir(&dest).unwrap();
                let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
                names.collect::<Vec<_>>().join(" ")
            }
            Err(_) => std::fs::read_to_string(&dest).unwrap(),
        })
    };
    for artifact in &artifacts {
        for prepare in before {
            std::fs::create_dir_all(&project).unwrap();
            prepare();
            let old = there();
            let mut staging = Staging::new(&store);
            let staged = staging.add(artifact, &dest, &|| false).unwrap().unwrap();
            let placed = staged.put().unwrap();
            assert_ne!(there(), old);
            placed.undo().unwrap();
            assert_eq!(there(), old);
            drop(staging);
            assert_eq!(there(), old, "it does not go with the staging");
            let left = std::fs::read_dir(&project).unwrap().count();
            assert_eq!(left, usize::from(old.is_some()));
            std::fs::remove_dir_all(&project).unwrap();
        }
    }
}

#[test]
fn what_cannot_be_put_leaves_its_place_as_it_was() {
    let (dir, store) = store();
    let file = dir.path().join("file");
    std::fs::write(&file, "new").unwrap();
    let artifact = store.put_path(&file).unwrap();
    let folder = dir.path().join("folder");
    let mut staging = Staging::new(&store);
    let mut add = |dest: &Path| staging.add(&artifact, dest, &|| false).unwrap().unwrap();
    // A name that no file system takes, and a folder that went with what was staged in it.
    let (long, gone) = (
        add(&folder.join("x".repeat(300))),
        add(&folder.join("in/a")),
    );
    std::fs::remove_dir_all(folder.join("in")).unwrap();
    std::fs::write(folder.join("in"), "old").unwrap();
    for staged in [long, gone] {
        let dest = staged.dest().display().to_string();
        let error = staged.put().unwrap_err().to_string();
        assert!(error.starts_with(&dest), "{error}");
    }
    assert_eq!(std::fs::read_to_string(folder.join("in")).unwrap(), "old");
}

#[test]
fn folders_that_were_made_for_what_was_not_put_go_with_it() {
    let (dir, store) = store();
    let file = dir.path().join("file");
    std::fs::write(&file, "new").unwrap();
    let artifact = store.put_path(&file).unwrap();
    let project = dir.path().join("project");
    std::fs::create_dir_all(project.join("empty")).unwrap();
    // Every folder below the project.
    let folders = || {
        let inner = |folder: &str| project.join(folder).is_dir();
        ["empty", "empty/b", "r", "r/a", "r/b", "r/b/c"].map(inner)
    };
    let before = folders();
    let dests = ["r/b/c/x", "r/a/x", "empty/b/x", "r/b/x"].map(|dest| project.join(dest));
    let mut staging = Staging::new(&store);
    for dest in &dests {
        let staged = staging.add(&artifact, dest, &|| false).unwrap();
        assert!(staged.is_some());
    }
    assert_eq!(folders(), [true; 6]);
    drop(staging);
    assert_eq!(folders(), before, "one that was there stays, though empty");

    // One is put, one is put and taken back, and in one somebody else has begun to stage.
    let mut staging = Staging::new(&store);
    let mut put = |dest: &Path| {
        let staged = staging.add(&artifact, dest, &|| false).unwrap();
        staged.unwrap().put().unwrap()
    };
    put(&dests[1]);
    put(&dests[0]).undo().unwrap();
    let mut other = Staging::new(&store);
    let theirs = other.add(&artifact, &dests[3], &|| false).unwrap();
    drop(staging);
    assert_eq!(folders(), [true, false, true, true, true, false]);
    theirs.unwrap().put().unwrap();
    assert_eq!(std::fs::read_to_string(&dests[3]).unwrap(), "new");
}

#[test]
fn what_was_staged_by_a_program_that_was_killed_is_removed() {
    let (dir, store) = store();
    let file = dir.path().join("file");
    std::fs::write(&file, "new").unwrap();
    let artifact = store.put_path(&file).unwrap();
    let project = dir.path().join("project");
    let staging = |name: &str| project.join(format!(".flowrun-{name}"));
    for name in ["dead00", "alive0", "unsure"] {
        std::fs::create_dir_all(staging(name)).unwrap();
        std::fs::write(staging(name).join("new-0"), "half").unwrap();
    }
    File::create(staging("dead00").join("held")).unwrap();
    let held = File::create(staging("alive0").join("held")).unwrap();
    held.lock().unwrap();
    store.materialize(&artifact, &project.join("dest")).unwrap();
    assert!(!staging("dead00").exists());
    assert!(staging("alive0").join("new-0").exists());
    assert!(staging("unsure").join("new-0").exists());
    let names = std::fs::read_dir(&project).unwrap().count();
    assert_eq!(names, 3, "nothing else is left");
}

#[test]
fn a_program_stays_one_wherever_it_is_placed() {
    let (dir, store) = store();
    let place = |name: &str| dir.path().join(name);
    let mode = |name: &str| {
        let meta = std::fs::metadata(place(name)).unwrap();
        meta.permissions().mode() & 0o111
    };
    // The same bytes, once as a program: one object, which is none.
    for (name, mode) in [("plain", 0o644), ("program", 0o755)] {
        std::fs::write(place(name), "#!/bin/sh\n").unwrap();
        std::fs::set_permissions(place(name), Permissions::from_mode(mode)).unwrap();
    }
    let address = ArtifactStore::address_of(&place("program")).unwrap();
    let program = store.put_path(&place("program")).unwrap();
    let plain = store.take_path(&place("plain")).unwrap();
    assert_eq!((&address, program.digest), (&program, plain.digest));
    assert!(program.executable && !plain.executable);
    store.link_read_only(&program, &place("lent")).unwrap();
    store.materialize(&program, &place("copied")).unwrap();
    store.link_read_only(&plain, &place("text")).unwrap();
    assert_eq!(
        (mode("lent"), mode("copied"), mode("text")),
        (0o111, 0o111, 0)
    );
    let object = std::fs::metadata(store.object_path(&program.digest)).unwrap();
    assert_eq!(object.permissions().mode() & 0o777, 0o444);
    let taken = store.take_path(&place("program")).unwrap();
    assert_eq!(taken, program);
}

#[test]
fn empty_folders_come_back_and_other_trees_have_the_address_they_had() {
    let (dir, store) = store();
    let source = dir.path().join("source");
    std::fs::create_dir_all(source.join("full/deep/empty")).unwrap();
    std::fs::create_dir_all(source.join("empty")).unwrap();
    std::fs::write(source.join("full/file"), "x").unwrap();
    let with = store.put_path(&source).unwrap();
    let tree = store.tree(&with.digest).unwrap();
    assert_eq!(tree.folders, ["empty", "full/deep/empty"]);
    for link in [false, true] {
        let dest = dir.path().join(format!("dest{link}"));
        match link {
            true => drop(store.link_read_only(&with, &dest).unwrap()),
            false => store.materialize(&with, &dest).unwrap(),
        }
        assert!(dest.join("empty").is_dir() && dest.join("full/deep/empty").is_dir());
        assert_eq!(ArtifactStore::address_of(&dest).unwrap(), with);
    }
    std::fs::remove_dir_all(source.join("empty")).unwrap();
    std::fs::remove_dir_all(source.join("full/deep")).unwrap();
    let without = store.put_path(&source).unwrap();
    let text = String::from_utf8(store.read(&without.digest).unwrap()).unwrap();
    assert!(!text.contains("folders"), "{text}");
    assert_ne!(without, with);
    std::fs::remove_dir_all(source.join("full")).unwrap();
    let nothing = store.put_path(&source).unwrap();
    let nothing = store.tree(&nothing.digest).unwrap();
    assert!(nothing.entries.is_empty() && nothing.folders.is_empty());
}

#[test]
fn a_link_that_leads_up_is_refused_and_named() {
    let (dir, store) = store();
    let out = dir.path().join("out");
    let other = dir.path().join("other");
    std::fs::create_dir_all(out.join("sub")).unwrap();
    std::fs::create_dir_all(&other).unwrap();
    let cases: [(&str, &Path); 3] = [
        ("sub/self", Path::new(".")),
        ("sub/up", Path::new("..")),
        ("sub/way", &other),
    ];
    std::os::unix::fs::symlink(&out, other.join("back")).unwrap();
    for (link, target) in cases {
        std::os::unix::fs::symlink(target, out.join(link)).unwrap();
        for stored in [
            ArtifactStore::address_of(&out),
            store.put_path(&out),
            store.take_path(&out),
            store.put_project_path(&out),
        ] {
            let error = stored.unwrap_err();
            assert!(matches!(error, CacheError::Unstorable { .. }), "{error}");
            let text = error.to_string();
            assert!(text.contains(link) && text.contains("leads to"), "{text}");
        }
        std::fs::remove_file(out.join(link)).unwrap();
    }
    // Two that lead to one folder beside them are two folders.
    std::fs::write(out.join("sub/file"), "x").unwrap();
    for name in ["a", "b"] {
        std::os::unix::fs::symlink("sub", out.join(name)).unwrap();
    }
    let tree = store.put_path(&out).unwrap();
    assert_eq!(store.tree(&tree.digest).unwrap().entries.len(), 3);
}

#[test]
fn the_cache_and_what_is_staged_are_no_part_of_a_project() {
    let (dir, store) = store();
    let project = tempfile::tempdir().unwrap();
    let inner = |name: &str| project.path().join(name);
    std::fs::create_dir_all(inner("data")).unwrap();
    std::fs::write(inner("data/file"), "x").unwrap();
    let before = store.put_project_path(project.path()).unwrap();
    // The cache may be met by another name.
    std::os::unix::fs::symlink(dir.path(), inner("data/cache")).unwrap();
    std::fs::create_dir_all(inner("data/.flowrun-abc123")).unwrap();
    std::fs::write(inner("data/.flowrun-abc123/new-0"), "half").unwrap();
    assert_eq!(store.put_project_path(project.path()).unwrap(), before);
    assert_eq!(store.address_in_project(project.path()).unwrap(), before);
    let all = ArtifactStore::address_of(project.path()).unwrap();
    assert_ne!(all, before);
    // A file of such a name is the user's, and so is a folder that holds something else.
    let mut last = before;
    for name in [
        ".flowrun-notes0",
        ".flowrun-notes/held",
        ".flowrun-notes1/text",
    ] {
        let path = inner("data").join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, "x").unwrap();
        let with = store.put_project_path(project.path()).unwrap();
        assert_ne!(with, last, "{name}");
        last = with;
    }
}
