//! `cargo xtask setup`: brings a fresh Debian 12 machine to where everything here builds and is tested.
//!
//! What is asked is whether a program or file is there, not whether a package is installed, so that what was installed in
//! another way counts too. The guest kernel and newer releases of containerd are unpacked below the target directory and
//! not installed.

mod containerd;
mod debian;
mod kernel;
mod requirements;

use anyhow::{Result, bail};

use crate::progress::step;
use crate::workspace::Workspace;
use debian::Debian;
use requirements::Requirement;

pub(crate) use containerd::directories as containerd_directories;

/// Installs what is missing.
pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    let missing = requirements::missing();
    let no_kernel = !kernel::is_there(workspace);
    let releases = containerd::missing(workspace);
    if missing.is_empty() && !no_kernel && releases.is_empty() {
        eprintln!("  ✓ Nothing is missing");
        return Ok(());
    }
    let debian = match Debian::detect() {
        Ok(debian) => debian,
        Err(why) => bail!("{}", by_hand(&why, &missing, no_kernel)),
    };
    if !missing.is_empty() || no_kernel {
        step("Reading Debian's package lists", || debian.update())?;
    }
    if !missing.is_empty() {
        let packages: Vec<&str> = missing.iter().map(|requirement| requirement.package).collect();
        step(&format!("Installing {}", packages.join(", ")), || debian.install(&packages))?;
        if let Some(requirement) = requirements::missing().first() {
            bail!("{} is still missing after installing {}", requirement.what(), requirement.package);
        }
    }
    if no_kernel {
        step("Unpacking a guest kernel", || kernel::unpack(workspace, &debian))?;
    }
    for suite in releases {
        let result = step(&format!("Unpacking the containerd of Debian {suite}"), || {
            containerd::unpack(workspace, &debian, suite)
        });
        if let Err(error) = result {
            eprintln!("    {error:#}\n    Tests that need this containerd will be skipped.");
        }
    }
    Ok(())
}

/// What to do on a machine where this program can install nothing.
fn by_hand(why: &str, missing: &[&Requirement], no_kernel: bool) -> String {
    let mut text = format!("{why}. Install by hand:\n");
    for requirement in missing {
        text += &format!("  {} (Debian package {})\n", requirement.what(), requirement.package);
    }
    if no_kernel {
        text += "  a Linux kernel package with virtio modules (Debian: linux-image-cloud-amd64's dependency), unpacked into \
                 target/kernel, with `depmod -b target/kernel RELEASE`\n";
    }
    text
}
