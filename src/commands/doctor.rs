//! `flowrun doctor`: what this machine lacks to run a pipeline. Looks only: it downloads
//! nothing, and asks a model's server no more than which models it has.

mod needs;

use std::path::Path;

use console::style;
use flowrun_cache::{FileSystem, LockWait, Reach, Survey};
use flowrun_steps::models::gpu;
use serde::Serialize;

use self::needs::needs;
use crate::args::{DoctorArgs, GlobalArgs};
use crate::exit::{Exit, Failure};
use crate::output::{self, bytes};
use crate::surroundings;

/// Free bytes below which a run may fill the disk.
const LITTLE_SPACE: u64 = 2_000_000_000;

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    /// All is there.
    Ok,
    /// It will do, but.
    Warn,
    /// Something is missing that a run needs.
    Missing,
}

/// One line of the report.
#[derive(Debug, Serialize)]
struct Finding {
    what: String,
    status: Status,
    text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    help: Option<String>,
    #[serde(skip)]
    exit: Exit,
}

impl Finding {
    fn ok(what: &str, text: impl Into<String>) -> Self {
        Self {
            what: what.to_owned(),
            status: Status::Ok,
            text: text.into(),
            help: None,
            exit: Exit::Ok,
        }
    }
    fn warn(what: &str, text: impl Into<String>, help: &str) -> Self {
        Self {
            status: Status::Warn,
            help: Some(help.to_owned()),
            ..Self::ok(what, text)
        }
    }
    fn missing(what: &str, text: impl Into<String>, help: &str) -> Self {
        Self {
            status: Status::Missing,
            help: Some(help.to_owned()),
            exit: Exit::Invalid,
            ..Self::ok(what, text)
        }
    }
}

/// Looks at the machine, and at what the pipeline names. Exit code 6 when the cache cannot be
/// used, 3 when something else is missing.
pub(crate) fn doctor(args: &DoctorArgs, global: &GlobalArgs) -> Result<Exit, Failure> {
    let mut found = vec![machine(), cache(global), disk(&global.cache_dir)];
    found.extend(locks(&global.cache_dir));
    found.extend(remote(global));
    found.extend(device(global));
    let named = args.select.pipeline.is_some();
    match surroundings::load(&args.select, global) {
        Ok(loaded) => {
            let (pipeline, world) = (&loaded.pipeline, &loaded.world);
            let text = format!("{}: no errors", pipeline.file.display());
            found.push(Finding::ok("pipeline", text));
            needs(pipeline, world, &mut found);
        }
        // Without a pipeline the machine alone is looked at.
        Err(failure) if failure.exit() == Exit::Usage && !named => {}
        Err(failure) => found.push(Finding::missing(
            "pipeline",
            failure.to_string().trim_end(),
            "`flowrun check` says the same",
        )),
    }
    let exits = found.iter().map(|f| f.exit);
    let exit = exits.max_by_key(|exit| *exit as u8).unwrap_or(Exit::Ok);
    if global.json {
        output::json(&found)?;
    } else {
        output::print(&found.iter().map(text).collect::<String>())?;
    }
    Ok(exit)
}

fn text(finding: &Finding) -> String {
    let mark = match finding.status {
        Status::Ok => style("ok     ").green(),
        Status::Warn => style("warning").yellow(),
        Status::Missing => style("missing").red().bold(),
    };
    let mut lines = finding.text.lines();
    let mut out = format!("{mark}  {}: {}\n", finding.what, lines.next().unwrap_or(""));
    for line in lines {
        out.push_str(&format!("         {line}\n"));
    }
    if let Some(help) = &finding.help {
        out.push_str(&format!("         {} {help}\n", style("help:").cyan()));
    }
    out
}

fn machine() -> Finding {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let free = info.lines().find_map(|line| {
        let kib = line
            .strip_prefix("MemAvailable:")?
            .trim()
            .strip_suffix("kB")?;
        Some(kib.trim().parse::<u64>().ok()? << 10)
    });
    let memory = free.map(|free| format!(", {} of memory free", bytes(free)));
    Finding::ok(
        "machine",
        format!(
            "flowrun {}, {}{}",
            env!("CARGO_PKG_VERSION"),
            output::count(cores, "core"),
            memory.unwrap_or_default()
        ),
    )
}

