//! The directory that the guest sees, and the binds in it.
//!
//! ```text
//! <state>/share            plain directory; targets are made here, through a descriptor (`base`)
//!        \_ bound to itself, read-only and shared: what the guest's file server exports (`top`)
//!             <cid>/rootfs            bind, writable, propagates into the file server's own mount namespace
//!             <cid>-<n>-<basename>    bind of a host file or directory, read-only where the container asked for it
//! ```
//!
//! Since the exported mount is read-only, a guest can plant nothing beside the binds, so no path that the host walks here
//! was ever made by a guest. The binds are cloned detached, given their attributes, and only then attached: no moment at
//! which a read-only one is writable, and unmounting a recursive one never reaches back to the original.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::{
    fs::{
        AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, open, openat, openat2, unlinkat,
    },
    io::Errno,
    mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree},
};

use super::sys::set_attributes;
use crate::{Error, error::os};

const READ_ONLY: u64 = 0x1;
const NO_SETUID: u64 = 0x2;
const NO_DEVICES: u64 = 0x4;
const NO_EXECUTION: u64 = 0x8;

/// What a shared thing is; a bind needs a target of the same sort.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sort {
    Directory,
    File,
}

/// Something of the host to be seen in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Share {
    /// Path below the share: one component, or `<cid>/rootfs`.
    pub(crate) name: String,
    pub(crate) source: PathBuf,
    pub(crate) sort: Sort,
    /// With everything that is mounted below it.
    pub(crate) recursive: bool,
    /// No writer in the guest, whatever its privileges.
    pub(crate) read_only: bool,
}

/// The shared directory of a pod.
#[derive(Debug)]
pub(crate) struct ShareRoot {
    path: PathBuf,
    base: OwnedFd,
    top: OwnedFd,
    attributes: u64,
}

impl ShareRoot {
    /// Makes the directory and mounts it over itself. `executable` leaves programs and devices in the binds usable on
    /// this very kernel, which only an agent without a VM needs.
    pub(crate) fn create(path: &Path, executable: bool) -> Result<ShareRoot, Error> {
        let name = path.display();
        std::fs::create_dir(path).map_err(os(format!("making the shared directory {name}")))?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let base = open(path, flags, Mode::empty()).map_err(os(format!("opening {name}")))?;
        let attributes = if executable { 0 } else { NO_SETUID | NO_DEVICES | NO_EXECUTION };
        let tree = clone_tree(path, false, attributes | READ_ONLY)?;
        attach(&tree, &base).map_err(os(format!("mounting {name} over itself")))?;
        let shared = mount(None::<&str>, path, None::<&str>, MsFlags::MS_SHARED, None::<&str>);
        if let Err(errno) = shared {
            let _ = umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
            return Err(os(format!("sharing the mount {name}"))(errno));
        }
        let top = open(path, flags, Mode::empty()).map_err(os(format!("opening {name}")))?;
        Ok(ShareRoot { path: path.to_owned(), base, top, attributes })
    }

    /// Where it is on the host.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Binds one thing into the share. On error nothing of it stays.
    pub(crate) fn bind(&self, share: &Share) -> Result<(), Error> {
        let attributes = self.attributes | if share.read_only { READ_ONLY } else { 0 };
        let tree = clone_tree(&share.source, share.recursive, attributes)?;
        let sort = match FileType::from_raw_mode(fstat(&tree).map_err(os("fstat of a mount"))?.st_mode) {
            FileType::Directory => Sort::Directory,
            _ => Sort::File,
        };
        if sort != share.sort {
            return Err(Error::Invalid(format!(
                "{} was exchanged while it was shared",
                share.source.display()
            )));
        }
        self.make_target(share)?;
        let attached = self.target(&share.name).and_then(|target| attach(&tree, &target));
        attached.map_err(|errno| {
            self.remove_target(share);
            os(format!("sharing {} with the guest", share.source.display()))(errno)
        })
    }

    /// Undoes [`ShareRoot::bind`]; what is gone already is fine.
    pub(crate) fn unbind(&self, share: &Share) -> Result<(), Error> {
        let path = self.path.join(&share.name);
        match umount2(&path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(nix::Error::ENOENT | nix::Error::EINVAL) => {}
            Err(errno) => return Err(os(format!("unmounting {}", path.display()))(errno)),
        }
        self.remove_target(share);
        Ok(())
    }

    /// Unmounts the share itself.
    pub(crate) fn unmount(&self) -> Result<(), Error> {
        match umount2(&self.path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(nix::Error::ENOENT | nix::Error::EINVAL) => Ok(()),
            Err(errno) => Err(os(format!("unmounting {}", self.path.display()))(errno)),
        }
    }

    /// Makes the target below the read-only mount, exclusively: whatever is there already is not ours to mount on.
    fn make_target(&self, share: &Share) -> Result<(), Error> {
        let failed = |errno: Errno| os(format!("making {} in the shared directory", share.name))(errno);
        let directory = Mode::RWXU | Mode::RGRP | Mode::XGRP | Mode::ROTH | Mode::XOTH;
        if let Some((parent, name)) = share.name.split_once('/') {
            mkdirat(&self.base, parent, directory).map_err(failed)?;
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let made = openat(&self.base, parent, flags, Mode::empty())
                .and_then(|parent| mkdirat(parent, name, directory));
            return made.map_err(|errno| {
                let _ = unlinkat(&self.base, parent, AtFlags::REMOVEDIR);
                failed(errno)
            });
        }
        match share.sort {
            Sort::Directory => mkdirat(&self.base, &share.name, directory).map_err(failed),
            Sort::File => {
                let flags =
                    OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                openat(&self.base, &share.name, flags, Mode::RUSR | Mode::WUSR).map(drop).map_err(failed)
            }
        }
    }

