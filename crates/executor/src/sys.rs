//! The system calls that no safe wrapper offers.

#![allow(unsafe_code, reason = "raw system calls; every other module is safe")]

use std::{
    ffi::{CStr, CString, c_char, c_int, c_long, c_ulong, c_void},
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

/// What `clone_sibling` returned, and where.
pub(crate) enum Cloned {
    /// In the new process.
    Child,
    /// In the calling process: the new one's pid as the caller sees it, and its pidfd.
    Sibling {
        /// The pid.
        pid: i32,
        /// The pidfd.
        pidfd: OwnedFd,
    },
}

/// Does not fit libc's c_int constants.
const CLONE_INTO_CGROUP: u64 = 1 << 33;

fn check(result: c_long) -> io::Result<c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn raw_fd(value: c_long) -> io::Result<RawFd> {
    RawFd::try_from(value).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))
}

/// Forks a process that is a child of the caller's parent, born in `cgroup` if one is given.
///
/// Only for a process with a single thread: the child goes on with a copy of the caller's memory.
pub(crate) fn clone_sibling(cgroup: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args is plain data for which zero means "not used".
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = u64::from((libc::CLONE_PARENT | libc::CLONE_PIDFD).cast_unsigned());
    args.pidfd = ptr::from_mut(&mut pidfd) as u64;
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::from(cgroup.as_raw_fd().cast_unsigned());
    }
    // exit_signal stays 0: with CLONE_PARENT the kernel takes the caller's own.
    // SAFETY: without CLONE_VM this is a fork: the child has its own copy of everything `args` points to, and the
    // process has one thread, so that no lock can be held by a thread that the child does not have. (glibc's cached
    // thread id is stale in the child; nothing that depends on it is used before execve.)
    let pid =
        check(unsafe { libc::syscall(libc::SYS_clone3, ptr::from_mut(&mut args), size_of_val(&args)) })?;
    if pid == 0 {
        return Ok(Cloned::Child);
    }
    // SAFETY: the kernel stored a fresh descriptor that nothing else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Cloned::Sibling { pid: raw_fd(pid)?, pidfd })
}

/// Ends the process without running exit handlers, which belong to the program it was cloned from.
pub(crate) fn exit(code: c_int) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(code) }
}

/// Closes every descriptor from `first` up. Only for a fresh process that owns none of them.
pub(crate) fn close_from(first: u32) -> io::Result<()> {
    // SAFETY: called as the first thing in a fresh process, which owns no descriptor yet.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) }).map(drop)
}

/// Marks every descriptor from `first` up close-on-exec.
pub(crate) fn cloexec_from(first: u32) -> io::Result<()> {
    const CLOSE_RANGE_CLOEXEC: u32 = 1 << 2;
    // SAFETY: changes flags only.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, CLOSE_RANGE_CLOEXEC) }).map(drop)
}

/// Every signal at its default, none blocked.
pub(crate) fn reset_signals() -> io::Result<()> {
    // struct sigaction as the kernel lays it out: handler (SIG_DFL is 0), flags, restorer, mask.
    let default = [0u64; 4];
    for signal in 1..=64 {
        // libc's own function refuses the signals that it keeps for itself; the caller may have been started with them
        // ignored. SIGKILL and SIGSTOP cannot be changed, which is fine.
        // SAFETY: the default action runs no code of ours; the kernel reads the structure and writes none.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                ptr::null_mut::<u64>(),
                size_of::<u64>(),
            )
        };
    }
    let none: u64 = 0;
    // SAFETY: the kernel reads eight bytes, its size of a signal set.
    check(unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            ptr::from_ref(&none),
            ptr::null_mut::<u64>(),
            size_of::<u64>(),
        )
    })
    .map(drop)
}

/// Becomes `path`; returns only with why that failed.
pub(crate) fn execve(path: &CStr, args: &[CString], env: &[CString]) -> io::Error {
    let pointers = |strings: &[CString]| -> Vec<*const c_char> {
        strings.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect()
    };
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: both arrays end with a null pointer and their strings outlive the call.
    unsafe { libc::execve(path.as_ptr(), args.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

/// Leaves the namespaces that `flags` name for new ones.
pub(crate) fn unshare(flags: c_int) -> io::Result<()> {
    // SAFETY: the flags are CLONE_NEW* ones, none of which concerns memory or descriptors.
    check(c_long::from(unsafe { libc::unshare(flags) })).map(drop)
}

/// Joins the namespace behind `fd`, which must be of the kind `flag` names.
pub(crate) fn setns(fd: BorrowedFd<'_>, flag: c_int) -> io::Result<()> {
    // SAFETY: as for unshare.
    check(c_long::from(unsafe { libc::setns(fd.as_raw_fd(), flag) })).map(drop)
}

/// `struct mount_attr` of mount_setattr(2).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MountAttr {
    /// `MOUNT_ATTR_*` to set.
    pub(crate) set: u64,
    /// `MOUNT_ATTR_*` to clear.
    pub(crate) clear: u64,
    /// `MS_SHARED`, `MS_PRIVATE`, `MS_SLAVE`, `MS_UNBINDABLE`, or 0.
    pub(crate) propagation: u64,
    /// Unused.
    pub(crate) userns_fd: u64,
}

/// Changes the mount that `mount` is the root of, and those below it if `recursive`.
pub(crate) fn mount_setattr(mount: BorrowedFd<'_>, recursive: bool, attr: &MountAttr) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is an empty C string and the structure has the size that is passed.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            ptr::from_ref(attr),
            size_of::<MountAttr>(),
        )
    })
    .map(drop)
}

