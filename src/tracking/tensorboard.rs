//! A run as an event file: the curve of the loss by step, numbers of the steps, and those of
//! checkpoints by the step that they were trained to. TensorBoard shows it, and so does what reads
//! its files.
//!
//! Source of the format: TensorFlow's `record_writer.cc` (a record is its length and its bytes, each
//! with a masked CRC-32C), `event.proto` and `summary.proto` (field numbers below).
//!
//! Invariant: the file is a sequence of whole records whenever the program may be killed, but for
//! the last one, which readers pass over. A run in which nothing ran leaves no file.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use flowrun_engine::event::{RunEvent, StepStatus};

use super::Tracker;
use super::points::{curve, parts, valid};

/// What the first record says of the format.
const VERSION: &str = "brain.Event:2";
/// What a checkpoint's name ends with before its step.
const TRAINED: &str = "total-trained-steps-";
/// What it begins with.
const EPOCHS: &str = "epochs-";
/// The student before any training, among items.
const BASE: &str = "base";

/// Writes the event file of a run.
pub(super) struct TensorBoard {
    /// Where each run gets a folder.
    folder: PathBuf,
    /// The run's own.
    run: Option<PathBuf>,
    /// Records that wait for something to run.
    waiting: Vec<u8>,
    /// Something ran.
    ran: bool,
    file: Option<File>,
    broken: Option<String>,
}

impl TensorBoard {
    /// Nothing is written yet.
    pub(super) fn new(folder: PathBuf) -> Self {
        Self {
            folder,
            run: None,
            waiting: Vec::new(),
            ran: false,
            file: None,
            broken: None,
        }
    }

    fn begin(&mut self, at: SystemTime, run: &str) {
        self.run = Some(self.folder.join(run));
        let mut event = time(at);
        field(&mut event, 3, VERSION.as_bytes());
        record(&mut self.waiting, &event);
    }

    fn step_ended(&mut self, at: SystemTime, event: &RunEvent) {
        let RunEvent::StepFinished {
            step,
            status,
            outputs,
            metrics,
            ..
        } = event
        else {
            return;
        };
        let mut curves = Vec::new();
        let prefix = valid(step);
        for output in outputs.values().filter(|output| output.ty == "loss") {
            for (name, value, step) in curve(Path::new(&output.path)) {
                self.scalar(at, step, &format!("{prefix}/{name}"), value);
                curves.push(name);
            }
        }
        let (place, trained) = place(step);
        for (name, value) in metrics {
            // The last point of its curve is the same.
            if let Some(value) = value.as_f64().filter(|_| !curves.contains(name)) {
                self.scalar(at, trained, &format!("{place}/{}", valid(name)), value);
            }
        }
        self.ran |= *status == StepStatus::Ran;
        self.write();
    }

    fn scalar(&mut self, at: SystemTime, step: u64, tag: &str, value: f64) {
        let mut number = Vec::new();
        field(&mut number, 1, tag.as_bytes());
        // Field 2, four bytes.
        number.push((2 << 3) | 5);
        number.extend((value as f32).to_le_bytes());
        let mut summary = Vec::new();
        field(&mut summary, 1, &number);
        let mut event = time(at);
        // Field 2, a number.
        event.push(2 << 3);
        varint(&mut event, step);
        field(&mut event, 5, &summary);
        record(&mut self.waiting, &event);
    }

    /// Writes what waits, once something ran.
    fn write(&mut self) {
        if !self.ran || self.broken.is_some() {
            return;
        }
        let records = std::mem::take(&mut self.waiting);
        let written = self.open().and_then(|file| file.write_all(&records));
        if let Err(error) = written {
            let folder = self.run.as_ref().unwrap_or(&self.folder);
            self.broken = Some(format!("{}: {error}", folder.display()));
        }
    }

    fn open(&mut self) -> std::io::Result<&mut File> {
        let file = match self.file.take() {
            Some(file) => file,
            None => {
                let folder = self.run.as_ref().unwrap_or(&self.folder);
                std::fs::create_dir_all(folder)?;
                let since = SystemTime::now().duration_since(UNIX_EPOCH);
                let seconds = since.unwrap_or_default().as_secs();
                // Readers know such files by this word.
                let name = format!("events.out.tfevents.{seconds}.flowrun");
                File::options()
                    .create(true)
                    .append(true)
                    .open(folder.join(name))?
            }
        };
        Ok(self.file.insert(file))
    }
}

impl Tracker for TensorBoard {
    fn hear(&mut self, at: SystemTime, event: &RunEvent) {
        match event {
            RunEvent::RunStarted { run, .. } => self.begin(at, run),
            RunEvent::StepFinished { .. } => self.step_ended(at, event),
            _ => {}
        }
    }

    fn end(self) -> Vec<String> {
        self.broken.into_iter().collect()
    }
}

