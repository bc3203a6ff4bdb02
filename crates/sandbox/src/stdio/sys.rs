//! Registration with the runtime's reactor, whose only constructor that is not deprecated is unsafe.
#![allow(unsafe_code, reason = "AsyncFd cannot know that its descriptor stays open; an OwnedFd does")]

use std::{io, os::fd::OwnedFd};

use tokio::io::{Interest, unix::AsyncFd};

/// Waits on a descriptor from now on. A descriptor that the kernel cannot wait for is given back with the error.
pub(super) fn watch(fd: OwnedFd, interest: Interest) -> Result<AsyncFd<OwnedFd>, (OwnedFd, io::Error)> {
    // SAFETY: an `OwnedFd` keeps its descriptor open until it is dropped, and the `AsyncFd` owns it until then.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(|failure| failure.into_parts())
}
