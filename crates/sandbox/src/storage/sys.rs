//! mount_setattr(2), for which there is no safe wrapper yet.
#![allow(unsafe_code, reason = "mount_setattr(2) has no wrapper in rustix, nix or libc")]

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// `struct mount_attr` of linux/mount.h, version 0.
#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Sets attributes (`MOUNT_ATTR_*`) and propagation (`MS_PRIVATE`...; 0 leaves it) on every mount of a detached tree.
pub(super) fn set_attributes(tree: BorrowedFd<'_>, set: u64, propagation: u64) -> io::Result<()> {
    let attributes = MountAttr { attr_set: set, attr_clr: 0, propagation, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    // SAFETY: the path is a NUL-terminated constant, the structure outlives the call and its size is passed along, and
    // the descriptor is borrowed for the time of the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<MountAttr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
