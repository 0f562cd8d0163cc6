//! [`Room`]: whether one more action may run now.

use std::collections::BTreeMap;

use crate::pipeline::{Resources, StepNode};

/// What the machine has, for steps that declare `resources` or a `pool`. An
/// action that asks for more than there is runs when nothing else that asks does.
#[derive(Debug, Clone, Default)]
pub struct Capacity {
    /// Cores; zero means as many as jobs.
    pub cpu: f64,
    /// Bytes of memory; zero means that it is not known, and bounds nothing.
    pub memory: u64,
    /// GPUs.
    pub gpu: f64,
}

/// What is in use.
pub(super) struct Room {
    jobs: usize,
    capacity: Capacity,
    running: usize,
    used: Resources,
    /// Places in each named pool.
    places: BTreeMap<String, usize>,
    pools: BTreeMap<String, usize>,
    /// Jobs that each job system takes at once, and how many it has.
    remote: BTreeMap<String, (usize, usize)>,
}

impl Room {
    pub(super) fn new(
        jobs: usize,
        mut capacity: Capacity,
        places: BTreeMap<String, usize>,
        remote: BTreeMap<String, usize>,
    ) -> Self {
        let jobs = jobs.max(1);
        if capacity.cpu <= 0.0 {
            capacity.cpu = jobs as f64;
        }
        if capacity.memory == 0 {
            capacity.memory = u64::MAX;
        }
        Self {
            jobs,
            capacity,
            running: 0,
            used: Resources::default(),
            places,
            pools: BTreeMap::new(),
            remote: remote
                .into_iter()
                .map(|(name, jobs)| (name, (jobs.max(1), 0)))
                .collect(),
        }
    }

    /// What a step asks for beyond what there is, in words: it then runs alone. None when it fits.
    pub(super) fn beyond(&self, node: &StepNode) -> Option<String> {
        if node.runner.job().is_some() {
            return None;
        }
        let want = &node.resources;
        let mut parts = Vec::new();
        if want.cpu > self.capacity.cpu {
            parts.push(format!("{} cores of {}", want.cpu, self.capacity.cpu));
        }
        if want.gpu > self.capacity.gpu {
            parts.push(format!("{} GPUs of {}", want.gpu, self.capacity.gpu));
        }
        if want.memory > self.capacity.memory {
            let gb = |bytes: u64| bytes as f64 / 1e9;
            let (want, have) = (gb(want.memory), gb(self.capacity.memory));
            parts.push(format!("{want:.1} GB of memory of {have:.1} GB"));
        }
        let text = || {
            let parts = parts.join(" and ");
            format!("asks for {parts}; it runs when no other that asks for the same does")
        };
        (!parts.is_empty()).then(text)
    }

    /// Nothing fits, whatever it asks for.
    pub(super) fn is_full(&self) -> bool {
        self.is_full_here() && self.remote.values().all(|(jobs, running)| running >= jobs)
    }

    fn is_full_here(&self) -> bool {
        self.running >= self.jobs
    }

    /// One more action of this step fits.
    pub(super) fn fits(&self, node: &StepNode) -> bool {
        let pool_is_free = node.pool.as_ref().is_none_or(|pool| {
            let places = self.places.get(pool).copied().unwrap_or(1).max(1);
            self.pools.get(pool).copied().unwrap_or(0) < places
        });
        let share = |demand: f64, used: f64, all: f64| {
            // Sums of fractions may be off by a little.
            demand <= 0.0 || used <= 0.0 || used + demand <= all + 1e-9
        };
        let (want, used) = (&node.resources, &self.used);
        let memory = want.memory == 0
            || used.memory == 0
            || used.memory.saturating_add(want.memory) <= self.capacity.memory;
        if !pool_is_free {
            return false;
        }
        if let Some(name) = node.runner.job() {
            return self
                .remote
                .get(name)
                .is_none_or(|(jobs, running)| running < jobs);
        }
        !self.is_full_here()
            && share(want.cpu, used.cpu, self.capacity.cpu)
            && share(want.gpu, used.gpu, self.capacity.gpu)
            && memory
    }

    /// The most actions of this step that run at the same time, whatever else does.
    pub(super) fn at_once(&self, node: &StepNode) -> usize {
        let places = node.pool.as_ref().map_or(usize::MAX, |pool| {
            self.places.get(pool).copied().unwrap_or(1)
        });
        let jobs = match node.runner.job() {
            Some(name) => self.remote.get(name).map_or(1, |(jobs, _)| *jobs),
            None => self.jobs,
        };
        jobs.min(places).max(1)
    }

