//! From the kernel's first program to a guest that can hold containers.
//!
//! The image's tree is the guest's: its programs, hooks and configuration are found where they are in the image. The host
//! waits for the agent to listen, therefore only what listening needs happens before; cgroups and the other modules follow
//! in a thread, and whoever depends on them waits for [`Guest::prepared`]. An agent that is not PID 1 is a guest on somebody
//! else's machine and prepares nothing.

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};

use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags},
    io::Errno,
    mount::{MountFlags, MoveMountFlags, OpenTreeFlags},
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
/// Kernel modules in the image; see `bulkhead_image::initramfs`.
const EARLY: &str = "lib/bulkhead/modules/early";
const LATE: &str = "lib/bulkhead/modules/late";
const ON_DEMAND: &str = "lib/bulkhead/modules/demand";

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

/// The image that the machine was started from: its whole tree, which is the guest's own root as well.
pub(crate) struct Image(OwnedFd);

impl Image {
    /// Reads a file of at most `limit` bytes.
    pub(crate) fn read(&self, path: &str, limit: u64) -> io::Result<Vec<u8>> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = rustix::fs::openat(&self.0, path.trim_start_matches('/'), flags, Mode::empty())?;
        config::read_to_limit(file.into(), limit)
    }

    /// Whether it is an initramfs. What is not needed any more there is memory that is not needed any more; on a disk it
    /// is somebody's file.
    fn is_in_memory(&self) -> io::Result<bool> {
        const RAMFS: u64 = 0x8584_58f6;
        const TMPFS: u64 = 0x0102_1994;
        let kind = rustix::fs::fstatfs(&self.0)?.f_type;
        Ok(u64::try_from(kind).is_ok_and(|kind| [RAMFS, TMPFS].contains(&kind)))
    }
}

/// Makes this PID 1's machine fit to listen: a root that containers can leave, the kernel's file systems, the modules of
/// the host's connection.
pub(crate) fn prepare() -> Result<Image> {
    let image = Image(directory("/").during(|| "open the root".into())?);
    if image.is_in_memory().during(|| "look at the root".into())? {
        cover_initramfs()?;
    }
    mount_file_systems()?;
    rustix::system::sethostname(b"localhost").during(|| "set the hostname".into())?;
    modules::load(&image.0, EARLY);
    Ok(image)
}

/// Does the rest behind the server's back.
pub(crate) fn finish(image: Image, guest: Arc<Guest>) {
    crate::sync::spawn_blocking(move || {
        match mount_cgroups() {
            Ok(()) => drop(guest.cgroups.set(CGROUPS.into())),
            Err(error) => tracing::error!(%error, "containers go without limits"),
        }
        if let Err(error) = raise_descriptor_limits() {
            tracing::warn!(%error, "the limit of open files stays low");
        }
        if let Err(error) = network::loopback_up() {
            tracing::error!(%error, "no loopback interface");
        }
        modules::load(&image.0, LATE);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        if let Ok(directory) = rustix::fs::openat(&image.0, ON_DEMAND, flags, Mode::empty()) {
            drop(guest.on_demand.set(directory));
        }
        if let Err(error) = hotplug::memory_from_now_on(&Places::default()) {
            tracing::warn!(%error, "memory that is plugged waits for a request to be used");
        }
        guest.prepared.send_replace(true);
        tracing::info!(after = ?uptime(), "ready for containers");
        if let Err(error) = free(&image) {
            tracing::warn!(%error, "the memory of the initramfs is not freed");
        }
    });
}

