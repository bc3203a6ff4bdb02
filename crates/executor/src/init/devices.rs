//! Device nodes and the links beside them. What is there already stays if it is what it should be.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid, makedev},
    io::Errno,
};

use super::{
    Child,
    fault::{Fault, On, Outcome},
};
use crate::{
    plan::{Device, DeviceKind},
    root::Root,
};

const LINKS: [(&str, &str); 5] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/core", "/proc/kcore"),
];

/// Makes all nodes and links.
pub(super) fn make(child: &mut Child) -> Outcome {
    let plan = &child.plan.setup.rootfs;
    for device in &plan.devices {
        node(&child.root, device).on(|| device.path.as_str())?;
    }
    if plan.device_links {
        for (path, target) in LINKS {
            link(&child.root, path, target).on(|| path)?;
        }
        ptmx(&child.root).on(|| "/dev/ptmx")?;
    }
    child.null = null(&child.root).on(|| "/dev/null")?;
    Ok(())
}

fn node(root: &Root, device: &Device) -> Outcome {
    let (parent, name) = root.parent(&device.path)?;
    let (kind, number) = match device.kind {
        DeviceKind::Char => (FileType::CharacterDevice, makedev(device.major, device.minor)),
        DeviceKind::Block => (FileType::BlockDevice, makedev(device.major, device.minor)),
        DeviceKind::Fifo => (FileType::Fifo, 0),
    };
    match rustix::fs::mknodat(&parent, name, kind, Mode::from_raw_mode(device.mode), number) {
        Ok(()) => {
            let owner = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
            let flags = AtFlags::SYMLINK_NOFOLLOW;
            rustix::fs::chownat(&parent, name, Some(owner.0), Some(owner.1), flags).on(|| "owner")
        }
        Err(Errno::EXIST) => {
            let there = rustix::fs::openat(
                &parent,
                name,
                OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::empty(),
            )?;
            if is(there.as_fd(), kind, number)? {
                return Ok(());
            }
            Err(Fault::new(libc::EEXIST, "there is something else at its place"))
        }
        Err(e) => Err(e.into()),
    }
}

fn is(fd: BorrowedFd<'_>, kind: FileType, number: u64) -> io::Result<bool> {
    let stat = rustix::fs::fstat(fd)?;
    Ok(FileType::from_raw_mode(stat.st_mode) == kind && stat.st_rdev == number)
}

fn link(root: &Root, path: &str, target: &str) -> Outcome {
    let (parent, name) = root.parent(path)?;
    match rustix::fs::symlinkat(target, &parent, name) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// Must lead to the container's own terminals, whatever an image has put there.
fn ptmx(root: &Root) -> Outcome {
    let (parent, name) = root.parent("/dev/ptmx")?;
    match rustix::fs::unlinkat(&parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(e) => return Err(e.into()),
    }
    Ok(rustix::fs::symlinkat("pts/ptmx", &parent, name)?)
}

/// The container's `/dev/null`, if it is one; anything else would unmask what it is put over (CVE-2025-31133).
fn null(root: &Root) -> Result<Option<OwnedFd>, Fault> {
    match root.open("/dev/null", OFlags::PATH | OFlags::NOFOLLOW) {
        Ok(fd) if is(fd.as_fd(), FileType::CharacterDevice, makedev(1, 3))? => Ok(Some(fd)),
        Ok(_) => Err(Fault::new(libc::EEXIST, "is not the null device")),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e.into()),
    }
}
