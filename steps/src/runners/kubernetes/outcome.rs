//! What a Job and its pod say of the work, in the words of [`JobState`]. Pure.
//!
//! | Kubernetes says | it means |
//! |---|---|
//! | the program ended with 137, 143 or 130 | it was killed, or told to stop, from outside |
//! | `OOMKilled` | it needs more memory: it failed |
//! | `StartError`, `ContainerCannotRun` | the image has no such program: it failed |
//! | `DisruptionTarget`; a reason of the pod (`Evicted`, `NodeLost`, …); the pod is gone | what it ran on was taken away: it may work elsewhere |
//! | `DeadlineExceeded` | the step's `timeout` is over |
//! | `Unschedulable`, an image that does not come | it waits, for so long as it may |
//! | an image that is not there or may not be had; a container that cannot be set up | it can never start |
//!
//! As of the API of 1.20 to 1.37.

use flowrun_engine::runner::{JobEnd, JobState};
use serde_json::Value;

use super::manifest::CONTAINER;

/// Exit code of this program when it was told to stop.
const INTERRUPTED: i64 = 130;
/// Characters of a message that are told.
const SAID: usize = 600;
/// Why a container waits that will never start as it is.
const HOPELESS: [&str; 3] = [
    "CreateContainerConfigError",
    "ErrImageNeverPull",
    "InvalidImageName",
];
/// What a registry says of an image that waiting does not bring.
const NO_IMAGE: [&str; 7] = [
    "access denied",
    "authorization failed",
    "forbidden",
    "manifest unknown",
    "no basic auth credentials",
    "not found",
    "unauthorized",
];

/// What is to be told of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Told {
    /// This.
    State(JobState),
    /// It waits, and only the events of this object may say why.
    Unclear { why: String, object: String },
}

/// What has become of a job whose newest pod is this one.
pub(super) fn told(job: &Value, pod: Option<&Value>) -> Told {
    if let Some(failed) = condition(job, "Failed") {
        return Told::State(JobState::Ended(failure(failed, pod)));
    }
    if condition(job, "Complete").is_some() {
        return Told::State(JobState::Ended(JobEnd::Well));
    }
    if condition(job, "Suspended").is_some() {
        return Told::State(waits("it is suspended, by a queue or by hand".to_owned()));
    }
    let Some(pod) = pod else {
        return Told::Unclear {
            why: "it has no pod yet".to_owned(),
            object: text(job, "/metadata/name").to_owned(),
        };
    };
    // A container of somebody else's beside it may keep the pod running.
    let over = matches!(
        text(pod, "/status/phase"),
        "Succeeded" | "Failed" | "Unknown"
    ) || text(pod, "/status/reason") == "NodeLost"
        || terminated(pod).is_some()
        || disruption(pod).is_some();
    match text(pod, "/status/phase") {
        _ if over => Told::State(JobState::Ended(end(pod))),
        "Running" => Told::State(JobState::Running),
        _ => waiting(pod),
    }
}

/// The condition of an object, if it holds.
fn condition<'a>(object: &'a Value, kind: &str) -> Option<&'a Value> {
    let all = object.pointer("/status/conditions")?.as_array()?;
    all.iter()
        .find(|one| one["type"] == kind && one["status"] == "True")
}

fn text<'a>(object: &'a Value, path: &str) -> &'a str {
    let value = object.pointer(path).and_then(Value::as_str);
    value.unwrap_or_default()
}

fn short(text: &str) -> String {
    text.trim().chars().take(SAID).collect()
}

/// `Evicted: the node was low on memory`.
fn worded(object: &Value) -> String {
    match (text(object, "/reason"), text(object, "/message")) {
        (reason, "") => reason.to_owned(),
        ("", message) => short(message),
        (reason, message) => format!("{reason}: {}", short(message)),
    }
}

fn waits(why: String) -> JobState {
    JobState::Waiting {
        why,
        hopeless: false,
    }
}

/// The end of a job that counts as failed.
fn failure(failed: &Value, pod: Option<&Value>) -> JobEnd {
    if text(failed, "/reason") == "DeadlineExceeded" {
        return JobEnd::Failed("it took longer than the step's `timeout`".to_owned());
    }
    match pod {
        Some(pod) => end(pod),
        None => JobEnd::Killed(
            "its pod is gone: somebody deleted it, or its node was taken away".to_owned(),
        ),
    }
}

/// How the container of the work ended, if it did.
fn terminated(pod: &Value) -> Option<&Value> {
    let all = pod.pointer("/status/containerStatuses")?.as_array()?;
    let ours = all.iter().find(|one| one["name"] == CONTAINER)?;
    ours.pointer("/state/terminated")
}

