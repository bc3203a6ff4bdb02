//! Descriptors that the spawner leaves open for us.
#![allow(
    unsafe_code,
    reason = "a descriptor number from the command line can be owned only by an unsafe promise"
)]

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, FdFlag, OFlag, fcntl},
    sys::{
        prctl::set_pdeathsig,
        signal::Signal,
        wait::{WaitStatus, waitpid},
    },
    unistd::{ForkResult, fork, pipe2, read},
};

use crate::privileges;

/// Takes over descriptor `fd`, which nothing in this process uses, and marks it close-on-exec.
pub(crate) fn take_fd(fd: RawFd) -> io::Result<OwnedFd> {
    if fd <= libc::STDERR_FILENO {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "descriptors 0 to 2 are the standard streams",
        ));
    }
    // SAFETY: only borrowed for the call; a number that is not open makes fcntl fail, nothing worse.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    // SAFETY: it is open, and as it was inherited, no object of this process owns it; main calls this once per number,
    // before it opens anything.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Forks; only the child returns. The parent waits for it without any privilege and ends as it does, and the child dies
/// with the parent. Fails when the process has more than one thread.
pub(crate) fn continue_in_child() -> io::Result<()> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("the process has more than one thread"));
    }
    let (alive, parent_end) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    // SAFETY: there is no other thread whose locks or half-done work the child could inherit.
    match unsafe { fork() }? {
        ForkResult::Child => {
            drop(parent_end);
            set_pdeathsig(Signal::SIGKILL)?;
            // Had the parent died before that line, nobody would tell us.
            match read(&alive, &mut [0]) {
                Err(Errno::EAGAIN) => Ok(()),
                _ => std::process::exit(1),
            }
        }
        ForkResult::Parent { child } => {
            // The VMM's socket is the child's alone, or a VMM could connect to nobody. The pipe stays, so that the child
            // knows us alive.
            close_all_but(&parent_end);
            if privileges::drop_all().is_err() {
                std::process::exit(1);
            }
            let status = loop {
                match waitpid(child, None) {
                    Ok(WaitStatus::Exited(_, code)) => break code,
                    Ok(WaitStatus::Signaled(_, signal, _)) => {
                        eprintln!("bulkhead-backend: the file server was ended by {signal}");
                        break 128 + signal as i32;
                    }
                    Ok(_) | Err(Errno::EINTR) => {}
                    Err(_) => break 1,
                }
            };
            std::process::exit(status)
        }
    }
}

/// Closes every descriptor but the standard streams and `kept`. For a process that does not return to their owners.
fn close_all_but(kept: &OwnedFd) {
    let kept = kept.as_raw_fd().unsigned_abs();
    for (first, last) in [(3, kept.saturating_sub(1)), (kept + 1, u32::MAX)] {
        if first <= last {
            // SAFETY: the owners of these descriptors live in frames that are never returned to, as the caller promises;
            // a kernel without close_range merely leaves them open.
            unsafe { libc::close_range(first, last, 0) };
        }
    }
}
