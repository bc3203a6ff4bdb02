//! `bind`: a file or directory of the guest in a second place.

use super::{
    Job, Mounted,
    mount::{Options, Target, bind, source},
};
use crate::error::Result;

/// Binds the source to the mount point, with the flags of the options.
pub(super) fn mount(job: &Job, mounted: &mut Mounted) -> Result<()> {
    let options = Options::parse(&job.storage.options)?;
    let (from, directory) = source(&job.storage.source)?;
    let to = if directory { Target::directory } else { Target::file };
    let to = to(&job.storage.mount_point, mounted)?;
    bind(&from, &to, &options, mounted)
}
