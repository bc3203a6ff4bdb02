//! The device that a storage stands on: by its address in a request, found or waited for.

use std::{
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use bulkhead_protocol::agent::Storage;

use crate::{
    boot::Guest,
    device::Devices,
    error::{Error, Result},
    sync::blocking,
};

/// The file of the storage's device; none for a driver without one.
pub(super) async fn find(
    guest: &Arc<Guest>,
    devices: &Devices,
    storage: &Storage,
) -> Result<Option<PathBuf>> {
    let (source, kind) = (&storage.source, [storage.driver.clone()]);
    let guest = Arc::clone(guest);
    let missing = blocking(move || guest.load_drivers(&kind)).await?;
    let node = match storage.driver.as_str() {
        "blk" if !source.starts_with("/dev/") => devices.block_by_pci(source).await,
        "blk" | "mmioblk" | "nvdimm" => devices.block_by_node(node(source)?).await,
        "scsi" => devices.block_by_scsi(source).await,
        _ => return Ok(None),
    };
    node.map(|node| Some(node.path)).map_err(|error| missing.explain(error))
}

/// A file of `/dev`, and nothing that leads elsewhere.
pub(super) fn node(source: &str) -> Result<&str> {
    let name = source.strip_prefix("/dev/").filter(|name| {
        !name.is_empty() && Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
    });
    name.map(|_| source).ok_or_else(|| Error::Invalid(format!("{source:?} is not a device below /dev")))
}

/// The file of a disk's partition, which appears when the kernel has read the disk's table.
pub(super) async fn partition(devices: &Devices, disk: &Path, number: u32) -> Result<PathBuf> {
    Ok(devices.block_by_node(&partition_of(&disk.to_string_lossy(), number)).await?.path)
}

/// `vda` has `vda1`, `nvme0n1` has `nvme0n1p1`.
fn partition_of(disk: &str, number: u32) -> String {
    let between = if disk.ends_with(|last: char| last.is_ascii_digit()) { "p" } else { "" };
    format!("{disk}{between}{number}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_a_file_of_dev() {
        for source in ["/dev/vda", "/dev/pmem0", "/dev/mapper/x"] {
            assert_eq!(node(source).unwrap(), source);
        }
        for source in ["", "/dev/", "/dev", "vda", "/dev/../etc/passwd", "/dev//vda", "/etc/passwd", "00:1"] {
            assert!(matches!(node(source), Err(Error::Invalid(_))), "{source:?}");
        }
    }

    #[test]
    fn partitions_are_named_after_their_disk() {
        for (disk, expected) in [("/dev/vda", "/dev/vda3"), ("/dev/nvme0n1", "/dev/nvme0n1p3")] {
            assert_eq!(partition_of(disk, 3), expected);
        }
    }
}
