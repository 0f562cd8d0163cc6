//! `runner: slurm`: steps as batch jobs of a real Slurm of this machine, whose processes are
//! killed. Slurm's daemons want to be started by root: `FLOWRUN_SLURM=1` says that they may be.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::command_job::CommandJob;
use crate::external::set;
use crate::processes::{signal, until};
use crate::project::{Project, Run};
use crate::required::skip;
use crate::server::free_port;
use crate::slow_job::Slow;
use crate::weed::Weed;

/// A cluster of one node, which ends with the test.
struct Slurm {
    daemons: Vec<Child>,
    scratch: tempfile::TempDir,
}

const RUNNERS: &str = "runners:\n  slurm: { jobs: 4 }\n";

const CONF: &str = "\
ClusterName=flowrun
SlurmctldHost=HOST(127.0.0.1)
SlurmctldPort=PORT1
SlurmdPort=PORT2
AuthType=auth/munge
AuthInfo=socket=HERE/munge/socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=HERE/state
SlurmdSpoolDir=HERE/spool
SlurmctldPidFile=HERE/slurmctld.pid
SlurmdPidFile=HERE/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=0
ReturnToService=2
KillWait=5
NodeName=HOST NodeAddr=127.0.0.1 CPUs=CORES State=UNKNOWN
PartitionName=p Nodes=HOST Default=YES MaxTime=INFINITE State=UP
";