/// That the pod is taken away: by the scheduler, a drain, a taint.
fn disruption(pod: &Value) -> Option<&Value> {
    condition(pod, "DisruptionTarget")
}

/// The end of a pod that is over.
fn end(pod: &Value) -> JobEnd {
    let ended = terminated(pod);
    let reason = ended.map_or("", |ended| text(ended, "/reason"));
    if reason == "OOMKilled" {
        return JobEnd::Failed(
            "its container used up its memory (OOMKilled): give more in `resources.memory`"
                .to_owned(),
        );
    }
    // What ended well did so whatever became of its node.
    if ended.is_some_and(|ended| ended["exitCode"] == 0) {
        return JobEnd::Well;
    }
    if let Some(why) = disruption(pod) {
        return JobEnd::Killed(format!("its pod was taken away ({})", worded(why)));
    }
    let status = &pod["status"];
    if !text(status, "/reason").is_empty() {
        return JobEnd::Killed(worded(status));
    }
    let Some(ended) = ended else {
        return match text(status, "/phase") {
            "Succeeded" => JobEnd::Well,
            "Unknown" => JobEnd::Killed("its node does not answer".to_owned()),
            _ => JobEnd::Killed("its pod failed before its container ended".to_owned()),
        };
    };
    let message = short(text(ended, "/message"));
    match (reason, ended["exitCode"].as_i64()) {
        ("StartError" | "ContainerCannotRun", _) => {
            JobEnd::Failed(format!("its program cannot be started: {message}"))
        }
        (_, Some(137)) => {
            JobEnd::Killed("its process was killed from outside (signal 9)".to_owned())
        }
        (_, Some(143 | INTERRUPTED)) => {
            JobEnd::Killed("its process was told to stop from outside (signal 15)".to_owned())
        }
        (_, Some(code)) => {
            let said = format!("its process ended with exit code {code}: {message}");
            JobEnd::Failed(said.trim_end_matches([':', ' ']).to_owned())
        }
        (reason, None) => JobEnd::Killed(format!("its container is over ({reason})")),
    }
}

