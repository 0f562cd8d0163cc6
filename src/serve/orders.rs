//! [`Orders`]: what callers have ordered of a server (batches, jobs), how far each is, and what came
//! of it; on disk after every change.
//!
//! | file | what |
//! |---|---|
//! | `orders` | what there is, and which one is under way |
//! | `records` | their files |
//! | `notes` | what callers note of one |
//!
//! Knows nothing of how an order is carried out. Invariants: one server at a time changes the
//! orders of a folder, the one in charge; others add new ones, and read the folder anew whenever
//! somebody asks. The one in charge finds what they added while it has nothing to do and whenever
//! it lists or counts. What waits and what is kept is bounded. A record that cannot be read may be
//! a newer version's: it stays where it is until a server takes charge that cannot read it.

mod notes;
mod records;

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::http::StatusCode;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::kept::{is_id, write};
use super::problem::Problem;
use crate::exit::Failure;
pub(super) use notes::metadata;
use records::{ids, read, read_all, record};

/// How long a server in charge that has nothing to do waits before it looks for what others added.
const LOOK: Duration = Duration::from_secs(1);
/// Orders that have not ended, at most.
const OPEN: usize = 100;

/// Something that is ordered.
pub(super) trait Order: Clone + Serialize + DeserializeOwned {
    /// What one is called.
    const NAME: &'static str;
    /// What several are called.
    const NAMES: &'static str;
    /// How their ids begin.
    const PREFIX: &'static str;
    /// The code of the refusal when too many of them wait.
    const TOO_MANY: &'static str;
    /// How many are kept; of those that have ended, the oldest are forgotten.
    const MOST: usize;
    /// How one that is under way hears that it is to stop.
    type Stop: Clone + Default;

    /// Its id, which is that of its record.
    fn id(&self) -> &str;
    /// Seconds since 1970.
    fn created_at(&self) -> u64;
    /// Whether nothing changes any more.
    fn has_ended(&self) -> bool;
    /// It is under way from now on.
    fn begin(&mut self);
    /// Another server takes charge of it, after the end of the one that had it; it may end then.
    fn resume(&mut self) {}
    /// It is to end. One that is under way is also told by [`Order::stop`].
    fn cancel(&mut self, under_way: bool);
    /// Tells one that is under way.
    fn stop(stop: &Self::Stop);
    /// What callers see of it.
    fn object(&self) -> Value;
}

/// All orders of a folder.
pub(super) struct Orders<T: Order> {
    folder: PathBuf,
    state: Mutex<State<T>>,
    arrived: Condvar,
}

struct State<T: Order> {
    all: BTreeMap<String, T>,
    /// The one that is under way, and how to stop it.
    running: Option<(String, T::Stop)>,
    /// Whether this server is in charge.
    mine: bool,
    /// Records that were looked at and are not looked at again.
    left: BTreeSet<String>,
}

