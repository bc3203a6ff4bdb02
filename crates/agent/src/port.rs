//! vsock ports of the guest that only the host gets through.

use std::{io, time::Duration};

use bulkhead_protocol::ports;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};

use crate::error::{During, Result};

/// After a failure, as when descriptors have run out, the next try waits this long.
const PAUSE: Duration = Duration::from_secs(1);

/// A port that connections are taken from.
pub(crate) struct HostPort(VsockListener);

impl HostPort {
    /// Opens a port.
    pub(crate) fn listen(cid: u32, port: u32) -> io::Result<HostPort> {
        Ok(HostPort(VsockListener::bind(VsockAddr::new(cid, port))?))
    }

    /// Waits for a connection of the host; also tells its port there. A container of the guest can reach the port, too,
    /// and is turned away.
    pub(crate) async fn accept(&self) -> io::Result<(VsockStream, u32)> {
        loop {
            let (connection, peer) = self.0.accept().await?;
            if is_host(&peer) {
                return Ok((connection, peer.port()));
            }
            tracing::warn!(cid = peer.cid(), "refused a connection that is not the host's");
        }
    }
}

/// Connections from the guest itself come from the loopback's or the guest's own number.
fn is_host(peer: &VsockAddr) -> bool {
    peer.cid() == ports::HOST_CID
}

/// Hands every connection of the host to `taken`, for as long as the agent runs. Has to be called on the runtime.
pub(crate) fn serve(
    port: u32,
    what: &'static str,
    taken: impl Fn(VsockStream, u32) + Send + 'static,
) -> Result<()> {
    let port = HostPort::listen(VMADDR_CID_ANY, port)
        .during(|| format!("listen on vsock port {port} for {what}"))?;
    crate::sync::spawn(async move {
        loop {
            match port.accept().await {
                Ok((connection, peer)) => taken(connection, peer),
                Err(error) => {
                    tracing::warn!(%error, "a connection for {what} was not taken");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio_vsock::{VMADDR_CID_HYPERVISOR, VMADDR_CID_LOCAL};

    use super::*;

    #[test]
    fn only_the_host_gets_through() {
        assert!(is_host(&VsockAddr::new(2, 1024)));
        for cid in [VMADDR_CID_HYPERVISOR, VMADDR_CID_LOCAL, 3, 4711, VMADDR_CID_ANY] {
            assert!(!is_host(&VsockAddr::new(cid, 1024)), "{cid}");
        }
    }
}
