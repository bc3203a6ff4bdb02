//! The connection with the VMM, the same for every device: one VMM, and when it goes, so do we.

use anyhow::{Context, bail};
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{Error, VhostUserBackend, VhostUserDaemon, bitmap::BitmapReplace};
use vm_memory::mmap::NewBitmap;

/// Waits for the VMM, then serves it until it disconnects.
pub(crate) fn serve<T>(daemon: &mut VhostUserDaemon<T>, mut listener: Listener) -> anyhow::Result<()>
where
    T: VhostUserBackend + Clone + 'static,
    T::Bitmap: BitmapReplace + NewBitmap + Clone + Send + Sync,
    T::Vring: Clone + Send + Sync,
{
    listener.set_nonblocking(false).context("cannot prepare the VMM's socket")?;
    daemon.start(&mut listener).map_err(|error| anyhow::anyhow!("cannot accept the VMM: {error}"))?;
    // Nobody else may connect; the socket file is its maker's.
    drop(listener);
    match daemon.wait() {
        Ok(()) => Ok(()),
        // However the VMM ended, it has no more use for us.
        Err(Error::HandleRequest(
            VhostUserError::Disconnected | VhostUserError::PartialMessage | VhostUserError::SocketBroken(_),
        )) => Ok(()),
        Err(error) => bail!("the VMM's vhost-user connection failed: {error}"),
    }
}
