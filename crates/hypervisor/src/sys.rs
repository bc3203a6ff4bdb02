//! The unsafe corner: what happens in a child between fork and exec, and one ioctl.
#![allow(unsafe_code, reason = "pre_exec, close_range and the vhost ioctl have no safe form")]

use std::{
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    process::Command,
};

use rustix::{
    process::{Resource, Rlimit, Signal},
    thread::{Gid, LinkNameSpaceType, Uid},
};
use tokio::io::{Interest, unix::AsyncFd};

use crate::process::Process;

/// What a child does to itself before it executes its program.
pub(crate) struct Entry {
    /// Descriptors it keeps, under the numbers they have here.
    pub inherit: Vec<RawFd>,
    /// Namespaces it enters.
    pub namespaces: Vec<(OwnedFd, LinkNameSpaceType)>,
    /// Whom it becomes, for good: no capability and no way back.
    pub identity: Option<(Uid, Gid, Vec<Gid>)>,
    /// Pid of this process: the child must not outlive it.
    pub parent: rustix::process::Pid,
}

impl Entry {
    /// Runs in the forked child: only system calls, no allocation, no lock.
    fn enter(&self) -> io::Result<()> {
        // Its own session: a Ctrl-C at the terminal is for the container, not for the VMM.
        rustix::process::setsid()?;
        close_on_exec_from(3)?;
        for &fd in &self.inherit {
            // SAFETY: the number was taken from a descriptor that the parent keeps open until the child has executed.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
        }
        for (namespace, kind) in &self.namespaces {
            rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(namespace), Some(*kind))?;
        }
        if let Some((uid, gid, groups)) = &self.identity {
            // A core file would hold the guest's memory.
            rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
            rustix::thread::set_thread_groups(groups)?;
            rustix::thread::set_thread_res_gid(*gid, *gid, *gid)?;
            rustix::thread::set_thread_res_uid(*uid, *uid, *uid)?;
            rustix::thread::set_no_new_privs(true)?;
        }
        // After the change of identity, which clears it; and then the check, for a parent that died before.
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        if rustix::process::getppid() != Some(self.parent) {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        Ok(())
    }
}

/// Arranges for `entry` to happen in the child of `command`.
pub(crate) fn before_exec(command: &mut Command, entry: Entry) {
    // SAFETY: `Entry::enter` makes system calls only; it neither allocates nor takes a lock, and touches no memory that
    // another thread of the parent could have held while it was forked.
    unsafe { command.pre_exec(move || entry.enter()) };
}

/// Makes the end of a process something to await.
pub(crate) fn watch(process: Process) -> io::Result<AsyncFd<Process>> {
    // SAFETY: the process owns its pidfd, hands it to nobody, and closes it only when it is dropped itself.
    Ok(unsafe { AsyncFd::register_with_interest(process, Interest::READABLE) }?)
}

/// Marks every descriptor from `first` up as closed on exec, whatever a library of this process forgot.
fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: takes numbers, touches no memory.
    let done = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `VHOST_VSOCK_SET_GUEST_CID`: claims a context id as long as `vhost` is open; `EADDRINUSE` when somebody has it.
pub(crate) fn set_guest_cid(vhost: &OwnedFd, cid: u32) -> io::Result<()> {
    /// `_IOW(0xAF, 0x60, u64)`
    const VHOST_VSOCK_SET_GUEST_CID: libc::c_ulong = 0x4008_AF60;
    let cid = u64::from(cid);
    // SAFETY: the kernel reads eight bytes from a live u64.
    let done = unsafe { libc::ioctl(vhost.as_raw_fd(), VHOST_VSOCK_SET_GUEST_CID, &raw const cid) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Gives this thread a mount namespace of its own. Only for a thread that nobody else will use: it loses the shared
/// working directory and root too.
pub(crate) fn unshare_mounts() -> io::Result<()> {
    use rustix::thread::UnshareFlags;
    // SAFETY: the flags share no file descriptors away; only this thread's view of mounts and its working directory
    // become its own.
    Ok(unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }?)
}
