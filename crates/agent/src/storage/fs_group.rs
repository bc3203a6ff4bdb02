//! `fs_group`: a volume that belongs to a group, as Kubernetes asks for it.
//!
//! Everything in the volume gets the group and what it needs to read and write, directories hand the group down. What the
//! volume's users planted in it counts for nothing: symbolic links are changed themselves and not followed, and what is
//! mounted below is not entered. A directory comes after what it holds, so that a root with the right group is the sign of
//! a walk that was not cut short, which is what the policy `OnRootMismatch` goes by.

use std::{
    os::fd::{AsFd, BorrowedFd},
    path::Path,
};

use bulkhead_protocol::{agent::Storage, types::FSGroupChangePolicy};
use rustix::{
    fs::{Gid, OFlags, Stat},
    io::Errno,
    mount::MountFlags,
};

use super::mount::Options;
use crate::{
    error::{During, Result},
    tree,
};

const SET_GID: u32 = 0o2000;

/// What each file is given.
#[derive(Clone, Copy)]
struct Grant {
    gid: u32,
    /// For every file; directories get the right to enter as well.
    mode: u32,
}

impl Grant {
    fn mode(self, status: &Stat) -> u32 {
        let directory = tree::kind(status).is_dir();
        status.st_mode & 0o7777 | self.mode | if directory { 0o110 | SET_GID } else { 0 }
    }

    fn fits(self, status: &Stat) -> bool {
        status.st_gid == self.gid && status.st_mode & 0o7777 == self.mode(status)
    }
}

/// Hands a mounted storage to the group that it asks for, if it does. Blocks.
pub(super) fn apply(storage: &Storage) -> Result<()> {
    let Some(group) = storage.fs_group.as_ref() else { return Ok(()) };
    let what = || format!("give the volume on {} to group {}", storage.mount_point, group.group_id);
    let read_only = Options::parse(&storage.options)?.flags.contains(MountFlags::RDONLY);
    let grant = Grant { gid: group.group_id, mode: if read_only { 0o440 } else { 0o660 } };
    let root = tree::open(Path::new(&storage.mount_point), OFlags::PATH).during(what)?;
    let status = rustix::fs::fstat(&root).during(what)?;
    let only_on_mismatch = group.group_change_policy.enum_value() == Ok(FSGroupChangePolicy::OnRootMismatch);
    if only_on_mismatch && grant.fits(&status) {
        return Ok(());
    }
    match give(root.as_fd(), &status, grant, 0) {
        // Nobody can change what is mounted read-only, and nobody needs to: it comes as its owner made it.
        Err(Errno::ROFS) if read_only => {
            tracing::info!(mount_point = storage.mount_point, "a read-only volume keeps its group");
            Ok(())
        }
        given => given.during(what),
    }
}

