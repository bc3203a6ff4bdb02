//! `blk`, `mmioblk`, `scsi`: a file system on a disk.

use super::{
    Job, Mounted,
    mount::{Options, Target, mount as mount_on},
};
use crate::error::{Error, Result};

/// Mounts the file system of the job's disk.
pub(super) fn mount(job: &Job, mounted: &mut Mounted) -> Result<()> {
    let storage = &job.storage;
    let node = job.node.as_ref().and_then(|node| node.to_str());
    let node =
        node.ok_or_else(|| Error::Invalid(format!("the storage {:?} has no device", storage.source)))?;
    let options = Options::parse(&storage.options)?;
    let target = Target::directory(&storage.mount_point, mounted)?;
    mount_on(node, &target, &storage.fstype, &options, mounted)
}
