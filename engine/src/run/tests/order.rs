//! Random graphs through the whole run: no step begins before what it needs has ended well,
//! neither by the events nor by the work itself; and no more runs at once than pools and
//! `max_parallel` let.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use serde_json::json;

use crate::event::{RunEvent, StepStatus};
use crate::pipeline::{ForeachList, Level, StepNode};
use crate::step::{StepError, StepOutcome};
use crate::testing::{Bench, Ran, Toy, uses, write};

/// A step: what it takes data from, what it waits for besides, and how it behaves.
#[derive(Debug, Clone)]
struct Shape {
    data: u16,
    needs: u16,
    /// Milliseconds of work.
    wait: u8,
    /// One item, or several.
    items: u8,
    /// Two items within each of several.
    is_deep: bool,
    /// Items of a level at once, where it is not 0.
    most: u8,
    /// Of one place, where it is not 0.
    pool: u8,
    fails: bool,
    /// Another one is another key.
    param: u8,
}

fn shape() -> impl Strategy<Value = Shape> {
    let bits = (any::<u16>(), any::<u16>(), any::<u16>(), any::<u16>());
    // Few edges, so that much may run at once.
    let edges = bits.prop_map(|(a, b, c, d)| (a & b, c & d));
    let fails = proptest::bool::weighted(0.08);
    let work = (0..4u8, 1..4u8, any::<bool>());
    let room = (0..3u8, 0..3u8);
    (edges, work, room, fails, 0..2u8).prop_map(|(edges, work, room, fails, param)| Shape {
        data: edges.0,
        needs: edges.1,
        wait: work.0,
        items: work.1,
        is_deep: work.2 && work.1 > 1,
        most: room.0,
        pool: room.1,
        fails,
        param,
    })
}

impl Shape {
    /// Actions at once, as far as `max_parallel` says.
    fn most_at_once(&self) -> usize {
        let most = usize::from(self.most);
        match (self.items > 1 && most > 0, self.is_deep) {
            (false, _) => usize::MAX,
            (true, false) => most,
            (true, true) => most * most,
        }
    }
}

/// The steps before step `i` whose bits are set.
fn before(i: usize, bits: u16) -> impl Iterator<Item = usize> {
    (0..i).filter(move |b| bits >> b & 1 == 1)
}

/// Work that began (`true`) or ended, by the id of its step.
type Worked = Arc<Mutex<Vec<(String, bool)>>>;

/// Works for a while, and notes when.
fn worker(worked: &Worked) -> Arc<Toy> {
    let worked = Arc::clone(worked);
    Arc::new(Toy::new("worker", move |ctx| {
        let note = |begins: bool| worked.lock().unwrap().push((ctx.step.clone(), begins));
        note(true);
        let wait = ctx.params["wait"].as_u64().unwrap_or_default();
        std::thread::sleep(Duration::from_millis(wait));
        if ctx.params["fails"] == true {
            note(false);
            return Err(StepError::failed("as the test asked"));
        }
        write(ctx, "out", &ctx.params.to_string())?;
        note(false);
        Ok(StepOutcome::default())
    }))
}

/// The step of an item: `s3[2]` is one of `s3`.
fn name_of(id: &str) -> &str {
    id.split('[').next().unwrap_or(id)
}

fn steps(shapes: &[Shape], worker: &Arc<Toy>) -> Vec<StepNode> {
    let make = |(i, shape): (usize, &Shape)| {
        let mut params = json!({
            // Equal actions would be one.
            "step": i, "param": shape.param, "wait": shape.wait, "fails": shape.fails,
        });
        let mut step = uses(&format!("s{i}"), worker.clone());
        if shape.items > 1 {
            let items: Vec<u8> = (0..shape.items).collect();
            step = step.each_value("item", json!(items));
            params["item"] = json!("${{ item.item }}");
            let max_parallel = (shape.most > 0).then_some(usize::from(shape.most));
            step.level_mut().max_parallel = max_parallel;
            if let Some(foreach) = step.foreach.as_mut().filter(|_| shape.is_deep) {
                let list = ForeachList::Values(vec![json!("a"), json!("b")]);
                foreach.levels.push(Level {
                    vars: BTreeMap::from([("inner".to_owned(), list)]),
                    max_parallel,
                    ..Level::default()
                });
                params["inner"] = json!("${{ item.inner }}");
            }
        }
        step.pool = (shape.pool > 0).then(|| format!("pool{}", shape.pool));
        step = step.with(params);
        for b in before(i, shape.data) {
            step = step.input("parts", &format!("s{b}.out"));
        }
        step.needs = before(i, shape.needs).map(|b| format!("s{b}")).collect();
        step
    };
    shapes.iter().enumerate().map(make).collect()
}