    fn target(&self, name: &str) -> Result<OwnedFd, Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        openat2(&self.top, name, flags, Mode::empty(), resolve)
    }

    fn remove_target(&self, share: &Share) {
        let remove = |name: &str, flags| match unlinkat(&self.base, name, flags) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => tracing::warn!("removing {name} from the shared directory: {errno}"),
        };
        match share.sort {
            Sort::File => remove(&share.name, AtFlags::empty()),
            Sort::Directory => remove(&share.name, AtFlags::REMOVEDIR),
        }
        if let Some((parent, _)) = share.name.split_once('/') {
            remove(parent, AtFlags::REMOVEDIR);
        }
    }
}

/// A detached copy of the mount(s) at `source`, which still receives what the host mounts below the original, and never
/// sends anything back.
fn clone_tree(source: &Path, recursive: bool, attributes: u64) -> Result<OwnedFd, Error> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree = open_tree(CWD, source, flags).map_err(os(format!("opening {}", source.display())))?;
    set_attributes(tree.as_fd(), attributes, MsFlags::MS_SLAVE.bits())
        .map_err(os(format!("setting the mount attributes of {}", source.display())))?;
    Ok(tree)
}

fn attach(tree: &OwnedFd, target: &OwnedFd) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(tree, "", target, "", flags)
}

#[cfg(test)]
mod tests {
    use std::{fs, io::ErrorKind};

    use super::*;

    /// A directory for mounts, which are gone at its end.
    struct Place(tempfile::TempDir);

    impl Place {
        fn new() -> Option<Place> {
            if !nix::unistd::geteuid().is_root() {
                println!("skipped: mounting needs root");
                return None;
            }
            Some(Place(tempfile::tempdir().unwrap()))
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn source(&self, name: &str) -> PathBuf {
            let source = self.path(name);
            fs::create_dir_all(&source).unwrap();
            fs::write(source.join("file"), name).unwrap();
            source
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            crate::state::remove(&self.path("pod")).unwrap();
            crate::state::remove(&self.path("source")).unwrap();
        }
    }

    fn share(name: &str, source: PathBuf, sort: Sort, read_only: bool) -> Share {
        Share { name: name.into(), source, sort, recursive: true, read_only }
    }

    #[test]
    fn binds_come_and_go_and_only_writable_ones_can_be_written() {
        let Some(place) = Place::new() else { return };
        fs::create_dir(place.path("pod")).unwrap();
        let root = ShareRoot::create(&place.path("pod/share"), true).unwrap();
        let source = place.source("source");
        let shares = [
            share("c1/rootfs", source.clone(), Sort::Directory, false),
            share("c1-0-ro", source.clone(), Sort::Directory, true),
            share("c1-1-file", source.join("file"), Sort::File, true),
        ];
        for share in &shares {
            root.bind(share).unwrap();
        }
        let at = |name: &str| root.path().join(name);
        assert_eq!(fs::read_to_string(at("c1-1-file")).unwrap(), "source");
        fs::write(at("c1/rootfs/new"), "x").unwrap();
        for read_only in ["c1-0-ro/x", "c1-1-file", "planted"] {
            let error = fs::write(at(read_only), "x").unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ReadOnlyFilesystem, "{read_only}");
        }
        for share in shares.iter().rev() {
            root.unbind(share).unwrap();
            root.unbind(share).unwrap();
        }
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
        assert_eq!(fs::read_to_string(source.join("new")).unwrap(), "x");
        root.unmount().unwrap();
        root.unmount().unwrap();
    }

    #[test]
    fn unsharing_leaves_what_is_mounted_below_the_source() {
        let Some(place) = Place::new() else { return };
        fs::create_dir(place.path("pod")).unwrap();
        let source = place.source("source");
        fs::create_dir(source.join("inner")).unwrap();
        mount(Some("x"), &source.join("inner"), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        mount(None::<&str>, &source.join("inner"), None::<&str>, MsFlags::MS_SHARED, None::<&str>).unwrap();
        fs::write(source.join("inner/file"), "inner").unwrap();
        let root = ShareRoot::create(&place.path("pod/share"), true).unwrap();
        let share = share("c1/rootfs", source.clone(), Sort::Directory, false);
        root.bind(&share).unwrap();
        assert_eq!(fs::read_to_string(root.path().join("c1/rootfs/inner/file")).unwrap(), "inner");
        root.unbind(&share).unwrap();
        assert_eq!(fs::read_to_string(source.join("inner/file")).unwrap(), "inner");
    }

    #[test]
    fn what_is_in_the_way_is_not_mounted_on() {
        let Some(place) = Place::new() else { return };
        fs::create_dir(place.path("pod")).unwrap();
        let source = place.source("source");
        let root = ShareRoot::create(&place.path("pod/share"), true).unwrap();
        rustix::fs::symlinkat(&source, &root.base, "c1").unwrap();
        rustix::fs::symlinkat(&source, &root.base, "c1-0-x").unwrap();
        for name in ["c1/rootfs", "c1-0-x"] {
            let error = root.bind(&share(name, source.clone(), Sort::Directory, false)).unwrap_err();
            assert!(
                matches!(&error, Error::Io { source, .. } if source.kind() == ErrorKind::AlreadyExists),
                "{error}"
            );
        }
        let file = root.bind(&share("c2-0-x", source.join("file"), Sort::Directory, false)).unwrap_err();
        assert!(matches!(file, Error::Invalid(_)), "{file}");
        assert_eq!(fs::read_dir(&source).unwrap().count(), 1);
    }
}
