//! [`run`]: the threads that work for the scheduler.
//!
//! A thread that is done tells the scheduler itself, and goes on with the next task: another
//! thread is woken only for a second one. To wake one costs about as much as what the scheduler
//! does for a step.
//!
//! Knows tasks, not what they are for. Invariant: one thread at a time asks the scheduler, and
//! when nothing is under way any more, a thread panicked, or the caller does not listen any
//! more, nobody asks it again.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use tokio::runtime::Handle;
use tokio::sync::oneshot::{Sender, channel};

use super::scheduler::{News, Scheduler, Task};
use super::worker::Worker;

/// Has everything done that the scheduler asks for. Must be called in a tokio runtime.
pub(super) async fn run(scheduler: Scheduler, worker: &Arc<Worker>) -> Scheduler {
    let (over, ended) = channel();
    let crew = Arc::new(Crew {
        worker: Arc::clone(worker),
        threads: Handle::current(),
        shift: Mutex::new(Some(Shift { scheduler, over })),
    });
    crew.start(crew.ask(News::Begun));
    drop(crew);
    match ended.await {
        Ok(Ok(scheduler)) => scheduler,
        Ok(Err(panic)) => resume_unwind(panic),
        Err(_) => unreachable!("the last thread tells how the run ended"),
    }
}

struct Crew {
    worker: Arc<Worker>,
    threads: Handle,
    /// Gone once the run is over.
    shift: Mutex<Option<Shift>>,
}

struct Shift {
    scheduler: Scheduler,
    over: Sender<thread::Result<Scheduler>>,
}

impl Crew {
    /// Tells the scheduler something, and takes what is to be done next.
    fn ask(&self, news: News) -> Vec<Task> {
        let mut shift = self.shift();
        if shift.as_ref().is_some_and(|shift| shift.over.is_closed()) {
            shift.take();
        }
        let Some(Shift { scheduler, .. }) = shift.as_mut() else {
            return Vec::new();
        };
        // Within this function, so that the lock is not poisoned.
        let asked = catch_unwind(AssertUnwindSafe(|| scheduler.hear(news)));
        let panic = match asked {
            Ok(Some(tasks)) => return tasks,
            Ok(None) => None,
            Err(panic) => Some(panic),
        };
        end(&mut shift, panic);
        Vec::new()
    }

    fn shift(&self) -> MutexGuard<'_, Option<Shift>> {
        self.shift.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has each task done by a thread of its own.
    fn start(self: &Arc<Self>, tasks: impl IntoIterator<Item = Task>) {
        for task in tasks {
            let crew = Arc::clone(self);
            self.threads.spawn_blocking(move || {
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| crew.work(task))) {
                    end(&mut crew.shift(), Some(panic));
                }
            });
        }
    }

    /// Does a task, and those after it.
    fn work(self: &Arc<Self>, first: Task) {
        let mut next = Some(first);
        while let Some(task) = next {
            let news = task.perform(&self.worker, |news| self.start(self.ask(news)));
            let mut tasks = self.ask(news).into_iter();
            next = tasks.next();
            self.start(tasks);
        }
    }
}

/// Ends the run, if nobody has yet.
fn end(shift: &mut Option<Shift>, panic: Option<Box<dyn Any + Send>>) {
    if let Some(Shift { scheduler, over }) = shift.take() {
        // The caller may have been dropped.
        let _ = over.send(panic.map_or(Ok(scheduler), Err));
    }
}