impl<T: Order> Orders<T> {
    /// Reads the orders of a folder, of which another server may be in charge.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub(super) fn open(folder: PathBuf) -> Result<Self, Failure> {
        let state = State {
            all: read_all(&folder, false)?,
            running: None,
            mine: false,
            left: BTreeSet::new(),
        };
        Ok(Self {
            folder,
            state: Mutex::new(state),
            arrived: Condvar::new(),
        })
    }

    /// From now on this server is in charge: its turn has come, and no other one changes them.
    /// Damaged records are set aside under another name.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub(super) fn take_over(&self) -> Result<(), Failure> {
        let mut state = self.state();
        state.all = read_all(&self.folder, true)?;
        state.mine = true;
        for order in state.all.values_mut() {
            let was_open = !order.has_ended();
            order.resume();
            if was_open && order.has_ended() {
                self.keep_or_say(order);
            }
        }
        self.forget_the_oldest(&mut state);
        Ok(())
    }

    /// Another server is to be in charge.
    pub(super) fn let_go(&self) {
        let mut state = self.state();
        state.running = None;
        state.mine = false;
    }

    /// Whether this server is in charge.
    pub(super) fn is_mine(&self) -> bool {
        self.state().mine
    }

    /// Where their records are.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Takes an order on, unless too many wait or `room`, which hears how many do, has something
    /// against it.
    ///
    /// # Errors
    /// 429 when too many wait; what `room` says; 500 when the order cannot be written.
    pub(super) fn add(
        &self,
        order: T,
        room: impl FnOnce(usize) -> Result<(), Problem>,
    ) -> Result<T, Problem> {
        let mut state = self.fresh();
        let open = state.open().count();
        if open >= OPEN {
            let text = format!(
                "{OPEN} {} wait already; order this one when one has ended",
                T::NAMES
            );
            let status = StatusCode::TOO_MANY_REQUESTS;
            return Err(Problem::new(status, text).code(T::TOO_MANY));
        }
        room(open)?;
        self.keep(&order)
            .map_err(|e| Problem::internal(e.to_string()))?;
        state.all.insert(order.id().to_owned(), order.clone());
        self.forget_the_oldest(&mut state);
        self.arrived.notify_one();
        Ok(order)
    }

    /// How many have not ended.
    pub(super) fn count_open(&self) -> usize {
        self.fresh().open().count()
    }

    /// Whether one that has not ended is such.
    pub(super) fn any_open(&self, is_such: impl Fn(&T) -> bool) -> bool {
        self.fresh().open().any(is_such)
    }

    /// One of them, as it is by now.
    ///
    /// # Errors
    /// 404 when there is none; 500 when its record cannot be read.
    pub(super) fn get(&self, id: &str) -> Result<T, Problem> {
        let missing = || {
            let text = format!("there is no {} `{id}` here", T::NAME);
            Problem::new(StatusCode::NOT_FOUND, text)
        };
        if !is_id(id, T::PREFIX) {
            return Err(missing());
        }
        let mut state = self.state();
        if state.mine
            && let Some(order) = state.all.get(id)
        {
            return Ok(order.clone());
        }
        // Another server may have changed it, or added it just now.
        let order: T = read(&self.folder, id).map_err(|e| match e.kind() {
            ErrorKind::NotFound | ErrorKind::InvalidData => missing(),
            _ => Problem::internal(e.to_string()),
        })?;
        if state.mine {
            state.all.insert(id.to_owned(), order.clone());
            self.arrived.notify_one();
        }
        Ok(order)
    }

    /// What callers see of all of them, the newest first.
    pub(super) fn objects(&self) -> Vec<Value> {
        let state = self.fresh();
        let mut all: Vec<&T> = state.all.values().collect();
        all.sort_by(|a, b| (b.created_at(), b.id()).cmp(&(a.created_at(), a.id())));
        all.into_iter().map(T::object).collect()
    }

    /// Asks one to end. One that has ended stays as it is.
    ///
    /// # Errors
    /// 404 when there is none; 409 when another server is in charge, which would not hear of it.
    pub(super) fn cancel(&self, id: &str) -> Result<T, Problem> {
        self.get(id)?;
        let mut state = self.state();
        if !state.mine {
            let text = format!(
                "this server is not the one in charge of the {} of this folder: ask that one, or \
                 ask again when it has ended",
                T::NAMES
            );
            return Err(Problem::new(StatusCode::CONFLICT, text).code("not_in_charge"));
        }
        let running = state.running.as_ref();
        let stop = running.and_then(|(running, stop)| (running == id).then(|| stop.clone()));
        self.change_in(&mut state, id, |order| order.cancel(stop.is_some()));
        if let Some(stop) = stop {
            T::stop(&stop);
        }
        drop(state);
        self.get(id)
    }

    /// The next one, once there is one, and how it hears that it is to stop; it is under way from
    /// then on. Blocks.
    pub(super) fn next(&self) -> (T, T::Stop) {
        let mut state = self.state();
        loop {
            self.find_new(&mut state);
            if let Some(next) = self.take(&mut state) {
                return next;
            }
            let woken = self.arrived.wait_timeout(state, LOOK);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn take(&self, state: &mut State<T>) -> Option<(T, T::Stop)> {
        let first = state
            .open()
            .min_by_key(|order| (order.created_at(), order.id().to_owned()))?;
        let id = first.id().to_owned();
        let stop = T::Stop::default();
        state.running = Some((id.clone(), stop.clone()));
        self.change_in(state, &id, T::begin);
        let order = state.all.get(&id)?.clone();
        Some((order, stop))
    }

    /// The one that is under way is for the next server.
    pub(super) fn put_down(&self, change: impl FnOnce(&mut T)) {
        let mut state = self.state();
        if let Some((id, _)) = state.running.take() {
            self.change_in(&mut state, &id, change);
        }
    }

    /// Nothing is under way.
    pub(super) fn idle(&self) {
        self.state().running = None;
    }

    /// Changes one, in memory and on disk.
    pub(super) fn change(&self, id: &str, change: impl FnOnce(&mut T)) {
        self.change_in(&mut self.state(), id, change);
    }

    /// Changes one in memory, and on disk where `change` says that it matters.
    pub(super) fn note(&self, id: &str, change: impl FnOnce(&mut T) -> bool) {
        let mut state = self.state();
        if let Some(order) = state.all.get_mut(id)
            && change(order)
        {
            self.keep_or_say(order);
        }
    }

    /// Changes one on disk, and in memory when that has come about.
    ///
    /// # Errors
    /// When it cannot be written; it is as it was then.
    pub(super) fn try_change(&self, id: &str, change: impl FnOnce(&mut T)) -> std::io::Result<()> {
        let mut state = self.state();
        let Some(order) = state.all.get_mut(id) else {
            return Ok(());
        };
        let mut changed = order.clone();
        change(&mut changed);
        self.keep(&changed)?;
        *order = changed;
        Ok(())
    }

    fn change_in(&self, state: &mut State<T>, id: &str, change: impl FnOnce(&mut T)) {
        if let Some(order) = state.all.get_mut(id) {
            change(order);
            self.keep_or_say(order);
        }
    }

    fn keep_or_say(&self, order: &T) {
        if let Err(error) = self.keep(order) {
            tracing::warn!("the {} {} cannot be written: {error}", T::NAME, order.id());
        }
    }

    fn keep(&self, order: &T) -> std::io::Result<()> {
        write(
            &record(&self.folder, order.id()),
            &serde_json::to_vec(order)?,
        )
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What there is by now, whoever wrote it.
    fn fresh(&self) -> MutexGuard<'_, State<T>> {
        let mut state = self.state();
        if state.mine {
            self.find_new(&mut state);
            return state;
        }
        match read_all(&self.folder, false) {
            Ok(all) => state.all = all,
            Err(failure) => tracing::warn!("{failure}"),
        }
        state
    }

    /// Takes in what other servers have added: only names are read, and the records behind new ones.
    fn find_new(&self, state: &mut State<T>) {
        let ids = match ids::<T>(&self.folder) {
            Ok(ids) => ids,
            Err(error) => {
                tracing::warn!("{}: {error}", self.folder.display());
                return;
            }
        };
        for id in ids {
            if state.all.contains_key(&id) || state.left.contains(&id) {
                continue;
            }
            match read(&self.folder, &id) {
                Ok(order) => {
                    state.all.insert(id, order);
                }
                Err(error) => {
                    let path = record(&self.folder, &id);
                    tracing::warn!("{}: {error}", path.display());
                    if error.kind() == ErrorKind::InvalidData {
                        state.left.insert(id);
                    }
                }
            }
        }
        self.forget_the_oldest(state);
    }

    fn forget_the_oldest(&self, state: &mut State<T>) {
        while state.mine && state.all.len() > T::MOST {
            let ended = state.all.values().filter(|order| order.has_ended());
            let oldest = ended.min_by_key(|order| (order.created_at(), order.id().to_owned()));
            let Some(id) = oldest.map(|order| order.id().to_owned()) else {
                return;
            };
            state.all.remove(&id);
            if let Err(error) = std::fs::remove_file(record(&self.folder, &id)) {
                tracing::warn!("the {} {id} cannot be removed: {error}", T::NAME);
                state.left.insert(id);
            }
        }
    }
}

impl<T: Order> State<T> {
    /// Those that have not ended.
    fn open(&self) -> impl Iterator<Item = &T> {
        self.all.values().filter(|order| !order.has_ended())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
