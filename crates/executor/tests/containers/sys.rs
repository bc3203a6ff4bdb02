//! The system calls that these tests need and no safe wrapper offers.

#![allow(unsafe_code, reason = "raw system calls")]

use std::io;

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A mount namespace for the whole program. Before any thread.
pub(crate) fn unshare_mounts() -> io::Result<()> {
    // SAFETY: concerns neither memory nor descriptors.
    check(unsafe { libc::unshare(libc::CLONE_NEWNS) })
}

/// Switches the machine off.
pub(crate) fn power_off() -> io::Result<()> {
    // SAFETY: a plain number.
    check(unsafe { libc::reboot(libc::RB_POWER_OFF) })
}
