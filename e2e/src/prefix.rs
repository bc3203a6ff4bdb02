//! Where the programs under test are installed.

use std::{env, path::PathBuf};

use crate::Skip;

/// An install prefix: `bin`, `libexec/bulkhead`, `share/bulkhead`.
#[derive(Clone, Debug)]
pub struct Prefix {
    /// Its root.
    pub root: PathBuf,
}

impl Prefix {
    /// The prefix named by `BULKHEAD_PREFIX`, which `cargo xtask test` sets.
    ///
    /// # Errors
    /// A [`Skip`] when the variable is missing: the tests were started by hand.
    pub fn from_env() -> anyhow::Result<Prefix> {
        let root = env::var_os("BULKHEAD_PREFIX").map(PathBuf::from).ok_or_else(|| {
            Skip("BULKHEAD_PREFIX names no install prefix; run these tests by `cargo xtask test`".to_owned())
        })?;
        Ok(Prefix { root })
    }

    /// The command line program.
    pub fn bulkhead(&self) -> PathBuf {
        self.root.join("bin/bulkhead")
    }

    /// The folder that containerd finds the shim in.
    pub fn bin(&self) -> PathBuf {
        self.root.join("bin")
    }
}
