//! `load`: reads labelled texts from a file, a URL or the Hugging Face hub, or,
//! where none can be had, from the stand-in that comes with the program.

mod rows_of;
mod source;

use std::collections::BTreeMap;

use flowrun_engine::step::{Port, Step, StepContext, StepError, StepErrorKind, StepOutcome, World};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::rows::{JsonlWriter, Row, write_json};
use crate::schema_of;
use crate::stand_in;
use crate::table::records;

pub(crate) use self::rows_of::RowsOf;
use self::source::{Located, SourceSpec};

/// A fifth of the values of a byte.
const FIFTH: u8 = 51;
/// The fact that says what is read: what names the content of the files, or the stand-in.
const DATA: &str = "data";
/// Rows between two looks at the cancel flag.
const LOOK_EVERY: usize = 4096;

/// The step kind.
pub struct Load;

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// Name of the data set: the first part of every row id.
    name: String,
    /// Where the training rows are.
    train: SourceSpec,
    /// Where the test rows are. Without it a fifth of the labelled training rows is set aside.
    /// A row's text alone decides where it goes: equal texts stay together, and rows that are
    /// added later move no others.
    #[serde(default)]
    test: Option<SourceSpec>,
    /// Column of the text.
    #[serde(default = "text")]
    text: String,
    /// Column of the label. A row where it is empty has no label.
    #[serde(default = "label")]
    label: String,
    /// When the data cannot be had, use the stand-in that comes with the program, and say so.
    #[serde(default)]
    stand_in: bool,
}

fn text() -> String {
    "text".to_owned()
}

fn label() -> String {
    "label".to_owned()
}

/// What was loaded; the artifact `about`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DataSetInfo {
    /// Name of the data set, or `stand-in`.
    pub dataset: String,
    /// True when the stand-in was used.
    pub stand_in: bool,
    /// Where the rows came from, for people.
    pub source: String,
    /// Training rows.
    pub train_rows: usize,
    /// Test rows.
    pub test_rows: usize,
}

impl Step for Load {
    fn kind(&self) -> &'static str {
        "load"
    }
    fn version(&self) -> u32 {
        2
    }
    fn about(&self) -> &'static str {
        "Reads labelled texts from CSV, JSONL or Parquet: a file, a URL with its sha256, or the Hugging Face hub."
    }
    fn params_schema(&self) -> Value {
        schema_of::<Params>()
    }
    fn inputs(&self) -> Vec<Port> {
        Vec::new()
    }
    fn outputs(&self) -> Vec<Port> {
        vec![
            Port::new("train", "examples", "Training rows in the file's order."),
            Port::new("test", "examples", "Test rows in the file's order."),
            Port::new("about", "dataset", "Name, source and size of the data set."),
        ]
    }

    /// Which source is at hand enters the key: a result on the stand-in is never
    /// taken for one on the real data, nor the other way round.
    fn observe(&self, params: &Value, world: &World) -> Result<BTreeMap<String, Value>, StepError> {
        let params: Params = serde_json::from_value(params.clone())
            .map_err(|e| StepError::invalid(format!("params of `load`: {e}")))?;
        let data = match params.digests(world) {
            Ok((train, Some(test))) => json!({ "train": train, "test": test }),
            Ok((train, None)) => json!({ "train": train }),
            Err(error) if params.stand_in && error.kind == StepErrorKind::Transient => {
                json!({ "stand_in": stand_in::digest() })
            }
            Err(error) => return Err(error),
        };
        Ok(BTreeMap::from([(DATA.to_owned(), data)]))
    }

    fn run(&self, ctx: &StepContext) -> Result<StepOutcome, StepError> {
        let params: Params = ctx.params()?;
        let mut out = Written {
            train: JsonlWriter::create(&ctx.output("train"))?,
            test: JsonlWriter::create(&ctx.output("test"))?,
        };
        // The key says which rows these are, whatever is at hand here and now.
        let nothing = Value::Null;
        let data = ctx.observed.get(DATA).unwrap_or(&nothing);
        let info = match data["stand_in"].as_str() {
            Some(digest) => params.copy_stand_in(digest, &mut out, ctx)?,
            None => {
                let (train, test) = params.locate(data, &ctx.world)?;
                params.copy(&train, test.as_ref(), &mut out, ctx)?
            }
        };
        let info = DataSetInfo {
            train_rows: out.train.finish()?,
            test_rows: out.test.finish()?,
            ..info
        };
        write_json(&ctx.output("about"), &info)?;
        Ok(StepOutcome::default()
            .metric("dataset", info.dataset)
            .metric("train_rows", info.train_rows)
            .metric("test_rows", info.test_rows))
    }
}

