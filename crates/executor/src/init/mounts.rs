//! The mounts of the spec, in order. Each target is opened inside the root first and then mounted on by descriptor, so
//! that nothing can be swapped in between; binds get their attributes before they are attached.

use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{CWD, FileType, OFlags},
    mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree},
};

use super::{
    Child,
    fault::{Fault, On, Outcome},
    procfs::is_proc,
};
use crate::{
    plan::{Attributes, MountKind, MountPlan},
    root::{Node, Root, file_type},
    sys::{self, MountAttr},
};

/// Makes all mounts.
pub(super) fn make(child: &mut Child) -> Outcome {
    for mount in &child.plan.setup.rootfs.mounts {
        one(&child.root, mount).on(|| describe(mount))?;
    }
    Ok(())
}

fn describe(mount: &MountPlan) -> String {
    match &mount.kind {
        MountKind::Bind { source, .. } => format!("{source} at {}", mount.target),
        MountKind::Filesystem { fstype, .. } => format!("{fstype} at {}", mount.target),
    }
}

fn one(root: &Root, mount: &MountPlan) -> Outcome {
    let mounted = match &mount.kind {
        MountKind::Bind { source, recursive } => {
            let flags = OpenTreeFlags::OPEN_TREE_CLOEXEC;
            let source = open_tree(CWD, source.as_str(), flags).on(|| "source")?;
            let node =
                if file_type(source.as_fd())? == FileType::Directory { Node::Directory } else { Node::File };
            let target = root.create(&mount.target, node).on(|| "target")?;
            check_proc(root, mount, target.as_fd(), is_proc(&source)?)?;
            bind(source.as_fd(), *recursive, mount, target.as_fd())?
        }
        MountKind::Filesystem { fstype, source, flags, data } => {
            let target = root.create(&mount.target, Node::Directory).on(|| "target")?;
            check_proc(root, mount, target.as_fd(), fstype == "proc")?;
            filesystem(target.as_fd(), fstype, source, *flags, data)?;
            // The target is now covered by what was mounted.
            root.open(&mount.target, OFlags::PATH)?
        }
    };
    set(mounted.as_fd(), true, mount.recursive_attributes)?;
    for &(propagation, recursive) in &mount.propagation {
        let attr = MountAttr { propagation, ..MountAttr::default() };
        sys::mount_setattr(mounted.as_fd(), recursive, &attr).on(|| "propagation")?;
    }
    Ok(())
}

fn filesystem(target: BorrowedFd<'_>, fstype: &str, source: &str, flags: u64, data: &str) -> Outcome {
    let c = |text: &str| CString::new(text).map_err(io::Error::from);
    let data = if data.is_empty() { None } else { Some(c(data)?) };
    let target = c(&format!("/proc/self/fd/{}", target.as_raw_fd()))?;
    let mounted = sys::mount(&c(source)?, &target, &c(fstype)?, flags, data.as_deref());
    let options = || data.as_ref().map_or_else(String::new, |d| format!("options {}", d.to_string_lossy()));
    mounted.map_err(|error| {
        let options = options();
        if options.is_empty() {
            error.into()
        } else {
            Fault::new(error.raw_os_error().unwrap_or(libc::EIO), options)
        }
    })
}

fn bind(
    source: BorrowedFd<'_>,
    recursive: bool,
    mount: &MountPlan,
    target: BorrowedFd<'_>,
) -> Result<OwnedFd, Fault> {
    let tree = clone_tree(source, recursive)?;
    set(tree.as_fd(), false, mount.attributes)?;
    attach(tree.as_fd(), target)?;
    Ok(tree)
}

/// A mount of its own of what `source` refers to, attached nowhere yet.
pub(super) fn clone_tree(source: BorrowedFd<'_>, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    Ok(open_tree(source, "", flags)?)
}

/// Attaches a detached mount on top of `target`.
pub(super) fn attach(tree: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(tree, "", target, "", flags)?)
}

/// Changes attributes of a mount.
pub(super) fn set(mount: BorrowedFd<'_>, recursive: bool, attributes: Attributes) -> Outcome {
    if attributes.is_empty() {
        return Ok(());
    }
    let attr = MountAttr { set: attributes.set, clear: attributes.clear, ..MountAttr::default() };
    sys::mount_setattr(mount, recursive, &attr).on(|| "attributes")
}

/// Files of `/proc` that may be replaced, as by LXCFS.
const REPLACEABLE: [&str; 9] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/net/dev",
    "/proc/slabinfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
];

/// Keeps `/proc` real: nothing but proc at it, nothing inside it but a few harmless files, and no link in front of it
/// or of `/sys` (CVE-2019-16884, CVE-2019-19921, CVE-2023-27561).
fn check_proc(root: &Root, mount: &MountPlan, target: BorrowedFd<'_>, brings_proc: bool) -> Outcome {
    let refuse = |why: &str| Err(Fault::new(libc::EPERM, why));
    let Some(path) = root.path_of(target)? else { return refuse("the target is outside of the root") };
    let special =
        matches!(&mount.kind, MountKind::Filesystem { fstype, .. } if fstype == "proc" || fstype == "sysfs");
    if special && path.components().ne(Path::new(&mount.target).components()) {
        return refuse("a link is in the way");
    }
    let at_proc = path == Path::new("/proc");
    if at_proc && !brings_proc {
        return refuse("only proc can be mounted at /proc");
    }
    if !at_proc
        && path.starts_with("/proc")
        && is_proc(target)?
        && !REPLACEABLE.iter().any(|allowed| path == Path::new(allowed))
    {
        return refuse("inside /proc");
    }
    Ok(())
}
