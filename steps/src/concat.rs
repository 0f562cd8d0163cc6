//! `concat`: one list of rows out of several, such as those of the shards of a `foreach`.

use std::fs::File;
use std::io::{BufReader, BufWriter, Write};

use flowrun_engine::step::{Port, Step, StepContext, StepError, StepOutcome};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::rows::next_line;
use crate::schema_of;

/// The step kind.
pub(crate) struct Concat;

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {}

impl Step for Concat {
    fn kind(&self) -> &'static str {
        "concat"
    }
    fn version(&self) -> u32 {
        1
    }
    fn about(&self) -> &'static str {
        "Puts several lists of rows one after the other, in the order given."
    }
    fn params_schema(&self) -> Value {
        schema_of::<Params>()
    }
    fn inputs(&self) -> Vec<Port> {
        vec![Port::new("parts", "examples", "The lists, in order.").many()]
    }
    fn outputs(&self) -> Vec<Port> {
        vec![Port::new("rows", "examples", "All rows.")]
    }
    fn run(&self, ctx: &StepContext) -> Result<StepOutcome, StepError> {
        let Params {} = ctx.params()?;
        let dest = ctx.output("rows");
        let failed = |e: std::io::Error| StepError::io(&dest, &e);
        let mut out = BufWriter::new(File::create(&dest).map_err(failed)?);
        let (mut line, mut rows) = (Vec::new(), 0usize);
        // Line by line: there may be more rows than fit into memory.
        for part in ctx.input_list("parts") {
            ctx.check_cancelled()?;
            let unread = |e: std::io::Error| StepError::io(&part.path, &e);
            let mut reader = BufReader::new(File::open(&part.path).map_err(unread)?);
            while next_line(&mut reader, &mut line).map_err(unread)? {
                out.write_all(&line).map_err(failed)?;
                rows += 1;
            }
        }
        out.flush().map_err(failed)?;
        Ok(StepOutcome::default()
            .metric("parts", ctx.input_list("parts").len())
            .metric("rows", rows))
    }
}