/// Where the rows go.
struct Written {
    train: JsonlWriter,
    test: JsonlWriter,
}

impl Params {
    /// The files that the fact [`DATA`] names.
    fn locate(&self, data: &Value, world: &World) -> Result<(Located, Option<Located>), StepError> {
        let of = |source: &SourceSpec, name: &str| source.locate_observed(name, &data[name], world);
        let train = of(&self.train, "train")?;
        let test = self.test.as_ref().map(|test| of(test, "test"));
        Ok((train, test.transpose()?))
    }

    /// The sha256 of the files.
    fn digests(&self, world: &World) -> Result<(String, Option<String>), StepError> {
        let of = |source: &SourceSpec, name| match source.locate(name, world) {
            Ok(located) => located.digest(),
            // Where no stand-in can take its place, a run has the declared file or none.
            Err(error) if error.kind == StepErrorKind::Unseen && !self.stand_in => {
                source.sha256.clone().ok_or(error)
            }
            Err(error) => Err(error),
        };
        let train = of(&self.train, "train")?;
        let test = self.test.as_ref().map(|test| of(test, "test"));
        Ok((train, test.transpose()?))
    }

    fn rows<'a>(
        &'a self,
        from: &'a Located,
        split: &'a str,
    ) -> Result<impl Iterator<Item = Result<Row, StepError>> + 'a, StepError> {
        let rows = RowsOf {
            dataset: &self.name,
            split,
            text: &self.text,
            label: &self.label,
            origin: &from.origin,
        };
        Ok(rows.of(records(&from.path, from.format)?))
    }

    /// Copies the rows of the stand-in with this digest.
    fn copy_stand_in(
        &self,
        digest: &str,
        out: &mut Written,
        ctx: &StepContext,
    ) -> Result<DataSetInfo, StepError> {
        if digest != stand_in::digest() {
            let text = "the program has another stand-in data set here than where the run is";
            return Err(StepError::failed(text).help("use one version of flowrun everywhere"));
        }
        ctx.reporter.warning(&format!(
            "`{}` was neither at hand nor could it be fetched; using the stand-in data set \
             instead. No score of this run is a {} result.",
            self.name, self.name
        ));
        let (info, train, test) = stand_in::rows()?;
        train.iter().try_for_each(|row| out.train.write(row))?;
        test.iter().try_for_each(|row| out.test.write(row))?;
        Ok(info)
    }

    /// Copies the rows of the files, one by one.
    fn copy(
        &self,
        train: &Located,
        test: Option<&Located>,
        out: &mut Written,
        ctx: &StepContext,
    ) -> Result<DataSetInfo, StepError> {
        for (number, row) in self.rows(train, "train")?.enumerate() {
            if number % LOOK_EVERY == 0 {
                ctx.check_cancelled()?;
            }
            let row = row?;
            match test.is_none() && is_set_aside(&row) {
                true => out.test.write(&as_test_row(row, &self.name))?,
                false => out.train.write(&row)?,
            }
        }
        if let Some(test) = test {
            let mut rows = self.rows(test, "test")?;
            rows.try_for_each(|row| out.test.write(&row?))?;
        }
        Ok(DataSetInfo {
            dataset: self.name.clone(),
            stand_in: false,
            source: train.origin.clone(),
            train_rows: 0,
            test_rows: 0,
        })
    }
}

/// A fifth of the labelled rows are test rows.
fn is_set_aside(row: &Row) -> bool {
    let hex = flowrun_cache::Digest::of_bytes(row.text.as_bytes()).to_hex();
    row.label.is_some() && u8::from_str_radix(&hex[..2], 16).is_ok_and(|byte| byte < FIFTH)
}

