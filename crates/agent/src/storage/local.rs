//! `local`: a plain directory of the guest that lives as long as the pod.

use std::{fs::Permissions, os::unix::fs::PermissionsExt};

use super::{
    Job, Mounted, Undo,
    mount::{Options, Target, give_to_group},
};
use crate::error::{During, Error, Result};

/// Makes the directory; `mode=<octal>` and `fsgid=<gid>` say whose it is.
pub(super) fn mount(job: &Job, mounted: &mut Mounted) -> Result<()> {
    let mut options = Options::parse(&job.storage.options)?;
    let target = Target::directory(&job.storage.mount_point, mounted)?;
    mounted.keep = true;
    mounted.did(Undo::RemoveTree(target.path().to_owned()));
    if let Some(mode) = options.take("mode") {
        let bits =
            u32::from_str_radix(&mode, 8).map_err(|_| Error::Invalid(format!("mode={mode} is not octal")))?;
        std::fs::set_permissions(target.path(), Permissions::from_mode(bits))
            .during(|| format!("set the mode of {}", target.path().display()))?;
    }
    if let Some(group) = options.take("fsgid") {
        give_to_group(target.path(), &group)?;
    }
    Ok(())
}
