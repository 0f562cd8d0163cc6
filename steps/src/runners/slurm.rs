//! `slurm`: batch jobs of Slurm, through its commands. A job is found by its name, which is its
//! id here: an order whose answer was lost is not given twice.
//!
//! As of Slurm 22.05. Without accounting, Slurm forgets a job some minutes after its end
//! (`MinJobAge`); the response in the job's folder is the truth anyway.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use flowrun_engine::runner::{CONSOLE, JobEnd, JobError, JobKind, JobOrder, JobState, JobSystem};
use flowrun_engine::step::{StepError, World};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::schema_of;

/// How long a command of Slurm may take: it tries for long to reach a controller that is away.
const ANSWER: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(10);
const MIB: u64 = 1 << 20;
/// Exit code of this program when it was told to stop.
const INTERRUPTED: i32 = 130;
/// Why a job waits that will never start as the cluster is.
const HOPELESS: [&str; 8] = [
    "PartitionConfig",
    "PartitionNodeLimit",
    "PartitionTimeLimit",
    "BadConstraints",
    "InvalidAccount",
    "AccountNotAllowed",
    "InvalidQOS",
    "QOSNotAllowed",
];

/// The job system.
pub(super) struct Slurm;

/// A Slurm cluster, as its commands find it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Settings {
    /// Partition.
    #[serde(default)]
    partition: Option<String>,
    /// Account.
    #[serde(default)]
    account: Option<String>,
    /// Time limit as Slurm writes it: `30`, `2:00:00`.
    #[serde(default)]
    time: Option<String>,
    /// More options of `sbatch`: `[--constraint=avx512, --qos=long]`.
    #[serde(default)]
    options: Vec<String>,
    /// Folder of `sbatch`, `squeue` and `scancel`, where they are not on the `PATH`.
    #[serde(default)]
    bin: Option<String>,
}

struct Cluster {
    settings: Settings,
    env: BTreeMap<String, String>,
}

impl JobKind for Slurm {
    fn name(&self) -> &'static str {
        "slurm"
    }
    fn about(&self) -> &'static str {
        "Batch jobs of Slurm, through `sbatch`."
    }
    fn settings_schema(&self) -> Value {
        schema_of::<Settings>()
    }
    fn example(&self) -> &'static str {
        "{}"
    }
    fn open(&self, settings: &Value, world: &World) -> Result<Box<dyn JobSystem>, StepError> {
        let settings = serde_json::from_value(settings.clone())
            .map_err(|e| StepError::invalid(format!("`runners.slurm`: {e}")))?;
        Ok(Box::new(Cluster {
            settings,
            env: world.env.clone(),
        }))
    }
}

impl JobSystem for Cluster {
    fn name(&self) -> String {
        match self.env.get("SLURM_CONF") {
            Some(conf) => format!("Slurm of {conf}"),
            None => "Slurm".to_owned(),
        }
    }

    fn submit(&self, order: &JobOrder<'_>) -> Result<(), JobError> {
        if self.found(order.id)?.is_some() {
            return Ok(());
        }
        self.call("sbatch", &self.options(order)).map(|_| ())
    }

    fn state(&self, order: &JobOrder<'_>) -> Result<JobState, JobError> {
        // It worked when the job was ordered: what is wrong now may pass.
        let found = self.found(order.id).map_err(|error| match error {
            JobError::Refused { text, .. } => JobError::Unreachable(text),
            away => away,
        })?;
        let Some(found) = found else {
            return Ok(JobState::Unknown);
        };
        let mut fields = found.split('|').skip(1);
        let mut next = || fields.next().unwrap_or_default().trim().to_owned();
        Ok(state_of(&next(), &next(), &next()))
    }

    fn stop(&self, id: &str) -> Result<(), JobError> {
        let words = [format!("--name={id}"), "--full".to_owned()];
        self.call("scancel", &words).map(|_| ())
    }

    fn forget(&self, _: &str) -> Result<bool, JobError> {
        // Slurm does so by itself.
        Ok(true)
    }
}

