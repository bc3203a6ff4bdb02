//! Mounts what the host shares: one driver a file, counted by mount point, undone once.
//!
//! A storage is mounted at its first use and undone when its last user is gone. What belongs to the pod and not to one
//! container (a storage marked as shared, an emptyDir) stays until the sandbox ends, because a container that is restarted
//! must find it as it was.

mod backing;
mod bind;
mod block;
mod ephemeral;
mod fs_group;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod hugepages;
mod local;
mod mount;
mod multi_layer;
mod ninep;
mod overlay;
mod pmem;
mod virtiofs;
mod watchable;

#[cfg(test)]
mod apart;
#[cfg(test)]
mod disks;

pub(crate) use block::{allow_bound, is_bound};

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use bulkhead_protocol::agent::Storage;
use rustix::mount::UnmountFlags;

use crate::{
    boot::Guest,
    device::Devices,
    error::{During, Error, Result},
    sync::{blocking, lock},
    watcher::Watched,
};

/// The end of the sandbox waits this long for each storage; a file system whose server is gone must not keep it.
const FAREWELL: Duration = Duration::from_secs(10);

/// A driver: it does its work and notes in `Mounted` each step it has done, so that a failure half way is undone as well.
type Driver = fn(&Job, &mut Mounted) -> Result<()>;

/// The drivers by the name that a request uses, sorted.
const DRIVERS: [(&str, Driver); 12] = [
    ("9p", ninep::mount),
    ("bind", bind::mount),
    ("blk", block::mount),
    ("ephemeral", ephemeral::mount),
    (multi_layer::DRIVER, multi_layer::mount),
    ("local", local::mount),
    ("mmioblk", block::mount),
    ("nvdimm", pmem::mount),
    ("overlayfs", overlay::mount),
    ("scsi", block::mount),
    ("virtio-fs", virtiofs::mount),
    ("watchable-bind", watchable::mount),
];

/// The names of the drivers, sorted.
pub(crate) fn drivers() -> Vec<String> {
    DRIVERS.iter().map(|(name, _)| (*name).to_owned()).collect()
}

/// One mount that is asked for.
#[derive(Clone, Debug, PartialEq)]
struct Wanted {
    storage: Storage,
    /// The storages it is put together from, if it is from several.
    layers: Vec<Storage>,
}

/// What a driver is to do, and with what.
struct Job {
    storage: Storage,
    /// The file of the device that the storage stands on, if it stands on one.
    node: Option<PathBuf>,
    /// The storages it is put together from, and their devices.
    layers: Vec<(Storage, PathBuf)>,
    /// The container that it is for; none if it is for the pod.
    container: Option<String>,
    /// Loads modules and runs programs.
    guest: Arc<Guest>,
    /// Keeps what is watched up to date.
    copies: Arc<watchable::Copies>,
}

/// The storages in use, by mount point.
pub(crate) struct Storages {
    guest: Arc<Guest>,
    devices: Arc<Devices>,
    copies: Arc<watchable::Copies>,
    slots: Mutex<HashMap<String, Arc<tokio::sync::Mutex<Slot>>>>,
}

/// One mount point. Its lock is held while it is mounted or unmounted, so that a second user waits for the first.
#[derive(Default)]
struct Slot {
    users: usize,
    /// A user has come and gone: what is to be kept may hold something.
    used: bool,
    /// What was asked for, and what was done about it.
    mounted: Option<(Wanted, Mounted)>,
    /// The slot has left the table: whoever still holds it looks for a new one.
    gone: bool,
}

/// Why a use of a storage ends.
#[derive(Clone, Copy, PartialEq)]
enum End {
    /// Whoever used it is gone.
    User,
    /// The request failed that wanted it: what it mounted goes, also what is otherwise kept.
    Request,
    /// The sandbox ends, whoever uses it.
    Sandbox,
}

/// What a driver did.
#[derive(Debug, Default)]
struct Mounted {
    /// How to undo it, last step first.
    undo: Vec<Undo>,
    /// It stays until the sandbox ends.
    keep: bool,
}

