//! From the kernel's first program to a guest that can hold containers.
//!
//! An initramfs cannot be pivoted away from, so PID 1 moves to a tmpfs of its own. The host waits for the agent to listen,
//! therefore only what listening needs happens before; cgroups and the other modules follow in a thread, and whoever
//! depends on them waits for [`Guest::prepared`]. An agent that is not PID 1 is a guest on somebody else's machine and
//! prepares nothing.

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};

use rustix::{
    fs::{AtFlags, Dir, FileType, Mode, OFlags},
    mount::MountFlags,
    process::{Resource, Rlimit},
    time::ClockId,
};
use tokio::sync::watch;

use crate::{
    config,
    device::Places,
    error::{During, Result},
    hotplug, modules, network,
    reaper::Reaper,
};

const CGROUPS: &str = "/sys/fs/cgroup";

/// The machine the agent runs in.
pub(crate) struct Guest {
    /// The agent is PID 1, and the machine its own.
    pub(crate) init: bool,
    /// Collects the children.
    pub(crate) reaper: Arc<Reaper>,
    /// The directory of the kernel modules that are loaded on demand; see `modules.rs`.
    pub(crate) on_demand: OnceLock<OwnedFd>,
    cgroups: OnceLock<PathBuf>,
    prepared: watch::Sender<bool>,
}

/// When the agent reached what its host waits for, since the machine's start.
#[derive(Clone, Debug)]
pub(crate) struct Times {
    /// The first instruction of `main`.
    pub(crate) started: Duration,
    /// Requests are taken.
    pub(crate) listening: Arc<OnceLock<Duration>>,
}

