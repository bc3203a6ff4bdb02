//! `ephemeral`: memory that lives as long as the pod, such as its `/dev/shm` or an emptyDir of medium Memory.

use bulkhead_protocol::agent::Storage;

use super::{
    Mounted, Undo,
    mount::{Options, Target, give_to_group, mount as mount_on},
};
use crate::error::{Error, Result};

/// Mounts a tmpfs with all of its options; `fsgid=<gid>` hands its root to a group.
pub(super) fn mount(storage: &Storage, _container: Option<&str>) -> Result<Mounted> {
    if !matches!(storage.fstype.as_str(), "tmpfs" | "") {
        return Err(Error::Unsupported(format!("ephemeral storage of type {:?}", storage.fstype)));
    }
    let mut options = Options::parse(&storage.options)?;
    let group = options.take("fsgid");
    let target = Target::directory(&storage.mount_point)?;
    let source = if storage.source.is_empty() { "tmpfs" } else { &storage.source };
    mount_on(source, &target, "tmpfs", &options)?;
    let path = target.path().to_owned();
    let mounted =
        Mounted { undo: vec![Undo::Unmount(path.clone()), Undo::RemoveDirectory(path.clone())], keep: true };
    if let Some(group) = group
        && let Err(error) = give_to_group(&path, &group)
    {
        // The caller hears of the failure and not of the mount, so it goes first.
        mounted.undo()?;
        return Err(error);
    }
    Ok(mounted)
}
