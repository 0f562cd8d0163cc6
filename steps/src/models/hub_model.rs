//! A whole model of the Hugging Face hub: the files that are fetched of a repository.

use flowrun_engine::step::{StepError, StepErrorKind};

use super::weights::Found;
use crate::hub::Snapshot;

/// The folder of a whole model, with the files that a Llama needs.
pub(super) fn hub_model(repo: &str, snapshot: &Snapshot) -> Result<Found, StepError> {
    let get = |file: &str| snapshot.file(file);
    get("config.json")?;
    get("tokenizer.json")?;
    get("tokenizer_config.json")?;
    if let Err(whole) = get("model.safetensors") {
        let index = get("model.safetensors.index.json").map_err(|index| told(whole, index))?;
        let index: serde_json::Value = crate::rows::read_json(&index)?;
        let shards = index["weight_map"].as_object().into_iter().flatten();
        let shards: std::collections::BTreeSet<&str> =
            shards.filter_map(|(_, file)| file.as_str()).collect();
        for shard in shards {
            get(shard)?;
        }
    }
    template(snapshot)?;
    Ok(Found {
        path: snapshot.folder(),
        digest: format!("{repo}@{}", snapshot.commit()),
    })
}

/// The file in which newer repositories keep the chat template; where it is, it is the template,
/// whatever `tokenizer_config.json` says. Where the hub does not answer whether it is there, a
/// template of `tokenizer_config.json` is enough; where asking is forbidden, what the cache has is.
fn template(snapshot: &Snapshot) -> Result<(), StepError> {
    let Err(error) = snapshot.optional_file("chat_template.jinja") else {
        return Ok(());
    };
    let settings = snapshot.file("tokenizer_config.json")?;
    // What is wrong with it is said by who loads it.
    let settings: serde_json::Value = crate::rows::read_json(&settings).unwrap_or_default();
    let known = !settings["chat_template"].is_null();
    if error.kind != StepErrorKind::Transient || !(known || snapshot.is_offline()) {
        return Err(error);
    }
    if !known {
        tracing::warn!("{}; going on without a chat template", error.message);
    }
    Ok(())
}

/// What to say of a model that has neither one file nor an index of several: the first, unless it
/// is only that a model of several files has no such file.
fn told(whole: StepError, index: StepError) -> StepError {
    let there = whole.kind == StepErrorKind::Invalid && index.kind == StepErrorKind::Transient;
    if there { index } else { whole }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use flowrun_engine::step::World;

    use super::*;
    use crate::hub::RepoType;

    fn world(dir: &Path) -> World {
        World {
            root: dir.to_path_buf(),
            user_cache: dir.join("user"),
            offline: true,
            ..World::default()
        }
    }

    #[test]
    fn what_is_said_of_a_model_without_weights_is_what_hinders() {
        let dir = tempfile::tempdir().unwrap();
        let world = world(dir.path());
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let snapshot = dir.path().join("huggingface/hub/models--a--b");
        let snapshot = snapshot.join("snapshots").join(commit);
        std::fs::create_dir_all(&snapshot).unwrap();
        for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
            std::fs::write(snapshot.join(name), "{}").unwrap();
        }
        let known = Snapshot::known(RepoType::Model, "a/b", commit, &world).unwrap();
        let error = hub_model("a/b", &known).unwrap_err();
        assert!(
            error.message.contains("/model.safetensors`"),
            "{}",
            error.message
        );

        let offline = || StepError::new(StepErrorKind::Transient, "offline");
        let absent = || StepError::invalid("404");
        assert_eq!(told(absent(), offline()).message, "offline");
        assert_eq!(told(offline(), absent()).message, "offline");
        assert_eq!(told(absent(), absent()).message, "404");
    }

    #[test]
    fn a_hub_that_does_not_answer_leaves_the_template_of_the_cache() {
        let dir = tempfile::tempdir().unwrap();
        let nobody = ("HF_ENDPOINT".to_owned(), "http://127.0.0.1:1".to_owned());
        let offline = world(dir.path());
        let world = World {
            offline: false,
            env: [nobody].into_iter().collect(),
            ..offline.clone()
        };
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let repository = dir.path().join("huggingface/hub/models--a--template");
        let snapshot = repository.join("snapshots").join(commit);
        std::fs::create_dir_all(&snapshot).unwrap();
        for name in ["config.json", "tokenizer.json", "model.safetensors"] {
            std::fs::write(snapshot.join(name), "{}").unwrap();
        }
        let settings = |text: &str| {
            std::fs::write(snapshot.join("tokenizer_config.json"), text).unwrap();
        };
        let known = Snapshot::known(RepoType::Model, "a/template", commit, &world).unwrap();
        settings("{}");
        let error = hub_model("a/template", &known).unwrap_err();
        assert!(
            error.message.contains("/chat_template.jinja`"),
            "{}",
            error.message
        );
        let forbidden = Snapshot::known(RepoType::Model, "a/template", commit, &offline).unwrap();
        hub_model("a/template", &forbidden).unwrap();
        settings("{\"chat_template\": \"{{ messages }}\"}");
        hub_model("a/template", &known).unwrap();
        settings("{}");
        let note = repository.join(".no_exist").join(commit);
        std::fs::create_dir_all(&note).unwrap();
        std::fs::write(note.join("chat_template.jinja"), "").unwrap();
        hub_model("a/template", &known).unwrap();
    }
}
