//! How the text adapters spell values, field lists and type notes. Shared by the
//! dialects of the chat adapter; knows no message order.

use super::{Dialect, FormatError};
use crate::example::Demo;
use crate::field_type::FieldType;
use crate::python_text::{dedent, splitlines, strip};
use crate::signature::{Field, Signature};
use crate::value::Value;

pub(super) const STRUCTURE: &str = "All interactions will be structured in the following way, \
     with the appropriate values filled in.";
pub(super) const INCOMPLETE: &str = "This is an example of the task, though some input or output \
     fields are not supplied.";

/// `[[ ## name ## ]]` and the text below it.
pub(super) fn block(name: &str, text: &str) -> String {
    format!("[[ ## {name} ## ]]\n{text}")
}

/// The value as the dialect writes it into a field of that type.
pub(super) fn value_text(
    field: &Field,
    value: &Value,
    dialect: Dialect,
) -> Result<String, FormatError> {
    let numbered = dialect == Dialect::Dspy25Dev || field.ty == FieldType::Str;
    Ok(match value {
        Value::List(items) if numbered => numbered_list(field, items)?,
        Value::Dict(_) | Value::List(_) if dialect != Dialect::Dspy25Dev => {
            value.to_json_dumps(dialect == Dialect::Dspy25)
        }
        other => other.to_python_str(),
    })
}

fn numbered_list(field: &Field, items: &[Value]) -> Result<String, FormatError> {
    let blobs: Vec<String> = items
        .iter()
        .map(|item| blob(field, item))
        .collect::<Result<_, _>>()?;
    Ok(match blobs.as_slice() {
        [] => "N/A".to_owned(),
        [only] => only.clone(),
        many => {
            let lines: Vec<String> = many
                .iter()
                .enumerate()
                .map(|(i, blob)| format!("[{}] {blob}", i + 1))
                .collect();
            lines.join("\n")
        }
    })
}

fn blob(field: &Field, item: &Value) -> Result<String, FormatError> {
    let text = match item {
        Value::Str(text) => text,
        Value::List(_) | Value::Dict(_) => return Ok(format!("«{}»", item.to_python_repr())),
        _ => {
            return Err(FormatError::ListItem {
                field: field.name.clone(),
            });
        }
    };
    Ok(if text.contains(['\n', '«', '»']) {
        format!("«««\n    {}\n»»»", text.replace('\n', "\n    "))
    } else {
        format!("«{text}»")
    })
}

/// The instructions as every dialect indents them: each line on a new line, after 8 spaces.
pub(super) fn objective(signature: &Signature) -> String {
    let instructions = dedent(&signature.instructions);
    let mut text = "In adhering to this structure, your objective is: ".to_owned();
    for line in splitlines(&instructions) {
        text.push_str("\n        ");
        text.push_str(line);
    }
    text
}

/// The blocks that show the structure of these fields.
pub(super) fn placeholders(fields: &[Field], is_output: bool, dialect: Dialect) -> String {
    let blocks: Vec<String> = fields
        .iter()
        .map(|field| placeholder(field, is_output, dialect))
        .collect();
    strip(&blocks.join("\n\n")).to_owned()
}

/// `{name}` and what is said about the type of an output, in the block that shows the structure.
fn placeholder(field: &Field, is_output: bool, dialect: Dialect) -> String {
    let note = if is_output {
        type_note(&field.ty, dialect)
    } else {
        None
    };
    let note = note.map_or_else(String::new, |note| {
        format!("        # note: the value you produce {note}")
    });
    block(&field.name, &format!("{{{}}}{note}", field.name))
}

fn type_note(ty: &FieldType, dialect: Dialect) -> Option<String> {
    let v3 = dialect == Dialect::Dspy3;
    if dialect == Dialect::Dspy25Dev {
        return None;
    }
    Some(match ty {
        FieldType::Str => return None,
        FieldType::Bool => "must be True or False".to_owned(),
        FieldType::Int => "must be a single int value".to_owned(),
        FieldType::Float => "must be a single float value".to_owned(),
        FieldType::Literal(values) => {
            let values: Vec<String> = values.iter().map(Value::to_python_str).collect();
            let exactly = if v3 {
                "must exactly match (no extra characters)"
            } else {
                "must be"
            };
            format!("{exactly} one of: {}", values.join("; "))
        }
        other if v3 => {
            format!(
                "must adhere to the JSON schema: {}",
                other.json_schema(true).to_json_dumps(false)
            )
        }
        // The misspelling is DSPy's own.
        other => format!(
            "must be pareseable according to the following JSON schema: {}",
            other.json_schema(false).to_json_dumps(true)
        ),
    })
}

/// How much of a signature a demo covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Coverage {
    Complete,
    Incomplete,
    Unusable,
}

/// DSPy's sorting of demos: complete with every field (3.x: and none of them `None`), incomplete
/// with at least one input and one output, else not shown.
pub(super) fn coverage(signature: &Signature, demo: &Demo, dialect: Dialect) -> Coverage {
    let has = |field: &Field| demo.fields.contains_key(&field.name);
    let is_set = |field: &Field| match demo.fields.get(&field.name) {
        None => false,
        Some(Value::Null) => dialect != Dialect::Dspy3,
        Some(_) => true,
    };
    if signature.fields().all(is_set) {
        Coverage::Complete
    } else if signature.inputs.iter().any(has) && signature.outputs.iter().any(has) {
        Coverage::Incomplete
    } else {
        Coverage::Unusable
    }
}

/// The demos that can be shown, incomplete ones first, each with whether it is complete.
pub(super) fn shown_demos<'a>(
    signature: &Signature,
    demos: &'a [Demo],
    dialect: Dialect,
) -> Vec<(&'a Demo, bool)> {
    let of = |wanted| {
        demos
            .iter()
            .filter(move |demo| coverage(signature, demo, dialect) == wanted)
            .map(move |demo| (demo, wanted == Coverage::Complete))
    };
    of(Coverage::Incomplete)
        .chain(of(Coverage::Complete))
        .collect()
}