/// Where the numbers of a step go, and the step that its checkpoint was trained to:
/// `evaluate[epochs-2-total-trained-steps-64]` is `evaluate` at 64, so that checkpoints make a curve.
fn place(step: &str) -> (String, u64) {
    let (name, Some(item)) = parts(step) else {
        return (valid(step), 0);
    };
    let base = item.strip_suffix(BASE);
    // The end of a longer word is another.
    let base = base.filter(|before| before.is_empty() || before.ends_with(['/', ',']));
    let found = item.split_once(TRAINED).and_then(|(before, rest)| {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let trained = rest[..digits].parse::<u64>().ok()?;
        // `epochs-2-` goes with it.
        let before = match before.rfind(EPOCHS) {
            Some(start) => &before[..start],
            None => before,
        };
        Some((format!("{before}{}", &rest[digits..]), trained))
    });
    let found = found.or_else(|| Some((base?.to_owned(), 0)));
    let Some((others, trained)) = found else {
        return (valid(step), 0);
    };
    let others = others.trim_matches(|c: char| !c.is_alphanumeric());
    match others {
        "" => (valid(name), trained),
        others => (valid(&format!("{name}[{others}]")), trained),
    }
}

/// The beginning of an event: field 1, the time in seconds.
fn time(at: SystemTime) -> Vec<u8> {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut event = vec![(1 << 3) | 1];
    event.extend(since.as_secs_f64().to_le_bytes());
    event
}

/// A field of bytes, a text or a message.
fn field(message: &mut Vec<u8>, number: u8, bytes: &[u8]) {
    message.push((number << 3) | 2);
    varint(message, bytes.len() as u64);
    message.extend(bytes);
}

