//! `bulkhead version`.

use clap::Args;

/// Prints the version.
#[derive(Debug, Args)]
pub(crate) struct Version {}

/// Prints the version.
pub(crate) fn run(_args: &Version) -> u8 {
    println!("bulkhead {}", env!("CARGO_PKG_VERSION"));
    0
}
