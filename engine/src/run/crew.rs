//! [`run`]: the threads that work for the scheduler.
//!
//! A thread that is done tells the scheduler itself, and goes on with the next task: another
//! thread is woken only for a second one. To wake one costs about as much as what the scheduler
//! does for a step.
//!
//! Knows tasks, not what they are for. Invariant: one thread at a time asks the scheduler, and
//! when nothing is under way any more, or the scheduler panicked, nobody asks it again.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex, PoisonError};
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
        Err(_) => unreachable!("a thread's panic is caught, and the last one tells the end"),
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
        let mut shift = self.shift.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Shift { scheduler, .. }) = shift.as_mut() else {
            return Vec::new();
        };
        let asked = catch_unwind(AssertUnwindSafe(|| scheduler.hear(news)));
        let end = match asked {
            Ok(Some(tasks)) => return tasks,
            Ok(None) => Ok(()),
            Err(panic) => Err(panic),
        };
        if let Some(Shift { scheduler, over }) = shift.take() {
            // The caller may have been dropped.
            let _ = over.send(end.map(|()| scheduler));
        }
        Vec::new()
    }

    /// Has each task done by a thread of its own.
    fn start(self: &Arc<Self>, tasks: impl IntoIterator<Item = Task>) {
        for task in tasks {
            let crew = Arc::clone(self);
            self.threads.spawn_blocking(move || crew.work(task));
        }
    }

    /// Does a task, and those after it.
    fn work(self: Arc<Self>, first: Task) {
        let mut next = Some(first);
        while let Some(task) = next {
            let news = task.perform(&self.worker, |news| self.start(self.ask(news)));
            let mut tasks = self.ask(news).into_iter();
            next = tasks.next();
            self.start(tasks);
        }
    }
}