fn give(file: BorrowedFd<'_>, status: &Stat, grant: Grant, depth: usize) -> rustix::io::Result<()> {
    let kind = tree::kind(status);
    if kind.is_dir() {
        if depth == tree::DEPTH {
            return Err(Errno::NAMETOOLONG);
        }
        let directory = tree::open_entry(file, c".", OFlags::RDONLY | OFlags::DIRECTORY)?;
        for name in tree::entries(&directory)? {
            match tree::open_entry(&directory, &name, OFlags::PATH) {
                // Gone meanwhile; something else that is mounted there.
                Err(Errno::NOENT | Errno::XDEV) => {}
                entry => {
                    let entry = entry?;
                    let status = rustix::fs::fstat(&entry)?;
                    give(entry.as_fd(), &status, grant, depth + 1)?;
                }
            }
        }
    }
    if status.st_gid != grant.gid {
        tree::set_owner(file, None, Some(Gid::from_raw(grant.gid)))?;
    }
    // A link has no mode. A change of owner takes the set-id bits of a file away, so they are set again.
    if !kind.is_symlink() && !grant.fits(status) {
        tree::set_mode(file, grant.mode(status))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    };

    use bulkhead_protocol::{agent::FSGroup, protobuf::MessageField};

    use super::*;

    fn storage(path: &Path, policy: FSGroupChangePolicy, options: &[&str]) -> Storage {
        Storage {
            mount_point: path.to_str().unwrap().into(),
            options: options.iter().map(|option| (*option).into()).collect(),
            fs_group: MessageField::some(FSGroup {
                group_id: 4242,
                group_change_policy: policy.into(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn look(path: &Path) -> (u32, u32) {
        let status = fs::symlink_metadata(path).unwrap();
        (status.gid(), status.mode() & 0o7777)
    }

    fn volume() -> (tempfile::TempDir, tempfile::TempDir) {
        let (volume, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir_all(volume.path().join("a/b")).unwrap();
        for (name, mode) in [("file", 0o600), ("a/tool", 0o4711), ("a/b/deep", 0o644)] {
            fs::write(volume.path().join(name), "x").unwrap();
            fs::set_permissions(volume.path().join(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        for name in ["", "a", "a/b"] {
            fs::set_permissions(volume.path().join(name), fs::Permissions::from_mode(0o700)).unwrap();
        }
        fs::create_dir(outside.path().join("directory")).unwrap();
        fs::write(outside.path().join("directory/precious"), "x").unwrap();
        fs::set_permissions(outside.path().join("directory"), fs::Permissions::from_mode(0o700)).unwrap();
        // As a user of the volume would plant them.
        symlink(outside.path().join("directory"), volume.path().join("a/out")).unwrap();
        symlink(outside.path().join("directory/precious"), volume.path().join("stolen")).unwrap();
        (volume, outside)
    }

    #[test]
    fn everything_gets_the_group_and_nothing_behind_a_link_does() {
        let (volume, outside) = volume();
        apply(&storage(volume.path(), FSGroupChangePolicy::Always, &[])).unwrap();
        let expected = [
            ("", 0o2770),
            ("a", 0o2770),
            ("a/b", 0o2770),
            ("file", 0o660),
            ("a/tool", 0o4771),
            ("a/b/deep", 0o664),
        ];
        for (name, mode) in expected {
            assert_eq!(look(&volume.path().join(name)), (4242, mode), "{name:?}");
        }
        assert_eq!(look(&volume.path().join("stolen")).0, 4242, "the link itself");
        assert_eq!(look(&outside.path().join("directory")), (0, 0o700));
        assert_eq!(look(&outside.path().join("directory/precious")).0, 0);
    }

    #[test]
    fn a_read_only_volume_is_made_readable_only() {
        let (volume, _outside) = volume();
        apply(&storage(volume.path(), FSGroupChangePolicy::Always, &["ro"])).unwrap();
        assert_eq!(look(volume.path()), (4242, 0o2750));
        assert_eq!(look(&volume.path().join("file")), (4242, 0o640));
    }

    #[test]
    fn a_root_that_fits_is_the_end_of_it_only_by_policy() {
        let (volume, _outside) = volume();
        let on_mismatch = storage(volume.path(), FSGroupChangePolicy::OnRootMismatch, &[]);
        apply(&on_mismatch).unwrap();
        assert_eq!(look(&volume.path().join("file")), (4242, 0o660), "the root did not fit");
        fs::set_permissions(volume.path().join("file"), fs::Permissions::from_mode(0o600)).unwrap();
        apply(&on_mismatch).unwrap();
        assert_eq!(look(&volume.path().join("file")), (4242, 0o600));
        apply(&storage(volume.path(), FSGroupChangePolicy::Always, &[])).unwrap();
        assert_eq!(look(&volume.path().join("file")), (4242, 0o660));
        fs::set_permissions(volume.path(), fs::Permissions::from_mode(0o770)).unwrap();
        fs::set_permissions(volume.path().join("file"), fs::Permissions::from_mode(0o600)).unwrap();
        apply(&on_mismatch).unwrap();
        assert_eq!(look(&volume.path().join("file")), (4242, 0o660), "the root did not hand its group down");
    }

    #[test]
    fn what_is_mounted_in_the_volume_is_not_entered() {
        let (volume, _outside) = volume();
        let path = volume.path().to_owned();
        crate::storage::apart::alone(move || {
            let below = path.join("a/b");
            rustix::mount::mount("tmpfs", &below, "tmpfs", MountFlags::empty(), c"mode=0700").unwrap();
            apply(&storage(&path, FSGroupChangePolicy::Always, &[])).unwrap();
            assert_eq!(look(&below), (0, 0o700));
            assert_eq!(look(&path.join("a")), (4242, 0o2770));
        });
    }
}
