//! What tests share: projects, processes, and the servers that they talk to. No test is here.

pub(crate) mod azurite;
pub(crate) mod batch_server;
pub(crate) mod classify;
pub(crate) mod deployed;
pub(crate) mod external;
pub(crate) mod fault_proxy;
pub(crate) mod files;
pub(crate) mod gcs_server;
pub(crate) mod heavy_steps;
pub(crate) mod http;
pub(crate) mod hub_server;
pub(crate) mod kubernetes_api;
pub(crate) mod label_job;
pub(crate) mod mount;
pub(crate) mod oracle;
pub(crate) mod processes;
pub(crate) mod project;
pub(crate) mod ray_cluster;
pub(crate) mod real_data;
pub(crate) mod receiver;
pub(crate) mod remote_cache;
pub(crate) mod server;
pub(crate) mod slow_job;
pub(crate) mod terminal;
pub(crate) mod tiny;
pub(crate) mod weed;
