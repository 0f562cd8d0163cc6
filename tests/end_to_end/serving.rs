//! `flowrun serve` with a tiny model.

mod access;
mod adapters;
mod chat;
mod load;
mod predict;

use std::sync::LazyLock;

use serde_json::Value;

use crate::project::Project;
use crate::server::Server;
use crate::tiny::{self, write_adapter, write_model};

/// A project with a deployed bundle: made once for all tests, which only read it.
static DEPLOYED: LazyLock<Project> = LazyLock::new(|| {
    let project = tiny::project();
    project.run(&["pipeline.yaml"]).ok();
    project
});

fn serve(project: &Project, args: &[&str]) -> Server {
    let mut command = project.command(&["serve"]);
    command.args(args).env_remove("FLOWRUN_API_KEY");
    Server::start(command)
}

/// The base model alone, with a folder of two adapters.
pub(crate) fn with_adapters(more: &[&str]) -> (Project, Server) {
    let project = Project::new();
    write_model(&project.path("tiny"), 1);
    write_adapter(&project.path("adapters/one"), 11);
    write_adapter(&project.path("adapters/two"), 12);
    let server = serve(
        &project,
        &[&["tiny", "--adapters", "adapters"], more].concat(),
    );
    (project, server)
}

fn ids(server: &Server) -> Vec<String> {
    let models: Value = server.get("/v1/models").json().unwrap();
    let models = models["data"].as_array().unwrap();
    models
        .iter()
        .map(|m| m["id"].as_str().unwrap().to_owned())
        .collect()
}
