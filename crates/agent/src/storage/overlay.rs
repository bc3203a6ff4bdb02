//! `overlayfs`: layers, with a writable one of the guest's own memory when asked for.

use std::path::PathBuf;

use bulkhead_protocol::{agent::Storage, ports::GUEST_STATE};

use super::{
    Mounted, Undo,
    mount::{Options, Target, mount as mount_on},
};
use crate::error::{Error, Result};

/// The option that asks for a writable layer in the guest.
const WRITABLE: &str = "io.katacontainers.fs-opt.overlay-rw";
/// The driver option that has a directory made first.
const CREATE_DIRECTORY: &str = "io.katacontainers.volume.overlayfs.create_directory";

/// Mounts the layers.
pub(super) fn mount(storage: &Storage, container: Option<&str>) -> Result<Mounted> {
    let mut options = Options::parse(&storage.options)?;
    for option in &storage.driver_options {
        if let Some(directory) = option.strip_prefix(CREATE_DIRECTORY).and_then(|rest| rest.strip_prefix('='))
        {
            Target::directory(directory)?;
        }
    }
    let mut own = Vec::new();
    if let Some(index) = options.data.iter().position(|option| option == WRITABLE) {
        options.data.remove(index);
        let container = container.ok_or_else(|| {
            Error::Invalid(format!("{WRITABLE} on {:?} needs a container to belong to", storage.mount_point))
        })?;
        for (key, name) in [("upperdir", "upper"), ("workdir", "work")] {
            let path = format!("{GUEST_STATE}/{container}/{name}");
            Target::directory(&path)?;
            options.data.push(format!("{key}={path}"));
            own.push(Undo::RemoveTree(PathBuf::from(path)));
        }
        own.push(Undo::RemoveDirectory(PathBuf::from(format!("{GUEST_STATE}/{container}"))));
    }
    let target = Target::directory(&storage.mount_point)?;
    let path = target.path().to_owned();
    if let Err(error) = mount_on("overlay", &target, "overlay", &options) {
        Mounted { undo: own, keep: false }.undo()?;
        return Err(error);
    }
    let undo = [Undo::Unmount(path.clone()), Undo::RemoveDirectory(path)].into_iter().chain(own).collect();
    Ok(Mounted { undo, keep: false })
}
