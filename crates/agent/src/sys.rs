#![allow(unsafe_code, reason = "system calls that have no safe wrapper")]
//! System calls that have no safe wrapper.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
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

/// Registers a descriptor with the runtime this is called on.
pub(crate) fn watch(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` keeps its one descriptor open until it is dropped, and the `AsyncFd` owns it until then.
    Ok(unsafe { AsyncFd::register_with_interest(descriptor, interest)? })
}

/// Grows a mounted ext4, named by a descriptor of anything in it, to so many blocks.
pub(crate) fn ext4_resize(volume: BorrowedFd<'_>, blocks: u64) -> io::Result<()> {
    const EXT4_IOC_RESIZE_FS: libc::c_ulong = 0x4008_6610;
    // SAFETY: the request reads one u64 through the pointer, which outlives the call; other file systems refuse it.
    let result = unsafe { libc::ioctl(volume.as_raw_fd(), EXT4_IOC_RESIZE_FS as _, &raw const blocks) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What a mounted xfs is made of.
pub(crate) struct XfsGeometry {
    /// Bytes of a block.
    pub(crate) block_size: u32,
    /// Blocks of the data section.
    pub(crate) blocks: u64,
    /// The most of it that inodes may take.
    pub(crate) inode_percent: u32,
}

/// Asks a mounted xfs, named by a descriptor of anything in it.
pub(crate) fn xfs_geometry(volume: BorrowedFd<'_>) -> io::Result<XfsGeometry> {
    const XFS_IOC_FSGEOMETRY_V1: libc::c_ulong = 0x8070_5864;
    /// `struct xfs_fsop_geom_v1`.
    #[repr(C)]
    struct Geometry {
        block_size: u32,
        before: [u32; 6],
        inode_percent: u32,
        blocks: u64,
        after: [u64; 9],
    }
    const _: () = assert!(size_of::<Geometry>() == 112);
    let mut geometry = Geometry { block_size: 0, before: [0; 6], inode_percent: 0, blocks: 0, after: [0; 9] };
    // SAFETY: the request writes 112 bytes through the pointer, which is what there is; other file systems refuse it.
    let result = unsafe { libc::ioctl(volume.as_raw_fd(), XFS_IOC_FSGEOMETRY_V1 as _, &raw mut geometry) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let Geometry { block_size, inode_percent, blocks, .. } = geometry;
    Ok(XfsGeometry { block_size, blocks, inode_percent })
}

/// Grows a mounted xfs to so many blocks.
pub(crate) fn xfs_grow(volume: BorrowedFd<'_>, blocks: u64, inode_percent: u32) -> io::Result<()> {
    const XFS_IOC_FSGROWFSDATA: libc::c_ulong = 0x4010_586e;
    /// `struct xfs_growfs_data`.
    #[repr(C)]
    struct Growth {
        blocks: u64,
        inode_percent: u32,
        padding: u32,
    }
    let growth = Growth { blocks, inode_percent, padding: 0 };
    // SAFETY: the request reads 16 bytes through the pointer, which is what there is; other file systems refuse it.
    let result = unsafe { libc::ioctl(volume.as_raw_fd(), XFS_IOC_FSGROWFSDATA as _, &raw const growth) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Swaps to a file or disk.
pub(crate) fn swap_on(path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the string ends with a NUL and outlives the call, which only reads it.
    if unsafe { libc::swapon(path.as_ptr(), 0) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
