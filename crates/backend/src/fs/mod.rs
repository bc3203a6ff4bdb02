//! `bulkhead-backend fs`: a virtio-fs device that shows the guest one directory of the host.
//!
//! The file system itself is the virtiofsd library. What is ours is the confinement ([`confine`]): the directory becomes
//! the root of a process that sees nothing else of the host, and the guest decides what is in it. Nothing but regular
//! files and directories is ever opened, so device nodes, sockets and fifos in it are data.

mod confine;
mod mountinfo;

use std::{os::unix::net::UnixListener, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, anyhow};
use rustix::thread::CapabilitySet;
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use virtiofsd::{
    passthrough::{self, CachePolicy, InodeFileHandlesMode, PassthroughFs},
    vhost_user::VhostUserFsBackendBuilder,
};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::{args::Cache, privileges, vhost_user};

/// What a file server needs that acts for all users of a guest: to own, read and write anybody's files, and to become
/// the user who creates one. Not DAC_READ_SEARCH, with which files could be opened by handle outside of the directory.
const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

/// Descriptors kept from the guest: one for each of the at most 509 memory regions, and our own.
const RESERVED_DESCRIPTORS: u64 = 609;

/// What `fs` needs.
pub(crate) struct Config {
    /// Where the VMM connects.
    pub(crate) vmm: UnixListener,
    /// The directory.
    pub(crate) shared_dir: PathBuf,
    /// How long the guest may trust what it has read.
    pub(crate) cache: Cache,
}

/// Serves one VMM until it disconnects.
pub(crate) fn serve(config: Config) -> anyhow::Result<()> {
    let descriptors = privileges::raise_descriptor_limit().context("cannot raise the limit of open files")?;
    let guest_fd_limit =
        descriptors.checked_sub(RESERVED_DESCRIPTORS).filter(|left| *left >= 128).ok_or_else(|| {
            anyhow!("the limit of {descriptors} open files is too low to serve files: raise `ulimit -Hn`")
        })?;
    let proc_self_fd = confine::enter(&config.shared_dir)
        .with_context(|| format!("cannot confine the file server to {}", config.shared_dir.display()))?;
    privileges::keep(CAPABILITIES).context("cannot give up privileges")?;

    let fs = PassthroughFs::new(passthrough::Config {
        proc_sfd_rawfd: Some(proc_self_fd.into()),
        guest_fd_limit,
        ..policy(config.cache)
    })
    .with_context(|| format!("cannot serve {}", config.shared_dir.display()))?;
    let backend = VhostUserFsBackendBuilder::default()
        .build(fs)
        .map_err(|error| anyhow!("cannot start the virtio-fs device: {error}"))?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("vhost-user".to_owned(), Arc::new(backend), memory)
        .map_err(|error| anyhow!("cannot start the vhost-user device: {error}"))?;
    vhost_user::serve(&mut daemon, Listener::from(config.vmm))
}

fn policy(cache: Cache) -> passthrough::Config {
    let (cache_policy, timeout) = match cache {
        Cache::Never => (CachePolicy::Never, Duration::ZERO),
        Cache::Auto => (CachePolicy::Auto, Duration::from_secs(1)),
        Cache::Always => (CachePolicy::Always, Duration::from_secs(24 * 60 * 60)),
    };
    passthrough::Config {
        entry_timeout: timeout,
        attr_timeout: timeout,
        cache_policy,
        // Reads the attributes of a whole directory at once, of no use to a guest that may not keep them.
        readdirplus: cache != Cache::Never,
        root_dir: "/".to_owned(),
        // Containers' root file systems are mounts of their own below the directory: without this, two files of
        // different ones could look like the same file to the guest.
        announce_submounts: true,
        inode_file_handles: InodeFileHandlesMode::Never,
        uid_map: Some(Vec::new()),
        gid_map: Some(Vec::new()),
        ..passthrough::Config::default()
    }
}
