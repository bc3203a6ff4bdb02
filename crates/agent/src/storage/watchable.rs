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

use rustix::fs::OFlags;

use super::{
    Job, Mounted, Undo,
    mount::{Options, Target, mount as mount_on},
};
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
    directories: Mutex<HashMap<PathBuf, Directory>>,
}

/// A directory that memory was mounted on for copies.
#[derive(Debug)]
struct Directory {
    users: usize,
    made: Mounted,
}

impl std::fmt::Debug for Copies {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Copies({:?})", lock(&self.directories))
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
    let parent =
        path.parent().filter(|parent| parent.file_name() == Some(PARENT.as_ref())).ok_or_else(wrong)?;
    let name = path.file_name().and_then(|name| CString::new(name.as_bytes()).ok()).ok_or_else(wrong)?;

    let source = PathBuf::from(&storage.source);
    let what = || format!("open {}, which is to be watched", source.display());
    let original = tree::open(&source, OFlags::PATH).during(what)?;
    let kind = rustix::fs::fstatfs(&original).during(what)?.f_type;
    drop(original);

    job.copies.use_directory(parent, mounted)?;
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
    fn use_directory(self: &Arc<Self>, directory: &Path, mounted: &mut Mounted) -> Result<()> {
        let mut directories = lock(&self.directories);
        if let Some(there) = directories.get_mut(directory) {
            there.users += 1;
        } else {
            let mut made = Mounted::default();
            if let Err(error) = memory(directory, &mut made) {
                made.undo(&directory.to_string_lossy());
                return Err(error);
            }
            directories.insert(directory.to_owned(), Directory { users: 1, made });
        }
        mounted.did(Undo::LeaveDirectory(Arc::clone(self), directory.to_owned()));
        Ok(())
    }

    /// The last user takes the memory along.
    pub(super) fn leave_directory(&self, directory: &Path) {
        let mut directories = lock(&self.directories);
        let Some(there) = directories.get_mut(directory) else { return };
        there.users = there.users.saturating_sub(1);
        if there.users == 0
            && let Some(there) = directories.remove(directory)
        {
            there.made.undo(&directory.to_string_lossy());
        }
    }
}

fn memory(directory: &Path, made: &mut Mounted) -> Result<()> {
    let target = Target::directory(&directory.to_string_lossy(), made)?;
    let options = Options::parse(&["nosuid,nodev,mode=0755".into()])?;
    mount_on("watchable", &target, "tmpfs", &options, made)
}

