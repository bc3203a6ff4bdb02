//! Devices that the host plugs: found where they appear, and told to containers by their guest numbers.

use std::{path::PathBuf, time::Duration};

use crate::error::{Error, Result};

/// Finds devices, and waits for those that are still coming.
pub(crate) struct Devices {
    timeout: Duration,
}

/// A device's file in the guest's `/dev`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    /// Its path.
    pub(crate) path: PathBuf,
    /// Its major number.
    pub(crate) major: u32,
    /// Its minor number.
    pub(crate) minor: u32,
}

impl Devices {
    /// Waits up to `timeout` (`agent.hotplug_timeout`) for each device.
    pub(crate) fn new(timeout: Duration) -> Devices {
        Devices { timeout }
    }

    /// The virtio disk at a PCI path (`02/1f.0`: slots and functions from the root bus down).
    pub(crate) async fn block_by_pci(&self, path: &str) -> Result<Node> {
        self.unsupported(path)
    }

    /// The SCSI disk at `<id>:<lun>`.
    pub(crate) async fn block_by_scsi(&self, address: &str) -> Result<Node> {
        self.unsupported(address)
    }

    /// A disk whose name is known (`/dev/vda`, of virtio-mmio), or a pmem device (`/dev/pmem0`).
    pub(crate) async fn block_by_node(&self, node: &str) -> Result<Node> {
        self.unsupported(node)
    }

    /// The name of the network interface at a PCI path.
    pub(crate) async fn interface_by_pci(&self, path: &str) -> Result<String> {
        self.unsupported(path)
    }

    fn unsupported<T>(&self, what: &str) -> Result<T> {
        Err(Error::Unsupported(format!("the device {what} (within {:?})", self.timeout)))
    }
}
