//! `bulkhead-backend vsock`: a virtio-vsock device whose host side are unix sockets ("hybrid vsock").
//!
//! A host program connects to the socket, writes `CONNECT <port>\n`, and reads `OK <n>\n` once a program in the guest has
//! accepted, or the end of the stream when none listens. A connection of the guest to port P of the host goes to the
//! socket `<uds>_P`. One thread serves everything and sleeps when there is nothing to do.

mod backend;
mod connection;
mod credit;
mod device;
mod door;
mod handshake;
mod host_end;
#[cfg(test)]
mod mock_driver;
mod packet;
mod rings;
mod table;

use std::{
    os::unix::net::UnixListener,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::Context;
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use self::{
    backend::{HOST_EVENT, VsockBackend},
    device::Device,
};
use crate::{privileges, vhost_user};

/// How long programs on the host may take to read what a guest sent before it went away.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What `vsock` needs.
pub(crate) struct Config {
    /// Where the VMM connects.
    pub(crate) vmm: UnixListener,
    /// Where host programs connect.
    pub(crate) programs: UnixListener,
    /// The path at which `programs` is bound.
    pub(crate) uds: PathBuf,
    /// The guest's context id.
    pub(crate) cid: u64,
}

/// Serves one VMM until it disconnects.
pub(crate) fn serve(config: Config) -> anyhow::Result<()> {
    privileges::drop_all().context("cannot give up privileges")?;
    let device =
        Device::new(config.cid, config.uds, config.programs).context("cannot set up the device's events")?;
    let events = device.events();
    let backend = Arc::new(Mutex::new(VsockBackend::new(device)));
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("vhost-user".to_owned(), backend.clone(), memory)
        .map_err(|error| anyhow::anyhow!("cannot start the vhost-user device: {error}"))?;
    for worker in daemon.get_epoll_handlers() {
        worker
            .register_listener(events, EventSet::IN, HOST_EVENT)
            .context("cannot wait for the host's sockets")?;
    }
    let served = vhost_user::serve(&mut daemon, Listener::from(config.vmm));
    if let Ok(mut backend) = backend.lock() {
        backend.drain(Instant::now() + LAST_WORDS);
    }
    served
}
