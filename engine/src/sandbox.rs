//! Runs a `run:` step's command in a folder that holds only its declared inputs.
//!
//! Each port is an environment variable with the port's path in that folder
//! (`$report` = `in/report`, `$receipt` = `out/receipt.json`). Nothing else of
//! the environment gets in but PATH, HOME, the locale, `env` and `secrets`.
//! Invariant: when [`Sandbox::run`] returns, the command's whole process group
//! was killed.

use std::collections::BTreeMap;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::child::{Streams, Tail, ended_within, no_input, signal, start};
use crate::step::{Cancel, StepError, StepReporter};
use crate::warden::Warden;

/// How long a stopped command has to clean up before it is killed.
const GRACE: Duration = Duration::from_secs(2);

/// A command and what it may see.
pub(crate) struct Sandbox<'a> {
    /// The shell command.
    pub(crate) command: &'a str,
    /// Working folder, with `in/` and `out/`.
    pub(crate) folder: &'a Path,
    /// The whole environment.
    pub(crate) env: BTreeMap<String, String>,
    /// Time limit.
    pub(crate) timeout: Option<Duration>,
    /// Ends it when flowrun is killed.
    pub(crate) warden: &'a Warden,
}

/// The variables of the surrounding environment that a command may see.
pub(crate) fn inherited(env: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    chosen(env, |name| is_local(name) || is_locale(name))
}

/// Those of them that only mean something on the machine that they are of.
pub(crate) fn local(env: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    chosen(env, is_local)
}

fn is_local(name: &str) -> bool {
    matches!(name, "PATH" | "HOME")
}

/// Those of them that say in which language and order programs print.
pub(crate) fn locale(env: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    chosen(env, is_locale)
}

fn is_locale(name: &str) -> bool {
    name == "LANG" || name.starts_with("LC_")
}

fn chosen(
    env: &BTreeMap<String, String>,
    choose: impl Fn(&str) -> bool,
) -> BTreeMap<String, String> {
    let chosen = env.iter().filter(|(name, _)| choose(name));
    chosen.map(|(n, v)| (n.clone(), v.clone())).collect()
}

impl Sandbox<'_> {
    /// Runs the command to its end. Output goes to the log line by line.
    pub(crate) fn run(
        &self,
        cancel: &Cancel,
        reporter: &Arc<dyn StepReporter>,
    ) -> Result<(), StepError> {
        self.warden.wake();
        let mut child = start(
            Command::new("/bin/sh")
                .args(["-eu", "-c", self.command])
                .current_dir(self.folder)
                .env_clear()
                .envs(&self.env)
                .stdin(no_input())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .process_group(0),
        )
        .map_err(|e| StepError::failed(format!("`sh` cannot be started: {e}")))?;
        let tail = Arc::new(Tail::default());
        let mut streams = Streams::of(&mut child, reporter, &tail);
        let status = self.wait(&mut child, &mut streams, cancel);
        if !streams.drain() {
            // Only a process that left the group can hold them longer.
            reporter.warning("the command left a process behind that still holds its output");
        }
        let status = status?;
        if status.success() {
            return Ok(());
        }
        let text = format!("the command failed ({status})\n{}", tail.text());
        let error = StepError::failed(text.trim_end());
        // In a container the process that takes most goes first, and this one lives.
        let killed = Signal::SIGKILL as i32;
        Err(match status.signal() == Some(killed) || status.code() == Some(128 + killed) {
            true => error.help(
                "it was killed from outside (signal 9), as what uses up its memory is: give more in `resources.memory`, or ask for less",
            ),
            false => error,
        })
    }

    /// Waits for the command, stops it when asked or when time is up, and ends
    /// whatever it left running in its group.
    fn wait(
        &self,
        child: &mut Child,
        streams: &mut Streams,
        cancel: &Cancel,
    ) -> Result<ExitStatus, StepError> {
        let guarded = self.warden.guard(child.id());
        let started = Instant::now();
        let stopped = ended_within(child, Some(&mut *streams), None, || {
            if cancel.is_cancelled() {
                return Some(StepError::cancelled());
            }
            let limit = self.timeout.filter(|limit| started.elapsed() > *limit);
            limit.map(timed_out)
        });
        if stopped.is_some() {
            signal(child, Signal::SIGTERM);
            let killed = || cancel.is_killed().then_some(());
            ended_within(child, Some(streams), Some(GRACE), killed);
        }
        // The leader was not reaped yet, so its group's number is still its own.
        signal(child, Signal::SIGKILL);
        drop(guarded);
        let status = child
            .wait()
            .map_err(|e| StepError::failed(format!("cannot wait for the command: {e}")))?;
        match stopped {
            Some(error) => Err(error),
            None => Ok(status),
        }
    }
}

