//! A root file system for trials: one static busybox.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::process::{self, command};

/// The static busybox of this machine.
pub(crate) fn busybox() -> Result<PathBuf> {
    process::find("busybox").context("no busybox: run `cargo xtask setup`")
}

/// Makes a root file system with all of busybox's commands in a new directory.
pub(crate) fn make(root: &Path) -> Result<()> {
    let busybox = busybox()?;
    let applets = process::output(command(&busybox).arg("--list"))?;
    let _ = fs::remove_dir_all(root);
    let fill = || {
        for directory in ["bin", "dev", "etc", "proc", "root", "sys", "tmp"] {
            fs::create_dir_all(root.join(directory))?;
        }
        fs::copy(&busybox, root.join("bin/busybox"))?;
        for applet in applets.lines().filter(|applet| *applet != "busybox") {
            symlink("busybox", root.join("bin").join(applet))?;
        }
        fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")
    };
    fill().with_context(|| format!("cannot make {}", root.display()))
}