fn output(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn ok(program: &str, args: &[&str]) {
    assert!(Command::new(program).args(args).status().unwrap().success());
}

impl Slurm {
    fn start() -> Option<Self> {
        if set("FLOWRUN_SLURM").is_none() {
            let why = "FLOWRUN_SLURM=1 does not say that `slurm-wlm` and `munge` are installed";
            skip("slurm", why);
            return None;
        }
        let scratch = tempfile::Builder::new()
            .prefix("fs")
            .tempdir_in("/tmp")
            .unwrap();
        let here = scratch.path().display().to_string();
        for folder in ["state", "spool", "munge"] {
            std::fs::create_dir(scratch.path().join(folder)).unwrap();
        }
        // The daemon of munge has a user of its own, and is particular about its folders.
        let munge = format!("{here}/munge");
        std::fs::write(
            format!("{munge}/key"),
            "no secret at all, but long enough".repeat(40),
        )
        .unwrap();
        ok("chmod", &["711", &here, &munge]);
        ok("chmod", &["400", &format!("{munge}/key")]);
        ok("chown", &["-R", "munge:munge", &munge]);
        let cores = std::thread::available_parallelism().unwrap().to_string();
        let conf = CONF
            .replace("HOST", &output("hostname", &["-s"]))
            .replace("PORT1", &free_port().to_string())
            .replace("PORT2", &free_port().to_string())
            .replace("CORES", &cores)
            .replace("HERE", &here);
        std::fs::write(scratch.path().join("slurm.conf"), conf).unwrap();
        let mut slurm = Self {
            daemons: Vec::new(),
            scratch,
        };
        let flag = |name: &str, file: &str| format!("--{name}={munge}/{file}");
        slurm.daemon(
            "setpriv",
            &[
                "--reuid=munge",
                "--regid=munge",
                "--clear-groups",
                "munged",
                "--foreground",
                &flag("key-file", "key"),
                &flag("socket", "socket"),
                &flag("pid-file", "pid"),
                &flag("log-file", "log"),
                &flag("seed-file", "seed"),
            ],
        );
        until("munge is not up", || {
            Path::new(&munge).join("socket").exists()
        });
        slurm.daemon("slurmctld", &["-D"]);
        slurm.daemon("slurmd", &["-D"]);
        until("Slurm is not up", || {
            slurm.said("sinfo", &["-h", "-o", "%T"]) == "idle"
        });
        Some(slurm)
    }

    fn conf(&self) -> String {
        self.scratch.path().join("slurm.conf").display().to_string()
    }

    fn daemon(&mut self, program: &str, args: &[&str]) {
        let path = std::env::var("PATH").unwrap_or_default();
        let child = Command::new(program)
            .args(args)
            .env("PATH", format!("{path}:/usr/sbin:/sbin"))
            .env("SLURM_CONF", self.conf())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        self.daemons.push(child);
    }

    /// What a command of Slurm says; nothing where the controller is away.
    fn said(&self, program: &str, args: &[&str]) -> String {
        let output = Command::new("timeout")
            .args(["10", program])
            .args(args)
            .env("SLURM_CONF", self.conf())
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// Jobs that are not over.
    fn jobs(&self) -> String {
        self.said("squeue", &["--noheader"])
    }

    fn project(&self, step: &str) -> Project {
        let project = Project::new();
        project.write("p.yaml", &format!("{}{step}", RUNNERS));
        project
    }

    fn run(&self, project: &Project, args: &[&str]) -> Run {
        let mut command = project.command(args);
        let command = command
            .env("SLURM_CONF", self.conf())
            .env("TOKEN", "very-secret-value");
        Run::of(command.output().unwrap())
    }

    fn start_run(&self, slow: &Slow) -> Child {
        slow.start_with(&[("SLURM_CONF", &self.conf())])
    }
}

impl Drop for Slurm {
    fn drop(&mut self) {
        for daemon in self.daemons.iter_mut().rev() {
            signal("-TERM", daemon.id());
            let deadline = Instant::now() + Duration::from_secs(20);
            while daemon.try_wait().is_ok_and(|ended| ended.is_none()) {
                if Instant::now() > deadline {
                    let _ = daemon.kill();
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

#[test]
fn steps_are_batch_jobs_and_what_dies_is_begun_again() {
    let Some(slurm) = Slurm::start() else { return };
    let step = "steps:\n  s:\n    run: 'echo \"it is $TOKEN\"; printf %s \"$TOKEN\" | wc -c > \"$out\"'\n    runner: slurm\n    secrets: [TOKEN]\n    out: { out: n }\n    publish: { out: n }\n";
    let project = slurm.project(step);
    slurm.run(&project, &["p.yaml"]).ok();
    assert_eq!(project.read("n").trim(), "17");
    project.edit("p.yaml", "printf", "exit 3; printf");
    let failed = slurm.run(&project, &["p.yaml"]);
    assert_eq!(failed.code, Some(4));
    assert!(
        failed.stderr.contains("exit status: 3"),
        "{}",
        failed.stderr
    );
    let asks = "    runner: slurm\n    resources: { cpu: 4096 }\n";
    project.edit("p.yaml", "    runner: slurm\n", asks);
    let refused = slurm.run(&project, &["p.yaml"]);
    assert_eq!(refused.code, Some(4));
    assert!(
        refused.stderr.contains("PartitionConfig"),
        "{}",
        refused.stderr
    );

    let slow = Slow::new("slurm", RUNNERS);
    slow.outlives_its_worker(slurm.start_run(&slow));
}

#[test]
fn the_job_of_a_killed_run_is_taken_up_and_an_interrupted_run_stops_its_job() {
    let Some(slurm) = Slurm::start() else { return };
    let slow = Slow::new("slurm", RUNNERS);
    slow.outlives_its_run(|| slurm.start_run(&slow), || {});

    let slow = Slow::new("slurm", RUNNERS);
    slow.is_stopped_with_its_run(slurm.start_run(&slow));
    until("jobs are left", || slurm.jobs().is_empty());
}

/// A program that trains, such as TRL, starts where the job is.
#[test]
fn another_program_trains_as_a_job() {
    let Some(slurm) = Slurm::start() else { return };
    let conf = slurm.conf();
    let env = [("SLURM_CONF", conf.as_str())];
    let job = CommandJob::new("slurm", RUNNERS);
    job.makes_the_same(&env, "at Slurm");
    let job = CommandJob::new("slurm", RUNNERS);
    job.outlives_its_worker(&env);
    let job = CommandJob::new("slurm", RUNNERS);
    job.is_stopped_with_its_run(&env);
}

/// Workers that see no folder of the run: files go through a real S3 server, and so does what the
/// jobs say. Secrets and the credentials of the store are in the jobs' environment alone.
#[test]
fn files_of_jobs_go_through_s3_where_the_workers_see_no_folder() {
    let Some(weed) = Weed::start() else { return };
    let Some(slurm) = Slurm::start() else { return };
    let runners = "runners:\n  slurm: { jobs: 4, through: remote }\n";
    let remote = "s3://flow/team/jobs";
    let project = Project::new();
    let step = "steps:\n  s:\n    run: 'echo \"it is $TOKEN\"; pwd; printf %s \"$TOKEN\" | wc -c > \"$out\"'\n    runner: slurm\n    secrets: [TOKEN]\n    out: { out: n }\n    publish: { out: n }\n";
    project.write("p.yaml", &format!("{runners}{step}"));
    let run = |args: &[&str]| {
        let mut command = weed.command(&project, args);
        command
            .env("SLURM_CONF", slurm.conf())
            .env("TOKEN", "very-secret-value")
            .env("FLOWRUN_REMOTE", remote);
        Run::of(command.output().unwrap())
    };
    run(&["p.yaml"]).ok();
    assert_eq!(project.read("n").trim(), "17");
    let log = project.run(&["show", "s"]).ok().stdout;
    assert!(log.contains("it is ***"), "{log}");
    assert!(
        !log.contains(&project.path("").display().to_string()),
        "{log}"
    );
    let notes = || {
        let files = weed.files("team");
        files
            .keys()
            .filter(|path| path.contains("/jobs/flowrun-"))
            .count()
    };
    until("notes are left", || notes() == 0);
    let all = weed.files("team");
    let secret = b"very-secret-value";
    let has = |bytes: &Vec<u8>| bytes.windows(secret.len()).any(|part| part == secret);
    assert!(!all.values().any(has), "the store has the secret");

    let slow = Slow::new("slurm", runners);
    let env = [
        ("SLURM_CONF", slurm.conf()),
        ("AWS_ACCESS_KEY_ID", "AK".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "SK".to_owned()),
        ("AWS_ENDPOINT_URL", weed.endpoint()),
        ("FLOWRUN_REMOTE", remote.to_owned()),
    ];
    let env: Vec<(&str, &str)> = env
        .iter()
        .map(|(name, value)| (*name, value.as_str()))
        .collect();
    slow.outlives_its_worker(slow.start_with(&env));
    slow.worked_elsewhere();
    until("notes are left", || notes() == 0);
}
