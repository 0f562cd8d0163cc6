//! The records of orders: a file each, named by the order's id.

use std::collections::BTreeMap;
use std::io::{Error, ErrorKind};
use std::path::{Path, PathBuf};

use super::Order;
use crate::exit::{Exit, Failure};
use crate::serve::kept::is_id;

pub(super) fn record(folder: &Path, id: &str) -> PathBuf {
    folder.join(format!("{id}.json"))
}

/// The ids that a folder has records of.
pub(super) fn ids<T: Order>(folder: &Path) -> std::io::Result<Vec<String>> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let name = entry?.file_name();
        let id = name.to_str().and_then(|name| name.strip_suffix(".json"));
        all.extend(id.filter(|id| is_id(id, T::PREFIX)).map(str::to_owned));
    }
    Ok(all)
}

/// Reads one; its data is invalid when it is no record of this version's, or another's.
pub(super) fn read<T: Order>(folder: &Path, id: &str) -> std::io::Result<T> {
    let bytes = std::fs::read(record(folder, id))?;
    let order: T =
        serde_json::from_slice(&bytes).map_err(|e| Error::new(ErrorKind::InvalidData, e))?;
    if order.id() != id {
        let text = format!("it is the record of {}", order.id());
        return Err(Error::new(ErrorKind::InvalidData, text));
    }
    Ok(order)
}

/// Reads all of a folder. Damaged ones are left out, and set aside where this server is in charge.
pub(super) fn read_all<T: Order>(
    folder: &Path,
    mine: bool,
) -> Result<BTreeMap<String, T>, Failure> {
    let failed = |e: Error| Failure::new(Exit::Internal, format!("{}: {e}", folder.display()));
    let mut all = BTreeMap::new();
    for id in ids::<T>(folder).map_err(failed)? {
        match read(folder, &id) {
            Ok(order) => {
                all.insert(id, order);
            }
            Err(error) if error.kind() == ErrorKind::InvalidData => {
                let path = record(folder, &id);
                if mine {
                    let aside = path.with_extension("damaged");
                    tracing::warn!(
                        "{}: {error}; it is renamed to {}",
                        path.display(),
                        aside.display()
                    );
                    std::fs::rename(&path, &aside).map_err(failed)?;
                } else {
                    tracing::debug!("{}: {error}", path.display());
                }
            }
            // The server in charge has removed it.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(all)
}
