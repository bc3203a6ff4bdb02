//! A folder and a configuration for one case alone.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context;

use crate::{Cli, Prefix, busybox_rootfs};

/// What a case works in: its own folder, state root and configuration file. Removed when the case ends.
pub struct Scratch {
    dir: tempfile::TempDir,
    prefix: Prefix,
}

impl Scratch {
    /// A fresh one.
    pub fn new() -> anyhow::Result<Scratch> {
        let prefix = Prefix::from_env()?;
        let dir = tempfile::Builder::new().prefix("bh-e2e-").tempdir().context("a temporary folder")?;
        fs::create_dir(dir.path().join("state"))?;
        Ok(Scratch { dir, prefix })
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The programs under test.
    pub fn prefix(&self) -> &Prefix {
        &self.prefix
    }

    /// Where sandboxes of this case keep their state.
    pub fn state_root(&self) -> PathBuf {
        self.path().join("state")
    }

    /// The command line, on this case's state root and the default configuration.
    pub fn cli(&self) -> Cli {
        Cli::new(&self.prefix, &self.state_root())
    }

    /// A fresh busybox root file system.
    pub fn rootfs(&self) -> anyhow::Result<PathBuf> {
        let root = self.path().join("rootfs");
        busybox_rootfs(&root)?;
        Ok(root)
    }

    /// Writes a configuration file and returns its path.
    pub fn config(&self, text: &str) -> anyhow::Result<PathBuf> {
        let path = self.path().join("configuration.toml");
        fs::write(&path, text)?;
        Ok(path)
    }
}
