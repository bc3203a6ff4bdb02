//! What a container needs from the host's file systems: planned purely, then applied.
//!
//! ```text
//! plan(id, rootfs, mounts) ──► Plan { shares, sources } ──► Holdings::apply() ──► undone in reverse order
//!                                        └── spec.rs rewrites the mounts' sources with it
//! ```

mod options;
mod rootfs;
mod share;
mod sys;

use std::{
    collections::BTreeMap,
    io,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use bulkhead_protocol::{agent::Storage, oci, ports};

pub(crate) use share::{Share, ShareRoot, Sort};

use crate::{Error, Rootfs, storage::rootfs::Mounted};

/// File systems that the guest's kernel provides out of nothing.
const GUEST_FILE_SYSTEMS: [&str; 10] =
    ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "ramfs", "debugfs", "tracefs"];

/// What the source of a bind is on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Directory,
    File,
    /// A socket, a fifo or a device: its name.
    Special(&'static str),
}

/// Looks at the source of a bind, symbolic links followed.
pub(crate) fn inspect(path: &Path) -> io::Result<Source> {
    let kind = std::fs::metadata(path)?.file_type();
    Ok(match () {
        () if kind.is_dir() => Source::Directory,
        () if kind.is_file() => Source::File,
        () if kind.is_socket() => Source::Special("socket"),
        () if kind.is_fifo() => Source::Special("fifo"),
        () if kind.is_block_device() => Source::Special("block device"),
        () => Source::Special("character device"),
    })
}

/// What is to be shared for one container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Binds into the share.
    pub(crate) shares: Vec<Share>,
    /// Guest paths that replace the source of a mount, by the mount's index.
    pub(crate) sources: BTreeMap<usize, String>,
}

/// Decides, for each mount of the configuration, whether it is shared or left to the guest.
pub(crate) fn plan(
    id: &str,
    bundle: &Path,
    mounts: &[oci::Mount],
    inspect: impl Fn(&Path) -> io::Result<Source>,
) -> Result<Plan, Error> {
    let mut plan = Plan::default();
    for (index, mount) in mounts.iter().enumerate() {
        if is_shm(mount) {
            plan.sources.insert(index, ports::GUEST_SHM.to_owned());
        } else if !is_bind(mount) {
            stays_in_guest(mount)?;
        } else if let Some(share) = share_of(id, index, bundle, mount, &inspect)? {
            plan.sources.insert(index, format!("{}/{}", ports::GUEST_SHARE, share.name));
            plan.shares.push(share);
        }
    }
    Ok(plan)
}

/// The share of a container's root file system.
pub(crate) fn rootfs_share(id: &str, source: &Path) -> Share {
    Share {
        name: format!("{id}/rootfs"),
        source: source.to_owned(),
        sort: Sort::Directory,
        recursive: true,
        read_only: false,
    }
}

/// Where the guest sees a container's root file system.
pub(crate) fn guest_rootfs(id: &str) -> String {
    format!("{}/{id}/rootfs", ports::GUEST_SHARE)
}

/// The storages of a pod: the shared file system and its shared memory.
pub(crate) fn sandbox_storages(shm_bytes: u64) -> Vec<Storage> {
    let shm = ["noexec", "nosuid", "nodev", "mode=1777"].map(str::to_owned).into_iter();
    vec![
        Storage {
            driver: "virtio-fs".into(),
            source: ports::SHARE_TAG.into(),
            fstype: "virtiofs".into(),
            mount_point: ports::GUEST_SHARE.into(),
            ..Default::default()
        },
        Storage {
            driver: "ephemeral".into(),
            source: "shm".into(),
            fstype: "tmpfs".into(),
            options: shm.chain([format!("size={shm_bytes}")]).collect(),
            mount_point: ports::GUEST_SHM.into(),
            ..Default::default()
        },
    ]
}

/// Whether a mount is a bind.
pub(crate) fn is_bind(mount: &oci::Mount) -> bool {
    mount.type_ == "bind" || mount.options.iter().any(|option| option == "bind" || option == "rbind")
}

/// Whether a mount is the container's `/dev/shm`, which is the pod's in the guest, whatever it was on the host.
pub(crate) fn is_shm(mount: &oci::Mount) -> bool {
    Path::new(&mount.destination) == Path::new("/dev/shm")
}

fn stays_in_guest(mount: &oci::Mount) -> Result<(), Error> {
    if mount.type_.is_empty() || GUEST_FILE_SYSTEMS.contains(&mount.type_.as_str()) {
        return Ok(());
    }
    Err(Error::Unsupported(format!(
        "a {} mount on {}: mount it on the host and bind the directory",
        mount.type_, mount.destination
    )))
}