/// The error of an attempt that took too long.
pub(crate) fn timed_out(limit: Duration) -> StepError {
    StepError::failed(format!(
        "took longer than its `timeout` of {}",
        humantime::format_duration(limit)
    ))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Mutex;

    use flowrun_cache::{Cache, OpenOptions};
    use nix::unistd::Pid;

    use super::*;

    #[derive(Default)]
    struct Lines(Mutex<Vec<String>>);

    impl StepReporter for Lines {
        fn progress(&self, _: u64, _: u64, _: &str, _: &str) {}
        fn warning(&self, text: &str) {
            self.log(&format!("warning: {text}"));
        }
        fn log(&self, text: &str) {
            self.0.lock().unwrap().push(text.to_owned());
        }
    }

    fn run(
        command: &str,
        timeout: Option<Duration>,
        cancel: &Cancel,
    ) -> (Result<(), StepError>, Vec<String>, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(&dir.path().join("cache"), &OpenOptions::no_wait("test")).unwrap();
        let warden = Warden::new(&Arc::new(cache));
        let lines = Arc::new(Lines::default());
        let reporter: Arc<dyn StepReporter> = lines.clone();
        let mut env = BTreeMap::from([("PATH".to_owned(), "/usr/bin:/bin".to_owned())]);
        env.insert("x".into(), "in/x".into());
        let sandbox = Sandbox {
            command,
            folder: dir.path(),
            env,
            timeout,
            warden: &warden,
        };
        let result = sandbox.run(cancel, &reporter);
        let lines = lines.0.lock().unwrap().clone();
        (result, lines, dir)
    }

    /// Waits until a process that was killed is gone, or a zombie.
    fn is_gone(pid: &str) -> bool {
        let pid = Pid::from_raw(pid.trim().parse().unwrap());
        (0..1000).any(|_| {
            std::thread::sleep(Duration::from_millis(5));
            nix::sys::signal::kill(pid, None).is_err()
                || std::fs::read_to_string(format!("/proc/{pid}/stat"))
                    .is_ok_and(|stat| stat.contains(") Z "))
        })
    }

    #[test]
    fn both_streams_are_logged_and_the_environment_is_bare() {
        let script = "echo $x; echo oops >&2; env | cut -d= -f1 | sort | tr '\\n' ' '";
        let (result, mut lines, _) = run(script, None, &Cancel::default());
        result.unwrap();
        lines.sort();
        assert_eq!(lines[0].trim(), "PATH PWD x");
        assert_eq!(lines[1..], ["in/x", "oops"]);
    }

    #[test]
    fn there_is_nothing_to_read() {
        for _ in 0..2 {
            let (result, lines, _) = run("readlink /proc/self/fd/0; cat", None, &Cancel::default());
            result.unwrap();
            assert_eq!(lines, ["/dev/null"]);
        }
    }

    #[test]
    fn a_failure_shows_the_last_lines() {
        let script = "for i in $(seq 50); do echo line $i; done; false; echo not reached";
        let (result, lines, _) = run(script, None, &Cancel::default());
        let message = result.unwrap_err().message;
        assert!(message.starts_with("the command failed (exit status: 1)\nline 31\n"));
        assert!(message.ends_with("line 50"));
        assert_eq!(lines.len(), 50);
        let (result, _, _) = run("echo $nothing", None, &Cancel::default());
        assert!(result.unwrap_err().message.contains("nothing"));
    }

    #[test]
    fn one_that_is_killed_says_what_kills() {
        for (script, killed) in [
            ("kill -KILL $$", true),
            ("sh -c 'kill -KILL $$'", true),
            ("exit 3", false),
            ("kill -TERM $$", false),
        ] {
            let (result, _, _) = run(script, None, &Cancel::default());
            let help = result.unwrap_err().help.unwrap_or_default();
            assert_eq!(
                help.contains("`resources.memory`"),
                killed,
                "{script}: {help}"
            );
        }
    }

    #[test]
    fn a_very_long_line_is_cut_and_a_progress_bar_is_not_one_line() {
        let script = "printf 'a\\rb\\r\\n'; head -c 20000 /dev/zero | tr '\\0' z";
        let (result, lines, _) = run(script, None, &Cancel::default());
        result.unwrap();
        let sizes: Vec<usize> = lines.iter().map(String::len).collect();
        assert_eq!(sizes, [1, 1, 0, 8192, 8192, 3616]);
    }

    #[test]
    fn time_up_kills_the_whole_group_even_if_it_does_not_listen() {
        let script = "trap '' TERM; (trap '' TERM; sleep 100) & echo $! > bg; sleep 100";
        let limit = Duration::from_millis(300);
        let (result, _, dir) = run(script, Some(limit), &Cancel::default());
        assert_eq!(
            result.unwrap_err().message,
            "took longer than its `timeout` of 300ms"
        );
        assert!(is_gone(
            &std::fs::read_to_string(dir.path().join("bg")).unwrap()
        ));
    }

    #[test]
    fn a_command_that_ends_takes_its_background_with_it() {
        let (result, _, dir) = run("sleep 100 & echo $! > bg", None, &Cancel::default());
        result.unwrap();
        assert!(is_gone(
            &std::fs::read_to_string(dir.path().join("bg")).unwrap()
        ));
    }

    #[test]
    fn cancelling_stops_the_command() {
        let cancel = Cancel::default();
        let soon = cancel.clone();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            soon.cancel();
        });
        let (result, _, _) = run("sleep 100", None, &cancel);
        thread.join().unwrap();
        let kind = result.unwrap_err().kind;
        assert_eq!(kind, crate::step::StepErrorKind::Cancelled);
    }

    #[test]
    fn a_second_wish_to_stop_leaves_no_time_to_clean_up() {
        let cancel = Cancel::default();
        let soon = cancel.clone();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            soon.kill();
        });
        let script = "trap 'sleep 1.9; echo > cleaned' TERM; sleep 100 & echo $! > bg; wait";
        let (result, _, dir) = run(script, None, &cancel);
        thread.join().unwrap();
        assert!(result.is_err() && !dir.path().join("cleaned").exists());
        assert!(is_gone(
            &std::fs::read_to_string(dir.path().join("bg")).unwrap()
        ));
    }

    #[test]
    fn only_path_home_and_locale_are_inherited() {
        let names = ["PATH", "HOME", "LANG", "LC_ALL", "API_KEY", "PYTHONPATH"];
        let env = names.map(|n| (n.to_owned(), "v".to_owned()));
        let kept = inherited(&BTreeMap::from(env));
        assert_eq!(
            Vec::from_iter(kept.keys()),
            ["HOME", "LANG", "LC_ALL", "PATH"]
        );
        assert_eq!(Vec::from_iter(local(&kept).keys()), ["HOME", "PATH"]);
        assert_eq!(Vec::from_iter(locale(&kept).keys()), ["LANG", "LC_ALL"]);
    }
}