/// Whether the cache can be written, and who holds it.
fn cache(global: &GlobalArgs) -> Finding {
    let dir = &global.cache_dir;
    let place = dir.display();
    if !dir.exists() {
        let there = |path: &&Path| path.exists() || path.as_os_str().is_empty();
        let around = match dir.ancestors().skip(1).find(there) {
            Some(path) if !path.as_os_str().is_empty() => path,
            _ => Path::new("."),
        };
        return match tempfile::tempfile_in(around) {
            Ok(_) => Finding::ok("cache", format!("{place} is made by the first run")),
            Err(e) => unusable(format!("{place} cannot be made: {e}")),
        };
    }
    match surroundings::hold_cache(global, LockWait::NoWait) {
        Ok(cache) => {
            let size = Survey::of(cache.dir()).total().bytes;
            Finding::ok("cache", format!("{place}, {}, free to use", bytes(size)))
        }
        Err(failure) if failure.is_locked() => Finding::warn(
            "cache",
            failure.to_string(),
            "a run waits for it, unless `--no-wait` is given",
        ),
        Err(failure) => unusable(failure.to_string()),
    }
}

/// Whether the cache folder can be used from several machines, where they may see it.
fn locks(cache_dir: &Path) -> Option<Finding> {
    let found = FileSystem::of(cache_dir)?;
    let what = "cache folder";
    let kind = &found.kind;
    let several = "one run after the other; for several at once give each machine a cache folder of its own and a common `--remote`";
    match found.reach {
        Reach::Local => None,
        Reach::All => Some(Finding::ok(
            what,
            format!("on {kind}, whose locks hold for all machines: their runs wait for each other"),
        )),
        Reach::Unknown => Some(Finding::warn(
            what,
            format!(
                "on {kind}: it is not known whether its locks hold for other machines that see it"
            ),
            several,
        )),
        Reach::ThisMachine | Reach::None => Some(Finding::warn(
            what,
            found.danger().unwrap_or_default(),
            several,
        )),
    }
}

/// Whether the remote cache, if one is named, lets itself be read.
fn remote(global: &GlobalArgs) -> Option<Finding> {
    let what = "remote cache";
    let help = "runs go on without it; look at the URL, the server and the credentials (AWS_…, GOOGLE_…, AZURE_…)";
    let remote = match surroundings::open_remote(global) {
        Some(Ok(remote)) => remote,
        Some(Err(error)) => return Some(Finding::missing(what, error.to_string(), help)),
        None if global.remote.is_some() => {
            let help = "leave `--offline` out to ask it";
            return Some(Finding::warn(what, "it was not asked", help));
        }
        None => return None,
    };
    let url = remote.url();
    Some(match remote.check() {
        Ok(()) if remote.is_read_only() => Finding::ok(what, format!("{url} can be read")),
        Ok(()) => {
            let waiting = match remote.waiting() {
                0 => String::new(),
                n => format!("; {} to be sent", output::count(n, "result")),
            };
            Finding::ok(what, format!("{url} can be read{waiting}"))
        }
        Err(why) => Finding::warn(what, format!("{url} cannot be read: {why}"), help),
    })
}

/// Where models compute, when that was said.
fn device(global: &GlobalArgs) -> Option<Finding> {
    let asked = global.device.as_deref();
    let asked = asked.filter(|asked| !matches!(*asked, "" | "cpu"))?;
    Some(match gpu(asked) {
        Ok(Some(name)) => Finding::ok("device", name),
        Ok(None) => Finding::ok("device", "the processor: no GPU can be used"),
        Err(error) => {
            let help = error.help.unwrap_or_default();
            Finding::missing("device", error.message, &help)
        }
    })
}

fn unusable(text: String) -> Finding {
    Finding {
        exit: Exit::Cache,
        ..Finding::missing("cache", text, "choose another place with `--cache-dir`")
    }
}

#[allow(
    clippy::useless_conversion,
    reason = "the counts are narrower on other systems"
)]
fn disk(cache_dir: &Path) -> Finding {
    let there = cache_dir
        .ancestors()
        .find(|p| p.is_dir())
        .unwrap_or(Path::new("."));
    match nix::sys::statvfs::statvfs(there) {
        Err(e) => Finding::warn(
            "disk",
            format!("its space is not known: {e}"),
            "look at it with `df`",
        ),
        Ok(stat) => {
            let free = u64::from(stat.blocks_available()) * u64::from(stat.fragment_size());
            let text = format!("{} free", bytes(free));
            if free < LITTLE_SPACE {
                return Finding::warn("disk", text, "`flowrun cache gc --max-size 0` makes room");
            }
            Finding::ok("disk", text)
        }
    }
}
