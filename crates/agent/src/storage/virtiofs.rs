//! `virtio-fs`: a directory tree of the host, by its tag.
//!
//! The tree of a host that serves images by nydus is the same storage, mounted one level up: containers are overlays of
//! `rafs/<id>/lowerdir` in it.

use super::{
    Job, Mounted,
    mount::{Options, Target, mount as mount_on},
};
use crate::error::Result;

/// Mounts the tree unless something is mounted there already: an agent that runs without a VM finds the tree in place.
pub(super) fn mount(job: &Job, mounted: &mut Mounted) -> Result<()> {
    let options = Options::parse(&job.storage.options)?;
    let target = Target::directory(&job.storage.mount_point, mounted)?;
    if target.is_mount_point()? {
        return Ok(());
    }
    mount_on(&job.storage.source, &target, "virtiofs", &options, mounted)
}
