//! What a person or a program sees of a run: a fold over its events.

mod json;
mod plain;
mod table;
mod terminal;

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::path::PathBuf;

use flowrun_cache::CacheReader;
use flowrun_engine::event::{RunEvent, StepStatus};
use flowrun_engine::record::RunRecord;
use indicatif::MultiProgress;
use serde_json::Value;
use tokio::sync::mpsc::UnboundedReceiver;

use self::json::JsonReporter;
use self::plain::PlainReporter;
use self::terminal::TerminalReporter;
use crate::args::GlobalArgs;
use crate::output::{bytes, count};

/// Events that are taken together, when so many wait.
const AT_ONCE: usize = 256;
/// Earlier runs that are looked at for how long a step took.
const EARLIER: usize = 3;

/// One way of showing events.
pub(crate) enum Reporter {
    Json(JsonReporter),
    Plain(PlainReporter),
    Terminal(TerminalReporter),
}

impl Reporter {
    /// JSON when asked for; bars on a terminal that can draw them; plain lines when piped, in
    /// a dumb terminal and in continuous integration.
    ///
    /// `steps` gives the names of those that may run, of the pipeline `pipeline`.
    pub(crate) fn new(
        global: &GlobalArgs,
        pipeline: &str,
        steps: impl FnOnce() -> BTreeSet<String>,
    ) -> Self {
        if global.json {
            Self::Json(JsonReporter::default())
        } else if draws() && !global.quiet {
            let earlier = Earlier::new(pipeline, steps(), global);
            Self::Terminal(TerminalReporter::new(earlier))
        } else {
            Self::Plain(PlainReporter::new(global.quiet, global.verbose))
        }
    }

    /// Says things beside the events.
    pub(crate) fn teller(&self) -> Teller {
        match self {
            Self::Terminal(reporter) => Teller(Some(reporter.bars())),
            Self::Json(_) | Self::Plain(_) => Teller(None),
        }
    }

    /// JSON when asked for; else plain lines.
    pub(crate) fn plain(global: &GlobalArgs) -> Self {
        if global.json {
            Self::Json(JsonReporter::default())
        } else {
            Self::Plain(PlainReporter::new(global.quiet, global.verbose))
        }
    }

    /// Shows events until the run is over; `hear` hears of them too.
    ///
    /// # Errors
    /// As [`Reporter::end`].
    pub(crate) fn follow(
        mut self,
        mut events: UnboundedReceiver<RunEvent>,
        mut hear: impl FnMut(&RunEvent),
    ) -> io::Result<()> {
        let mut batch = Vec::new();
        while events.blocking_recv_many(&mut batch, AT_ONCE) > 0 {
            for event in batch.drain(..) {
                hear(&event);
                self.take(&event);
            }
            self.flush();
        }
        self.end()
    }

    /// Shows events that were recorded, one JSON object a line, to a program.
    pub(crate) fn show_recorded(&mut self, lines: &[u8]) {
        if let Self::Json(reporter) = self {
            reporter.write(lines);
        }
    }

    /// # Errors
    /// When a program asked for events, and they could not be written although it reads them.
    pub(crate) fn end(self) -> io::Result<()> {
        match self {
            Self::Json(reporter) => reporter.end(),
            Self::Plain(_) | Self::Terminal(_) => Ok(()),
        }
    }

    /// Shows one event.
    pub(crate) fn show(&mut self, event: &RunEvent) {
        self.take(event);
        self.flush();
    }

    /// Prints what plain lines have gathered.
    fn flush(&mut self) {
        if let Self::Plain(reporter) = self {
            reporter.flush();
        }
    }

    fn take(&mut self, event: &RunEvent) {
        match self {
            Self::Json(reporter) => reporter.show(event),
            Self::Plain(reporter) => reporter.show(event),
            Self::Terminal(reporter) => reporter.show(event),
        }
    }
}

/// Says a line on stderr, above the bars where there are any.
pub(crate) struct Teller(Option<MultiProgress>);

impl Teller {
    /// Says it. Standard error may be gone with the terminal: then there is nobody to tell.
    pub(crate) fn say(&self, line: &str) {
        let _ = match &self.0 {
            Some(bars) => bars.println(line),
            None => writeln!(std::io::stderr(), "{line}"),
        };
    }
}

fn draws() -> bool {
    let is = |name: &str, value: &str| std::env::var_os(name).is_some_and(|v| v == value);
    let in_ci = std::env::var_os("CI").is_some_and(|v| !v.is_empty() && v != "false");
    console::user_attended_stderr() && !is("TERM", "dumb") && !in_ci
}

/// How long the steps of a pipeline took when they last ran. Read when a step starts: records
/// of large runs are long, and a run that does nothing needs none.
pub(crate) struct Earlier {
    pipeline: String,
    /// Its steps that may run.
    steps: BTreeSet<String>,
    cache_dir: PathBuf,
    took: OnceCell<BTreeMap<String, u64>>,
}

impl Earlier {
    fn new(pipeline: &str, steps: BTreeSet<String>, global: &GlobalArgs) -> Self {
        Self {
            pipeline: pipeline.to_owned(),
            steps,
            cache_dir: global.cache_dir.clone(),
            took: OnceCell::new(),
        }
    }

