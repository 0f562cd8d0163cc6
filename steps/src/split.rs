//! `split`: keeps a few gold labels and deletes the others.

use flowrun_engine::step::{Port, Step, StepContext, StepError, StepOutcome};
use flowrun_lm::python_random::PythonRandom;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::rows::{JsonlReader, JsonlWriter, Row};
use crate::schema_of;

/// Rows between two looks at the cancel flag.
const LOOK_EVERY: usize = 4096;

/// The step kind.
pub(crate) struct Split;

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// How many rows keep their gold label: the last ones after shuffling. All that have one
    /// when left out.
    #[serde(default)]
    labelled: Option<usize>,
    /// Seed of the shuffle; the order is that of Python's `random.Random(seed).shuffle`.
    #[serde(default)]
    seed: i64,
}

/// A gold label kept aside: only an audit may read it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Gold {
    /// Row id.
    pub(crate) id: String,
    /// Gold label.
    pub(crate) label: String,
}

impl Step for Split {
    fn kind(&self) -> &'static str {
        "split"
    }
    fn version(&self) -> u32 {
        4
    }
    fn about(&self) -> &'static str {
        "Shuffles rows; the last `labelled` with a label keep it, from the rest it is deleted."
    }
    fn params_schema(&self) -> Value {
        schema_of::<Params>()
    }
    fn inputs(&self) -> Vec<Port> {
        vec![Port::new("rows", "examples", "Labelled rows.")]
    }
    fn outputs(&self) -> Vec<Port> {
        vec![
            Port::new("labelled", "examples", "Rows with their gold label."),
            Port::new(
                "unlabelled",
                "examples",
                "Rows without a label, in shuffled order.",
            ),
            Port::new(
                "gold",
                "gold",
                "The deleted labels, to audit the teacher with.",
            ),
        ]
    }
    fn run(&self, ctx: &StepContext) -> Result<StepOutcome, StepError> {
        let params: Params = ctx.params()?;
        let path = &ctx.input("rows")?.path;
        // The rows stay in the file: only where each begins is shuffled.
        let (mut places, mut there) = (Places::default(), 0);
        for row in JsonlReader::<Row>::open(path)?.with_offsets() {
            let (place, row) = row?;
            places.push(place);
            there += usize::from(row.label.is_some());
        }
        let wanted = params.labelled.unwrap_or(there);
        let Some(mut hidden) = there.checked_sub(wanted) else {
            return Err(StepError::invalid(format!(
                "`labelled` is {wanted} but there are only {there} rows with a label"
            )));
        };
        places.shuffle(params.seed);
        let out = |port: &str| JsonlWriter::create(&ctx.output(port));
        let (mut labelled, mut unlabelled, mut gold) =
            (out("labelled")?, out("unlabelled")?, out("gold")?);
        let mut rows = JsonlReader::<Row>::open(path)?;
        for (number, place) in places.iter().enumerate() {
            if number % LOOK_EVERY == 0 {
                ctx.check_cancelled()?;
            }
            let mut row = rows.at(place)?;
            if keeps_label(&row, &mut hidden) {
                labelled.write(&row)?;
                continue;
            }
            if let Some(kept) = hide_label(&mut row) {
                gold.write(&kept)?;
            }
            unlabelled.write(&row)?;
        }
        gold.finish()?;
        Ok(StepOutcome::default()
            .metric("labelled", labelled.finish()?)
            .metric("unlabelled", unlabelled.finish()?))
    }
}

/// Where rows begin in their file, in bytes: 4 bytes of memory each below 4 GiB, else 8.
enum Places {
    Narrow(Vec<u32>),
    Wide(Vec<u64>),
}

impl Default for Places {
    fn default() -> Self {
        Self::Narrow(Vec::new())
    }
}

impl Places {
    fn push(&mut self, place: u64) {
        if let Self::Narrow(all) = self {
            match u32::try_from(place) {
                Ok(place) => {
                    all.push(place);
                    return;
                }
                Err(_) => *self = Self::Wide(all.iter().copied().map(u64::from).collect()),
            }
        }
        if let Self::Wide(all) = self {
            all.push(place);
        }
    }

    /// Python's order: the draws depend on how many there are alone.
    fn shuffle(&mut self, seed: i64) {
        let mut random = PythonRandom::new(seed);
        match self {
            Self::Narrow(all) => random.shuffle(all),
            Self::Wide(all) => random.shuffle(all),
        }
    }

    fn iter(&self) -> Box<dyn Iterator<Item = u64> + '_> {
        match self {
            Self::Narrow(all) => Box::new(all.iter().copied().map(u64::from)),
            Self::Wide(all) => Box::new(all.iter().copied()),
        }
    }
}

/// Whether a row keeps its label: all that have one do but the first `hidden`, counted down.
fn keeps_label(row: &Row, hidden: &mut usize) -> bool {
    let first = *hidden > 0;
    if row.label.is_some() {
        *hidden = hidden.saturating_sub(1);
    }
    row.label.is_some() && !first
}

/// Takes the label, and all but the text with it: a teacher's spelling, its reason or further columns
/// may say the label once more.
fn hide_label(row: &mut Row) -> Option<Gold> {
    let bare = Row::new(row.id.clone(), row.text.clone(), None);
    let Row { id, label, .. } = std::mem::replace(row, bare);
    label.map(|label| Gold { id, label })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_rows_with_a_label_keep_it() {
        let label = |i: usize| (i % 3 == 1 || i % 3 == 2).then(|| "l".to_owned());
        let rows = (0..6).map(|i| Row::new(i.to_string(), "t".into(), label(i)));
        let mut hidden = 2;
        let kept = rows.filter(|row| keeps_label(row, &mut hidden));
        assert_eq!(kept.map(|row| row.id).collect::<String>(), "45");
    }

    #[test]
    fn places_beyond_4_gib_are_kept_and_shuffled_alike() {
        let shuffled = |first: u64| {
            let mut places = Places::default();
            (first..first + 100).for_each(|place| places.push(place));
            let wide = matches!(places, Places::Wide(_));
            places.shuffle(7);
            (
                wide,
                places
                    .iter()
                    .map(|place| place - first)
                    .collect::<Vec<u64>>(),
            )
        };
        let (wide, order) = shuffled(0);
        assert!(!wide);
        let mut plain: Vec<u64> = (0..100).collect();
        PythonRandom::new(7).shuffle(&mut plain);
        assert_eq!(order, plain);
        // The last ones do not fit into 32 bits.
        assert_eq!(shuffled(u64::from(u32::MAX) - 50), (true, plain));
    }

    #[test]
    fn nothing_that_spells_the_label_stays() {
        let mut row = Row::new("1".into(), "t".into(), Some("pin".into()));
        row.raw_label = Some("PIN".into());
        row.sanitised_label = Some("pin".into());
        row.reasoning = Some("it asks for a pin".into());
        row.confidence = Some(0.9);
        row.extra.insert("intent".into(), "pin".into());
        let gold = hide_label(&mut row).map(|gold| (gold.id, gold.label));
        assert_eq!(gold, Some(("1".into(), "pin".into())));
        assert_eq!(row, Row::new("1".into(), "t".into(), None));
    }
}
