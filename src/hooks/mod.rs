//! Hooks: tells those whom the pipeline names that a run ended.
//!
//! | file | what |
//! |---|---|
//! | `document` | what is told, as JSON |
//! | `command` | a program that is told |
//! | `webhook` | a server that is told |
//!
//! Knows no events: a run that ended is its record. Invariants: whatever a hook does, the run's
//! result and the exit code stay; no secret of a hook is in what it leaves or what is said of it.

mod command;
mod document;
mod webhook;

use std::collections::BTreeMap;

use flowrun_engine::hook::{Hook, HookAction, HookEvent};
use flowrun_engine::run::{Mask, RunSummary};
use flowrun_engine::step::{Cancel, World};

use self::document::Document;

/// Tells the hooks, all at once; what went wrong with them comes back as warnings.
pub(crate) fn tell(
    hooks: &BTreeMap<String, Hook>,
    summary: &RunSummary,
    world: &World,
    cancel: &Cancel,
) -> Vec<String> {
    let due: Vec<(&String, &Hook, HookEvent)> = hooks
        .iter()
        .filter_map(|(name, hook)| Some((name, hook, event(hook, summary)?)))
        .collect();
    if due.is_empty() {
        return Vec::new();
    }
    let document = Document::of(summary);
    std::thread::scope(|scope| {
        let document = &document;
        let telling: Vec<_> = due
            .iter()
            .map(|&(name, hook, event)| {
                let call = Call {
                    name,
                    hook,
                    event,
                    document,
                    world,
                    cancel,
                };
                (name, scope.spawn(move || call.make()))
            })
            .collect();
        let ended = telling.into_iter().map(|(name, thread)| {
            let panicked = |_| Err("the hook panicked; this is a fault of flowrun".to_owned());
            (name, thread.join().unwrap_or_else(panicked))
        });
        ended
            .filter_map(|(name, told)| Some(format!("hook `{name}`: {}", told.err()?)))
            .collect()
    })
}

/// What the hook is told of; nothing when the run did not end so.
fn event(hook: &Hook, summary: &RunSummary) -> Option<HookEvent> {
    let asks = |event: HookEvent| hook.on.contains(&event).then_some(event);
    asks(HookEvent::Failed)
        .filter(|_| !summary.ok)
        .or_else(|| asks(HookEvent::Finished))
}

/// One hook and what it is told.
struct Call<'a> {
    name: &'a str,
    hook: &'a Hook,
    event: HookEvent,
    document: &'a Document,
    world: &'a World,
    /// Ends programs at once, when it is killed.
    cancel: &'a Cancel,
}

impl Call<'_> {
    /// # Errors
    /// What went wrong, without the values of secrets.
    fn make(&self) -> Result<(), String> {
        let done = match &self.hook.action {
            HookAction::Command(command) => command::run(self, command),
            HookAction::Webhook(webhook) => webhook::post(self, webhook),
        };
        done.map_err(|why| self.mask().apply(&why))
    }

    /// The secret of this name, where it is the hook's.
    fn secret(&self, name: &str) -> Option<String> {
        let is_own = self.hook.secrets.iter().any(|own| own == name);
        self.world.env.get(name).filter(|_| is_own).cloned()
    }

    /// Hides the values of the hook's secrets.
    fn mask(&self) -> Mask {
        let names = self.hook.secrets.iter();
        Mask::new(names.filter_map(|name| self.secret(name)))
    }

    fn body(&self) -> Result<Vec<u8>, String> {
        self.document.bytes(self.name, self.event)
    }
}
