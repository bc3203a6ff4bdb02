//! `watchable-bind`: a directory or file of the share whose changes are seen in the guest, such as a ConfigMap.
//!
//! What the host changes on the share raises no event in the guest, so containers get a copy in the guest's memory that the
//! [`crate::watcher`] keeps up to date, with as many files of any size as there are. The mount points lie side by side in a
//! directory `watchable`, where hosts put them; that directory gets a tmpfs of its own, for the share may be read-only.

use std::{
    collections::HashMap,
    ffi::CString,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use rustix::{
    fs::OFlags,
    mount::{MountFlags, UnmountFlags},
};

use super::{Job, Mounted, Undo, mount::Target};
use crate::{
    error::{During, Error, Result},
    mirror::Mirror,
    sync::lock,
    tree,
    watcher::Watcher,
};

/// The name of the directory that mount points lie in.
const PARENT: &str = "watchable";
/// File systems that others change without this kernel's knowledge: virtio-fs and all of FUSE, 9p, NFS, CIFS.
const SILENT: [u64; 5] = [0x6573_5546, 0x0102_1997, 0x6969, 0xff53_4d42, 0xfe53_4d42];

/// The copies, and the memory that they are in.
#[derive(Default)]
pub(super) struct Copies {
    watcher: Arc<Watcher>,
    /// How many copies lie in each directory that was mounted for them.
    users: Mutex<HashMap<PathBuf, usize>>,
}

impl std::fmt::Debug for Copies {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Copies({:?})", lock(&self.users))
    }
}

impl PartialEq for Copies {
    fn eq(&self, other: &Copies) -> bool {
        std::ptr::eq(self, other)
    }
}

/// Copies the source and has it watched.
pub(super) fn mount(job: &Job, mounted: &mut Mounted) -> Result<()> {
    let storage = &job.storage;
    if storage.fs_group.is_some() {
        return Err(Error::Unsupported(format!(
            "fs_group on {}: what is watched keeps the owners that it has",
            storage.mount_point
        )));
    }
    let wrong = || {
        Error::Invalid(format!(
            "the mount point {:?} of a watchable-bind storage must lie in a directory {PARENT:?}",
            storage.mount_point
        ))
    };
    let path = Path::new(&storage.mount_point);
    let parent = path.parent().filter(|parent| parent.file_name() == Some(PARENT.as_ref())).ok_or_else(wrong)?;
    let name = path.file_name().and_then(|name| CString::new(name.as_bytes()).ok()).ok_or_else(wrong)?;

    let source = PathBuf::from(&storage.source);
    let what = || format!("open {}, which is to be watched", source.display());
    let original = tree::open(&source, OFlags::PATH).during(what)?;
    let kind = rustix::fs::fstatfs(&original).during(what)?.f_type;
    drop(original);

    job.copies.use_directory(parent, mounted, Arc::clone(&job.copies))?;
    let directory = tree::open(parent, OFlags::PATH | OFlags::DIRECTORY)
        .during(|| format!("open {}", parent.display()))?;
    mounted.did(Undo::RemoveCopy(path.to_owned()));
    let tells = u64::try_from(kind).is_ok_and(|kind| !SILENT.contains(&kind));
    let mirror = Mirror::new(source.clone(), directory, name);
    mounted.did(Undo::Unwatch(job.copies.watcher.keep(mirror, source, tells)?));
    Ok(())
}

impl Copies {
    /// Counts a user of a directory; the first has memory mounted there.
    fn use_directory(&self, directory: &Path, mounted: &mut Mounted, own: Arc<Copies>) -> Result<()> {
        let target = Target::directory(&directory.to_string_lossy(), mounted)?;
        let mut users = lock(&self.users);
        let count = users.entry(directory.to_owned()).or_default();
        if *count == 0 {
            let flags = MountFlags::NOSUID | MountFlags::NODEV;
            let done =
                rustix::mount::mount("watchable", target.fixed_path(), "tmpfs", flags, c"mode=0755");
            if done.is_err() {
                users.remove(directory);
            }
            done.during(|| format!("mount tmpfs on {}", directory.display()))?;
        }
        if let Some(count) = users.get_mut(directory) {
            *count += 1;
        }
        mounted.did(Undo::LeaveDirectory(own, directory.to_owned()));
        Ok(())
    }

    /// The last user takes the memory along.
    pub(super) fn leave_directory(&self, directory: &Path) -> Result<()> {
        let mut users = lock(&self.users);
        let Some(count) = users.get_mut(directory) else { return Ok(()) };
        *count -= 1;
        if *count > 0 {
            return Ok(());
        }
        users.remove(directory);
        rustix::mount::unmount(directory, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)
            .during(|| format!("unmount {}", directory.display()))
    }
}

/// Deletes a copy, whatever was mounted or linked in its place.
pub(super) fn remove_copy(path: &Path) -> Result<()> {
    let what = || format!("remove {}", path.display());
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
    let parent = tree::open(parent, OFlags::PATH | OFlags::DIRECTORY).during(what)?;
    let name = CString::new(name.as_bytes()).during(what)?;
    tree::remove(parent, &name).during(what)
}
