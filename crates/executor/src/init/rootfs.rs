//! The root file system: made a mount of its own, protected, and changed to.

use std::{
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, OFlags, StatxAttributes, StatxFlags},
    mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount},
};

use super::{
    Child,
    fault::{Fault, On, Outcome},
    mounts::{attach, clone_tree, set},
};
use crate::{
    plan::{Propagation, RootfsPlan},
    root::{Root, file_type},
    sys::{self, MountAttr},
};

/// Binds the root onto itself, so that there is a mount to change to, and decides what travels between it and the
/// caller.
pub(super) fn prepare(child: &mut Child) -> Outcome {
    let plan = &child.plan.setup.rootfs;
    let path = Path::new(&plan.path);
    match plan.propagation {
        // The caller's mounts stay its peers; only the one that the new root lies on must not hear of it.
        Propagation::Shared => {
            let mount = mount_point_of(path).on(|| plan.path.as_str())?;
            mount_change(&mount, MountPropagationFlags::PRIVATE).on(|| mount.display().to_string())?;
        }
        Propagation::Slave => {
            mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
        }
        Propagation::Private | Propagation::Unbindable => {
            mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        }
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let source = rustix::fs::openat(CWD, path, flags, Mode::empty()).on(|| plan.path.as_str())?;
    let tree = clone_tree(source.as_fd(), true).on(|| plan.path.as_str())?;
    if plan.propagation == Propagation::Shared {
        let private = MountAttr { propagation: libc::MS_PRIVATE, ..MountAttr::default() };
        sys::mount_setattr(tree.as_fd(), false, &private)?;
    }
    attach(tree.as_fd(), source.as_fd()).on(|| plan.path.as_str())?;
    child.root = Root::new(tree);
    Ok(())
}

/// The mount point that `path` lies on.
fn mount_point_of(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    loop {
        let stat = rustix::fs::statx(CWD, &path, AtFlags::empty(), StatxFlags::BASIC_STATS)?;
        if stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) || !path.pop() {
            return Ok(path);
        }
    }
}

/// Read-only paths, masked paths, a read-only `/dev` and root.
pub(super) fn protect(child: &mut Child) -> Outcome {
    let plan = &child.plan.setup.rootfs;
    for path in &plan.readonly_paths {
        readonly(&child.root, path).on(|| format!("read-only {path}"))?;
    }
    for path in &plan.masked {
        mask(child, path).on(|| format!("masking {path}"))?;
    }
    if plan.readonly_dev {
        let dev = child.root.open("/dev", OFlags::PATH)?;
        set(dev.as_fd(), false, RootfsPlan::READONLY).on(|| "read-only /dev")?;
    }
    if plan.readonly {
        set(child.root.as_fd(), false, RootfsPlan::READONLY).on(|| "read-only /")?;
    }
    Ok(())
}

fn readonly(root: &Root, path: &str) -> Outcome {
    let Some(target) = existing(root, path)? else { return Ok(()) };
    let tree = clone_tree(target.as_fd(), true)?;
    set(tree.as_fd(), false, RootfsPlan::READONLY)?;
    attach(tree.as_fd(), target.as_fd())?;
    Ok(())
}

/// A directory is covered by an empty one, anything else by `/dev/null`, which was verified to be that.
fn mask(child: &Child, path: &str) -> Outcome {
    let Some(target) = existing(&child.root, path)? else { return Ok(()) };
    if file_type(target.as_fd())? == FileType::Directory {
        let covered = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&target));
        let covered = std::ffi::CString::new(covered).map_err(io::Error::from)?;
        let flags = libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
        sys::mount(c"tmpfs", &covered, c"tmpfs", flags, Some(c"size=4k,nr_inodes=1,mode=755"))?;
        return Ok(());
    }
    let null = child.null.as_ref().ok_or_else(|| Fault::new(libc::ENOENT, "no /dev/null to mask with"))?;
    let tree = clone_tree(null.as_fd(), false)?;
    attach(tree.as_fd(), target.as_fd())?;
    Ok(())
}

/// What is not there needs no protection.
fn existing(root: &Root, path: &str) -> io::Result<Option<std::os::fd::OwnedFd>> {
    match root.open(path, OFlags::PATH) {
        Ok(fd) => Ok(Some(fd)),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Changes to the new root; nothing of the old one stays reachable.
pub(super) fn pivot(child: &mut Child) -> Outcome {
    let old = Root::own()?;
    rustix::process::fchdir(&child.root)?;
    // The old root ends up on top of the new one.
    rustix::process::pivot_root(".", ".").map_err(|errno| match errno {
        rustix::io::Errno::INVAL => Fault::new(
            libc::EINVAL,
            "the caller's root must be a mount that can be changed from, and not an initramfs",
        ),
        errno => errno.into(),
    })?;
    rustix::process::fchdir(&old)?;
    // Nothing that happens to it here reaches the caller's.
    mount_change(".", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .on(|| "the old root")?;
    unmount(".", UnmountFlags::DETACH).on(|| "detaching the old root")?;
    rustix::process::chdir("/")?;
    // Not before: the kernel changes to no root that is shared.
    let propagation = match child.plan.setup.rootfs.propagation {
        Propagation::Shared => libc::MS_SHARED,
        Propagation::Unbindable => libc::MS_UNBINDABLE,
        Propagation::Slave | Propagation::Private => return Ok(()),
    };
    let attr = MountAttr { propagation, ..MountAttr::default() };
    sys::mount_setattr(child.root.as_fd(), false, &attr).on(|| "propagation of /")
}