impl Cluster {
    fn options(&self, order: &JobOrder<'_>) -> Vec<String> {
        let want = order.resources;
        let ours = ["PATH", "HOME", "LANG"].into_iter();
        let exported: Vec<&str> = ours
            .chain(order.variables.iter().map(String::as_str))
            .collect();
        let mut words = vec![
            "--parsable".to_owned(),
            format!("--job-name={}", order.id),
            format!("--comment=flowrun:{}", order.step),
            // Another attempt has another folder.
            "--no-requeue".to_owned(),
            // Nothing else of this environment: secrets would come along.
            format!("--export={}", exported.join(",")),
            "--chdir=/".to_owned(),
            match order.folder {
                Some(folder) => format!("--output={}", folder.join(CONSOLE).display()),
                // By default it would be written into `--chdir`.
                None => "--output=/dev/null".to_owned(),
            },
            format!("--cpus-per-task={}", want.cpu.ceil().max(1.0)),
        ];
        if want.memory > 0 {
            words.push(format!("--mem={}M", want.memory.div_ceil(MIB)));
        }
        let mut gres: Vec<String> = want
            .custom
            .iter()
            .map(|(name, n)| format!("{name}:{}", n.ceil()))
            .collect();
        gres.extend((want.gpu > 0.0).then(|| format!("gpu:{}", want.gpu.ceil())));
        if !gres.is_empty() {
            words.push(format!("--gres={}", gres.join(",")));
        }
        let settings = &self.settings;
        let named = [
            ("partition", &settings.partition),
            ("account", &settings.account),
            ("time", &settings.time),
        ];
        let named = named
            .into_iter()
            .filter_map(|(name, value)| Some(format!("--{name}={}", value.as_ref()?)));
        words.extend(named);
        words.extend(settings.options.iter().cloned());
        let command = std::iter::once(order.program).chain(order.args.iter().map(String::as_str));
        let command: Vec<String> = command.map(quoted).collect();
        words.push(format!("--wrap=exec {}", command.join(" ")));
        words
    }

    /// The line of the newest job of this name, if Slurm knows one: id, state, exit code, reason.
    fn found(&self, name: &str) -> Result<Option<String>, JobError> {
        let words = [
            "--noheader".to_owned(),
            format!("--name={name}"),
            "--states=all".to_owned(),
            "--Format=JobID:|,State:|,exit_code:|,Reason:".to_owned(),
        ];
        let said = self.call("squeue", &words)?;
        Ok(said.lines().last().map(str::to_owned))
    }

    fn call(&self, program: &str, words: &[String]) -> Result<String, JobError> {
        let path = match &self.settings.bin {
            Some(folder) => format!("{folder}/{program}"),
            None => program.to_owned(),
        };
        let missing = |e: std::io::Error| JobError::Refused {
            text: format!("`{path}` cannot be started: {e}"),
            help: Some(
                "Slurm's commands must be on the `PATH`, or in the `bin` of `runners.slurm`"
                    .to_owned(),
            ),
        };
        let mut child = flowrun_engine::runner::start(
            Command::new(&path)
                .args(words)
                .env_clear()
                .envs(&self.env)
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped()),
        )
        .map_err(missing)?;
        let started = Instant::now();
        // What they print is short: it fits into the pipes.
        while child.try_wait().is_ok_and(|status| status.is_none()) {
            if started.elapsed() > ANSWER {
                // It is waited for below.
                let _ = child.kill();
                let _ = child.wait();
                let text = format!("`{program}` did not answer for {} s", ANSWER.as_secs());
                return Err(JobError::Unreachable(text));
            }
            std::thread::sleep(LOOK_EVERY);
        }
        let output = child
            .wait_with_output()
            .map_err(|e| JobError::refused(format!("`{program}`: {e}")))?;
        let error = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
            false if is_away(&error) => Err(JobError::Unreachable(error)),
            false => Err(JobError::refused(error)),
        }
    }
}

/// The controller does not answer.
fn is_away(error: &str) -> bool {
    [
        "Unable to contact",
        "Connection refused",
        "Socket timed out",
        "Zero Bytes were transmitted",
    ]
    .iter()
    .any(|words| error.contains(words))
}