    /// Milliseconds that the steps and items which did not end yet took, where they are known,
    /// and the longest of them.
    fn rest(&self, ended: &BTreeSet<String>) -> (u64, u64) {
        let took = self.took.get_or_init(|| self.read()).iter();
        let rest = took.filter(|(id, _)| !ended.contains(*id) && self.has(id));
        rest.fold((0, 0), |(all, longest), (_, &ms)| {
            (all + ms, longest.max(ms))
        })
    }

    /// The step, or the item of a step, may run.
    fn has(&self, id: &str) -> bool {
        let step = id.split_once('[').map_or(id, |(step, _)| step);
        self.steps.contains(step)
    }

    /// Milliseconds, where one of the newest runs did the step.
    fn took(&self, step: &str) -> Option<u64> {
        self.took.get_or_init(|| self.read()).get(step).copied()
    }

    fn read(&self) -> BTreeMap<String, u64> {
        let mut took = BTreeMap::new();
        let runs = CacheReader::open(&self.cache_dir).runs();
        let records = runs.iter().filter_map(|dir| RunRecord::load(dir).ok());
        let same = records.filter(|record| record.pipeline == self.pipeline);
        for step in same.take(EARLIER).flat_map(|record| record.steps) {
            if step.status == StepStatus::Ran {
                took.entry(step.step).or_insert(step.took_ms);
            }
        }
        took
    }
}

/// How far the results are on their way to the remote cache.
pub(crate) fn uploading(event: &RunEvent) -> String {
    let RunEvent::Uploading {
        objects,
        of_objects,
        bytes: moved,
        of_bytes,
    } = event
    else {
        return String::new();
    };
    format!(
        "sending to the remote cache: {objects} of {}, {} of {}",
        count(*of_objects as usize, "object"),
        bytes(*moved),
        bytes(*of_bytes)
    )
}

/// What the remote cache was sent.
pub(crate) fn uploaded(event: &RunEvent) -> String {
    let RunEvent::Uploaded {
        to,
        results,
        objects,
        bytes: moved,
        waiting,
    } = event
    else {
        return String::new();
    };
    let waiting = match *waiting as usize {
        0 => String::new(),
        n => {
            let left = count(n, "result");
            if *results + *objects == 0 {
                return format!("remote: {left} still to be sent to {to}, by a later run");
            }
            format!("; {left} still to be sent, by a later run")
        }
    };
    format!(
        "remote: {}, {}, {} to {to}{waiting}",
        count(*results as usize, "result"),
        count(*objects as usize, "object"),
        bytes(*moved)
    )
}

/// A duration for people: `12 ms`, `3.4 s`, `2 min 05 s`.
pub(crate) fn duration(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..60_000 => format!("{:.1} s", ms as f64 / 1000.0),
        _ => format!("{} min {:02} s", ms / 60_000, ms % 60_000 / 1000),
    }
}

/// How a step ended, in a word.
pub(crate) fn status_word(status: StepStatus) -> &'static str {
    match status {
        StepStatus::Ran => "ran",
        StepStatus::Cached => "cached",
        StepStatus::Failed => "failed",
        StepStatus::Skipped => "skipped",
    }
}

/// The same in colour, of seven places.
pub(crate) fn styled_status(status: StepStatus) -> console::StyledObject<String> {
    let word = console::style(format!("{:7}", status_word(status)));
    match status {
        StepStatus::Ran => word.green(),
        StepStatus::Cached => word.dim(),
        StepStatus::Failed => word.red().bold(),
        StepStatus::Skipped => word.yellow(),
    }
}

/// Metrics on one line; fractions get three digits.
pub(crate) fn metric_text(metrics: &BTreeMap<String, Value>) -> String {
    let show = |value: &Value| match value {
        Value::Number(n) if n.is_f64() => format!("{:.3}", n.as_f64().unwrap_or(f64::NAN)),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let parts: Vec<String> = metrics
        .iter()
        .map(|(k, v)| format!("{k} {}", show(v)))
        .collect();
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_known_from_earlier_runs() {
        let took = [
            ("a", 100),
            ("b[1]", 2_000),
            ("b[2]", 3_000),
            ("gone", 9_000),
        ];
        let earlier = Earlier {
            pipeline: "p".into(),
            steps: ["a", "b", "c"].map(str::to_owned).into(),
            cache_dir: PathBuf::new(),
            took: OnceCell::from(BTreeMap::from(took.map(|(id, ms)| (id.to_owned(), ms)))),
        };
        let rest = |ended: &[&str]| {
            let ended = ended.iter().map(|id| (*id).to_owned());
            earlier.rest(&ended.collect())
        };
        assert_eq!(rest(&[]), (5_100, 3_000));
        assert_eq!(rest(&["a", "b[2]"]), (2_000, 2_000));
        assert_eq!(rest(&["a", "b[1]", "b[2]"]), (0, 0));
    }

    #[test]
    fn durations_are_short() {
        let shown = [5, 1_240, 125_000].map(duration);
        assert_eq!(shown, ["5 ms", "1.2 s", "2 min 05 s"]);
    }
}