fn share_of(
    id: &str,
    index: usize,
    bundle: &Path,
    mount: &oci::Mount,
    inspect: &impl Fn(&Path) -> io::Result<Source>,
) -> Result<Option<Share>, Error> {
    let source = bundle.join(&mount.source);
    let destination = &mount.destination;
    let found = match inspect(&source) {
        found if is_of_the_guest(&source, &found) => return Ok(None),
        Ok(found) => found,
        Err(error) => {
            return Err(Error::Invalid(format!(
                "mount source {} (for {destination}): {error}",
                source.display()
            )));
        }
    };
    let sort = match found {
        Source::Directory => Sort::Directory,
        Source::File => Sort::File,
        Source::Special(kind) => {
            return Err(Error::Unsupported(format!(
                "the mount of {} on {destination}: a {kind} of the host cannot be used inside a VM",
                source.display()
            )));
        }
    };
    if let Some(option) = mount.options.iter().find(|option| *option == "shared" || *option == "rshared") {
        return Err(Error::Unsupported(format!(
            "the mount option {option} on {destination}: a VM's mounts cannot propagate to the host; use rslave or rprivate"
        )));
    }
    let on = |set: &str, clear: &str| {
        mount
            .options
            .iter()
            .rev()
            .find(|option| *option == set || *option == clear)
            .is_some_and(|last| last == set)
    };
    Ok(Some(Share {
        name: share_name(id, index, destination),
        source,
        sort,
        recursive: on("rbind", "bind"),
        read_only: on("ro", "rw"),
    }))
}

/// Kernel file systems and devices: the guest has its own, or none. A regular file in `/dev`, and what lives in
/// `/dev/shm`, is data of the host.
fn is_of_the_guest(source: &Path, found: &io::Result<Source>) -> bool {
    let kernel = source.starts_with("/proc") || source.starts_with("/sys");
    let device = source.starts_with("/dev") && !source.starts_with("/dev/shm");
    kernel || (device && !matches!(found, Ok(Source::File)))
}

/// One path component: the container, the mount's index, and a name that a person recognizes.
fn share_name(id: &str, index: usize, destination: &str) -> String {
    let last = Path::new(destination).file_name().and_then(|name| name.to_str()).unwrap_or("root");
    let mut name = format!("{id}-{index}-{last}");
    while name.len() > 255 {
        name.pop();
    }
    name
}

/// What the host holds for one container; released in reverse order, at the latest when dropped.
#[derive(Debug)]
pub(crate) struct Holdings {
    root: Arc<ShareRoot>,
    bound: Vec<Share>,
    rootfs: Option<Mounted>,
}

impl Holdings {
    /// Makes the root file system and shares it together with what was planned. On error nothing stays.
    pub(crate) fn apply(
        root: Arc<ShareRoot>,
        id: &str,
        bundle: &Path,
        rootfs: &Rootfs,
        plan: &Plan,
    ) -> Result<Holdings, Error> {
        let mut holdings = Holdings { root, bound: Vec::new(), rootfs: None };
        let directory = match rootfs {
            Rootfs::Directory(directory) => bundle.join(directory),
            Rootfs::Mounts(mounts) => {
                let target = mount_target(bundle, !mounts.is_empty())?;
                holdings.rootfs = Some(Mounted::apply(mounts, &target)?);
                target
            }
        };
        if !directory.is_dir() {
            return Err(Error::Invalid(format!(
                "the root file system {} is not a directory",
                directory.display()
            )));
        }
        for share in std::iter::once(&rootfs_share(id, &directory)).chain(&plan.shares) {
            holdings.root.bind(share)?;
            holdings.bound.push(share.clone());
        }
        Ok(holdings)
    }

    /// Takes everything away again; goes on after a failure, and returns the first.
    pub(crate) fn release(&mut self) -> Result<(), Error> {
        let mut outcome = Ok(());
        while let Some(share) = self.bound.pop() {
            outcome = outcome.and(self.root.unbind(&share));
        }
        if let Some(mut rootfs) = self.rootfs.take() {
            outcome = outcome.and(rootfs.unmount());
        }
        outcome
    }
}

impl Drop for Holdings {
    fn drop(&mut self) {
        if let Err(error) = self.release() {
            tracing::warn!("{error}");
        }
    }
}

