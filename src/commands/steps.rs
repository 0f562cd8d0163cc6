//! `flowrun steps` and `flowrun schema`.

use flowrun_engine::step::{Port, Step};
use flowrun_engine::{pipeline_schema, step_schema};
use serde_json::Value;

use crate::exit::{Exit, Failure};

/// Lists the step kinds, or describes one.
#[allow(clippy::print_stdout)]
pub(crate) fn steps(kind: Option<&str>) -> Result<Exit, Failure> {
    let vocabulary = flowrun_steps::registry();
    match kind {
        None => {
            for (kind, step) in &vocabulary.steps {
                println!("{kind:22} {}", step.about());
            }
        }
        Some(kind) => print!("{}", describe(find(kind, &vocabulary.steps)?)),
    }
    Ok(Exit::Ok)
}

/// Prints a JSON Schema.
#[allow(clippy::print_stdout)]
pub(crate) fn schema(kind: Option<&str>) -> Result<Exit, Failure> {
    let vocabulary = flowrun_steps::registry();
    let schema = match kind {
        None => pipeline_schema(&vocabulary),
        Some(kind) => step_schema(find(kind, &vocabulary.steps)?),
    };
    println!("{schema:#}");
    Ok(Exit::Ok)
}

type Kinds = std::collections::BTreeMap<String, std::sync::Arc<dyn Step>>;

fn find<'a>(kind: &str, kinds: &'a Kinds) -> Result<&'a dyn Step, Failure> {
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
