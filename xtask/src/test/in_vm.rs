//! A test program as PID 1 of a VM: for what needs a machine of its own, such as cgroups.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use bulkhead_image::cpio::Archive;

use crate::build::{GUEST_TARGET, statically};
use crate::process;
use crate::rootfs;
use crate::workspace::Workspace;

/// After this long, a VM is not going to end any more (`timeout` of coreutils).
const PATIENCE: &str = "900";

/// Builds the executor's tests into an initramfs and returns the command of a VM that runs them and prints what they print.
pub(super) fn command(workspace: &Workspace) -> Result<Command> {
    let mut archive = Archive::new();
    archive.file("init", 0o755, fs::read(build(workspace)?)?);
    archive.file("bin/busybox", 0o755, fs::read(rootfs::busybox()?)?);
    let initramfs = workspace.target.join("test-initramfs.img");
    fs::write(&initramfs, archive.to_bytes()?)
        .with_context(|| format!("cannot write {}", initramfs.display()))?;

    let mut vm = process::command("timeout");
    vm.args(["--foreground", "--kill-after=5", PATIENCE, "qemu-system-x86_64"])
        // Works everywhere; and there is nothing here that would be worth finding out about KVM.
        .args(["-machine", "q35,accel=tcg", "-cpu", "max", "-m", "1G"])
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"])
        .arg("-kernel")
        .arg(workspace.prefix().join("share/bulkhead/vmlinuz"))
        .arg("-initrd")
        .arg(&initramfs)
        .args(["-append", "console=ttyS0 quiet panic=-1"])
        .stdin(Stdio::null());
    Ok(vm)
}

/// Builds the test program, without libraries, and finds out where it is.
fn build(workspace: &Workspace) -> Result<PathBuf> {
    let mut cargo = workspace.cargo("test");
    cargo
        .args(["--package", "bulkhead-executor", "--test", "containers", "--no-run", "--message-format=json"])
        .args(["--target", GUEST_TARGET]);
    let output = statically(&mut cargo).stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    let messages = String::from_utf8_lossy(&output.stdout);
    messages.lines().find_map(executable).context("cargo built no test program `containers`")
}

/// The program that a message of cargo tells of, if it is the test.
fn executable(message: &str) -> Option<PathBuf> {
    let message: serde_json::Value = serde_json::from_str(message).ok()?;
    let wanted = message["target"]["name"] == "containers" && message["target"]["kind"][0] == "test";
    if wanted { message["executable"].as_str().map(PathBuf::from) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_found_among_the_messages() {
        let message = |kind: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","target":{{"kind":["{kind}"],"name":"containers"}},"executable":"/t/c"}}"#
            )
        };
        assert_eq!(executable(&message("test")), Some("/t/c".into()));
        assert_eq!(executable(&message("lib")), None);
        assert_eq!(executable("not json"), None);
        assert_eq!(executable(r#"{"reason":"build-finished","success":true}"#), None);
    }
}