/// The time since the machine's start.
pub(crate) fn uptime() -> Duration {
    let time = rustix::time::clock_gettime(ClockId::Boottime);
    Duration::new(time.tv_sec.cast_unsigned(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

impl Guest {
    /// The agent's own machine, which [`finish`] makes ready.
    pub(crate) fn own() -> Guest {
        Guest::new(true)
    }

    fn new(init: bool) -> Guest {
        Guest {
            init,
            reaper: Arc::default(),
            on_demand: OnceLock::new(),
            cgroups: OnceLock::new(),
            prepared: watch::Sender::new(!init),
        }
    }

    /// A machine that is somebody else's.
    pub(crate) fn plain() -> Guest {
        let guest = Guest::new(false);
        // Only a cgroup2 with controllers can hold limits; on a hybrid host there is one without.
        let controllers = std::fs::read_to_string(format!("{CGROUPS}/cgroup.controllers"));
        if controllers.is_ok_and(|controllers| !controllers.trim().is_empty()) {
            guest.cgroups.get_or_init(|| CGROUPS.into());
        }
        guest
    }

    /// The cgroup2 mount for containers, if there is a usable one.
    pub(crate) fn cgroups(&self) -> Option<PathBuf> {
        self.cgroups.get().cloned()
    }

    /// Waits until the machine can hold containers.
    pub(crate) async fn prepared(&self) {
        // The sender is `self`, so there is no error to wait for.
        let _ = self.prepared.subscribe().wait_for(|prepared| *prepared).await;
    }
}

/// The initramfs, out of sight but not freed yet.
pub(crate) struct Initramfs(OwnedFd);

impl Initramfs {
    /// Reads a file of at most `limit` bytes; the path is the one it has in the image.
    pub(crate) fn read(&self, path: &str, limit: u64) -> io::Result<Vec<u8>> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = rustix::fs::openat(&self.0, path.trim_start_matches('/'), flags, Mode::empty())?;
        config::read_to_limit(file.into(), limit)
    }
}

/// Makes this PID 1's machine fit to listen: a root of its own, the kernel's file systems, the modules of the host's
/// connection.
pub(crate) fn prepare() -> Result<Initramfs> {
    let initramfs = Initramfs(directory("/").during(|| "open the initramfs".into())?);
    move_to_tmpfs()?;
    modules::load(&initramfs.0, "lib/bulkhead/modules/early");
    Ok(initramfs)
}

/// Does the rest behind the server's back.
pub(crate) fn finish(initramfs: Initramfs, guest: Arc<Guest>) {
    crate::sync::spawn_blocking(move || {
        match mount_cgroups() {
            Ok(()) => drop(guest.cgroups.set(CGROUPS.into())),
            Err(error) => tracing::error!(%error, "containers go without limits"),
        }
        if let Err(error) = raise_descriptor_limit() {
            tracing::warn!(%error, "the limit of open files stays low");
        }
        if let Err(error) = network::loopback_up() {
            tracing::error!(%error, "no loopback interface");
        }
        modules::load(&initramfs.0, "lib/bulkhead/modules/late");
        let kept = keep_on_demand(&initramfs, &guest);
        if let Err(error) = hotplug::memory_from_now_on(&Places::default()) {
            tracing::warn!(%error, "memory that is plugged waits for a request to be used");
        }
        guest.prepared.send_replace(true);
        tracing::info!(after = ?uptime(), "ready for containers");
        if let Err(error) = remove_below(&initramfs.0, kept) {
            tracing::warn!(%error, "the memory of the initramfs is not freed");
        }
    });
}

/// Leaves the modules that are loaded on demand where they are, within the guest's reach. Returns the directory's identity.
fn keep_on_demand(initramfs: &Initramfs, guest: &Guest) -> Option<Identity> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory =
        rustix::fs::openat(&initramfs.0, "lib/bulkhead/modules/demand", flags, Mode::empty()).ok()?;
    let kept = identity(&directory).ok()?;
    guest.on_demand.set(directory).ok()?;
    Some(kept)
}

/// Mounts the new root with everything in it, then moves it over `/`. This program stays reachable as `/proc/self/exe`.
fn move_to_tmpfs() -> Result<()> {
    const ROOT: &str = "/bulkhead";
    let none = MountFlags::empty();
    let plain = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let data_nosuid = MountFlags::NOSUID | MountFlags::NODEV;
    let mounts = [
        ("tmpfs", "", none, c"mode=0755"),
        ("proc", "/proc", plain, c""),
        ("sysfs", "/sys", plain, c""),
        ("devtmpfs", "/dev", MountFlags::NOSUID, c"mode=0755"),
        ("devpts", "/dev/pts", MountFlags::NOSUID | MountFlags::NOEXEC, c"gid=5,mode=620,ptmxmode=666"),
        ("tmpfs", "/dev/shm", data_nosuid, c"mode=1777"),
        ("tmpfs", "/run", data_nosuid, c"mode=0755"),
        ("tmpfs", "/tmp", data_nosuid, c"mode=1777"),
    ];
    for (kind, path, flags, data) in mounts {
        let target = format!("{ROOT}{path}");
        match rustix::fs::mkdir(&target, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(errno) => return Err(errno).during(|| format!("make the directory {target}")),
        }
        rustix::mount::mount(kind, &target, kind, flags, data)
            .during(|| format!("mount {kind} on {target}"))?;
    }
    let step = |what: &'static str| move || format!("make {ROOT} the root: {what}");
    rustix::process::chdir(ROOT).during(step("chdir"))?;
    rustix::mount::mount_move(".", "/").during(step("move the mount"))?;
    rustix::process::chroot(".").during(step("chroot"))?;
    rustix::process::chdir("/").during(step("chdir to /"))?;
    rustix::system::sethostname(b"localhost").during(|| "set the hostname".into())
}

/// Mounts cgroup2 and hands every controller down.
fn mount_cgroups() -> Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("cgroup2", CGROUPS, "cgroup2", flags, c"nsdelegate")
        .during(|| format!("mount {CGROUPS}"))?;
    let path = format!("{CGROUPS}/cgroup.controllers");
    let controllers = std::fs::read_to_string(&path).during(|| format!("read {path}"))?;
    let all: Vec<String> =
        controllers.split_whitespace().map(|controller| format!("+{controller}")).collect();
    let path = format!("{CGROUPS}/cgroup.subtree_control");
    std::fs::write(&path, all.join(" ")).during(|| format!("enable {controllers:?} in {path}"))
}