/// A word for the shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// What Slurm's words for a job mean. The exit code is the status of `wait(2)`.
fn state_of(state: &str, exit: &str, reason: &str) -> JobState {
    let exit: i32 = exit.parse().unwrap_or_default();
    match state {
        "PENDING" | "CONFIGURING" | "RESV_DEL_HOLD" | "SPECIAL_EXIT" | "REQUEUED" => {
            JobState::Waiting {
                why: format!("Slurm lets it wait for `{reason}`"),
                hopeless: HOPELESS.contains(&reason),
            }
        }
        "COMPLETED" => JobState::Ended(JobEnd::Well),
        "CANCELLED" => JobState::Ended(JobEnd::Stopped),
        "FAILED" => {
            let (code, signal) = (exit >> 8, exit & 0x7f);
            JobState::Ended(match (code, signal) {
                (137, 0) | (0, 9) => {
                    JobEnd::Killed("its process was killed from outside (signal 9)".to_owned())
                }
                (143 | INTERRUPTED, 0) | (0, 15) => JobEnd::Killed(
                    "its process was told to stop from outside (signal 15)".to_owned(),
                ),
                (code, 0) => JobEnd::Failed(format!("its process ended with exit code {code}")),
                (_, signal) => JobEnd::Failed(format!("its process ended by signal {signal}")),
            })
        }
        "NODE_FAIL" | "BOOT_FAIL" | "PREEMPTED" | "REVOKED" => {
            JobState::Ended(JobEnd::Killed(format!("Slurm says {state}")))
        }
        "OUT_OF_MEMORY" | "TIMEOUT" | "DEADLINE" => {
            JobState::Ended(JobEnd::Failed(format!("Slurm says {state}")))
        }
        // COMPLETING, STAGE_OUT, SUSPENDED, …: it is not over.
        _ => JobState::Running,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use flowrun_engine::pipeline::Resources;

    use super::*;

    #[test]
    fn what_died_is_told_from_what_failed() {
        let end = |state: &str, exit: &str| state_of(state, exit, "None");
        assert!(matches!(
            end("FAILED", "9"),
            JobState::Ended(JobEnd::Killed(_))
        ));
        assert!(matches!(
            end("FAILED", "35072"),
            JobState::Ended(JobEnd::Killed(_))
        ));
        for told_to_stop in ["15", "36608", "33280"] {
            let state = end("FAILED", told_to_stop);
            let killed = matches!(state, JobState::Ended(JobEnd::Killed(_)));
            assert!(killed, "{told_to_stop}: {state:?}");
        }
        assert!(matches!(
            end("NODE_FAIL", "0"),
            JobState::Ended(JobEnd::Killed(_))
        ));
        assert_eq!(
            end("FAILED", "1024"),
            JobState::Ended(JobEnd::Failed(
                "its process ended with exit code 4".to_owned()
            ))
        );
        assert_eq!(end("COMPLETED", "0"), JobState::Ended(JobEnd::Well));
        assert_eq!(end("COMPLETING", "0"), JobState::Running);
        assert!(matches!(
            state_of("PENDING", "0", "Resources"),
            JobState::Waiting { why, hopeless: false } if why.contains("Resources")
        ));
        assert!(matches!(
            state_of("PENDING", "0", "PartitionConfig"),
            JobState::Waiting { hopeless: true, .. }
        ));
    }

    #[test]
    fn a_question_that_fails_says_nothing_of_the_job() {
        let bin = tempfile::tempdir().unwrap();
        let cluster = Cluster {
            settings: Settings {
                bin: Some(bin.path().display().to_string()),
                ..serde_json::from_str("{}").unwrap()
            },
            env: BTreeMap::new(),
        };
        let order = JobOrder {
            id: "flowrun-1",
            step: "a",
            run: "r",
            timeout: None,
            program: "flowrun",
            args: Vec::new(),
            folder: Some(Path::new("/f")),
            variables: &[],
            resources: &Resources::default(),
        };
        let missing = cluster.state(&order);
        assert!(matches!(missing, Err(JobError::Unreachable(_))));
        assert!(matches!(
            cluster.submit(&order),
            Err(JobError::Refused { .. })
        ));
        let false_program = Path::new("/bin/false");
        std::os::unix::fs::symlink(false_program, bin.path().join("squeue")).unwrap();
        let fails = cluster.state(&order);
        assert!(matches!(fails, Err(JobError::Unreachable(_))), "{fails:?}");
    }

    #[test]
    fn a_job_says_what_it_needs() {
        let cluster = Cluster {
            settings: Settings {
                partition: Some("p".to_owned()),
                account: None,
                time: Some("30".to_owned()),
                options: vec!["--qos=long".to_owned()],
                bin: None,
            },
            env: BTreeMap::new(),
        };
        let resources = Resources {
            cpu: 1.5,
            memory: 3 * MIB + 1,
            gpu: 1.0,
            custom: [("tpu".to_owned(), 2.0)].into(),
        };
        let words = cluster.options(&JobOrder {
            id: "flowrun-1",
            step: "a",
            run: "r",
            timeout: None,
            program: "/opt/flowrun",
            args: vec!["step".into()],
            folder: Some(Path::new("/f")),
            variables: &[],
            resources: &resources,
        });
        for word in [
            "--job-name=flowrun-1",
            "--cpus-per-task=2",
            "--mem=4M",
            "--gres=tpu:2,gpu:1",
            "--partition=p",
            "--time=30",
            "--qos=long",
            "--wrap=exec '/opt/flowrun' 'step'",
        ] {
            assert!(words.iter().any(|w| w == word), "{word}: {words:?}");
        }
    }
}
