//! Random pipelines and random edits: a run with the cache gives what a clean
//! run gives, runs nothing twice, and does what its plan said.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use serde_json::json;

use crate::pipeline::StepNode;
use crate::plan::PlanStatus;
use crate::testing::{Bench, Toy, node, uses};

/// A step: what it reads, what it is, its param.
#[derive(Debug, Clone)]
struct Shape {
    before: u8,
    needs: u8,
    kind: u8,
    param: u8,
}

fn shape() -> impl Strategy<Value = Shape> {
    (any::<u8>(), any::<u8>(), 0..5u8, 0..3u8).prop_map(|(before, needs, kind, param)| Shape {
        before,
        needs: needs & before.rotate_left(3),
        kind,
        param,
    })
}

/// Halves its param: some edits change nothing.
fn blunt() -> Toy {
    Toy::new("blunt", |ctx| {
        let n = ctx.params["n"].as_u64().unwrap_or_default();
        let mut all = (n / 2).to_string();
        for input in ctx.inputs.values().flatten() {
            all.push_str(
                &std::fs::read_to_string(&input.path).map_err(|e| crate::testing::io(ctx, &e))?,
            );
        }
        crate::testing::write(ctx, "out", &all)?;
        Ok(crate::step::StepOutcome::default())
    })
}

fn steps(shapes: &[Shape]) -> Vec<StepNode> {
    let list = |i: usize| shapes[i].kind == 3;
    let make = |(i, shape): (usize, &Shape)| {
        let name = format!("s{i}");
        let params = json!({ "n": shape.param, "text": format!("{} w{} end", i % 2, shape.param) });
        let mut step = match shape.kind {
            0 => node(&name),
            1 => uses(&name, Arc::new(blunt())),
            2 => shell_step(&name),
            3 => uses(&name, Arc::new(Toy::words())),
            _ => node(&name),
        }
        .with(params);
        let before = (0..i).filter(|b| shape.before >> b & 1 == 1);
        for b in before {
            step = step.input("parts", &format!("s{b}.out"));
        }
        if shape.kind == 4 {
            if let Some(b) = (0..i).find(|b| list(*b)) {
                step = step.each("w", &format!("s{b}.out")).input("x", "item.w");
            } else {
                step = step.input("y", "file:data");
            }
        }
        let needs = (0..i).filter(|b| shape.needs >> b & 1 == 1);
        step.needs = needs.map(|b| format!("s{b}")).collect();
        step
    };
    shapes.iter().enumerate().map(make).collect()
}

fn shell_step(name: &str) -> StepNode {
    crate::testing::shell(
        name,
        "if [ -n \"${parts:-}\" ]; then find -L $parts -type f | sort | xargs -r cat > $out; else echo none > $out; fi",
    )
}

fn outputs(ran: &crate::testing::Ran) -> BTreeMap<String, String> {
    ran.events
        .iter()
        .filter_map(|event| match event {
            crate::event::RunEvent::StepFinished { step, .. } => {
                Some((step.clone(), ran.digest(step, "out")))
            }
            _ => None,
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn a_cached_run_equals_a_clean_one(
        mut shapes in proptest::collection::vec(shape(), 1..8),
        edits in proptest::collection::vec((any::<prop::sample::Index>(), shape(), 0..4u8), 1..4),
        jobs in 1..4usize,
    ) {
        let mut kept = Bench::new()?;
        kept.options.jobs = jobs;
        let mut text = 0;
        std::fs::write(kept.root().join("data"), "0")?;
        kept.run(&steps(&shapes));
        for (at, new, what) in edits {
            let at = at.index(shapes.len());
            match what {
                0 => shapes[at].param = new.param,
                1 => shapes[at] = new,
                2 => text = new.param,
                _ => {}
            }
            std::fs::write(kept.root().join("data"), text.to_string())?;
            let steps = steps(&shapes);
            let plan = kept.plan(&steps);
            let cached = kept.run(&steps);
            let clean = Bench::new()?;
            std::fs::write(clean.root().join("data"), text.to_string())?;
            let fresh = clean.run(&steps);
            prop_assert!(cached.summary.ok && fresh.summary.ok, "{:?}", fresh.summary.first_error);
            prop_assert_eq!(outputs(&cached), outputs(&fresh));
            let ran = cached.ran();
            for step in &plan.steps {
                for item in &step.items {
                    // Equal actions run once, so one that is stale may end as cached.
                    if item.status == PlanStatus::Fresh {
                        prop_assert!(!ran.contains(&item.id.as_str()), "{} ran", item.id);
                    }
                }
            }
            prop_assert_eq!(plan.is_fresh(), ran.is_empty());
            prop_assert!(kept.plan(&steps).is_fresh());
            prop_assert_eq!(kept.run(&steps).summary.ran, 0);
        }
    }
}
