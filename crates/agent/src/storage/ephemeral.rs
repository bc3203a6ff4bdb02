//! `ephemeral`: memory that lives as long as the pod, such as its `/dev/shm` or an emptyDir of medium Memory.

use super::{
    Job, Mounted,
    mount::{Options, Target, give_to_group, mount as mount_on},
};
use crate::error::{Error, Result};

/// Mounts a tmpfs with all of its options; `fsgid=<gid>` hands its root to a group.
pub(super) fn mount(job: &Job, mounted: &mut Mounted) -> Result<()> {
    let storage = &job.storage;
    if !matches!(storage.fstype.as_str(), "tmpfs" | "") {
        return Err(Error::Unsupported(format!("ephemeral storage of type {:?}", storage.fstype)));
    }
    mounted.keep = true;
    let mut options = Options::parse(&storage.options)?;
    let group = options.take("fsgid");
    let target = Target::directory(&storage.mount_point, mounted)?;
    let source = if storage.source.is_empty() { "tmpfs" } else { &storage.source };
    mount_on(source, &target, "tmpfs", &options, mounted)?;
    group.map_or(Ok(()), |group| give_to_group(target.path(), &group))
}
