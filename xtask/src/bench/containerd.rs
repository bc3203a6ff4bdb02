//! A containerd of our own, beside whatever this machine runs, with one container in a VM.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::foreground::Foreground;
use crate::process::{self, command};
use crate::workspace::Workspace;

/// The container, and so its sandbox.
pub(super) const ID: &str = "bench";

/// A running containerd; it ends, and its directory goes, when this is dropped.
pub(super) struct Containerd {
    directory: PathBuf,
    /// None once it was told to end.
    daemon: Option<Foreground>,
}

impl Containerd {
    /// Starts it so that it finds our shim.
    pub(super) fn start(workspace: &Workspace) -> Result<Containerd> {
        // Not below the target directory: the paths of its sockets may have 107 bytes.
        let directory = std::env::temp_dir().join(format!("xtask-containerd-{}", std::process::id()));
        fs::create_dir_all(&directory)?;
        let at = |name: &str| directory.join(name).display().to_string();
        let config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = {:?}\n",
            at("root"),
            at("state"),
            at("socket"),
        );
        fs::write(directory.join("config.toml"), config)?;
        let path = format!(
            "{}:{}",
            workspace.prefix().join("bin").display(),
            std::env::var("PATH").unwrap_or_default()
        );
        let mut daemon = Foreground::start(
            // It says on its standard error that it is ready.
            command("sh")
                .args(["-c", "exec containerd --config \"$1\" 2>&1", "sh", &at("config.toml")])
                .env("PATH", path),
        )?;
        while !daemon
            .line()
            .context("containerd does not start")?
            .1
            .contains("containerd successfully booted")
        {}
        Ok(Containerd { directory, daemon: Some(daemon) })
    }

    /// Starts a container of this root file system that does nothing.
    pub(super) fn run(&self, rootfs: &Path) -> Result<()> {
        let mut ctr =
            self.ctr(&["run", "--detach", "--null-io", "--runtime", "io.containerd.bulkhead.v2", "--rootfs"]);
        process::output(ctr.arg(rootfs).args([ID, "/bin/sleep", "1000000"])).map(drop)
    }

    /// Ends and removes the container.
    pub(super) fn remove(&self) -> Result<()> {
        process::output(&mut self.ctr(&["task", "delete", "--force", ID]))?;
        process::output(&mut self.ctr(&["container", "delete", ID])).map(drop)
    }

    fn ctr(&self, arguments: &[&str]) -> Command {
        let mut ctr = command("ctr");
        ctr.arg("--address").arg(self.directory.join("socket")).args(arguments);
        ctr
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // In this order: it writes into the directory as long as it runs.
        drop(self.daemon.take());
        let _ = fs::remove_dir_all(&self.directory);
    }
}