/// Deletes a copy, whatever was mounted or linked in its place.
pub(super) fn remove_copy(path: &Path) -> Result<()> {
    let what = || format!("remove {}", path.display());
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
    let parent = tree::open(parent, OFlags::PATH | OFlags::DIRECTORY).during(what)?;
    let name = CString::new(name.as_bytes()).during(what)?;
    tree::remove(parent, &name).during(what)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::symlink,
        time::{Duration, Instant},
    };

    use bulkhead_protocol::agent::Storage;

    use super::*;
    use crate::{storage::apart::apart, sync::blocking};

    fn storage(path: &str, name: &str) -> Storage {
        Storage {
            driver: "watchable-bind".into(),
            source: format!("{path}/{name}"),
            fstype: "bind".into(),
            mount_point: format!("{path}/watchable/{name}"),
            ..Default::default()
        }
    }

    /// Waits until a file says something, a generous while.
    async fn becomes(path: &str, content: &str) {
        let start = Instant::now();
        while fs::read_to_string(path).unwrap_or_default() != content {
            assert!(start.elapsed() < Duration::from_secs(30), "{path} does not become {content:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn switch(path: &str, version: &str) {
        fs::create_dir(format!("{path}/..{version}")).unwrap();
        fs::write(format!("{path}/..{version}/key"), version).unwrap();
        symlink(format!("..{version}"), format!("{path}/..data_tmp")).unwrap();
        fs::rename(format!("{path}/..data_tmp"), format!("{path}/..data")).unwrap();
        let _ = symlink("..data/key", format!("{path}/key"));
    }

    fn mounts(path: &str) -> usize {
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        mounts.lines().filter(|line| line.contains(path)).count()
    }

    #[test]
    fn two_volumes_are_kept_up_to_date_and_leave_nothing() {
        apart(async |storages, path| {
            for name in ["a", "b"] {
                fs::create_dir(format!("{path}/{name}")).unwrap();
                switch(&format!("{path}/{name}"), "one");
            }
            let a = storages.add_all(vec![storage(&path, "a")], Some("c")).await.unwrap();
            let b = storages.add_all(vec![storage(&path, "b")], Some("c")).await.unwrap();
            let copy = |name: &str| format!("{path}/watchable/{name}/key");
            assert_eq!(fs::read_to_string(copy("a")).unwrap(), "one");
            assert_eq!(mounts(&path), 1);
            for name in ["a", "b"] {
                switch(&format!("{path}/{name}"), "two");
                becomes(&copy(name), "two").await;
                switch(&format!("{path}/{name}"), "three");
                becomes(&copy(name), "three").await;
            }
            storages.release_all(&a).await;
            assert!(!fs::exists(format!("{path}/watchable/a")).unwrap());
            switch(&format!("{path}/b"), "four");
            becomes(&copy("b"), "four").await;
            storages.release_all(&b).await;
            assert_eq!(mounts(&path), 0);
            assert!(!fs::exists(format!("{path}/watchable")).unwrap());
        });
    }

    #[test]
    fn an_original_that_comes_back_is_seen_though_it_tells_nothing_any_more() {
        apart(async |storages, path| {
            fs::create_dir(format!("{path}/a")).unwrap();
            fs::write(format!("{path}/a/key"), "one").unwrap();
            storages.add_all(vec![storage(&path, "a")], Some("c")).await.unwrap();
            fs::remove_dir_all(format!("{path}/a")).unwrap();
            fs::create_dir(format!("{path}/a")).unwrap();
            fs::write(format!("{path}/a/key"), "two").unwrap();
            becomes(&format!("{path}/watchable/a/key"), "two").await;
            storages.clear().await;
        });
    }

    #[test]
    fn what_cannot_be_watched_is_refused_and_leaves_nothing() {
        apart(async |storages, path| {
            fs::create_dir(format!("{path}/a")).unwrap();
            let elsewhere = Storage { mount_point: format!("{path}/x/a"), ..storage(&path, "a") };
            let error = storages.add_all(vec![elsewhere], Some("c")).await.unwrap_err();
            assert!(matches!(error, Error::Invalid(_)), "{error:?}");
            let missing = storages.add_all(vec![storage(&path, "missing")], Some("c")).await.unwrap_err();
            assert!(matches!(missing, Error::Io { .. }), "{missing:?}");
            symlink("/etc", format!("{path}/link")).unwrap();
            assert!(storages.add_all(vec![storage(&path, "link")], Some("c")).await.is_err());
            assert_eq!(mounts(&path), 0);
            assert!(!fs::exists(format!("{path}/watchable")).unwrap());
        });
    }

    /// Polling is what a virtio-fs needs; here it is asked of a file system that would tell.
    #[test]
    fn one_that_tells_nothing_is_looked_at_again() {
        apart(async |_, path| {
            fs::create_dir_all(format!("{path}/a")).unwrap();
            fs::create_dir_all(format!("{path}/holder")).unwrap();
            fs::write(format!("{path}/a/key"), "one").unwrap();
            let watcher = Arc::<Watcher>::default();
            let keep = |tells: bool| {
                let (watcher, source) = (Arc::clone(&watcher), PathBuf::from(format!("{path}/a")));
                let holder = tree::open(Path::new(&format!("{path}/holder")), OFlags::PATH).unwrap();
                let mirror = Mirror::new(source.clone(), holder, c"copy".to_owned());
                blocking(move || watcher.keep(mirror, source, tells))
            };
            for value in ["two", "three"] {
                // Twice: the task that looks ends with its last copy and comes back with the next.
                let watched = keep(false).await.unwrap();
                fs::write(format!("{path}/a/key"), value).unwrap();
                becomes(&format!("{path}/holder/copy/key"), value).await;
                watched.stop();
            }
            fs::write(format!("{path}/a/key"), "four").unwrap();
            let watched = keep(true).await.unwrap();
            watched.stop();
            fs::write(format!("{path}/a/key"), "five").unwrap();
            tokio::time::sleep(Duration::from_millis(100)).await;
            assert_eq!(fs::read_to_string(format!("{path}/holder/copy/key")).unwrap(), "four");
        });
    }
}
