//! Random graphs through the whole run: no step begins before what it needs has ended well,
//! neither by the events nor by the work itself.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use serde_json::json;

use crate::event::{RunEvent, StepStatus};
use crate::pipeline::StepNode;
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
    fails: bool,
    /// Another one is another key.
    param: u8,
}

fn shape() -> impl Strategy<Value = Shape> {
    let bits = (any::<u16>(), any::<u16>(), any::<u16>(), any::<u16>());
    // Few edges, so that much may run at once.
    let edges = bits.prop_map(|(a, b, c, d)| (a & b, c & d));
    let fails = proptest::bool::weighted(0.08);
    (edges, 0..4u8, 1..4u8, fails, 0..2u8).prop_map(|((data, needs), wait, items, fails, param)| {
        Shape {
            data,
            needs,
            wait,
            items,
            fails,
            param,
        }
    })
}

/// The steps before step `i` whose bits are set.
fn before(i: usize, bits: u16) -> impl Iterator<Item = usize> {
    (0..i).filter(move |b| bits >> b & 1 == 1)
}

/// Work that began (`true`) or ended, by the name of its step.
type Worked = Arc<Mutex<Vec<(String, bool)>>>;

/// Works for a while, and notes when.
fn worker(worked: &Worked) -> Arc<Toy> {
    let worked = Arc::clone(worked);
    Arc::new(Toy::new("worker", move |ctx| {
        let note = |begins: bool| {
            let name = name_of(&ctx.step).to_owned();
            worked.lock().unwrap().push((name, begins));
        };
        note(true);
        let wait = ctx.params["wait"].as_u64().unwrap_or_default();
        std::thread::sleep(Duration::from_millis(wait));
        if ctx.params["fails"] == true {
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
        }
        step = step.with(params);
        for b in before(i, shape.data) {
            step = step.input("parts", &format!("s{b}.out"));
        }
        step.needs = before(i, shape.needs).map(|b| format!("s{b}")).collect();
        step
    };
    shapes.iter().enumerate().map(make).collect()
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
                let of = move |(n, b): &(String, bool)| n == name && *b == begins;
                (log.iter().position(of), log.iter().rposition(of))
            };
            prop_assert_eq!(times.ended.len(), shapes.len(), "each step ends");
            for (i, shape) in shapes.iter().enumerate() {
                let name = format!("s{i}");
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