    pub(super) fn take(&mut self, node: &StepNode) {
        if let Some(pool) = &node.pool {
            *self.pools.entry(pool.clone()).or_default() += 1;
        }
        if let Some(name) = node.runner.job() {
            if let Some((_, running)) = self.remote.get_mut(name) {
                *running += 1;
            }
            return;
        }
        self.running += 1;
        self.used.cpu += node.resources.cpu;
        self.used.gpu += node.resources.gpu;
        self.used.memory = self.used.memory.saturating_add(node.resources.memory);
    }

    pub(super) fn give_back(&mut self, node: &StepNode) {
        if let Some(used) = node.pool.as_ref().and_then(|p| self.pools.get_mut(p)) {
            *used -= 1;
        }
        if let Some(name) = node.runner.job() {
            if let Some((_, running)) = self.remote.get_mut(name) {
                *running -= 1;
            }
            return;
        }
        self.running -= 1;
        if self.running == 0 {
            // Also drops what rounding left.
            self.used = Resources::default();
        } else {
            self.used.cpu -= node.resources.cpu;
            self.used.gpu -= node.resources.gpu;
            self.used.memory = self.used.memory.saturating_sub(node.resources.memory);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::RunnerKind;
    use crate::testing::node;

    fn wanting(cpu: f64, memory: u64, gpu: f64) -> StepNode {
        let mut step = node("s");
        step.resources = Resources {
            cpu,
            memory,
            gpu,
            ..Resources::default()
        };
        step
    }

    #[test]
    fn each_resource_bounds_those_who_ask_for_it() {
        let capacity = Capacity {
            memory: 100,
            gpu: 1.0,
            ..Capacity::default()
        };
        let mut room = Room::new(4, capacity, BTreeMap::new(), BTreeMap::new());
        let (free, big) = (wanting(0.0, 0, 0.0), wanting(3.0, 60, 0.5));
        assert!(room.fits(&big));
        room.take(&big);
        assert!(room.fits(&free));
        assert!(!room.fits(&wanting(1.5, 0, 0.0)) && room.fits(&wanting(1.0, 0, 0.0)));
        assert!(!room.fits(&wanting(0.0, 41, 0.0)) && room.fits(&wanting(0.0, 40, 0.0)));
        assert!(!room.fits(&wanting(0.0, 0, 0.6)) && room.fits(&wanting(0.0, 0, 0.5)));
        room.give_back(&big);
        assert!(room.fits(&wanting(99.0, 999, 99.0)), "too big runs alone");
    }

    #[test]
    fn what_is_asked_for_beyond_the_machine_is_told() {
        let capacity = Capacity {
            memory: 8_000_000_000,
            ..Capacity::default()
        };
        let room = Room::new(4, capacity, BTreeMap::new(), BTreeMap::new());
        assert_eq!(room.beyond(&wanting(4.0, 8_000_000_000, 0.0)), None);
        assert_eq!(
            room.beyond(&wanting(64.0, 16_000_000_000, 0.0)).as_deref(),
            Some(
                "asks for 64 cores of 4 and 16.0 GB of memory of 8.0 GB; it runs when no other \
                 that asks for the same does"
            )
        );
    }

    #[test]
    fn jobs_elsewhere_take_no_place_here() {
        let remote = BTreeMap::from([("ray".to_owned(), 2)]);
        let mut room = Room::new(1, Capacity::default(), BTreeMap::new(), remote);
        let mut job = wanting(64.0, 1 << 40, 8.0);
        job.runner = RunnerKind::Job("ray".to_owned());
        let here = node("s");
        assert_eq!((room.at_once(&job), room.at_once(&here)), (2, 1));
        assert_eq!(room.beyond(&job), None);
        room.take(&here);
        assert!(!room.fits(&here) && room.fits(&job) && !room.is_full());
        room.take(&job);
        assert!(room.fits(&job));
        room.take(&job);
        assert!(!room.fits(&job) && room.is_full());
        room.give_back(&here);
        assert!(room.fits(&here) && !room.fits(&job));
        room.give_back(&job);
        assert!(room.fits(&job));
    }

    #[test]
    fn pools_and_jobs_have_places() {
        let places = BTreeMap::from([("two".to_owned(), 2)]);
        let mut room = Room::new(3, Capacity::default(), places, BTreeMap::new());
        let pooled = |pool: &str| {
            let mut step = node("s");
            step.pool = Some(pool.to_owned());
            step
        };
        let (one, two) = (pooled("one"), pooled("two"));
        assert_eq!((room.at_once(&one), room.at_once(&two)), (1, 2));
        assert_eq!(room.at_once(&node("s")), 3);
        room.take(&one);
        assert!(!room.fits(&one));
        room.take(&two);
        assert!(room.fits(&two));
        room.take(&two);
        assert!(room.is_full() && !room.fits(&node("s")));
        room.give_back(&one);
        assert!(room.fits(&one) && !room.fits(&two));
    }
}
