//! A server that forgets an adapter while a step asks it: the adapter is loaded again, and the
//! step goes on. The server is this program's; what stands before it unloads the adapter there.

use crate::forgetful;
use crate::project::Project;
use crate::server::Server;
use crate::tiny::{self, write_model};

#[test]
fn an_adapter_that_the_server_forgets_is_loaded_again_in_mid_step() {
    let home = Project::new();
    write_model(&home.path("tiny"), 1);
    // The server looks for adapters by their ids in this folder alone, not in those within.
    let given = home.path("adapters/given");
    std::fs::create_dir_all(&given).unwrap();
    let mut command = home.command(&["serve", "tiny", "--adapters", "adapters"]);
    command.env_remove("FLOWRUN_API_KEY");
    let server = Server::start(command);
    forgetful::scored(&server.url, "flowrun", &given, tiny::stand_in_trainer);
}
