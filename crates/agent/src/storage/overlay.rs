//! `overlayfs`: layers, with a writable one of the guest's own memory when asked for.

use std::path::PathBuf;

use bulkhead_protocol::ports::GUEST_STATE;

use super::{
    Job, Mounted, Undo,
    mount::{Options, Target, mount as mount_on},
};
use crate::error::{Error, Result};

/// The option that asks for a writable layer in the guest.
const WRITABLE: &str = "io.katacontainers.fs-opt.overlay-rw";
/// The driver option that has a directory made first.
const CREATE_DIRECTORY: &str = "io.katacontainers.volume.overlayfs.create_directory";

/// Mounts the layers.
pub(super) fn mount(job: &Job, mounted: &mut Mounted) -> Result<()> {
    let mut options = Options::parse(&job.storage.options)?;
    for option in &job.storage.driver_options {
        match option.split_once('=') {
            Some((CREATE_DIRECTORY, directory)) => drop(Target::directory(directory, mounted)?),
            _ => {
                return Err(Error::Unsupported(format!("the option {option:?} of an overlayfs storage")));
            }
        }
    }
    if let Some(index) = options.data.iter().position(|option| option == WRITABLE) {
        options.data.remove(index);
        let container = job.container.as_ref().ok_or_else(|| {
            Error::Invalid(format!(
                "{WRITABLE} on {:?} needs a container to belong to",
                job.storage.mount_point
            ))
        })?;
        Target::directory(&format!("{GUEST_STATE}/{container}"), mounted)?;
        for (key, name) in [("upperdir", "upper"), ("workdir", "work")] {
            let path = format!("{GUEST_STATE}/{container}/{name}");
            Target::directory(&path, mounted)?;
            mounted.did(Undo::RemoveTree(PathBuf::from(&path)));
            options.data.push(format!("{key}={path}"));
        }
    }
    let target = Target::directory(&job.storage.mount_point, mounted)?;
    mount_on("overlay", &target, "overlay", &options, mounted)
}
