//! `flowrun deploy`: what is deployed on this machine, and files for other places to run.

use std::path::Path;
use std::time::Duration;

use flowrun_engine::step::Cancel;
use flowrun_steps::bundle::Bundle;
use flowrun_steps::deploy::local::{Current, Place, is_up};
use flowrun_steps::deploy::targets::{self, Settings, TARGETS};
use serde_json::{Map, Value, json};

use crate::args::{DeployCommand, GlobalArgs};
use crate::exit::{Exit, Failure};
use crate::surroundings;

/// Does what the command line says.
pub(crate) fn deploy(command: &DeployCommand, global: &GlobalArgs) -> Result<Exit, Failure> {
    match command {
        DeployCommand::Status { name, place } => status(name.as_deref(), &place.folder, global),
        DeployCommand::Rollback { name, place } => rollback(name, &place.folder, global),
        DeployCommand::Check { url, bundle } => check(url, bundle.as_deref(), global),
        DeployCommand::Render {
            bundle,
            target: Some(target),
            output,
            set,
        } => render(bundle, target, output, set, global),
        DeployCommand::Render { target: None, .. } => Ok(list_targets(global)),
    }
}

#[allow(clippy::print_stdout, clippy::print_stderr)]
fn status(name: Option<&str>, folder: &Path, global: &GlobalArgs) -> Result<Exit, Failure> {
    let names = match name {
        Some(name) => vec![name.to_owned()],
        None => Place::names(folder),
    };
    if names.is_empty() && !global.json {
        eprintln!("nothing is deployed in {}", folder.display());
    }
    for name in names {
        let current = Place::new(folder, &name).current().ok_or_else(|| {
            let text = format!("`{name}` is not deployed in {}", folder.display());
            Failure::new(Exit::Usage, text)
        })?;
        let up = is_up(&current);
        if global.json {
            println!("{}", json!({"name": name, "up": up, "current": current}));
        } else {
            println!("{}", line(&name, up, &current));
        }
    }
    Ok(Exit::Ok)
}

fn line(name: &str, up: bool, current: &Current) -> String {
    let short = |digest: &str| digest.chars().take(12).collect::<String>();
    let state = match up {
        true => format!("up at {}, process {}", current.url, current.pid),
        false => "down".to_owned(),
    };
    let mut text = format!("{name}: {state}; bundle {}", short(&current.bundle));
    if let Ok(bundle) = Bundle::open(&current.folder) {
        let measured = &bundle.manifest.measured;
        text += &format!(
            ", {} of {} right on {}",
            measured.correct, measured.n, measured.dataset
        );
    }
    if let Some(previous) = &current.previous {
        text += &format!("; before it {}", short(&previous.bundle));
    }
    text
}

#[allow(clippy::print_stdout)]
fn rollback(name: &str, folder: &Path, global: &GlobalArgs) -> Result<Exit, Failure> {
    let world = surroundings::world(Path::new("."), global)?;
    let folder = std::path::absolute(folder)?;
    let current = Place::new(&folder, name).rollback(&world, &Cancel::default())?;
    if global.json {
        println!("{}", json!({"name": name, "up": true, "current": current}));
    } else {
        println!("{}", line(name, true, &current));
    }
    Ok(Exit::Ok)
}

#[allow(clippy::print_stdout)]
fn check(url: &str, bundle: Option<&Path>, global: &GlobalArgs) -> Result<Exit, Failure> {
    let world = surroundings::world(Path::new("."), global)?;
    let agreed = flowrun_steps::deploy::check(url, bundle, &world)?;
    if global.json {
        let smoke = agreed.as_ref().map(|agreed| {
            json!({"agreed": agreed.right, "rows": agreed.of, "p95_ms": millis(agreed.p95)})
        });
        println!("{}", json!({"url": url, "up": true, "smoke": smoke}));
    } else if !global.quiet {
        match agreed {
            None => println!("{url} is up"),
            Some(agreed) => println!(
                "{url} answers {agreed} smoke rows as evaluated; 95 % within {:.1} ms",
                millis(agreed.p95)
            ),
        }
    }
    Ok(Exit::Ok)
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[allow(clippy::print_stdout)]
fn list_targets(global: &GlobalArgs) -> Exit {
    for target in &TARGETS {
        if global.json {
            println!("{}", json!({"target": target.name, "about": target.about}));
        } else {
            println!("{:16} {}", target.name, target.about);
        }
    }
    Exit::Ok
}

#[allow(clippy::print_stdout)]
fn render(
    bundle: &Path,
    target: &str,
    output: &Path,
    set: &[(String, String)],
    global: &GlobalArgs,
) -> Result<Exit, Failure> {
    let world = surroundings::world(Path::new("."), global)?;
    let bundle = Bundle::open(bundle)?;
    let files = targets::render(target, &bundle, &settings(set)?, &world)?;
    targets::write(&files, output)?;
    for file in &files {
        let path = output.join(&file.path);
        if global.json {
            println!("{}", json!({"file": path}));
        } else if !global.quiet {
            println!("{}", path.display());
        }
    }
    Ok(Exit::Ok)
}

fn settings(set: &[(String, String)]) -> Result<Settings, Failure> {
    let value = |text: &String| {
        let number = text.parse::<u32>().map(Value::from);
        number.unwrap_or_else(|_| Value::from(text.as_str()))
    };
    // `cpu` is a text that may look like a number.
    let value = |name: &String, text: &String| match name.as_str() {
        "cpu" | "memory" => Value::from(text.as_str()),
        _ => value(text),
    };
    let set: Map<String, Value> = set
        .iter()
        .map(|(name, text)| (name.clone(), value(name, text)))
        .collect();
    serde_json::from_value(Value::Object(set)).map_err(|e| Failure::usage(format!("`--set`: {e}")))
}
