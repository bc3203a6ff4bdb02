//! Mounts what the host shares: one driver a file, counted by mount point, undone once.
//!
//! A storage is mounted at its first use and undone when its last user is gone. What belongs to the pod and not to one
//! container (a storage marked as shared, an emptyDir) stays until the sandbox ends, because a container that is restarted
//! must find it as it was.

mod bind;
mod ephemeral;
mod local;
mod mount;
mod overlay;
mod virtiofs;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use bulkhead_protocol::agent::Storage;
use rustix::mount::UnmountFlags;

use crate::{
    error::{During, Error, Result},
    sync::{blocking, lock},
};

type Driver = fn(&Storage, Option<&str>) -> Result<Mounted>;

/// The drivers by the name that a request uses, sorted. Each mounts a storage, for a container if one is named.
const DRIVERS: [(&str, Driver); 5] = [
    ("bind", bind::mount),
    ("ephemeral", ephemeral::mount),
    ("local", local::mount),
    ("overlayfs", overlay::mount),
    ("virtio-fs", virtiofs::mount),
];

/// The names of the drivers, sorted.
pub(crate) fn drivers() -> Vec<String> {
    DRIVERS.iter().map(|(name, _)| (*name).to_owned()).collect()
}

/// The storages in use, by mount point.
#[derive(Default)]
pub(crate) struct Storages {
    slots: Mutex<HashMap<String, Arc<tokio::sync::Mutex<Slot>>>>,
}

/// One mount point. Its lock is held while it is mounted or unmounted, so that a second user waits for the first.
#[derive(Default)]
struct Slot {
    users: usize,
    mounted: Option<Mounted>,
    /// The slot has left the table: whoever still holds it looks for a new one.
    gone: bool,
}

/// What a driver did.
struct Mounted {
    /// How to undo it, in this order.
    undo: Vec<Undo>,
    /// It stays until the sandbox ends.
    keep: bool,
}

enum Undo {
    Unmount(PathBuf),
    /// Only if it is empty: what somebody put there is not the agent's to delete.
    RemoveDirectory(PathBuf),
    /// A directory of the agent's own.
    RemoveTree(PathBuf),
}

impl Storages {
    /// Mounts what is not mounted yet and counts the rest; all or nothing. Returns the mount points, to be released.
    pub(crate) async fn add_all(
        &self,
        storages: Vec<Storage>,
        container: Option<&str>,
    ) -> Result<Vec<String>> {
        let mut added = Vec::new();
        for storage in storages {
            let mount_point = storage.mount_point.clone();
            if let Err(error) = self.add(storage, container).await {
                self.release_all(&added).await;
                return Err(error);
            }
            added.push(mount_point);
        }
        Ok(added)
    }

    async fn add(&self, storage: Storage, container: Option<&str>) -> Result<()> {
        let driver = check(&storage)?;
        loop {
            let slot = Arc::clone(lock(&self.slots).entry(storage.mount_point.clone()).or_default());
            let mut slot = slot.lock().await;
            if slot.gone {
                continue;
            }
            if slot.mounted.is_none() {
                let (wanted, container) = (storage.clone(), container.map(str::to_owned));
                let mounted = blocking(move || driver(&wanted, container.as_deref())).await;
                match mounted {
                    Ok(mounted) => {
                        slot.mounted = Some(Mounted { keep: mounted.keep || storage.shared, ..mounted })
                    }
                    Err(error) => {
                        self.forget(&storage.mount_point, &mut slot);
                        return Err(error);
                    }
                }
            }
            slot.users += 1;
            return Ok(());
        }
    }

    /// Takes back one use of each, last first.
    pub(crate) async fn release_all(&self, mount_points: &[String]) {
        for mount_point in mount_points.iter().rev() {
            self.release(mount_point, false).await;
        }
    }

    /// Undoes everything, whoever uses it: the sandbox ends.
    pub(crate) async fn clear(&self) {
        let mut mount_points: Vec<String> = lock(&self.slots).keys().cloned().collect();
        // What is mounted below another goes first.
        mount_points.sort();
        for mount_point in mount_points.iter().rev() {
            self.release(mount_point, true).await;
        }
    }

    async fn release(&self, mount_point: &str, last: bool) {
        let Some(slot) = lock(&self.slots).get(mount_point).cloned() else { return };
        let mut slot = slot.lock().await;
        slot.users = slot.users.saturating_sub(1);
        let keep = slot.mounted.as_ref().is_some_and(|mounted| mounted.keep);
        if last || (slot.users == 0 && !keep) {
            self.forget(mount_point, &mut slot);
            if let Some(mounted) = slot.mounted.take() {
                let undone = blocking(move || mounted.undo()).await;
                if let Err(error) = undone {
                    tracing::warn!(mount_point, %error, "storage was not released cleanly");
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
    if storage.fs_group.is_some() {
        return Err(Error::Unsupported(format!(
            "fs_group, which storage {:?} asks for",
            storage.mount_point
        )));
    }
    Ok(*driver)
}

impl Mounted {
    fn undo(self) -> Result<()> {
        let mut first = Ok(());
        for step in self.undo {
            let done = match &step {
                Undo::Unmount(path) => {
                    // Something may still hold a file open there; the mount goes with it.
                    rustix::mount::unmount(path, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)
                        .during(|| format!("unmount {}", path.display()))
                }
                Undo::RemoveDirectory(path) => match std::fs::remove_dir(path) {
                    Err(error) if error.kind() == std::io::ErrorKind::DirectoryNotEmpty => Ok(()),
                    removed => removed.during(|| format!("remove {}", path.display())),
                },
                Undo::RemoveTree(path) => {
                    std::fs::remove_dir_all(path).during(|| format!("remove {}", path.display()))
                }
            };
            first = first.and(done);
        }
        first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let storages = Storages::default();
        let storage = Storage { driver: "9p".into(), mount_point: "/x".into(), ..Default::default() };
        let error = storages.add_all(vec![storage], None).await.unwrap_err();
        assert!(matches!(error, Error::Unsupported(_)), "{error:?}");
        assert!(error.to_string().contains("9p"));
        assert!(lock(&storages.slots).is_empty());
    }

    #[tokio::test]
    async fn a_failure_takes_back_what_the_same_request_added() {
        let directory = tempfile::tempdir().unwrap();
        let storages = Storages::default();
        let good = Storage { shared: false, ..local(&directory.path().join("a")) };
        let bad = Storage { mount_point: "relative".into(), ..good.clone() };
        assert!(storages.add_all(vec![good, bad], None).await.is_err());
        let users: Vec<_> = lock(&storages.slots).values().cloned().collect();
        for slot in users {
            assert_eq!(slot.lock().await.users, 0);
        }
    }

    #[tokio::test]
    async fn a_kept_storage_stays_until_the_sandbox_ends() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("volume");
        let storages = Storages::default();
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