/// Mounts the initramfs a second time, over itself, and makes that the root: nothing can pivot away from the first mount of
/// all, which a container has to. This program stays reachable as `/proc/self/exe`.
fn cover_initramfs() -> Result<()> {
    let step = |what: &'static str| move || format!("mount the initramfs over itself: {what}");
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let root = rustix::mount::open_tree(CWD, "/", flags).during(step("open_tree"))?;
    rustix::process::fchdir(&root).during(step("fchdir"))?;
    rustix::mount::move_mount(&root, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .during(step("move_mount"))?;
    rustix::process::chroot(".").during(step("chroot"))?;
    // The kernel lets everybody write to a root that the archive says nothing of.
    rustix::fs::chmod("/", Mode::from_raw_mode(0o755)).during(step("chmod"))
}

/// Mounts the kernel's file systems, and those for what does not outlive the machine.
fn mount_file_systems() -> Result<()> {
    let plain = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let data_nosuid = MountFlags::NOSUID | MountFlags::NODEV;
    let mounts = [
        ("proc", "/proc", plain, c""),
        ("sysfs", "/sys", plain, c""),
        ("devtmpfs", "/dev", MountFlags::NOSUID, c"mode=0755"),
        ("devpts", "/dev/pts", MountFlags::NOSUID | MountFlags::NOEXEC, c"gid=5,mode=620,ptmxmode=666"),
        ("tmpfs", "/dev/shm", data_nosuid, c"mode=1777"),
        ("tmpfs", "/run", data_nosuid, c"mode=0755"),
        ("tmpfs", "/tmp", data_nosuid, c"mode=1777"),
    ];
    for (kind, target, flags, data) in mounts {
        let what = || format!("mount {kind} on {target}");
        match rustix::fs::mkdir(target, Mode::from_raw_mode(0o755)) {
            // An image that cannot be written to has the directory, or the mount will tell.
            Ok(()) | Err(Errno::EXIST | Errno::ROFS) => {}
            Err(errno) => return Err(errno).during(what),
        }
        match rustix::mount::mount(kind, target, kind, flags, data) {
            // The kernel mounts devtmpfs itself when it mounts a disk.
            Ok(()) | Err(Errno::BUSY) => {}
            Err(errno) => return Err(errno).during(what),
        }
    }
    Ok(())
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

/// Lets containers ask for any number of open files, and the agent have enough: up to three descriptors for each process
/// that was started and not drained.
fn raise_descriptor_limits() -> io::Result<()> {
    // The most that any kernel of 64 bits takes.
    let any = std::fs::write("/proc/sys/fs/nr_open", "2147483584");
    let limit = Rlimit { current: Some(65_536), maximum: Some(1_048_576) };
    rustix::process::setrlimit(Resource::Nofile, limit)?;
    any
}

fn directory(path: &str) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Deletes what only the boot needed: the modules that are loaded, and this program's name. Its memory is its own until it
/// ends.
fn free(image: &Image) -> io::Result<()> {
    if !image.is_in_memory()? {
        return Ok(());
    }
    for path in [EARLY, LATE] {
        match rustix::fs::openat(
            &image.0,
            path,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        ) {
            Err(Errno::NOENT) => {}
            directory => remove_files(&directory?)?,
        }
    }
    match rustix::fs::unlinkat(&image.0, "init", AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Deletes the regular files of a directory.
fn remove_files(directory: &OwnedFd) -> io::Result<()> {
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        if entry.file_type() == FileType::RegularFile {
            rustix::fs::unlinkat(directory, entry.file_name(), AtFlags::empty())?;
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
    fn what_only_the_boot_needed_is_freed_in_memory_and_nothing_on_a_disk() {
        let tree = tempfile::tempdir_in("/dev/shm").unwrap();
        let files = [EARLY, LATE, ON_DEMAND, "etc"].map(|path| tree.path().join(path).join("file"));
        for file in &files {
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, "x").unwrap();
        }
        std::fs::write(tree.path().join("init"), "x").unwrap();
        let image = Image(directory(tree.path().to_str().unwrap()).unwrap());
        assert!(image.is_in_memory().unwrap());
        assert!(!Image(directory("/proc").unwrap()).is_in_memory().unwrap());
        free(&Image(directory("/proc").unwrap())).unwrap();
        for _ in 0..2 {
            free(&image).unwrap();
            assert_eq!(files.each_ref().map(|file| file.exists()), [false, false, true, true]);
            assert!(!tree.path().join("init").exists());
        }
    }

    #[test]
    fn a_file_of_the_image_is_read_by_its_path_there() {
        let image = tempfile::tempdir().unwrap();
        std::fs::create_dir(image.path().join("etc")).unwrap();
        std::fs::write(image.path().join("etc/agent.toml"), "x").unwrap();
        let image = Image(directory(image.path().to_str().unwrap()).unwrap());
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