#[derive(Debug, PartialEq)]
enum Undo {
    Unmount(PathBuf),
    /// Only if it is empty: what somebody put there is not the agent's to delete.
    RemoveDirectory(PathBuf),
    /// The empty file that something was bound to.
    RemoveFile(PathBuf),
    /// A directory of the agent's own.
    RemoveTree(PathBuf),
    /// To the guest's pool of huge pages.
    GiveBackPages {
        pool: PathBuf,
        pages: u64,
    },
    /// The memory that copies are in.
    LeaveDirectory(Arc<watchable::Copies>, PathBuf),
    RemoveCopy(PathBuf),
    Unwatch(Watched),
}

impl Storages {
    /// None yet.
    pub(crate) fn new(guest: Arc<Guest>, devices: Arc<Devices>) -> Storages {
        Storages { guest, devices, copies: Arc::default(), slots: Mutex::default() }
    }

    /// Mounts what is not mounted yet and counts the rest; all or nothing. Returns the mount points, to be released.
    pub(crate) async fn add_all(
        &self,
        storages: Vec<Storage>,
        container: Option<&str>,
    ) -> Result<Vec<String>> {
        let mut added = Vec::new();
        for wanted in multi_layer::group(storages)? {
            match self.add(wanted, container).await {
                Ok(mount_point) => added.push(mount_point),
                Err(error) => {
                    self.cancel_all(&added).await;
                    return Err(error);
                }
            }
        }
        Ok(added)
    }

    async fn add(&self, mut wanted: Wanted, container: Option<&str>) -> Result<String> {
        let driver = check(&wanted.storage)?;
        let mount_point = mount::point(&wanted.storage.mount_point, self.guest.init)?;
        wanted.storage.mount_point.clone_from(&mount_point);
        loop {
            let slot = Arc::clone(lock(&self.slots).entry(mount_point.clone()).or_default());
            let mut slot = slot.lock().await;
            if slot.gone {
                continue;
            }
            match &slot.mounted {
                Some((present, _)) => same(present, &wanted)?,
                None => match self.mount(driver, wanted.clone(), container).await {
                    Ok(mounted) => slot.mounted = Some((wanted, mounted)),
                    Err(error) => {
                        self.forget(&mount_point, &mut slot);
                        return Err(error);
                    }
                },
            }
            slot.users += 1;
            return Ok(mount_point);
        }
    }

    /// Finds the devices, then has the driver do its work. A failure leaves nothing.
    async fn mount(&self, driver: Driver, wanted: Wanted, container: Option<&str>) -> Result<Mounted> {
        let Wanted { storage, layers } = wanted;
        let (guest, container) = (Arc::clone(&self.guest), container.map(str::to_owned));
        let node = backing::find(&guest, &self.devices, &storage).await?;
        let layers = multi_layer::find(&guest, &self.devices, layers).await?;
        let copies = Arc::clone(&self.copies);
        let job = Job { storage, node, layers, container, guest, copies };
        blocking(move || {
            let mut mounted = Mounted { keep: job.storage.shared, ..Mounted::default() };
            let done = driver(&job, &mut mounted).and_then(|()| fs_group::apply(&job.storage));
            match done {
                Ok(()) => Ok(mounted),
                Err(error) => {
                    mounted.undo(&job.storage.mount_point);
                    Err(error)
                }
            }
        })
        .await
    }

