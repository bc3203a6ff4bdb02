//! A folder and a configuration for one case alone.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context;

use crate::{Cli, Prefix, busybox_rootfs};

/// What a case works in: its own folder and configuration file. Removed when the case ends.
pub struct Scratch {
    dir: tempfile::TempDir,
    prefix: Prefix,
}

impl Scratch {
    /// A fresh one.
    pub fn new() -> anyhow::Result<Scratch> {
        let prefix = Prefix::from_env()?;
        let dir = tempfile::Builder::new().prefix("bh-e2e-").tempdir().context("a temporary folder")?;
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

    /// The command line with the default configuration.
    pub fn cli(&self) -> Cli {
        Cli::new(&self.prefix)
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
