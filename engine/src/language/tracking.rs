//! `tracking:` of a pipeline file.

use super::node::Node;
use super::source_map::{SourceMap, Span};
use super::spec::TrackingSpec;
use super::suggest;
use crate::pipeline::StepNode;
use crate::tracking::{
    MlflowTracking, RegisteredModel, TensorBoardTracking, TrackedOutput, Tracking,
};

/// What the file says of trackers; `steps` are those of the pipeline.
pub(crate) fn read(map: &mut SourceMap, tree: &Node, steps: &[StepNode]) -> Tracking {
    let Some(entry) = tree.entry("tracking") else {
        return Tracking::default();
    };
    // Steps that are wrong may be missing here.
    if map.has_errors() {
        return Tracking::default();
    }
    let spec = serde_json::from_value::<Option<TrackingSpec>>(entry.value.to_value());
    let spec = spec.ok().flatten().unwrap_or_default();
    let place = |path: &[&str]| {
        let path: Vec<String> = path.iter().map(|part| (*part).to_owned()).collect();
        entry.value.place(&path, false, entry.key)
    };
    let tensorboard = spec.tensorboard.and_then(|spec| {
        let folder = spec.folder.filter(|folder| !folder.trim().is_empty());
        if folder.is_none() {
            let at = place(&["tensorboard", "folder"]);
            let help = "name a folder of the project: `folder: results/tensorboard`".to_owned();
            map.report(
                at,
                "missing-field",
                "`tensorboard` needs `folder`",
                "",
                Some(help),
            );
        }
        folder.map(|folder| TensorBoardTracking {
            folder: folder.into(),
        })
    });
    let Some(spec) = spec.mlflow else {
        return Tracking {
            tensorboard,
            ..Tracking::default()
        };
    };
    let mut artifacts = Vec::new();
    for (index, text) in spec.artifacts.iter().flatten().enumerate() {
        let at = place(&["mlflow", "artifacts", &index.to_string()]);
        artifacts.extend(output(map, at, text, steps).map(|(output, _)| output));
    }
    let register = spec.register.and_then(|register| {
        let at = place(&["mlflow", "register"]);
        let (Some(name), Some(text)) = (register.name, register.output) else {
            let message = "`register` needs `name` and `output`";
            map.report(at, "missing-field", message, "", None);
            return None;
        };
        let at = place(&["mlflow", "register", "output"]);
        let (output, is_list) = output(map, at, &text, steps)?;
        if is_list {
            let message = format!("`{text}` is a list, and a version of a model is one of it");
            let help = "register what a `select` step chose".to_owned();
            map.report(at, "bad-reference", message, "", Some(help));
        }
        Some(RegisteredModel { name, output })
    });
    Tracking {
        mlflow: MlflowTracking {
            experiment: spec.experiment,
            artifacts,
            register,
        },
        tensorboard,
    }
}

/// The output that `step.output` names, and whether it is a list.
fn output(
    map: &mut SourceMap,
    at: Span,
    text: &str,
    steps: &[StepNode],
) -> Option<(TrackedOutput, bool)> {
    let Some((name, port)) = text.rsplit_once('.') else {
        let message = format!("`{text}` is no output of a step");
        let help = "write it as `step.output`".to_owned();
        map.report(at, "bad-reference", message, "", Some(help));
        return None;
    };
    let Some(step) = steps.iter().find(|step| step.name == name) else {
        let names = steps.iter().map(|step| step.name.as_str());
        let help = suggest::help(name, "steps", names);
        let message = format!("there is no step `{name}`");
        map.report(at, "unknown-step", message, "", help);
        return None;
    };
    let Some(found) = step.outputs.iter().find(|output| output.name == port) else {
        let names = step.outputs.iter().map(|output| output.name.as_str());
        let help = suggest::help(port, "its outputs", names);
        let message = format!("the step `{name}` has no output `{port}`");
        map.report(at, "unknown-output", message, "", help);
        return None;
    };
    let output = TrackedOutput {
        step: name.to_owned(),
        output: port.to_owned(),
    };
    Some((output, found.many || step.foreach.is_some()))
}
