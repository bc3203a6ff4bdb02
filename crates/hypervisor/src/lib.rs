//! Boots and feeds one virtual machine; knows no containers and no agent.
//!
//! Everything known before boot is a value, [`VmConfig`]; what exists afterwards is a handle, [`Vm`]. Dropping the handle
//! leaves no process, socket or directory behind.

mod accel;
mod backend;
mod config;
mod endpoint;
mod error;
mod identity;
mod local;
mod machine;
mod process;
mod qemu;
mod sys;
mod tail;
mod workdir;

pub use accel::{Accel, AccelPolicy, AccelQuery, Verdict, resolve_accel};
pub use config::{Kind, Share, VmConfig};
pub use endpoint::{Connection, Endpoint, Stream};
pub use error::Error;

use std::{fs::File, os::fd::OwnedFd, path::Path, time::Duration};

use rustix::thread::LinkNameSpaceType;
/// A device to be plugged into a running VM.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Device {
    /// A disk backed by a file or a block device.
    Block {
        /// The file or device.
        path: std::path::PathBuf,
        /// Writes are refused by the VMM itself.
        read_only: bool,
    },
}

/// How a VMM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmExit {
    /// Exit code of the VMM, or 128 + signal.
    pub code: i32,
    /// When it was seen.
    pub at: std::time::SystemTime,
    /// The last lines of the guest's console and of the VMM's own output, for the error text.
    pub last_words: String,
}

/// A running virtual machine. Handed out by [`boot`]; methods may be called in any order and from any task. A method that
/// a backend cannot do returns [`Error::Unsupported`].
#[async_trait::async_trait]
pub trait Vm: Send + Sync {
    /// What executes the guest's instructions.
    fn accel(&self) -> Accel;
    /// Pid of the VMM process.
    fn pid(&self) -> u32;
    /// Every process of this VM besides the VMM (backends), for state files and figures.
    fn helper_pids(&self) -> Vec<u32>;
    /// How other processes reach the guest's ports; may be written into a state file.
    fn endpoint(&self) -> &Endpoint;
    /// The last lines of the guest's console and of the VMM's output.
    fn last_words(&self) -> String;
    /// Plugs a device in; returns its guest address (PCI path).
    async fn attach(&self, device: Device) -> Result<String, Error>;
    /// Stops the virtual CPUs.
    async fn pause(&self) -> Result<(), Error>;
    /// Lets the virtual CPUs run again.
    async fn resume(&self) -> Result<(), Error>;
    /// Resolves when the VMM is gone, by whatever cause; any number of callers, any time.
    async fn wait(&self) -> VmExit;
    /// Waits up to `grace` for the guest to power itself off, then asks the VMM to quit, then kills it. On return every
    /// process and socket of this VM is gone.
    async fn stop(&self, grace: Duration) -> Result<VmExit, Error>;
}

/// Boots a VM. On error, or when the returned future is dropped, nothing is left behind, and the error carries the last
/// lines of the console. Resolves when the VMM runs the guest, which is not yet when the guest listens.
pub async fn boot(config: VmConfig) -> Result<Box<dyn Vm>, Error> {
    match &config.kind {
        Kind::Qemu => qemu::boot(&config).await,
        Kind::Local { program, args, share_at } => local::boot(&config, program, args, share_at).await,
    }
}

/// A network namespace to be entered.
fn netns(path: &Path) -> Result<(OwnedFd, LinkNameSpaceType), Error> {
    let namespace =
        File::open(path).map_err(Error::io(format!("open the network namespace {}", path.display())))?;
    Ok((namespace.into(), LinkNameSpaceType::Network))
}
