//! `cargo xtask build`: everything a host needs to run containers in VMs, in one prefix.
//!
//! ```text
//! target/bulkhead/bin/{bulkhead, containerd-shim-bulkhead-v2}
//! target/bulkhead/libexec/bulkhead/{bulkhead-backend, bulkhead-agent}
//! target/bulkhead/share/bulkhead/{vmlinuz, initramfs.img}
//! ```
//!
//! Files are replaced, never written into, so that programs which are running keep theirs; what has not changed stays.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use bulkhead_image::{initramfs, kernel};

use crate::progress::{heading, step};
use crate::workspace::Workspace;
use crate::{process, setup};

/// The target is named so that what is only meant for the guest's programs does not apply to build scripts too.
const GUEST_TARGET: &str = "x86_64-unknown-linux-gnu";

/// Package (and program) and the directory it is installed in.
const HOST_PROGRAMS: &[(&str, &str)] =
    &[("bulkhead", "bin"), ("containerd-shim-bulkhead-v2", "bin"), ("bulkhead-backend", "libexec/bulkhead")];

/// How to build.
#[derive(clap::Args, Default)]
pub(crate) struct Arguments {
    /// Unoptimized programs, quicker to build
    #[arg(long)]
    debug: bool,
    /// Only what the guest boots from: agent, kernel, initramfs
    #[arg(long)]
    guest: bool,
}

/// For tasks that use the prefix.
#[derive(clap::Args, Default)]
pub(crate) struct Prepare {
    /// Take target/bulkhead as it is: no setup, no build
    #[arg(long, global = true)]
    no_build: bool,
}

impl Prepare {
    /// Sets up and builds, unless told not to.
    pub(crate) fn run(&self, workspace: &Workspace) -> Result<()> {
        if self.no_build {
            return Ok(());
        }
        heading("Setup");
        setup::run(workspace)?;
        run(workspace, &Arguments::default())
    }
}

/// Builds and installs.
pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    let mut programs = Vec::new();
    if !arguments.guest {
        heading("Building host programs");
        programs = host_programs(workspace, arguments)?;
    }
    heading("Building the guest agent");
    let agent = agent(workspace, arguments)?;
    let prefix = workspace.prefix();
    step(&format!("Installing into {}", prefix.display()), || {
        for ((name, directory), program) in HOST_PROGRAMS.iter().zip(&programs) {
            install(&prefix.join(directory).join(name), &read(program)?, 0o755)?;
        }
        install(&prefix.join("libexec/bulkhead/bulkhead-agent"), &read(&agent)?, 0o755)?;
        guest(workspace, &agent)
    })
}

fn host_programs(workspace: &Workspace, arguments: &Arguments) -> Result<Vec<PathBuf>> {
    let mut cargo = workspace.cargo("build");
    for (package, _) in HOST_PROGRAMS {
        cargo.args(["--package", package]);
    }
    if !arguments.debug {
        cargo.arg("--release");
    }
    process::run(&mut cargo)?;
    let output = workspace.target.join(if arguments.debug { "debug" } else { "release" });
    Ok(HOST_PROGRAMS.iter().map(|(name, _)| output.join(name)).collect())
}

/// Makes cargo link statically what it builds for [`GUEST_TARGET`]: there are no libraries in the guest.
fn statically(cargo: &mut Command) -> &mut Command {
    cargo
        .env(
            "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS",
            "-C target-feature=+crt-static -C link-arg=-Wl,-z,pack-relative-relocs",
        )
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
}

fn agent(workspace: &Workspace, arguments: &Arguments) -> Result<PathBuf> {
    let mut cargo = workspace.cargo("build");
    statically(&mut cargo).args(["--package", "bulkhead-agent", "--target", GUEST_TARGET]);
    if arguments.debug {
        // Line tables would make it twenty times as large, and it is copied into the guest at each boot.
        cargo.args(["--config", "profile.dev.strip='debuginfo'"]);
    } else {
        cargo.args(["--profile", "guest"]);
    }
    process::run(&mut cargo)?;
    let profile = if arguments.debug { "debug" } else { "guest" };
    Ok(workspace.target.join(GUEST_TARGET).join(profile).join("bulkhead-agent"))
}

/// Kernel and initramfs.
fn guest(workspace: &Workspace, agent: &Path) -> Result<()> {
    let package = kernel::Package::find(&workspace.kernel())
        .context("there is no guest kernel yet: run `cargo xtask setup` first")?;
    let share = workspace.prefix().join("share/bulkhead");
    let bootable = share.join("vmlinuz");
    if is_older(&bootable, &package.image) {
        install(&bootable, &package.bootable()?, 0o644)?;
    }
    install(&share.join("initramfs.img"), &initramfs::build(&package.modules, agent)?, 0o644)
}

/// Whether a file is missing or was made before its source came here (which is not when that was made: a package keeps
/// the dates of its files).
fn is_older(file: &Path, source: &Path) -> bool {
    match (fs::metadata(file), fs::metadata(source)) {
        (Ok(file), Ok(source)) => (file.mtime(), file.mtime_nsec()) < (source.ctime(), source.ctime_nsec()),
        _ => true,
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Makes `path` a file of this content and mode, unless it is already.
fn install(path: &Path, content: &[u8], mode: u32) -> Result<()> {
    let same = fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o7777 == mode)
        && fs::read(path).is_ok_and(|present| present == content);
    if same {
        return Ok(());
    }
    let replace = || {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        let new = path.with_extension("new");
        fs::write(&new, content)?;
        fs::set_permissions(&new, fs::Permissions::from_mode(mode))?;
        fs::rename(&new, path)
    };
    replace().with_context(|| format!("cannot install {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_changed_is_replaced() {
        let directory = std::env::temp_dir().join(format!("xtask-install-{}", std::process::id()));
        let file = directory.join("bin/program");
        let inode = || fs::metadata(&file).unwrap().ino();
        install(&file, b"one", 0o755).unwrap();
        let first = inode();
        install(&file, b"one", 0o755).unwrap();
        assert_eq!(inode(), first);
        install(&file, b"one", 0o644).unwrap();
        assert_ne!(inode(), first);
        install(&file, b"two", 0o644).unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"two");
        assert_eq!(fs::read_dir(directory.join("bin")).unwrap().count(), 1);
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn older_or_missing_files_are_made_again() {
        let directory = std::env::temp_dir().join(format!("xtask-older-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let (first, second) = (directory.join("first"), directory.join("second"));
        fs::write(&first, "").unwrap();
        assert!(is_older(&second, &first));
        fs::write(&second, "").unwrap();
        assert!(!is_older(&second, &first));
        let old = std::time::SystemTime::UNIX_EPOCH;
        fs::File::options().write(true).open(&first).unwrap().set_modified(old).unwrap();
        fs::File::options().write(true).open(&second).unwrap().set_modified(old).unwrap();
        assert!(is_older(&second, &first), "what counts is when the source came here");
        fs::remove_dir_all(&directory).unwrap();
    }
}