/// The most that was at work at once of what is counted.
fn most_at_once(log: &[(String, bool)], counts: impl Fn(&str) -> bool) -> usize {
    let (mut now, mut most) = (0_usize, 0);
    for (_, begins) in log.iter().filter(|(id, _)| counts(id)) {
        now = if *begins { now + 1 } else { now - 1 };
        most = most.max(now);
    }
    most
}

/// When each step began first, and when it ended last and how, as places among the events.
#[derive(Default)]
struct Times {
    began: BTreeMap<String, usize>,
    ended: BTreeMap<String, usize>,
    is_whole: BTreeMap<String, bool>,
}

impl Times {
    fn of(ran: &Ran) -> Self {
        let mut times = Self::default();
        for (at, event) in ran.events.iter().enumerate() {
            match event {
                RunEvent::StepStarted { step, .. } => {
                    times.began.entry(name_of(step).to_owned()).or_insert(at);
                }
                RunEvent::StepFinished { step, status, .. } => {
                    let name = name_of(step).to_owned();
                    let is_well = matches!(status, StepStatus::Ran | StepStatus::Cached);
                    *times.is_whole.entry(name.clone()).or_insert(true) &= is_well;
                    times.ended.insert(name, at);
                }
                _ => {}
            }
        }
        times
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]
    #[test]
    fn no_step_begins_before_what_it_needs_has_ended(
        mut shapes in proptest::collection::vec(shape(), 1..14),
        edits in proptest::collection::vec(any::<prop::sample::Index>(), 0..3),
        jobs in 1..6usize,
    ) {
        let mut bench = Bench::new()?;
        bench.options.jobs = jobs;
        bench.options.keep_going = true;
        let worked = Worked::default();
        let worker = worker(&worked);
        // The second run has what did not change from the cache.
        for round in 0..2 {
            if round == 1 {
                for at in &edits {
                    let at = at.index(shapes.len());
                    shapes[at].param += 2;
                }
            }
            worked.lock().unwrap().clear();
            let ran = bench.run(&steps(&shapes, &worker));
            let times = Times::of(&ran);
            let log = worked.lock().unwrap().clone();
            let place = |name: &str, begins: bool| {
                let of = move |(id, b): &(String, bool)| name_of(id) == name && *b == begins;
                (log.iter().position(of), log.iter().rposition(of))
            };
            prop_assert_eq!(times.ended.len(), shapes.len(), "each step ends");
            prop_assert!(most_at_once(&log, |_| true) <= jobs);
            for pool in 1..3 {
                let names = shapes.iter().enumerate().filter(|(_, shape)| shape.pool == pool);
                let names: Vec<String> = names.map(|(i, _)| format!("s{i}")).collect();
                let of_pool = |id: &str| names.iter().any(|name| name == name_of(id));
                prop_assert!(most_at_once(&log, of_pool) <= 1, "a pool of one place");
            }
            for (i, shape) in shapes.iter().enumerate() {
                let name = format!("s{i}");
                let at_once = most_at_once(&log, |id| name_of(id) == name);
                prop_assert!(at_once <= shape.most_at_once(), "{} of {}", at_once, name);
                for b in before(i, shape.data | shape.needs) {
                    let b = format!("s{b}");
                    if let Some(began) = times.began.get(&name) {
                        prop_assert!(times.ended[&b] < *began, "{} began before {} ended", name, b);
                        prop_assert!(times.is_whole[&b], "{} began, and {} did not end well", name, b);
                    }
                    if let (Some(first), _) = place(&name, true) {
                        let (_, last) = place(&b, false);
                        prop_assert!(last.is_none_or(|last| last < first), "{} worked before {}", name, b);
                        let (_, begun) = place(&b, true);
                        prop_assert!(begun.is_none_or(|at| at < first), "{} worked before {}", name, b);
                    }
                }
            }
        }
    }
}