    /// Changes what ephemeral storages are mounted with; all of them must be there before any is changed.
    pub(crate) async fn update_ephemeral(&self, wanted: Vec<Storage>) -> Result<()> {
        let mut slots = Vec::new();
        for storage in wanted {
            if storage.driver != "ephemeral" {
                return Err(Error::Invalid(format!(
                    "the storage on {:?} is of driver {:?}; only ephemeral ones can be updated",
                    storage.mount_point, storage.driver
                )));
            }
            let mount_point = mount::point(&storage.mount_point, self.guest.init)?;
            let slot = lock(&self.slots).get(&mount_point).cloned();
            let slot = slot.ok_or_else(|| not_ephemeral(&mount_point))?;
            slots.push((Storage { mount_point, ..storage }, slot));
        }
        for (wanted, slot) in slots {
            let slot = slot.lock().await;
            let present = slot.mounted.as_ref().map(|(present, _)| present.storage.clone());
            let present = present.filter(|present| present.driver == wanted.driver);
            let present = present.ok_or_else(|| not_ephemeral(&wanted.mount_point))?;
            blocking(move || ephemeral::update(&present, &wanted)).await?;
        }
        Ok(())
    }

    /// Takes back one use of each, last first.
    pub(crate) async fn release_all(&self, mount_points: &[String]) {
        for mount_point in mount_points.iter().rev() {
            self.release(mount_point, End::User).await;
        }
    }

    /// The same for a request that failed; everything is as it was before.
    pub(crate) async fn cancel_all(&self, mount_points: &[String]) {
        for mount_point in mount_points.iter().rev() {
            self.release(mount_point, End::Request).await;
        }
    }

    /// Undoes everything, whoever uses it: the sandbox ends.
    pub(crate) async fn clear(&self) {
        let mut mount_points: Vec<String> = lock(&self.slots).keys().cloned().collect();
        // What is mounted below another goes first.
        mount_points.sort();
        for mount_point in mount_points.iter().rev() {
            if tokio::time::timeout(FAREWELL, self.release(mount_point, End::Sandbox)).await.is_err() {
                tracing::error!(mount_point, "storage was not released in time");
            }
        }
    }

    async fn release(&self, mount_point: &str, end: End) {
        let Some(slot) = lock(&self.slots).get(mount_point).cloned() else { return };
        let mut slot = slot.lock().await;
        slot.users = slot.users.saturating_sub(1);
        slot.used |= end == End::User;
        let keep = slot.used && slot.mounted.as_ref().is_some_and(|(_, mounted)| mounted.keep);
        if end == End::Sandbox || (slot.users == 0 && !keep) {
            self.forget(mount_point, &mut slot);
            if let Some((wanted, mounted)) = slot.mounted.take() {
                let undone = blocking(move || {
                    mounted.undo(&wanted.storage.mount_point);
                    Ok(())
                });
                if let Err(error) = undone.await {
                    tracing::warn!(mount_point, %error, "storage was not released");
                }
            }
        }
    }

    fn forget(&self, mount_point: &str, slot: &mut Slot) {
        slot.gone = true;
        lock(&self.slots).remove(mount_point);
    }
}

fn check(storage: &Storage) -> Result<Driver> {
    let known = DRIVERS.iter().find(|(name, _)| *name == storage.driver);
    let Some((_, driver)) = known else {
        return Err(Error::Unsupported(format!(
            "the storage driver {:?} (it has {})",
            storage.driver,
            drivers().join(", ")
        )));
    };
    Ok(*driver)
}

fn not_ephemeral(mount_point: &str) -> Error {
    Error::State(format!("no ephemeral storage is mounted on {mount_point:?}"))
}

/// Who finds a mount point in use gets what is there, so that must be what he asks for. Only in its options it may differ:
/// hosts put each container's own limit there, and whether that container writes.
fn same(present: &Wanted, wanted: &Wanted) -> Result<()> {
    // These, and whether it outlives its users, were settled by the first.
    let Storage { shared, options, .. } = &present.storage;
    let storage = Storage { shared: *shared, options: options.clone(), ..wanted.storage.clone() };
    if present.storage == storage && present.layers == wanted.layers {
        if *options != wanted.storage.options {
            let (mount_point, asked) = (&storage.mount_point, &wanted.storage.options);
            tracing::warn!(mount_point, ?options, ?asked, "storage in use keeps its options");
        }
        return Ok(());
    }
    let describe = |wanted: &Wanted| {
        let Storage { driver, source, fstype, .. } = &wanted.storage;
        format!("{driver} storage {source:?} of type {fstype:?}")
    };
    Err(Error::State(format!(
        "the mount point {:?} is in use by another storage: {}, not {}",
        present.storage.mount_point,
        describe(present),
        describe(wanted)
    )))
}