/// Why a pod was not started yet.
fn waiting(pod: &Value) -> Told {
    for list in ["/status/initContainerStatuses", "/status/containerStatuses"] {
        let all = pod.pointer(list).and_then(Value::as_array);
        let states = all.into_iter().flatten();
        let states = states.filter_map(|one| one.pointer("/state/waiting"));
        for state in states {
            let (reason, why) = (text(state, "/reason"), worded(state));
            let pulls = matches!(reason, "ErrImagePull" | "ImagePullBackOff");
            let message = text(state, "/message").to_lowercase();
            let hopeless = HOPELESS.contains(&reason)
                || pulls && NO_IMAGE.iter().any(|words| message.contains(words));
            // The two that say no more than that it begins.
            if !matches!(reason, "" | "ContainerCreating" | "PodInitializing") {
                return Told::State(JobState::Waiting { why, hopeless });
            }
        }
    }
    let conditions = pod.pointer("/status/conditions").and_then(Value::as_array);
    let unplaced = conditions
        .into_iter()
        .flatten()
        .find(|one| one["type"] == "PodScheduled" && one["status"] == "False");
    match unplaced {
        Some(why) => Told::State(waits(worded(why))),
        None => Told::Unclear {
            why: "its pod is being set up".to_owned(),
            object: text(pod, "/metadata/name").to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn job(kind: &str, reason: &str) -> Value {
        json!({"metadata": {"name": "flowrun-1"}, "status": {
            "conditions": [{"type": kind, "status": "True", "reason": reason}],
        }})
    }

    fn pod(status: Value) -> Value {
        json!({"metadata": {"name": "flowrun-1-x"}, "status": status})
    }

    fn exit(code: i64, reason: &str, message: &str) -> Value {
        json!({"phase": "Failed", "containerStatuses": [
            {"name": "proxy", "state": {"terminated": {"exitCode": 0}}},
            {"name": CONTAINER, "state": {"terminated": {
                "exitCode": code, "reason": reason, "message": message,
            }}},
        ]})
    }

    #[test]
    fn what_was_taken_away_is_told_from_what_failed() {
        let failed = job("Failed", "BackoffLimitExceeded");
        let ended = |status: Value| match told(&failed, Some(&pod(status))) {
            Told::State(JobState::Ended(end)) => Some(end),
            _ => None,
        };
        for (status, words) in [
            (exit(137, "Error", ""), "signal 9"),
            (exit(143, "Error", ""), "signal 15"),
            (exit(130, "Error", ""), "signal 15"),
            (
                json!({"phase": "Failed", "reason": "Evicted", "message": "low on memory"}),
                "Evicted: low on memory",
            ),
            (
                json!({"phase": "Running", "reason": "NodeLost"}),
                "NodeLost",
            ),
            (json!({"phase": "Unknown"}), "its node does not answer"),
            (
                json!({"phase": "Running", "conditions": [{
                    "type": "DisruptionTarget", "status": "True",
                    "reason": "DeletionByTaintManager", "message": "NoExecute",
                }]}),
                "DeletionByTaintManager: NoExecute",
            ),
        ] {
            let end = ended(status.clone());
            assert!(
                matches!(&end, Some(JobEnd::Killed(why)) if why.contains(words)),
                "{status}: {end:?}"
            );
        }
        for (status, words) in [
            (exit(137, "OOMKilled", ""), "resources.memory"),
            (exit(128, "StartError", "no such file"), "no such file"),
            (exit(4, "Error", "last words"), "exit code 4: last words"),
            (exit(1, "Error", ""), "exit code 1"),
        ] {
            let end = ended(status.clone());
            assert!(
                matches!(&end, Some(JobEnd::Failed(why)) if why.contains(words)),
                "{status}: {end:?}"
            );
        }
        let gone = told(&failed, None);
        let gone = matches!(&gone, Told::State(JobState::Ended(JobEnd::Killed(_))));
        assert!(gone, "a pod that is gone");
        let late = told(&job("Failed", "DeadlineExceeded"), None);
        assert!(
            matches!(&late, Told::State(JobState::Ended(JobEnd::Failed(why))) if why.contains("timeout")),
            "{late:?}"
        );
    }

    #[test]
    fn a_job_is_over_with_its_container() {
        let running = json!({"metadata": {"name": "flowrun-1"}, "status": {"active": 1}});
        let with = |status: Value| told(&running, Some(&pod(status)));
        assert_eq!(
            with(json!({"phase": "Running"})),
            Told::State(JobState::Running)
        );
        let well = Told::State(JobState::Ended(JobEnd::Well));
        assert_eq!(with(json!({"phase": "Succeeded"})), well);
        let beside = json!({"phase": "Running", "containerStatuses": [
            {"name": "proxy", "state": {"running": {}}},
            {"name": CONTAINER, "state": {"terminated": {"exitCode": 0, "reason": "Completed"}}},
        ]});
        assert_eq!(with(beside), well);
        assert_eq!(told(&job("Complete", ""), None), well);
    }

    #[test]
    fn why_a_job_waits_is_told_and_whether_it_can_ever_start() {
        let new = json!({"metadata": {"name": "flowrun-1"}, "status": {}});
        let pulls = |reason: &str, message: &str| {
            json!({"phase": "Pending", "containerStatuses": [{"name": CONTAINER, "state": {
                "waiting": {"reason": reason, "message": message},
            }}]})
        };
        for (status, words, never) in [
            (
                pulls("ErrImagePull", "manifest unknown"),
                "manifest unknown",
                true,
            ),
            (
                pulls("ErrImagePull", "dial tcp: i/o timeout"),
                "i/o timeout",
                false,
            ),
            (
                pulls("ImagePullBackOff", "Back-off pulling image \"x\""),
                "Back-off",
                false,
            ),
            (
                pulls("CreateContainerConfigError", "secret \"x\" is missing"),
                "secret",
                true,
            ),
            (
                json!({"phase": "Pending", "conditions": [{
                    "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                    "message": "0/3 nodes are available: 3 Insufficient cpu.",
                }]}),
                "Unschedulable: 0/3 nodes",
                false,
            ),
        ] {
            let said = told(&new, Some(&pod(status)));
            assert!(
                matches!(&said, Told::State(JobState::Waiting { why, hopeless })
                    if why.contains(words) && *hopeless == never),
                "{said:?}"
            );
        }
        let unclear = |said: Told| match said {
            Told::Unclear { object, .. } => object,
            Told::State(_) => String::new(),
        };
        let begins = pod(pulls("ContainerCreating", ""));
        assert_eq!(unclear(told(&new, Some(&begins))), "flowrun-1-x");
        assert_eq!(unclear(told(&new, None)), "flowrun-1");
        let suspended = told(&job("Suspended", ""), None);
        let waits = matches!(&suspended, Told::State(JobState::Waiting { .. }));
        assert!(waits, "{suspended:?}");
    }
}
