//! `flowrun steps`: the vocabulary with its docs.

use flowrun_engine::step::{Port, Step};
use serde_json::{Value, json};

use crate::args::GlobalArgs;
use crate::exit::{Exit, Failure};
use crate::output;

/// Lists the step kinds, or describes one.
pub(crate) fn steps(kind: Option<&str>, global: &GlobalArgs) -> Result<Exit, Failure> {
    let kinds = flowrun_steps::registry().steps;
    match kind {
        None if global.json => {
            let all: Vec<Value> = kinds.values().map(|step| as_json(&**step)).collect();
            output::json(&all)
        }
        None => {
            let width = kinds.keys().map(String::len).max().unwrap_or(0);
            let lines = kinds.iter();
            let lines = lines.map(|(kind, step)| format!("{kind:width$}  {}\n", step.about()));
            output::print(&lines.collect::<String>())
        }
        Some(kind) => {
            let step = find(kind, &kinds)?;
            if global.json {
                return output::json(&as_json(step));
            }
            output::print(&describe(step))
        }
    }
}

fn as_json(step: &dyn Step) -> Value {
    json!({
        "kind": step.kind(),
        "version": step.version(),
        "about": step.about(),
        "inputs": step.inputs(),
        "outputs": step.outputs(),
        "params": step.params_schema(),
    })
}

pub(super) type Kinds = std::collections::BTreeMap<String, std::sync::Arc<dyn Step>>;

pub(super) fn find<'a>(kind: &str, kinds: &'a Kinds) -> Result<&'a dyn Step, Failure> {
    kinds.get(kind).map(|step| &**step).ok_or_else(|| {
        let names: Vec<&str> = kinds.keys().map(String::as_str).collect();
        Failure::usage(format!(
            "there is no step kind `{kind}`; there are {}",
            names.join(", ")
        ))
    })
}

fn describe(step: &dyn Step) -> String {
    let mut out = format!(
        "{} (version {})\n{}\n",
        step.kind(),
        step.version(),
        step.about()
    );
    for (title, ports) in [("inputs", step.inputs()), ("outputs", step.outputs())] {
        if !ports.is_empty() {
            out.push_str(&format!("\n{title}:\n"));
        }
        for port in ports {
            out.push_str(&format!(
                "  {:14} {:22} {}\n",
                port.name,
                port_type(&port),
                port.about
            ));
        }
    }
    let schema = step.params_schema();
    let required: Vec<&str> = schema["required"]
        .as_array()
        .map(|names| names.iter().filter_map(Value::as_str).collect())
        .unwrap_or_default();
    if let Some(params) = schema["properties"].as_object().filter(|p| !p.is_empty()) {
        out.push_str("\nparams:\n");
        for (name, param) in params {
            let about = param["description"]
                .as_str()
                .unwrap_or("")
                .replace('\n', " ");
            let default = match (param.get("default"), required.contains(&name.as_str())) {
                (Some(default), _) if !default.is_null() => format!("default {default}"),
                (_, true) => "required".to_owned(),
                _ => "optional".to_owned(),
            };
            out.push_str(&format!("  {name:14} {default:22} {about}\n"));
        }
    }
    out
}

fn port_type(port: &Port) -> String {
    let list = if port.many {
        format!("list of {}", port.ty)
    } else {
        port.ty.clone()
    };
    if port.optional {
        format!("{list}, optional")
    } else {
        list
    }
}
