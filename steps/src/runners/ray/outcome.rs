//! What Ray says of a job; pure.

use flowrun_engine::runner::{JobEnd, JobState};
use serde_json::Value;

/// Bytes of a message of Ray's that are told; it may hold 20,000 characters of logs, which the
/// step's own log has too.
const SAID: usize = 600;
/// Exit code of this program when it was told to stop.
const INTERRUPTED: i64 = 130;

/// What Ray's description of a job means.
pub(super) fn state_of(job: &Value) -> JobState {
    let text = |name: &str| job[name].as_str().unwrap_or_default();
    let message = || {
        let message = text("message").trim();
        message.chars().take(SAID).collect::<String>()
    };
    match text("status") {
        "RUNNING" => JobState::Running,
        "SUCCEEDED" => JobState::Ended(JobEnd::Well),
        "STOPPED" => JobState::Ended(JobEnd::Stopped),
        "FAILED" => {
            let exit = job["driver_exit_code"].as_i64();
            JobState::Ended(match (text("error_type"), exit) {
                (_, Some(-9 | 137)) => JobEnd::Killed(
                    "its process was killed from outside (signal 9), as the system does where memory runs out".to_owned(),
                ),
                (_, Some(-15 | 143 | INTERRUPTED)) => JobEnd::Killed(
                    "its process was told to stop from outside (signal 15)".to_owned(),
                ),
                (_, Some(code)) => {
                    let last = text("message").lines().last().unwrap_or_default();
                    let last: String = last.chars().take(SAID).collect();
                    JobEnd::Failed(format!("its process ended with exit code {code}: {last}"))
                }
                ("JOB_SUPERVISOR_ACTOR_START_TIMEOUT", None) => JobEnd::NotStarted(message()),
                ("JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE" | "RUNTIME_ENV_SETUP_FAILURE", None) => {
                    JobEnd::Failed(message())
                }
                // The actor that watches it died, by whatever name: with its node, mostly.
                (_, None) => JobEnd::Killed(message()),
            })
        }
        _ => JobState::Waiting {
            why: "Ray has no place for it yet".to_owned(),
            hopeless: false,
        },
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn failed(error_type: Value, exit: Value) -> JobEnd {
        let job = json!({"status": "FAILED", "message": "why", "error_type": error_type,
            "driver_exit_code": exit});
        match state_of(&job) {
            JobState::Ended(end) => end,
            other => JobEnd::Failed(format!("{other:?}")),
        }
    }

    #[test]
    fn what_died_is_told_from_what_failed() {
        let killed = failed("JOB_ENTRYPOINT_COMMAND_ERROR".into(), json!(-9));
        assert!(matches!(killed, JobEnd::Killed(_)), "{killed:?}");
        for exit in [-15, 143, 130] {
            let stopped = failed("JOB_ENTRYPOINT_COMMAND_ERROR".into(), json!(exit));
            assert!(matches!(stopped, JobEnd::Killed(_)), "{stopped:?}");
        }
        let crashed = failed("JOB_ENTRYPOINT_COMMAND_ERROR".into(), json!(3));
        assert!(
            matches!(&crashed, JobEnd::Failed(why) if why.contains('3')),
            "{crashed:?}"
        );
        let why = || "why".to_owned();
        for (kind, end) in [
            ("JOB_SUPERVISOR_ACTOR_DIED", JobEnd::Killed(why())),
            (
                "JOB_SUPERVISOR_ACTOR_START_TIMEOUT",
                JobEnd::NotStarted(why()),
            ),
            ("RUNTIME_ENV_SETUP_FAILURE", JobEnd::Failed(why())),
        ] {
            assert_eq!(failed(kind.into(), Value::Null), end, "{kind}");
        }
        assert_eq!(failed(Value::Null, Value::Null), JobEnd::Killed(why()));
        let state = |status: &str| state_of(&json!({ "status": status }));
        assert_eq!(state("RUNNING"), JobState::Running);
        assert_eq!(state("SUCCEEDED"), JobState::Ended(JobEnd::Well));
        assert!(matches!(
            state("PENDING"),
            JobState::Waiting {
                hopeless: false,
                ..
            }
        ));
    }
}
