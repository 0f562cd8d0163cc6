//! Digests, a content-addressed store, an action cache and a completion cache
//! over a rebuildable index.
//!
//! This crate knows no workflow: an action is a key, a manifest and outputs.
//! Its invariant: what it hands out is what was put in, or nothing. Damage is
//! reported and set aside, never returned.

pub mod action;
pub mod archive;
pub mod artifact;
pub mod cache;
pub mod completion;
pub mod digest;
mod durability;
pub mod error;
pub mod filesystem;
pub mod gc;
pub mod index;
pub mod lock;
mod record;
pub mod remote;
pub mod removal;
pub mod stamp;
pub mod store;
pub mod survey;
pub mod verify;

pub use action::{ActionCache, ActionKey, ActionResult, ListItem, OutputRecord, OutputValue};
pub use artifact::{Artifact, ArtifactKind, is_executable};
pub use cache::{Cache, CacheReader, OpenOptions, Scratch};
pub use completion::CompletionCache;
pub use digest::{Digest, canonical_json};
pub use error::CacheError;
pub use filesystem::{FileSystem, Reach};
pub use gc::{Bounds, Garbage, Uses};
pub use index::Index;
pub use lock::LockWait;
pub use remote::{Depot, DepotError, Prefix, RemoteCache, RemoteError, RemoteOptions};
pub use removal::{Removal, Remover};
pub use stamp::FileStamp;
pub use store::{ArtifactStore, Lent, Placed, Staged, Staging};
pub use survey::{Share, Survey};
