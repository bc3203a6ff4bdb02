//! The guest kernel: Debian's stock kernel for virtual machines, unpacked into `target/kernel`.

use std::fs;

use anyhow::{Context, Result};
use bulkhead_image::kernel::Package;

use super::debian::Debian;
use crate::process::{self, command};
use crate::workspace::Workspace;

/// A name for the newest kernel of its kind, on which it depends.
const PACKAGE: &str = "linux-image-cloud-amd64";

/// Whether there is a kernel whose modules have an index.
pub(super) fn is_there(workspace: &Workspace) -> bool {
    Package::find(&workspace.kernel()).is_ok_and(|package| package.modules.join("modules.dep").exists())
}

/// Unpacks the kernel and indexes its modules, which its installation would have done.
pub(super) fn unpack(workspace: &Workspace, debian: &Debian) -> Result<()> {
    fs::create_dir_all(&workspace.target)?;
    debian.unpack(&debian.dependency(PACKAGE)?, &workspace.kernel())?;
    let package = Package::find(&workspace.kernel())?;
    // <root>/lib/modules/<release>; newer packages have <root>/usr/lib.
    let root = package.modules.ancestors().nth(3).context("a module directory is three below its root")?;
    process::output(command("depmod").arg("-b").arg(root).arg(&package.release)).map(drop)
}
