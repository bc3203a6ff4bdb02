//! `bind`: a file or directory of the guest in a second place.

use bulkhead_protocol::agent::Storage;

use super::{
    Mounted, Undo,
    mount::{Options, Target, bind, source},
};
use crate::error::Result;

/// Binds the source to the mount point, with the flags of the options.
pub(super) fn mount(storage: &Storage, _container: Option<&str>) -> Result<Mounted> {
    let options = Options::parse(&storage.options)?;
    let (from, directory) = source(&storage.source)?;
    let to = if directory {
        Target::directory(&storage.mount_point)?
    } else {
        Target::file(&storage.mount_point)?
    };
    let mut undo = vec![Undo::Unmount(to.path().to_owned())];
    if directory {
        undo.push(Undo::RemoveDirectory(to.path().to_owned()));
    }
    bind(&from, &to, &options)?;
    Ok(Mounted { undo, keep: false })
}