fn mount_target(bundle: &Path, make: bool) -> Result<PathBuf, Error> {
    let target = bundle.join("rootfs");
    if make {
        match std::fs::create_dir(&target) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(crate::error::os(format!("making {}", target.display()))(error));
            }
            _ => {}
        }
    }
    Ok(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &str, destination: &str, options: &[&str]) -> oci::Mount {
        oci::Mount {
            destination: destination.into(),
            source: source.into(),
            type_: kind.into(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            ..Default::default()
        }
    }

    /// A host on which names tell what a thing is.
    fn host(path: &Path) -> io::Result<Source> {
        let name = path.to_str().unwrap();
        match () {
            () if name.contains("missing") => Err(io::ErrorKind::NotFound.into()),
            () if name.ends_with(".sock") => Ok(Source::Special("socket")),
            () if name == "/dev/fuse" => Ok(Source::Special("character device")),
            () if name.ends_with(".conf") || name.ends_with("hosts") => Ok(Source::File),
            () => Ok(Source::Directory),
        }
    }

    fn planned(mounts: &[oci::Mount]) -> Result<Plan, Error> {
        plan("c1", Path::new("/bundle"), mounts, host)
    }

    #[test]
    fn each_mount_is_shared_or_left_to_the_guest() {
        let left = None;
        let shared = |name: &str, source: &str, sort, recursive, read_only| {
            Some(Share { name: name.into(), source: source.into(), sort, recursive, read_only })
        };
        for (mount, expected) in [
            (mount("proc", "proc", "/proc", &["nosuid"]), left.clone()),
            (mount("sysfs", "sysfs", "/sys", &["ro"]), left.clone()),
            (mount("cgroup", "cgroup", "/sys/fs/cgroup", &["ro"]), left.clone()),
            (mount("tmpfs", "tmpfs", "/run", &[]), left.clone()),
            (mount("bind", "/sys/fs/cgroup", "/sys/fs/cgroup", &["rbind"]), left.clone()),
            (mount("bind", "/proc/sys", "/proc/sys", &["bind"]), left.clone()),
            (mount("bind", "/dev", "/dev", &["rbind"]), left.clone()),
            (mount("bind", "/dev/fuse", "/dev/fuse", &["bind"]), left.clone()),
            (mount("bind", "/dev/missing", "/dev/m", &["bind"]), left),
            (
                mount("bind", "/dev/x.conf", "/x", &["bind"]),
                shared("c1-0-x", "/dev/x.conf", Sort::File, false, false),
            ),
            (
                mount("bind", "/data", "/srv/x", &["rbind"]),
                shared("c1-0-x", "/data", Sort::Directory, true, false),
            ),
            (
                mount("bind", "/data", "/srv/x", &["bind", "ro"]),
                shared("c1-0-x", "/data", Sort::Directory, false, true),
            ),
            (
                mount("bind", "/data", "/y", &["ro", "rw"]),
                shared("c1-0-y", "/data", Sort::Directory, false, false),
            ),
            (
                mount("none", "/etc/hosts", "/etc/hosts", &["rbind", "ro"]),
                shared("c1-0-hosts", "/etc/hosts", Sort::File, true, true),
            ),
            (
                mount("bind", "relative.conf", "/z", &["bind"]),
                shared("c1-0-z", "/bundle/relative.conf", Sort::File, false, false),
            ),
            (
                mount("bind", "/dev/shm/data", "/d", &["bind"]),
                shared("c1-0-d", "/dev/shm/data", Sort::Directory, false, false),
            ),
            (
                mount("bind", "/data", "/", &["bind"]),
                shared("c1-0-root", "/data", Sort::Directory, false, false),
            ),
        ] {
            let plan = planned(std::slice::from_ref(&mount)).unwrap();
            let source = plan.sources.get(&0).cloned();
            assert_eq!(plan.shares, expected.clone().into_iter().collect::<Vec<_>>(), "{mount:?}");
            assert_eq!(
                source,
                expected.map(|share| format!("/run/kata-containers/shared/containers/{}", share.name))
            );
        }
    }

    #[test]
    fn shared_memory_is_the_pods_whatever_it_was() {
        for shm in [
            mount("tmpfs", "shm", "/dev/shm", &["size=65536k"]),
            mount("bind", "/run/containerd/x/shm", "/dev/shm/", &["rbind"]),
        ] {
            let plan = planned(&[mount("proc", "proc", "/proc", &[]), shm]).unwrap();
            assert!(plan.shares.is_empty());
            assert_eq!(plan.sources, BTreeMap::from([(1, ports::GUEST_SHM.to_owned())]));
        }
    }

    #[test]
    fn what_cannot_work_in_a_vm_is_refused() {
        for (mount, kind, word) in [
            (mount("bind", "/run/docker.sock", "/s", &["bind"]), "unsupported", "socket"),
            (mount("bind", "/data", "/d", &["rbind", "rshared"]), "unsupported", "rshared"),
            (mount("nfs", "server:/x", "/n", &[]), "unsupported", "nfs"),
            (mount("bind", "/missing", "/m", &["bind"]), "invalid", "/missing"),
        ] {
            let error = planned(std::slice::from_ref(&mount)).unwrap_err();
            let found = if matches!(error, Error::Unsupported(_)) { "unsupported" } else { "invalid" };
            assert_eq!(found, kind, "{error}");
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn names_fit_into_a_directory_entry() {
        assert_eq!(share_name("c", 3, &format!("/{}", "é".repeat(200))).len(), 255 - usize::from(true));
        assert_eq!(share_name("c", 3, "/a/.."), "c-3-root");
    }

    #[test]
    fn the_pods_storages_are_those_the_agents_know() {
        let storages = sandbox_storages(1 << 20);
        assert_eq!((storages[0].driver.as_str(), storages[0].source.as_str()), ("virtio-fs", "kataShared"));
        assert_eq!(storages[1].options, ["noexec", "nosuid", "nodev", "mode=1777", "size=1048576"]);
        assert_eq!(storages[1].mount_point, "/run/kata-containers/sandbox/shm");
    }
}
