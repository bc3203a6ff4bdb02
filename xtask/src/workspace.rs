//! Where things are: the repository, and what the tasks put into its target directory.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::process;

/// The repository and its target directory.
pub(crate) struct Workspace {
    /// The top of the repository.
    pub(crate) root: PathBuf,
    /// Cargo's target directory.
    pub(crate) target: PathBuf,
}

impl Workspace {
    /// Asks cargo.
    pub(crate) fn locate() -> Result<Workspace> {
        #[derive(serde::Deserialize)]
        struct Metadata {
            workspace_root: PathBuf,
            target_directory: PathBuf,
        }
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
        let json = process::output(
            process::command(cargo())
                .args(["metadata", "--format-version=1", "--no-deps", "--manifest-path"])
                .arg(manifest),
        )?;
        let metadata: Metadata = serde_json::from_str(&json).context("cannot read `cargo metadata`")?;
        Ok(Workspace { root: metadata.workspace_root, target: metadata.target_directory })
    }

    /// A cargo command in the repository.
    pub(crate) fn cargo(&self, subcommand: &str) -> Command {
        let mut command = process::command(cargo());
        command.current_dir(&self.root).arg(subcommand);
        command
    }

    /// The install prefix that `build` fills.
    pub(crate) fn prefix(&self) -> PathBuf {
        self.target.join("bulkhead")
    }

    /// The guest kernel's package, unpacked.
    pub(crate) fn kernel(&self) -> PathBuf {
        self.target.join("kernel")
    }
}

/// The cargo that runs this program.
fn cargo() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned())
}
