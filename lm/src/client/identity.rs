//! [`Identity`]: whether a server answers as the model that it is asked for. Some answer to any
//! name with the model that they have, and what they say would be kept under the wrong one.

use std::collections::BTreeSet;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use flowrun_cache::Digest;
use serde_json::json;

use super::OpenAiSpec;

/// Hears what a person should know of a server's answers.
pub type OnWarning = Arc<dyn Fn(&str) + Send + Sync>;

/// The entries, with the model that was asked for, that were warned of.
static WARNED: LazyLock<Mutex<BTreeSet<Digest>>> = LazyLock::new(Mutex::default);

/// The model that is asked for, and who hears when another answers.
pub(super) struct Identity {
    /// Of the entry and the model: one warning each in a process.
    name: Digest,
    asked: String,
    on_warning: Option<OnWarning>,
}

impl Identity {
    pub(super) fn new(spec: &OpenAiSpec) -> Self {
        Self {
            name: Digest::of_record("answering-model", &json!(spec)),
            asked: spec.model.clone(),
            on_warning: None,
        }
    }

    /// The same, which tells `on_warning` instead of the log.
    pub(super) fn told_to(self, on_warning: Option<OnWarning>) -> Self {
        Self { on_warning, ..self }
    }

    /// The same for another model of the entry's server.
    pub(super) fn of_model(self, spec: &OpenAiSpec) -> Self {
        let on_warning = self.on_warning.clone();
        Self::new(spec).told_to(on_warning)
    }

    /// Looks at the name that came with an answer, where one did.
    pub(super) fn check(&self, told: Option<&str>) {
        let Some(told) = told.filter(|told| !may_be(&self.asked, told)) else {
            return;
        };
        let mut warned = WARNED.lock().unwrap_or_else(PoisonError::into_inner);
        if !warned.insert(self.name) {
            return;
        }
        drop(warned);
        let text = format!(
            "`{told}` answers where `{}` was asked for, and its answers are kept as those of \
             `{}`: check `model` of the entry",
            self.asked, self.asked
        );
        match &self.on_warning {
            Some(tell) => tell(&text),
            None => tracing::warn!("{text}"),
        }
    }
}

/// Whether both names may be of one model. Servers answer with a dated id (`gpt-4.1-2025-04-14`),
/// with an adapter's, with the path of a file, or with less than was asked for.
fn may_be(asked: &str, told: &str) -> bool {
    let (asked, told) = (asked.trim().to_lowercase(), told.trim().to_lowercase());
    let fits = |one: &str, other: &str| {
        let within = |part: &str, whole: &str| whole.starts_with(part) || whole.ends_with(part);
        within(one, other) || within(other, one)
    };
    fits(&asked, &told) || fits(basename(&asked), basename(&told))
}

/// The last part of a path or of an id with an owner.
fn basename(name: &str) -> &str {
    let name = name.trim_end_matches(['/', '\\']);
    name.rsplit(['/', '\\']).next().unwrap_or(name)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_of_one_model_are_taken_for_one() {
        for (asked, told) in [
            ("gpt-4.1", "gpt-4.1-2025-04-14"),
            ("gpt-4.1", "GPT-4.1"),
            ("openai/gpt-4.1", "gpt-4.1"),
            ("openai/gpt-4.1", "gpt-4.1-2025-04-14"),
            ("org/base:epochs-1-abc", "org/base"),
            ("org/base:epochs-1-abc", "epochs-1-abc"),
            (
                "meta-llama/Llama-3.1-8B-Instruct",
                "/models/llama-3.1-8b-instruct/",
            ),
            (
                "Qwen/Qwen2.5-7B-Instruct",
                "C:\\models\\qwen2.5-7b-instruct-q4_k_m.gguf",
            ),
            ("base", ""),
        ] {
            assert!(may_be(asked, told), "{asked} {told}");
        }
        for (asked, told) in [
            ("gpt-4.1", "gpt-3.5-turbo"),
            ("qwen2.5-7b", "llama-3.1-8b"),
            ("meta-llama/a", "meta-llama/b"),
        ] {
            assert!(!may_be(asked, told), "{asked} {told}");
        }
    }

    #[test]
    fn another_model_is_warned_of_once_by_both_names() {
        let spec = json!({"base_url": "http://identity/v1", "model": "big-model"});
        let spec: OpenAiSpec = serde_json::from_value(spec).unwrap();
        let heard = Arc::new(Mutex::new(Vec::new()));
        let tell: OnWarning = {
            let heard = Arc::clone(&heard);
            Arc::new(move |text: &str| heard.lock().unwrap().push(text.to_owned()))
        };
        let identity = || Identity::new(&spec).told_to(Some(Arc::clone(&tell)));
        for told in [None, Some("big-model-2025"), Some("tiny"), Some("other")] {
            identity().check(told);
        }
        let heard = heard.lock().unwrap();
        assert_eq!(heard.len(), 1);
        assert!(heard[0].contains("`tiny` answers where `big-model` was asked for"));
    }
}
