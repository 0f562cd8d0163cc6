//! `flowrun deploy`: what is deployed, here and on Ray, the way back, and files for other places to
//! run.

use std::path::Path;
use std::time::Duration;

use flowrun_engine::step::{Cancel, World};
use flowrun_steps::bundle::Bundle;
use flowrun_steps::deploy::targets::{self, Settings, TARGETS};
use flowrun_steps::deploy::{local, on_ray};
use serde_json::{Map, Value, json};

use crate::args::{DeployCommand, DeployPlace, DeployedOn, GlobalArgs};
use crate::exit::{Exit, Failure};
use crate::surroundings;

/// Does what the command line says.
pub(crate) fn deploy(command: &DeployCommand, global: &GlobalArgs) -> Result<Exit, Failure> {
    match command {
        DeployCommand::Status { name, place } => status(name.as_deref(), place, global),
        DeployCommand::Rollback { name, place } => rollback(name, place, global),
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

/// What is deployed under a name.
enum Deployed {
    Here(local::Current),
    OnRay(on_ray::Current),
}

/// All that is deployed, or what has this name; in the order of the names.
fn deployed(name: Option<&str>, place: &DeployPlace) -> Vec<(String, Deployed)> {
    let named = |all: Vec<String>| {
        let meant = move |other: &String| name.is_none_or(|name| name == other);
        all.into_iter().filter(meant)
    };
    let folder = &place.folder;
    let mut all = Vec::new();
    if place.target != Some(DeployedOn::RayServe) {
        all.extend(named(local::Place::names(folder)).filter_map(|name| {
            let current = local::Place::new(folder, &name).current()?;
            Some((name, Deployed::Here(current)))
        }));
    }
    if place.target != Some(DeployedOn::Local) {
        all.extend(named(on_ray::Place::names(folder)).filter_map(|name| {
            let current = on_ray::Place::new(folder, &name).current()?;
            Some((name, Deployed::OnRay(current)))
        }));
    }
    all.sort_by(|(a, _), (b, _)| a.cmp(b));
    all
}

#[allow(clippy::print_stdout, clippy::print_stderr)]
fn status(name: Option<&str>, place: &DeployPlace, global: &GlobalArgs) -> Result<Exit, Failure> {
    let found = deployed(name, place);
    let folder = place.folder.display();
    match name {
        Some(name) if found.is_empty() => {
            let text = format!("`{name}` is not deployed in {folder}");
            return Err(Failure::new(Exit::Usage, text));
        }
        None if found.is_empty() && !global.json => eprintln!("nothing is deployed in {folder}"),
        _ => {}
    }
    let world = surroundings::world(Path::new("."), global)?;
    for (name, deployed) in found {
        match deployed {
            Deployed::Here(current) => show_here(&name, local::is_up(&current), &current, global),
            Deployed::OnRay(current) => show_on_ray(&name, &current, &world, global),
        }
    }
    Ok(Exit::Ok)
}

#[allow(clippy::print_stdout)]
fn show_here(name: &str, up: bool, current: &local::Current, global: &GlobalArgs) {
    if global.json {
        let shown = json!({"name": name, "target": "local", "up": up, "current": current});
        println!("{shown}");
        return;
    }
    let state = match up {
        true => format!("up at {}, process {}", current.url, current.pid),
        false => "down".to_owned(),
    };
    let previous = current.previous.as_ref().map(|p| p.bundle.as_str());
    println!(
        "{name}: {state}; {}",
        versions(&current.bundle, &current.folder, previous)
    );
}

#[allow(clippy::print_stdout)]
fn show_on_ray(name: &str, current: &on_ray::Current, world: &World, global: &GlobalArgs) {
    let state = current.state(world);
    if global.json {
        let shown = json!({
            "name": name, "target": "ray-serve", "up": state.up, "state": state,
            "current": current,
        });
        println!("{shown}");
        return;
    }
    let release = &current.release;
    let told = match (&state.why, &state.url) {
        (None, Some(url)) => format!("up at {url}"),
        (Some(why), _) => format!("down ({why})"),
        (None, None) => "down".to_owned(),
    };
    let previous = current.previous.as_ref().map(|p| p.bundle.as_str());
    println!(
        "{name}: {told}, `{}` on Ray since {}; {}",
        release.application,
        state.since,
        versions(&release.bundle, &release.bundle_folder(), previous)
    );
}

/// The bundle, what it was measured to be worth, and the one before it.
fn versions(bundle: &str, folder: &Path, previous: Option<&str>) -> String {
    let short = |digest: &str| digest.chars().take(12).collect::<String>();
    let mut text = format!("bundle {}", short(bundle));
    if let Ok(bundle) = Bundle::open(folder) {
        let measured = &bundle.manifest.measured;
        text += &format!(
            ", {} of {} right on {}",
            measured.correct, measured.n, measured.dataset
        );
    }
    if let Some(previous) = previous {
        text += &format!("; before it {}", short(previous));
    }
    text
}

fn rollback(name: &str, place: &DeployPlace, global: &GlobalArgs) -> Result<Exit, Failure> {
    let found = deployed(Some(name), place);
    if found.len() > 1 {
        return Err(Failure::usage(format!(
            "`{name}` is deployed on this machine and on Ray: say which with --target"
        )));
    }
    let world = surroundings::world(Path::new("."), global)?;
    let folder = std::path::absolute(&place.folder)?;
    let on_ray = match found.first() {
        Some((_, deployed)) => matches!(deployed, Deployed::OnRay(_)),
        None => place.target == Some(DeployedOn::RayServe),
    };
    if on_ray {
        let place = on_ray::Place::new(&folder, name);
        let (current, _) = place.rollback(&world, &Cancel::default())?;
        show_on_ray(name, &current, &world, global);
    } else {
        let place = local::Place::new(&folder, name);
        let current = place.rollback(&world, &Cancel::default())?;
        show_here(name, true, &current, global);
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