/// mount(2) with everything optional and raw flags.
pub(crate) fn mount(
    source: &CStr,
    target: &CStr,
    fstype: &CStr,
    flags: u64,
    data: Option<&CStr>,
) -> io::Result<()> {
    let data = data.map_or(ptr::null(), CStr::as_ptr).cast::<c_void>();
    // SAFETY: all strings are valid C strings that outlive the call.
    check(c_long::from(unsafe {
        libc::mount(source.as_ptr(), target.as_ptr(), fstype.as_ptr(), flags as c_ulong, data)
    }))
    .map(drop)
}

/// Installs a seccomp program.
pub(crate) fn seccomp(flags: u32, program: &[u64]) -> io::Result<()> {
    const SECCOMP_SET_MODE_FILTER: c_int = 1;
    let len = u16::try_from(program.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
    // An instruction is eight bytes: code u16, jt u8, jf u8, k u32; see `seccomp::Instruction`.
    let prog = libc::sock_fprog { len, filter: program.as_ptr().cast_mut().cast() };
    // SAFETY: the kernel reads `len` instructions of eight bytes from `filter` and writes nothing.
    check(unsafe { libc::syscall(libc::SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, ptr::from_ref(&prog)) })
        .map(drop)
}

/// Sets a resource limit of this process.
pub(crate) fn setrlimit(resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
    // SAFETY: the kernel reads the limit, and the old one is not asked for.
    check(unsafe {
        libc::syscall(libc::SYS_prlimit64, 0, resource, ptr::from_ref(&limit), ptr::null_mut::<c_void>())
    })
    .map(drop)
}

/// Starts a session keyring of its own, so that the caller's keys are out of reach. No keys in the kernel is fine.
pub(crate) fn join_session_keyring() -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: c_int = 1;
    // SAFETY: a null name asks for an anonymous keyring.
    match check(unsafe {
        libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, ptr::null::<c_char>())
    }) {
        Err(e) if e.raw_os_error() != Some(libc::ENOSYS) => Err(e),
        _ => Ok(()),
    }
}

/// The `CLONE_NEW*` flag of the namespace behind `fd`; fails when it is none.
pub(crate) fn namespace_kind(fd: BorrowedFd<'_>) -> io::Result<c_int> {
    const NS_GET_NSTYPE: c_ulong = 0xb703;
    // SAFETY: this request takes no argument.
    check(c_long::from(unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE) })).and_then(raw_fd)
}

/// Sends a signal; any number the kernel knows, real-time ones too.
pub(crate) fn pidfd_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: a null siginfo means that of kill(2).
    check(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            ptr::null::<libc::siginfo_t>(),
            0,
        )
    })
    .map(drop)
}

/// kill(2).
pub(crate) fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: plain numbers.
    check(c_long::from(unsafe { libc::kill(pid, signal) })).map(drop)
}

/// The attributes of bpf(2) that loading a program takes; the rest of the union is zero.
#[repr(C)]
#[derive(Default)]
struct BpfLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

/// The attributes of bpf(2) that attaching and detaching take.
#[repr(C)]
struct BpfAttach {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
    replace_bpf_fd: u32,
}

const BPF_PROG_LOAD: c_int = 5;
const BPF_PROG_ATTACH: c_int = 8;
const BPF_PROG_DETACH: c_int = 9;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 1 << 1;

/// Loads a device program; the kernel verifies it.
pub(crate) fn load_device_program(program: &[u64]) -> io::Result<OwnedFd> {
    let attr = BpfLoad {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: u32::try_from(program.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?,
        insns: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        ..BpfLoad::default()
    };
    // SAFETY: the kernel reads `insn_cnt` instructions of eight bytes and the licence, both of which outlive the call.
    let fd = check(unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, ptr::from_ref(&attr), size_of_val(&attr))
    })?;
    // SAFETY: a fresh descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(raw_fd(fd)?) })
}

/// Attaches a device program to a cgroup, beside those that are there: all of them must agree.
pub(crate) fn attach_device_program(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    bpf_attach(BPF_PROG_ATTACH, cgroup, program, BPF_F_ALLOW_MULTI)
}

/// Takes a device program off a cgroup.
pub(crate) fn detach_device_program(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    bpf_attach(BPF_PROG_DETACH, cgroup, program, 0)
}

fn bpf_attach(command: c_int, cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>, flags: u32) -> io::Result<()> {
    let attr = BpfAttach {
        target_fd: cgroup.as_raw_fd().cast_unsigned(),
        attach_bpf_fd: program.as_raw_fd().cast_unsigned(),
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: flags,
        replace_bpf_fd: 0,
    };
    // SAFETY: the kernel reads the structure, whose size is passed.
    check(unsafe { libc::syscall(libc::SYS_bpf, command, ptr::from_ref(&attr), size_of_val(&attr)) })
        .map(drop)
}

/// A system call that nothing else here makes, for a test of filters.
#[cfg(test)]
pub(crate) fn test_sched_getscheduler() -> io::Result<()> {
    // SAFETY: asks about the calling thread.
    check(c_long::from(unsafe { libc::sched_getscheduler(0) })).map(drop)
}