impl Mounted {
    /// Notes a step that has been done.
    fn did(&mut self, step: Undo) {
        self.undo.push(step);
    }

    /// Undoes every step, also after one that fails.
    fn undo(self, mount_point: &str) {
        for step in self.undo.into_iter().rev() {
            if let Err(error) = step.run() {
                tracing::warn!(mount_point, %error, "storage was not released cleanly");
            }
        }
    }
}

impl Undo {
    fn run(&self) -> Result<()> {
        match self {
            // Something may still hold a file open there; the mount goes with it.
            Undo::Unmount(path) => {
                rustix::mount::unmount(path, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)
                    .during(|| format!("unmount {}", path.display()))
            }
            Undo::RemoveDirectory(path) => remove(path, std::fs::remove_dir(path)),
            Undo::RemoveFile(path) => remove(path, std::fs::remove_file(path)),
            Undo::RemoveTree(path) => remove(path, std::fs::remove_dir_all(path)),
            Undo::GiveBackPages { pool, pages } => hugepages::give_back(pool, *pages),
            Undo::LeaveDirectory(copies, directory) => {
                copies.leave_directory(directory);
                Ok(())
            }
            Undo::RemoveCopy(path) => watchable::remove_copy(path),
            Undo::Unwatch(watched) => {
                watched.stop();
                Ok(())
            }
        }
    }
}

