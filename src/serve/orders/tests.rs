use serde::Deserialize;
use serde_json::json;

use super::*;
use crate::serve::kept::new_id;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Errand {
    id: String,
    created_at: u64,
    begun: u32,
    ended: bool,
}

impl Order for Errand {
    const NAME: &'static str = "errand";
    const NAMES: &'static str = "errands";
    const PREFIX: &'static str = "errand-";
    const TOO_MANY: &'static str = "too_many_errands";
    const MOST: usize = 3;
    type Stop = ();

    fn id(&self) -> &str {
        &self.id
    }

    fn created_at(&self) -> u64 {
        self.created_at
    }

    fn has_ended(&self) -> bool {
        self.ended
    }

    fn begin(&mut self) {
        self.begun += 1;
    }

    fn resume(&mut self) {
        self.ended |= self.begun >= 3;
    }

    fn cancel(&mut self, under_way: bool) {
        self.ended = !under_way;
    }

    fn stop(_stop: &()) {}

    fn object(&self) -> Value {
        json!({"id": self.id})
    }
}

fn errand(created_at: u64) -> Errand {
    Errand {
        id: new_id(Errand::PREFIX),
        created_at,
        begun: 0,
        ended: false,
    }
}

fn open(folder: &Path) -> Orders<Errand> {
    Orders::open(folder.to_owned()).unwrap()
}

/// The orders of a folder that this server is in charge of.
fn mine(folder: &Path) -> Orders<Errand> {
    let orders = open(folder);
    orders.take_over().unwrap();
    orders
}

fn add(orders: &Orders<Errand>, created_at: u64) -> String {
    orders.add(errand(created_at), |_| Ok(())).unwrap().id
}

#[test]
fn the_one_in_charge_finds_what_others_add_while_it_waits() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (mine(dir.path()), open(dir.path()));
    let (next, id) = std::thread::scope(|threads| {
        let next = threads.spawn(|| first.next().0);
        let id = add(&second, 1);
        (next.join().unwrap(), id)
    });
    assert_eq!((next.id.as_str(), next.begun), (id.as_str(), 1));
    assert_eq!(second.get(&id).unwrap().begun, 1);
}

#[test]
fn what_others_added_is_listed_counted_and_bounded_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (mine(dir.path()), open(dir.path()));
    let ids: Vec<String> = (0..3).map(|at| add(&second, at)).collect();
    assert_eq!(first.count_open(), 3);
    assert!(first.any_open(|errand| errand.created_at == 2));
    assert_eq!(first.objects()[0], json!({"id": ids[2]}));
    first.change(&ids[1], |errand| errand.ended = true);
    let last = add(&second, 9);
    // The oldest that has ended gives way, on disk too.
    assert_eq!(first.count_open(), 3);
    let gone = first.get(&ids[1]).unwrap_err();
    assert_eq!(gone.status(), StatusCode::NOT_FOUND);
    assert_eq!(second.objects().len(), 3);
    assert!(second.get(&last).is_ok());
}

#[test]
fn what_waits_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let orders = mine(dir.path());
    for at in 0..OPEN {
        add(&orders, at as u64);
    }
    let refused = orders.add(errand(0), |_| Ok(())).unwrap_err();
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(refused.body()["error"]["code"], Errand::TOO_MANY);
    let first = orders.next().0;
    orders.change(&first.id, |errand| errand.ended = true);
    let refused = orders
        .add(errand(0), |_| Err(Problem::bad("no")))
        .unwrap_err();
    assert_eq!(refused.status(), StatusCode::BAD_REQUEST);
    add(&orders, 0);
}

#[test]
fn a_record_that_cannot_be_read_is_set_aside_by_the_one_in_charge_alone() {
    let dir = tempfile::tempdir().unwrap();
    let at = |id: &str, ending: &str| dir.path().join(format!("{id}.{ending}"));
    let (newer, copy) = (new_id(Errand::PREFIX), new_id(Errand::PREFIX));
    let first = mine(dir.path());
    let good = add(&first, 1);
    std::fs::write(at(&newer, "json"), "{\"of\": \"a newer version\"}").unwrap();
    std::fs::copy(at(&good, "json"), at(&copy, "json")).unwrap();
    std::fs::write(at("notes", "json"), "{").unwrap();
    // Neither who waits nor who has charge already touches it.
    let second = open(dir.path());
    for orders in [&first, &second] {
        assert_eq!(orders.objects(), [json!({"id": good})]);
        let missing = orders.get(&newer).unwrap_err();
        assert_eq!(missing.status(), StatusCode::NOT_FOUND);
        assert!(at(&newer, "json").is_file() && at(&copy, "json").is_file());
    }
    drop(first);
    second.take_over().unwrap();
    for id in [&newer, &copy] {
        assert!(at(id, "damaged").is_file() && !at(id, "json").exists());
    }
    assert!(at("notes", "json").is_file(), "no record");
    assert_eq!(second.next().0.id, good);
}

#[test]
fn a_change_that_must_last_is_none_until_it_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("errands");
    std::fs::create_dir(&folder).unwrap();
    let orders = mine(&folder);
    let id = add(&orders, 1);
    let end = || orders.try_change(&id, |errand| errand.ended = true);
    std::fs::remove_dir_all(&folder).unwrap();
    assert!(end().is_err());
    assert!(!orders.get(&id).unwrap().ended);
    std::fs::create_dir(&folder).unwrap();
    end().unwrap();
    assert!(orders.get(&id).unwrap().ended);
    assert!(mine(&folder).get(&id).unwrap().ended);
}

#[test]
fn what_ends_as_a_server_takes_charge_has_ended_on_disk_too() {
    let dir = tempfile::tempdir().unwrap();
    let first = mine(dir.path());
    let id = add(&first, 1);
    first.change(&id, |errand| errand.begun = 3);
    let second = open(dir.path());
    assert!(!second.get(&id).unwrap().ended);
    first.take_over().unwrap();
    assert!(second.get(&id).unwrap().ended);
}

#[test]
fn one_server_alone_cancels_and_a_second_take_over_begins_anew() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (mine(dir.path()), open(dir.path()));
    let (running, waiting) = (add(&first, 1), add(&first, 2));
    assert_eq!(first.next().0.id, running);
    let refused = second.cancel(&waiting).unwrap_err();
    assert_eq!(refused.status(), StatusCode::CONFLICT);
    assert!(!first.cancel(&running).unwrap().ended, "it is told");
    assert!(first.cancel(&waiting).unwrap().ended);
    first.let_go();
    second.take_over().unwrap();
    assert_eq!(second.next().0.begun, 2);
    assert_eq!(
        first.cancel(&running).unwrap_err().status(),
        StatusCode::CONFLICT
    );
}
