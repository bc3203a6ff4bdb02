//! The device that a storage stands on: by its address in a request, found or waited for.

use std::path::PathBuf;

use bulkhead_protocol::agent::Storage;

use crate::{boot::Guest, device::Devices, error::Result};

/// The file of the storage's device; none for a driver without one.
pub(super) async fn find(_guest: &Guest, devices: &Devices, storage: &Storage) -> Result<Option<PathBuf>> {
    let source = &storage.source;
    let node = match storage.driver.as_str() {
        "blk" if !source.starts_with("/dev/") => devices.block_by_pci(source).await?,
        "blk" | "mmioblk" => devices.block_by_node(source).await?,
        "scsi" => devices.block_by_scsi(source).await?,
        _ => return Ok(None),
    };
    Ok(Some(node.path))
}
