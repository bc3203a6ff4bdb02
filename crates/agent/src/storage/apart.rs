//! Tests that mount: each in a mount namespace of its own.

use std::{sync::Arc, time::Duration};

use rustix::{mount::MountPropagationFlags, thread::UnshareFlags};

use super::Storages;
use crate::{boot::Guest, device::Devices};

/// Runs a test on a thread in a mount namespace of its own, as are the threads that it starts, with an empty directory.
pub(super) fn apart(test: impl AsyncFnOnce(Storages, String) + Send + 'static) {
    alone(move || {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_str().unwrap().to_owned();
        let storages = Storages::new(Arc::new(Guest::plain()), Arc::new(Devices::new(Duration::ZERO, false)));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test(storages, path));
        runtime.shutdown_timeout(Duration::from_secs(1));
    });
}

/// The same without storages and runtime.
pub(super) fn alone(test: impl FnOnce() + Send + 'static) {
    std::thread::spawn(move || {
        #[expect(deprecated, reason = "the one call that is not unsafe; it takes no descriptors away")]
        rustix::thread::unshare(UnshareFlags::NEWNS | UnshareFlags::FS).unwrap();
        rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
            .unwrap();
        test();
    })
    .join()
    .unwrap();
}
