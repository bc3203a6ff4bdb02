//! Builds what a guest boots from: a kernel out of a distribution's package, and an initramfs of the modules the guest
//! needs and the agent that is its `/init`.
//!
//! Nothing here runs another program or needs privileges, and the same input gives the same bytes.

pub mod compression;
pub mod cpio;
pub mod elf;
pub mod initramfs;
pub mod kernel;
pub mod modules;

/// The contents of a file; the error names it.
fn read(path: &std::path::Path) -> Result<Vec<u8>, ReadError> {
    std::fs::read(path).map_err(|source| ReadError { path: path.to_path_buf(), source })
}

/// A file or directory that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {}", path.display())]
pub struct ReadError {
    /// Which one.
    pub path: std::path::PathBuf,
    /// Why.
    pub source: std::io::Error,
}
