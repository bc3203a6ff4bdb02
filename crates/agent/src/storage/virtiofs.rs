//! `virtio-fs`: a directory tree of the host, by its tag.

use bulkhead_protocol::agent::Storage;

use super::{
    Mounted, Undo,
    mount::{Options, Target, mount as mount_on},
};
use crate::error::Result;

/// Mounts the tree unless something is mounted there already: an agent that runs without a VM finds the tree in place.
pub(super) fn mount(storage: &Storage, _container: Option<&str>) -> Result<Mounted> {
    let options = Options::parse(&storage.options)?;
    let target = Target::directory(&storage.mount_point)?;
    if target.is_mount_point()? {
        return Ok(Mounted { undo: Vec::new(), keep: false });
    }
    mount_on(&storage.source, &target, "virtiofs", &options)?;
    Ok(Mounted { undo: vec![Undo::Unmount(target.path().to_owned())], keep: false })
}
