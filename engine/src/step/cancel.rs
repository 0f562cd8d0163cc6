//! [`Cancel`]: the wish that a run stops.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// Says whether the run was asked to stop. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Cancel {
    own: Arc<AtomicU8>,
    parent: Option<Arc<AtomicU8>>,
}

/// What [`Cancel`] says: stop, and what is under way may clean up.
const STOP: u8 = 1;
/// Stop at once.
const KILL: u8 = 2;

impl Cancel {
    /// Asks everything to stop.
    pub fn cancel(&self) {
        self.own.fetch_max(STOP, Ordering::SeqCst);
    }
    /// Asks everything to stop at once: commands are killed without time to clean up.
    pub fn kill(&self) {
        self.own.fetch_max(KILL, Ordering::SeqCst);
    }
    /// A flag that is also set by this one, but not the other way round.
    #[must_use]
    pub fn child(&self) -> Self {
        Self {
            own: Arc::default(),
            parent: Some(Arc::clone(&self.own)),
        }
    }
    /// True once [`Cancel::cancel`] or [`Cancel::kill`] was called.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.level() >= STOP
    }
    /// True once [`Cancel::kill`] was called.
    #[must_use]
    pub fn is_killed(&self) -> bool {
        self.level() >= KILL
    }

    fn level(&self) -> u8 {
        let parent = self.parent.as_ref();
        let parent = parent.map_or(0, |p| p.load(Ordering::SeqCst));
        self.own.load(Ordering::SeqCst).max(parent)
    }
}
