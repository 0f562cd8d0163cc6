//! `shard`: cuts rows into pieces of one size, so that many workers can take them.

use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::path::Path;

use flowrun_engine::step::{Port, Step, StepContext, StepError, StepOutcome};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::rows::next_line;
use crate::schema_of;

/// The step kind.
pub struct Shard;

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// Rows of a shard; the last one may have fewer. Rows that are appended later leave all
    /// shards before the last as they are.
    #[schemars(range(min = 1))]
    size: usize,
}

impl Step for Shard {
    fn kind(&self) -> &'static str {
        "shard"
    }
    fn version(&self) -> u32 {
        1
    }
    fn about(&self) -> &'static str {
        "Cuts rows into shards of one size, in order, for `foreach`."
    }
    fn params_schema(&self) -> Value {
        schema_of::<Params>()
    }
    fn inputs(&self) -> Vec<Port> {
        vec![Port::new("rows", "examples", "The rows.")]
    }
    fn outputs(&self) -> Vec<Port> {
        vec![Port::new("shards", "examples", "The shards, in order.").many()]
    }
    fn run(&self, ctx: &StepContext) -> Result<StepOutcome, StepError> {
        let params: Params = ctx.params()?;
        let place = |label: &str| ctx.output_item("shards", label);
        let (labels, rows) = cut(&ctx.input("rows")?.path, params.size, place)?;
        Ok(StepOutcome::default()
            .metric("shards", labels.len())
            .metric("rows", rows)
            .list("shards", labels))
    }
}

/// Line by line: there may be more rows than fit into memory. No rows are one empty shard.
fn cut(
    path: &Path,
    size: usize,
    place: impl Fn(&str) -> Result<std::path::PathBuf, StepError>,
) -> Result<(Vec<String>, usize), StepError> {
    let file = File::open(path).map_err(|e| StepError::io(path, &e))?;
    let mut reader = BufReader::new(file);
    let mut labels = Vec::new();
    let (mut line, mut rows) = (Vec::new(), 0);
    loop {
        let label = format!("{:06}", labels.len());
        let dest = place(&label)?;
        let failed = |e: std::io::Error| StepError::io(&dest, &e);
        let mut out = BufWriter::new(File::create(&dest).map_err(failed)?);
        let mut held = 0;
        let mut more = true;
        while held < size {
            more = next_line(&mut reader, &mut line).map_err(|e| StepError::io(path, &e))?;
            if !more {
                break;
            }
            out.write_all(&line).map_err(failed)?;
            held += 1;
        }
        out.flush().map_err(failed)?;
        if held == 0 && !labels.is_empty() {
            std::fs::remove_file(&dest).map_err(failed)?;
            return Ok((labels, rows));
        }
        labels.push(label);
        rows += held;
        if !more {
            return Ok((labels, rows));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn shards(text: &str, size: usize) -> Vec<String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows");
        std::fs::write(&path, text).unwrap();
        let place = |label: &str| Ok(dir.path().join(label));
        let (labels, rows) = cut(&path, size, place).unwrap();
        let read = |label: &String| std::fs::read_to_string(dir.path().join(label)).unwrap();
        let shards: Vec<String> = labels.iter().map(read).collect();
        assert_eq!(
            rows,
            shards.iter().map(|s| s.lines().count()).sum::<usize>()
        );
        shards
    }

    #[test]
    fn rows_are_cut_in_order_and_appended_ones_come_last() {
        assert_eq!(shards("1\n2\n\n3", 2), ["1\n2\n", "3\n"]);
        assert_eq!(shards("1\n2\n3\n4\n", 2), ["1\n2\n", "3\n4\n"]);
        assert_eq!(shards("1\n2\n3\n4\n5\n", 2)[..2], shards("1\n2\n3\n4\n", 2));
        assert_eq!(shards("", 2), [""]);
    }
}
