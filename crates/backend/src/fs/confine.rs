//! Makes one directory the whole world of this process.
//!
//! A new mount namespace is entered whose mounts are slaves: what the host mounts below the directory later (containers'
//! root file systems) appears here and so in the guest, what it unmounts disappears, and nothing done here is seen by the
//! host. For that the host's mount on which the directory lies must be shared; if it is not, a warning says so.

use std::{
    ffi::CStr,
    fs,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use anyhow::{Context, bail};
use nix::sched::{CloneFlags, unshare};
use rustix::{
    fs::{CWD, Mode, OFlags, StatVfsMountFlags, fstatvfs},
    mount::{
        MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_change,
        mount_remount, move_mount, open_tree, unmount,
    },
    process::{fchdir, pivot_root},
    thread::set_thread_groups,
};

use super::mountinfo;
use crate::sys;

const HERE: &CStr = c".";

/// Enters the confinement; returns `/proc/self/fd` as a directory from which nothing above it can be reached. Must be
/// called while the process has one thread. The caller continues in a child process, PID 1 of a namespace of its own;
/// the parent only waits for its end.
pub(crate) fn enter(dir: &Path) -> anyhow::Result<OwnedFd> {
    let dir = fs::canonicalize(dir).context("no such directory")?;
    if !dir.is_dir() {
        bail!("not a directory");
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    if !mountinfo::is_shared(&mounts, &dir) {
        log::warn!(
            "{} is not on a shared mount: the guest will not see what is mounted there later",
            dir.display()
        );
    }
    set_thread_groups(&[]).context("cannot drop supplementary groups")?;
    unshare(
        CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWIPC,
    )
    .context("cannot create namespaces (it takes root)")?;
    sys::continue_in_child().context("cannot enter the PID namespace")?;

    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .context("cannot detach the mount namespace from the host's")?;
    // A clone of this directory alone has no parent, so `..` ends there.
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let proc_self_fd = open_tree(CWD, "/proc/self/fd", clone).context("cannot clone /proc/self/fd")?;
    let root =
        open_tree(CWD, &dir, clone | OpenTreeFlags::AT_RECURSIVE).context("cannot clone its mounts")?;
    move_mount(root.as_fd(), "", CWD, &dir, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .context("cannot mount it on itself")?;
    pivot(root.as_fd())?;
    harden()?;
    Ok(proc_self_fd)
}

/// Makes `root` the root and the current directory, and forgets the old root.
fn pivot(root: std::os::fd::BorrowedFd<'_>) -> anyhow::Result<()> {
    fchdir(root).context("cannot enter it")?;
    let old = rustix::fs::open("/", OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .context("cannot open the old root")?;
    // Stacks the old root on the new one, from where it can be unmounted without a directory to put it on.
    pivot_root(HERE, HERE).context("cannot change the root")?;
    fchdir(&old).context("cannot return to the old root")?;
    unmount(HERE, UnmountFlags::DETACH).context("cannot unmount the old root")?;
    fchdir(root).context("cannot enter the new root")
}

/// No device node, set-user-id bit or program in the directory means anything to this process. The mount's other
/// properties stay as they are.
fn harden() -> anyhow::Result<()> {
    let now =
        fstatvfs(rustix::fs::open("/", OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)?
            .f_flag;
    let mut flags = MountFlags::BIND | MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC;
    for (given, keep) in [
        (StatVfsMountFlags::RDONLY, MountFlags::RDONLY),
        (StatVfsMountFlags::NOATIME, MountFlags::NOATIME),
        (StatVfsMountFlags::NODIRATIME, MountFlags::NODIRATIME),
        (StatVfsMountFlags::RELATIME, MountFlags::RELATIME),
    ] {
        if now.contains(given) {
            flags |= keep;
        }
    }
    mount_remount("/", flags, c"").context("cannot restrict its mount")
}