fn varint(message: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        message.push((value as u8) | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}

fn record(file: &mut Vec<u8>, event: &[u8]) {
    let length = (event.len() as u64).to_le_bytes();
    file.extend(length);
    file.extend(masked(&length).to_le_bytes());
    file.extend(event);
    file.extend(masked(event).to_le_bytes());
}

/// A checksum that is not one of itself.
fn masked(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32 with Castagnoli's polynomial, reflected.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            let low = crc & 1;
            crc = (crc >> 1) ^ (0x82f6_3b78 & low.wrapping_neg());
        }
    }
    !crc
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;

    use flowrun_engine::event::OutputInfo;
    use serde_json::json;

    use super::*;

    #[test]
    fn the_checksum_is_castagnolis() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    }

    #[test]
    fn checkpoints_make_a_curve() {
        for (step, expected) in [
            ("load", ("load", 0)),
            ("evaluate[base]", ("evaluate", 0)),
            ("score[short/base]", ("score/short", 0)),
            ("score[short,base]", ("score/short", 0)),
            ("score[database]", ("score/database", 0)),
            ("x/evaluate[0.001/base]", ("x/evaluate/0.001", 0)),
            (
                "x/evaluate[0.001/epochs-1-total-trained-steps-8]",
                ("x/evaluate/0.001", 8),
            ),
            (
                "evaluate[epochs-2-total-trained-steps-64]",
                ("evaluate", 64),
            ),
            (
                "score[epochs-1-total-trained-steps-8,plain]",
                ("score/plain", 8),
            ),
            (
                "score[short,epochs-1-total-trained-steps-8]",
                ("score/short", 8),
            ),
            (
                "score[total-trained-steps-x]",
                ("score/total-trained-steps-x", 0),
            ),
            ("score[n=1]", ("score/n_1", 0)),
        ] {
            let (place, trained) = place(step);
            assert_eq!((place.as_str(), trained), expected, "{step}");
        }
    }

    /// The records of a file; each must be whole.
    fn records(mut bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        while !bytes.is_empty() {
            let (length, rest) = bytes.split_at(8);
            let size = u64::from_le_bytes(length.try_into().unwrap()) as usize;
            let (sum, rest) = rest.split_at(4);
            assert_eq!(sum, masked(length).to_le_bytes());
            let (event, rest) = rest.split_at(size);
            let (sum, rest) = rest.split_at(4);
            assert_eq!(sum, masked(event).to_le_bytes());
            all.push(event.to_vec());
            bytes = rest;
        }
        all
    }

    fn number(bytes: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..).step_by(7) {
            let (first, rest) = bytes.split_first().unwrap();
            *bytes = rest;
            value |= u64::from(first & 0x7f) << shift;
            if first & 0x80 == 0 {
                break;
            }
        }
        value
    }

    /// The fields of a message: number to bytes, numbers as eight bytes.
    fn fields(mut bytes: &[u8]) -> BTreeMap<u64, Vec<u8>> {
        let mut all = BTreeMap::new();
        while !bytes.is_empty() {
            let key = number(&mut bytes);
            let size = match key & 7 {
                0 => {
                    let value = number(&mut bytes);
                    all.insert(key >> 3, value.to_le_bytes().to_vec());
                    continue;
                }
                1 => 8,
                2 => number(&mut bytes) as usize,
                5 => 4,
                other => unreachable!("{other}"),
            };
            let (value, rest) = bytes.split_at(size);
            all.insert(key >> 3, value.to_vec());
            bytes = rest;
        }
        all
    }

    /// Tag, step and value of each scalar.
    fn scalars(events: &[Vec<u8>]) -> Vec<(String, u64, f32)> {
        let scalar = |event: &Vec<u8>| {
            let event = fields(event);
            assert_eq!(event[&1].len(), 8);
            let value = fields(&fields(&event[&5])[&1]);
            let tag = String::from_utf8(value[&1].clone()).unwrap();
            let step = u64::from_le_bytes(event[&2].clone().try_into().unwrap());
            let number = f32::from_le_bytes(value[&2].clone().try_into().unwrap());
            (tag, step, number)
        };
        events.iter().map(scalar).collect()
    }

    fn finished(step: &str, status: StepStatus, metrics: &[(&str, f64)], loss: &str) -> RunEvent {
        let output = |path: &str| OutputInfo {
            ty: "loss".to_owned(),
            digest: String::new(),
            path: path.to_owned(),
        };
        let outputs = Some(loss).filter(|path| !path.is_empty());
        let metric = |(name, value): &(&str, f64)| ((*name).to_owned(), json!(value));
        RunEvent::StepFinished {
            step: step.to_owned(),
            kind: "k".to_owned(),
            status,
            key: String::new(),
            took_ms: 1,
            why: String::new(),
            outputs: outputs
                .map(|path| ("loss".to_owned(), output(path)))
                .into_iter()
                .collect(),
            metrics: metrics.iter().map(metric).collect(),
            help: None,
            from: None,
        }
    }

    fn started(run: &str) -> RunEvent {
        RunEvent::RunStarted {
            run: run.to_owned(),
            pipeline: "p".to_owned(),
            steps: 1,
            at: String::new(),
        }
    }

    #[test]
    fn a_file_has_the_curves_and_numbers_of_a_run() {
        let folder = tempfile::tempdir().unwrap();
        let loss = folder.path().join("loss.json");
        std::fs::write(
            &loss,
            r#"[{"step": 1, "loss": 2.5}, {"step": 300, "loss": 0.5}]"#,
        )
        .unwrap();
        let runs = folder.path().join("runs");
        let mut tracker = TensorBoard::new(runs.clone());
        let at = SystemTime::now();
        tracker.hear(at, &started("r1"));
        let loss = loss.to_str().unwrap();
        let cached = finished(
            "train",
            StepStatus::Cached,
            &[("loss", 0.5), ("rows", 8.0)],
            loss,
        );
        tracker.hear(at, &cached);
        assert!(!runs.exists());
        let item = "score[epochs-1-total-trained-steps-300]";
        tracker.hear(
            at,
            &finished(item, StepStatus::Ran, &[("accuracy", 0.75)], ""),
        );
        assert!(tracker.end().is_empty());
        let files: Vec<PathBuf> = std::fs::read_dir(runs.join("r1"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        assert_eq!(files.len(), 1);
        assert!(files[0].to_str().unwrap().contains("tfevents"));
        let events = records(&std::fs::read(&files[0]).unwrap());
        assert_eq!(fields(&events[0])[&3], VERSION.as_bytes());
        let expected = [
            ("train/loss".to_owned(), 1, 2.5),
            ("train/loss".to_owned(), 300, 0.5),
            ("train/rows".to_owned(), 0, 8.0),
            ("score/accuracy".to_owned(), 300, 0.75),
        ];
        assert_eq!(scalars(&events[1..]), expected);
    }

    #[test]
    fn a_run_that_had_nothing_to_do_leaves_nothing_and_a_folder_that_cannot_be_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let runs = folder.path().join("runs");
        let mut tracker = TensorBoard::new(runs.clone());
        let at = SystemTime::now();
        tracker.hear(at, &started("r1"));
        tracker.hear(at, &finished("a", StepStatus::Cached, &[("x", 1.0)], ""));
        assert!(tracker.end().is_empty() && !runs.exists());

        std::fs::write(&runs, "a file").unwrap();
        let mut tracker = TensorBoard::new(runs.clone());
        tracker.hear(at, &started("r1"));
        tracker.hear(at, &finished("a", StepStatus::Ran, &[("x", 1.0)], ""));
        tracker.hear(at, &finished("b", StepStatus::Ran, &[("x", 1.0)], ""));
        let told = tracker.end();
        assert_eq!(told.len(), 1);
        assert!(told[0].starts_with(runs.to_str().unwrap()), "{told:?}");
    }
}