fn remove(path: &Path, removed: std::io::Result<()>) -> Result<()> {
    use std::io::ErrorKind::{DirectoryNotEmpty, NotFound};
    match removed {
        Err(error) if matches!(error.kind(), DirectoryNotEmpty | NotFound) => Ok(()),
        removed => removed.during(|| format!("remove {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn storages() -> Storages {
        Storages::new(Arc::new(Guest::plain()), Arc::new(Devices::new(Duration::ZERO, false)))
    }

    fn local(mount_point: &std::path::Path) -> Storage {
        let mount_point = mount_point.to_str().unwrap().to_owned();
        Storage {
            driver: "local".into(),
            mount_point,
            options: vec!["mode=0750".into()],
            ..Default::default()
        }
    }

    #[test]
    fn the_drivers_are_sorted() {
        assert!(drivers().is_sorted());
    }

    #[tokio::test]
    async fn an_unknown_driver_is_named_and_leaves_nothing() {
        let storages = storages();
        let storage = Storage { driver: "floppy".into(), mount_point: "/x".into(), ..Default::default() };
        let error = storages.add_all(vec![storage], None).await.unwrap_err();
        assert!(matches!(error, Error::Unsupported(_)), "{error:?}");
        assert!(error.to_string().contains("floppy"));
        assert!(lock(&storages.slots).is_empty());
    }

    #[tokio::test]
    async fn a_failure_takes_back_what_the_same_request_added() {
        let directory = tempfile::tempdir().unwrap();
        let storages = storages();
        let good = Storage { shared: false, ..local(&directory.path().join("a")) };
        let bad = Storage { mount_point: "relative".into(), ..good.clone() };
        assert!(storages.add_all(vec![good.clone(), bad.clone()], None).await.is_err());
        assert!(!directory.path().join("a").exists(), "also what would be kept");
        assert!(lock(&storages.slots).is_empty());

        // What a user has left stays, and so does what another still uses.
        let added = storages.add_all(vec![good.clone()], None).await.unwrap();
        let data = directory.path().join("a/data");
        std::fs::write(&data, "x").unwrap();
        assert!(storages.add_all(vec![good.clone(), bad.clone()], None).await.is_err());
        assert!(data.exists());
        storages.release_all(&added).await;
        assert!(storages.add_all(vec![good, bad], None).await.is_err());
        assert!(data.exists());
        storages.clear().await;
        assert!(!data.exists());
    }

    /// A bind of `/run/from` to `/run/to`, which is not kept.
    fn bound(options: &[&str]) -> Storage {
        Storage {
            driver: "bind".into(),
            source: "/run/from".into(),
            mount_point: "/run/to".into(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            ..Default::default()
        }
    }

    fn alone_with(test: impl AsyncFnOnce(Storages) + Send) {
        disks::alone(|| {
            // Threads have the mounts of the one that makes them.
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            runtime.block_on(test(storages()));
        });
    }

    #[test]
    fn the_last_of_several_users_undoes_it_once() {
        alone_with(async |storages| {
            std::fs::write("/run/from", "x").unwrap();
            let first = storages.add_all(vec![bound(&["ro"])], Some("a")).await.unwrap();
            let slash = Storage { mount_point: "//run/to/".into(), ..bound(&["ro"]) };
            let second = storages.add_all(vec![slash], Some("b")).await.unwrap();
            assert_eq!(disks::mounts_below("/run"), ["/run/to"], "mounted once");
            storages.release_all(&first).await;
            assert_eq!(std::fs::read_to_string("/run/to").unwrap(), "x");
            storages.release_all(&second).await;
            assert!(disks::mounts_below("/run").is_empty());
            assert!(!Path::new("/run/to").exists(), "the file it was bound to was the agent's");
            assert!(lock(&storages.slots).is_empty());
        });
    }

    #[test]
    fn a_second_user_gets_what_is_there_or_an_error() {
        alone_with(async |storages| {
            std::fs::write("/run/from", "x").unwrap();
            std::fs::write("/run/other", "y").unwrap();
            storages.add_all(vec![bound(&["ro"])], Some("a")).await.unwrap();
            let other = Storage { source: "/run/other".into(), ..bound(&["ro"]) };
            let typed = Storage { fstype: "ext4".into(), ..bound(&["ro"]) };
            let driven = Storage { driver: "overlayfs".into(), ..bound(&["ro"]) };
            for storage in [other, typed, driven] {
                let error = storages.add_all(vec![storage], Some("b")).await.unwrap_err();
                assert!(matches!(&error, Error::State(text) if text.contains("/run/to")), "{error}");
            }
            let shared = Storage { shared: true, ..bound(&["ro"]) };
            storages.add_all(vec![shared], Some("c")).await.unwrap();
            // Options are those of the first.
            storages.add_all(vec![bound(&["rw"])], Some("d")).await.unwrap();
            assert_eq!(disks::mounts_below("/run"), ["/run/to"]);
            assert!(std::fs::write("/run/to", "z").is_err(), "it is still read-only");
            storages.clear().await;
            assert!(disks::mounts_below("/run").is_empty());
        });
    }

    #[test]
    fn a_failure_leaves_no_mount_and_no_file_of_the_request() {
        alone_with(async |storages| {
            std::fs::write("/run/from", "x").unwrap();
            let bad = Storage { mount_point: "/run/x/y".into(), source: "/run/gone".into(), ..bound(&[]) };
            let unknown = Storage { driver: "floppy".into(), ..bound(&[]) };
            for last in [bad, unknown] {
                assert!(storages.add_all(vec![bound(&[]), last], Some("a")).await.is_err());
                assert!(disks::mounts_below("/run").is_empty());
                assert!(!Path::new("/run/to").exists());
                assert!(lock(&storages.slots).is_empty());
            }
        });
    }

    #[tokio::test]
    async fn a_kept_storage_stays_until_the_sandbox_ends() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("volume");
        let storages = storages();
        let added = storages.add_all(vec![local(&path)], Some("c")).await.unwrap();
        std::fs::write(path.join("data"), "x").unwrap();
        storages.release_all(&added).await;
        assert!(path.join("data").exists());
        storages.add_all(vec![local(&path)], Some("c")).await.unwrap();
        assert!(path.join("data").exists());
        storages.clear().await;
        assert!(!path.exists());
    }
}