fn as_test_row(mut row: Row, dataset: &str) -> Row {
    let train_id = format!("{dataset}:train:");
    row.id = row.id.replacen(&train_id, &format!("{dataset}:test:"), 1);
    row
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_is_what_the_key_names() {
        let dir = tempfile::tempdir().unwrap();
        let world = World {
            user_cache: dir.path().join("user"),
            offline: true,
            ..World::default()
        };
        let commit = |digit: &str| digit.repeat(40);
        let cache = dir.path().join("huggingface/hub/datasets--o--observed");
        for (digit, rows) in [("a", "old"), ("b", "new")] {
            let snapshot = cache.join("snapshots").join(commit(digit));
            std::fs::create_dir_all(&snapshot).unwrap();
            std::fs::write(snapshot.join("t.csv"), rows).unwrap();
        }
        // As a machine has it that looked before the branch moved.
        std::fs::create_dir_all(cache.join("refs")).unwrap();
        std::fs::write(cache.join("refs/main"), commit("a")).unwrap();
        let params = json!({
            "name": "n", "stand_in": true,
            "train": { "hf": { "repo": "o/observed", "file": "t.csv" } },
        });
        let params: Params = serde_json::from_value(params).unwrap();
        let read = |commit: &str, world: &World| {
            let data = json!({ "train": format!("o/observed@{commit}/t.csv") });
            let (train, _) = params.locate(&data, world)?;
            Ok::<_, StepError>((std::fs::read_to_string(&train.path).unwrap(), train.origin))
        };
        let (rows, origin) = read(&commit("b"), &world).unwrap();
        assert_eq!(rows, "new");
        assert!(origin.contains(&commit("b")), "{origin}");
        assert!(read(&commit("c"), &world).is_err(), "in one run");
        // As on a machine that has nothing yet.
        let elsewhere = World {
            user_cache: dir.path().join("elsewhere/user"),
            ..world.clone()
        };
        let error = read(&commit("c"), &elsewhere).unwrap_err();
        assert_eq!(error.kind, StepErrorKind::Transient);
        assert!(error.message.contains(&commit("c")), "{}", error.message);
        assert!(read("main", &world).is_err());
        assert!(params.locate(&Value::Null, &world).is_err());
    }

    fn row(i: usize, text: &str, label: Option<&str>) -> Row {
        Row::new(format!("d:train:{i}"), text.into(), label.map(Into::into))
    }

    fn set_aside(rows: Vec<Row>, dataset: &str) -> (Vec<Row>, Vec<Row>) {
        let (test, train): (Vec<Row>, _) = rows.into_iter().partition(is_set_aside);
        let test = test.into_iter().map(|row| as_test_row(row, dataset));
        (train, test.collect())
    }

    #[test]
    fn a_plan_fetches_nothing_and_says_what_it_cannot_know() {
        let home = std::env::temp_dir().join(format!("flowrun-load-{}", std::process::id()));
        let world = World {
            user_cache: home.clone(),
            look_only: true,
            ..World::default()
        };
        // Nobody listens there.
        let url = json!({ "url": "http://127.0.0.1:9/a.csv", "sha256": "0".repeat(64) });
        let seen = |train: &Value, stand_in: bool| {
            let params = json!({ "name": "n", "train": train, "stand_in": stand_in });
            let seen = Load.observe(&params, &world);
            seen.map(|mut seen| seen.remove("data"))
                .map_err(|error| error.kind)
        };
        let declared = json!({ "train": "0".repeat(64) });
        assert_eq!(seen(&url, false), Ok(Some(declared)));
        assert_eq!(seen(&url, true), Err(StepErrorKind::Unseen));
        let hub = json!({ "hf": { "repo": "owner/name", "file": "a.csv" } });
        assert_eq!(seen(&hub, false), Err(StepErrorKind::Unseen));
        assert!(!home.exists());
    }

    #[test]
    fn equal_texts_stay_together_and_new_rows_move_no_others() {
        let rows = |n: usize| -> Vec<Row> {
            let text = |i: usize| format!("text {}", i / 2);
            (0..n).map(|i| row(i, &text(i), Some("l"))).collect()
        };
        let (train, test) = set_aside(rows(1000), "d");
        assert_eq!(train.len() + test.len(), 1000);
        assert!((150..250).contains(&test.len()), "{}", test.len());
        assert!(test.iter().all(|row| row.id.starts_with("d:test:")));
        let texts: std::collections::BTreeSet<&str> =
            test.iter().map(|r| r.text.as_str()).collect();
        assert!(train.iter().all(|row| !texts.contains(row.text.as_str())));
        let (_, more) = set_aside(rows(2000), "d");
        assert_eq!(more[..test.len()], test);
    }

    #[test]
    fn a_row_without_a_label_is_no_test_row() {
        let rows = (0..100).map(|i| row(i, &i.to_string(), None)).collect();
        assert!(set_aside(rows, "d").1.is_empty());
    }
}
