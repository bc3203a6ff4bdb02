//! A root file system made of one static busybox.

use std::{fs, os::unix::fs::symlink, path::Path, process::Command};

use anyhow::{Context, ensure};

const BUSYBOX: &str = "/bin/busybox";
const FOLDERS: [&str; 9] = ["bin", "dev", "etc", "home", "proc", "root", "sys", "tmp", "var"];

/// Makes a root file system at `root`: busybox with a link for each applet, `/etc/passwd` and `/etc/group` with `root`
/// and `app` (1000:1000, home `/home`), and a file `/etc/not-executable`.
///
/// # Errors
/// When busybox-static is not installed, or the folder cannot be written.
pub fn busybox_rootfs(root: &Path) -> anyhow::Result<()> {
    for folder in FOLDERS {
        fs::create_dir_all(root.join(folder))?;
    }
    fs::copy(BUSYBOX, root.join("bin/busybox"))
        .context("/bin/busybox: install the package busybox-static")?;
    let listed = Command::new(BUSYBOX).arg("--list").output()?;
    ensure!(listed.status.success(), "{BUSYBOX} --list failed");
    for applet in String::from_utf8(listed.stdout)?.lines().filter(|name| *name != "busybox") {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/home:/bin/sh\n")?;
    fs::write(root.join("etc/group"), "root:x:0:\napp:x:1000:\nextra:x:2000:app\n")?;
    fs::write(root.join("etc/not-executable"), "text\n")?;
    Ok(())
}
