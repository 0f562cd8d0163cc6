//! End to end, through the real binary on real files.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::panic, missing_docs)]

mod cache;
mod classify;
mod data;
mod deployed;
mod deploying;
mod distil;
mod docs;
mod faults;
mod graph;
mod history;
mod hostile;
mod interfaces;
mod killed;
mod labelling;
mod language;
mod leakage;
mod malformed;
mod mount;
mod notebook;
mod openai_sdk;
mod oracle;
mod prices;
mod process;
mod programs;
mod project;
mod ray;
mod sandbox;
mod schema;
mod search;
mod server;
mod serving;
mod shell;
mod stale;
mod tiny;
mod unchanged;