/// An agent holds up to three descriptors for each process that was started and not drained.
fn raise_descriptor_limit() -> io::Result<()> {
    let limit = Rlimit { current: Some(65_536), maximum: Some(1_048_576) };
    Ok(rustix::process::setrlimit(Resource::Nofile, limit)?)
}

fn directory(path: &str) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Device and inode.
type Identity = (u64, u64);

fn identity(directory: &OwnedFd) -> io::Result<Identity> {
    let status = rustix::fs::fstat(directory)?;
    Ok((status.st_dev, status.st_ino))
}

/// Deletes all that is in a directory, save for one directory and what leads to it. The program that runs is only unlinked: its memory is its own until it ends.
fn remove_below(parent: &OwnedFd, kept: Option<Identity>) -> io::Result<()> {
    for entry in Dir::read_from(parent)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        if entry.file_type() == FileType::Directory {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let child = rustix::fs::openat(parent, name, flags, Mode::empty())?;
            if kept == Some(identity(&child)?) {
                continue;
            }
            remove_below(&child, kept)?;
            match rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR) {
                // The new root was mounted on it and moved away; nothing else is mounted here. Or it leads to what is kept.
                Ok(()) | Err(rustix::io::Errno::BUSY | rustix::io::Errno::NOTEMPTY) => {}
                Err(errno) => return Err(errno.into()),
            }
        } else {
            rustix::fs::unlinkat(parent, name, AtFlags::empty())?;
        }
    }
    Ok(())
}

/// Writes everything back and switches the machine off.
pub(crate) fn power_off() -> Result<()> {
    rustix::fs::sync();
    rustix::system::reboot(rustix::system::RebootCommand::PowerOff).during(|| "switch the machine off".into())
}

/// Whether this program is the first of its machine.
pub(crate) fn is_init() -> bool {
    std::process::id() == 1 && Path::new("/proc/1").symlink_metadata().is_err()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_removed_and_links_are_not_followed() {
        let keep = tempfile::tempdir().unwrap();
        std::fs::write(keep.path().join("precious"), "x").unwrap();
        let tree = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(tree.path().join("a/b")).unwrap();
        std::fs::write(tree.path().join("a/b/file"), "x").unwrap();
        std::os::unix::fs::symlink(keep.path(), tree.path().join("a/link")).unwrap();
        std::fs::create_dir_all(tree.path().join("c/kept")).unwrap();
        std::fs::write(tree.path().join("c/kept/module"), "x").unwrap();
        let kept = identity(&directory(tree.path().join("c/kept").to_str().unwrap()).unwrap()).unwrap();
        let tree_directory = directory(tree.path().to_str().unwrap()).unwrap();
        remove_below(&tree_directory, Some(kept)).unwrap();
        assert_eq!(std::fs::read_dir(tree.path()).unwrap().count(), 1);
        assert!(tree.path().join("c/kept/module").exists());
        remove_below(&directory(tree.path().to_str().unwrap()).unwrap(), None).unwrap();
        assert_eq!(std::fs::read_dir(tree.path()).unwrap().count(), 0);
        assert!(keep.path().join("precious").exists());
    }

    #[test]
    fn a_file_of_the_image_is_read_by_its_path_there() {
        let image = tempfile::tempdir().unwrap();
        std::fs::create_dir(image.path().join("etc")).unwrap();
        std::fs::write(image.path().join("etc/agent.toml"), "x").unwrap();
        let image = Initramfs(directory(image.path().to_str().unwrap()).unwrap());
        assert_eq!(image.read("/etc/agent.toml", 1).unwrap(), b"x");
        assert!(image.read("/etc/agent.toml", 0).is_err(), "too large");
        assert!(
            image.read("/etc", 9).is_err() && image.read("", 9).is_err() && image.read("/no\0", 9).is_err()
        );
    }

    #[tokio::test]
    async fn a_plain_machine_is_prepared_at_once() {
        let guest = Guest::plain();
        guest.prepared().await;
        assert!(!guest.init);
    }
}
