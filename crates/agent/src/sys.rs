#![allow(unsafe_code, reason = "system calls that have no safe wrapper")]
//! System calls that have no safe wrapper.

use std::{
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::Command,
};

use tokio::io::{Interest, unix::AsyncFd};

/// Sends any signal, real-time ones included, to the process behind a pidfd.
pub(crate) fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: the descriptor is open for the duration of the call, and a null siginfo asks for the kernel's own.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Credits the random pool behind `random` with `bits` of entropy and asks for a reseed.
pub(crate) fn credit_entropy(random: BorrowedFd<'_>, bits: i32) -> io::Result<()> {
    const RNDADDTOENTCNT: libc::c_ulong = 0x4004_5201;
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    // SAFETY: the request reads one int through the pointer, which outlives the call.
    if unsafe { libc::ioctl(random.as_raw_fd(), RNDADDTOENTCNT as _, &raw const bits) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the request takes no argument.
    if unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG as _) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Makes a program the leader of a session whose terminal is its standard input.
pub(crate) fn with_terminal(command: &mut Command) -> &mut Command {
    let lead = || {
        // SAFETY: neither call takes a pointer.
        let led = unsafe { libc::setsid() != -1 && libc::ioctl(0, libc::TIOCSCTTY, 0) != -1 };
        if led { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // SAFETY: between fork and exec it makes two system calls and touches no memory of the parent.
    unsafe { command.pre_exec(lead) }
}

/// Registers a descriptor with the runtime this is called on.
pub(crate) fn watch(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` keeps its one descriptor open until it is dropped, and the `AsyncFd` owns it until then.
    Ok(unsafe { AsyncFd::register_with_interest(descriptor, interest)? })
}
