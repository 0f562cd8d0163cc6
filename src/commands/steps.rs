//! `flowrun steps`: the vocabulary with its docs.

use console::style;
use flowrun_engine::step::{Port, Step};
use serde_json::{Value, json};

use crate::args::GlobalArgs;
use crate::exit::{Exit, Failure};
use crate::output;
use crate::param_docs::{ParamDoc, param_docs};

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
    let (inputs, outputs) = (step.inputs(), step.outputs());
    let params = param_docs(&step.params_schema());
    let kind = style(step.kind()).bold();
    let mut out = format!("{kind} (version {})\n{}\n", step.version(), step.about());
    for (title, ports) in [("inputs", &inputs), ("outputs", &outputs)] {
        if !ports.is_empty() {
            out.push_str(&format!("\n{title}:\n"));
        }
        for port in ports {
            entry(&mut out, &port.name, &port_type(port), &port.about);
        }
    }
    if !params.is_empty() {
        out.push_str("\nparams:\n");
    }
    for param in &params {
        let facts = format!("{}, {}", param.ty, param.need);
        entry(&mut out, &param.path, &facts, &param.about);
    }
    out.push_str("\nin a pipeline:\n");
    out.push_str(&example(step.kind(), &inputs, &params));
    out
}

fn entry(out: &mut String, name: &str, facts: &str, about: &str) {
    out.push_str(&format!("  {}  {facts}\n", style(name).bold()));
    if !about.is_empty() {
        out.push_str(&format!("      {about}\n"));
    }
}

/// A step with what it cannot do without.
fn example(kind: &str, inputs: &[Port], params: &[ParamDoc]) -> String {
    let mut out = format!("  my-step:\n    uses: {kind}\n");
    let needed: Vec<&Port> = inputs.iter().filter(|port| !port.optional).collect();
    if !needed.is_empty() {
        out.push_str("    in:\n");
    }
    for port in needed {
        let source = if port.many {
            "[other.output]"
        } else {
            "other.output"
        };
        out.push_str(&format!("      {}: {source}\n", port.name));
    }
    let top = |param: &&ParamDoc| param.need == "required" && !param.path.contains('.');
    let needed: Vec<&ParamDoc> = params.iter().filter(top).collect();
    if !needed.is_empty() {
        out.push_str("    with:\n");
    }
    for param in needed {
        out.push_str(&format!("      {}: …    # {}\n", param.path, param.ty));
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
