//! Volumes that are mounted: how full they are, how to make them larger, and a look at the share's that frees what the host
//! keeps for it.

use std::{
    collections::HashSet,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use bulkhead_protocol::{
    csi::{VolumeCondition, VolumeStatsResponse, VolumeUsage, volume_usage::Unit},
    ports::{GUEST_SHARE, GUEST_STATE},
};
use rustix::{
    fs::{AtFlags, OFlags, StatxFlags},
    io::Errno,
};

use crate::{
    error::{During, Error, Result},
    sync::{blocking, lock},
    sys, tree,
};

/// How long a mount of the share has to answer.
const ANSWER: Duration = Duration::from_secs(2);
/// With so many mounts that do not answer, no more are asked.
const SILENT: usize = 4;

/// Opens a volume by the path a request gives. Blocks.
fn open(path: &str, flags: OFlags) -> Result<OwnedFd> {
    let plain = Path::new(path)
        .components()
        .all(|part| matches!(part, std::path::Component::RootDir | std::path::Component::Normal(_)));
    if !path.starts_with('/') || !plain || path.contains('\0') || path.len() > 4095 {
        return Err(Error::Invalid(format!(
            "a volume has an absolute path without \"..\", which {path:?} is not"
        )));
    }
    tree::open(Path::new(path), flags).map_err(|errno| match errno {
        Errno::NOENT | Errno::NOTDIR => Error::NotFound(format!("there is no volume {path:?}")),
        Errno::LOOP => Error::Invalid(format!("the path of the volume {path:?} has a symbolic link on it")),
        errno => Error::Io { what: format!("open the volume {path:?}"), source: errno.into() },
    })
}

/// How full the file system at a path is, in bytes and in files. Blocks.
pub(crate) fn stats(path: &str) -> Result<VolumeStatsResponse> {
    let volume = open(path, OFlags::PATH)?;
    let figures = rustix::fs::fstatvfs(&volume).during(|| format!("measure the volume {path:?}"))?;
    let usage = |unit: Unit, size: u64, total: u64, free: u64, available: u64| VolumeUsage {
        unit: unit.into(),
        total: total.saturating_mul(size),
        used: total.saturating_sub(free).saturating_mul(size),
        // What a user can have, without what is kept back for root.
        available: available.saturating_mul(size),
        ..Default::default()
    };
    Ok(VolumeStatsResponse {
        usage: vec![
            usage(Unit::BYTES, figures.f_frsize, figures.f_blocks, figures.f_bfree, figures.f_bavail),
            usage(Unit::INODES, 1, figures.f_files, figures.f_ffree, figures.f_favail),
        ],
        volume_condition: Some(VolumeCondition { message: "OK".into(), ..Default::default() }).into(),
        ..Default::default()
    })
}

/// Whether a path is where the agent itself mounts.
pub(crate) fn is_the_agents(path: &str) -> bool {
    path.strip_prefix(GUEST_STATE).is_some_and(|below| below.starts_with('/'))
}

/// What a file system is grown by.
#[derive(Debug, PartialEq)]
enum Growth {
    Ext4,
    Xfs,
}

impl Growth {
    fn of(magic: u64, path: &str) -> Result<Growth> {
        match magic {
            0xef53 => Ok(Growth::Ext4),
            0x5846_5342 => Ok(Growth::Xfs),
            magic => Err(Error::Unsupported(format!(
                "resizing the volume {path:?}: it is {}, and only ext4 and xfs grow while they are mounted",
                name(magic)
            ))),
        }
    }
}

/// A file system by its number, as far as a guest may meet it.
fn name(magic: u64) -> String {
    match magic {
        0x0102_1994 => "tmpfs".into(),
        0x6573_5546 => "virtio-fs".into(),
        0x0102_1997 => "9p".into(),
        0x794c_7630 => "overlayfs".into(),
        0x9123_683e => "btrfs".into(),
        0x9584_58f6 => "hugetlbfs".into(),
        0xe0f5_e1e2 => "erofs".into(),
        magic => format!("a file system of type {magic:#x}"),
    }
}

/// How many blocks a file system of so many bytes has. Never fewer than it has now, never more than its disk holds; of 0
/// bytes, as many as the disk holds.
fn blocks(path: &str, wanted: u64, now: u64, disk: u64, block: u64) -> Result<u64> {
    if wanted > disk {
        return Err(Error::State(format!(
            "resize the volume {path:?} to {wanted} bytes: its disk has {disk}, and must be made larger first"
        )));
    }
    let wanted = if wanted == 0 { disk } else { wanted };
    if wanted < now {
        return Err(Error::Invalid(format!(
            "resize the volume {path:?} to {wanted} bytes: it has {now}, and does not shrink"
        )));
    }
    wanted.checked_div(block).ok_or_else(|| Error::State(format!("the volume {path:?} has no blocks")))
}

/// Grows the file system at a path to `size` bytes, or to all of its disk if that is 0. Blocks.
pub(crate) fn resize(path: &str, size: u64) -> Result<()> {
    let volume = open(path, OFlags::RDONLY | OFlags::DIRECTORY)?;
    let what = || format!("resize the volume {path:?} to {size} bytes");
    let figures = rustix::fs::fstatfs(&volume).during(what)?;
    let magic = u64::try_from(figures.f_type).unwrap_or(0);
    let growth = Growth::of(magic, path)?;
    let disk = disk_size(&volume).during(what)?;
    let block = u64::try_from(figures.f_bsize).unwrap_or(0);
    let grown = match growth {
        Growth::Ext4 => {
            // The figure leaves out what the file system needs for itself, so the kernel has the last word.
            let blocks = blocks(path, size, figures.f_blocks.saturating_mul(block), disk, block)?;
            sys::ext4_resize(volume.as_fd(), blocks)
        }
        Growth::Xfs => {
            let geometry = sys::xfs_geometry(volume.as_fd()).during(what)?;
            let block = u64::from(geometry.block_size);
            let blocks = blocks(path, size, geometry.blocks.saturating_mul(block), disk, block)?;
            sys::xfs_grow(volume.as_fd(), blocks, geometry.inode_percent)
        }
    };
    match grown {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            Err(Error::Invalid(format!("{}: it has that size or more already, and does not shrink", what())))
        }
        grown => grown.during(what),
    }
}

/// Bytes of the disk that a file system is on.
fn disk_size(volume: &OwnedFd) -> std::io::Result<u64> {
    let device = rustix::fs::fstat(volume)?.st_dev;
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let sectors = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/size"))?;
    let sectors: u64 = sectors.trim().parse().map_err(std::io::Error::other)?;
    Ok(sectors.saturating_mul(512))
}

/// Asks each mount of the share for its status, which has the host's file server drop what is gone. One that hangs is left
/// to itself, and not asked again as long as it hangs.
#[derive(Clone, Default)]
pub(crate) struct Sweep {
    asked: Arc<Mutex<HashSet<PathBuf>>>,
}

impl Sweep {
    /// Looks at every mount of the share.
    pub(crate) async fn run(&self) -> Result<()> {
        let mounts =
            std::fs::read_to_string("/proc/self/mountinfo").during(|| "read /proc/self/mountinfo".into())?;
        self.ask(mount_points_below(&mounts, Path::new(GUEST_SHARE)), |path| {
            rustix::fs::statx(
                rustix::fs::CWD,
                path,
                AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_FORCE_SYNC,
                StatxFlags::BASIC_STATS,
            )
            .map(drop)
            .map_err(Into::into)
        })
        .await;
        Ok(())
    }

    async fn ask(&self, paths: Vec<PathBuf>, look: fn(&Path) -> std::io::Result<()>) {
        for path in paths {
            {
                let mut asked = lock(&self.asked);
                if asked.len() >= SILENT {
                    tracing::warn!(silent = asked.len(), "the share does not answer");
                    return;
                }
                if !asked.insert(path.clone()) {
                    continue;
                }
            }
            let (asked, name) = (Arc::clone(&self.asked), path.clone());
            let looking = blocking(move || {
                let looked = look(&path).during(|| format!("look at {}", path.display()));
                lock(&asked).remove(&path);
                looked
            });
            match tokio::time::timeout(ANSWER, looking).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::info!(%error, "a stale mount"),
                Err(_) => tracing::warn!(path = %name.display(), "a mount does not answer"),
            }
        }
    }
}

/// The mount points at and below a directory, from the kernel's list of mounts, each once.
fn mount_points_below(mounts: &str, directory: &Path) -> Vec<PathBuf> {
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape);
    let mut below: Vec<PathBuf> = points.filter(|point| point.starts_with(directory)).collect();
    below.sort_unstable();
    below.dedup();
    below
}

/// Undoes the kernel's `\040` for blanks and the like.
fn unescape(text: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let octal = |digits: &[u8]| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok();
        match (first, after.get(..3).and_then(octal)) {
            (b'\\', Some(byte)) => {
                bytes.push(byte);
                rest = after.get(3..).unwrap_or_default();
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    std::ffi::OsString::from_vec(bytes).into()
}

#[cfg(any(test, fuzzing))]
/// A list of mounts of anybody.
pub(crate) fn fuzz(text: &str) {
    let directory = Path::new("/run");
    assert!(mount_points_below(text, directory).iter().all(|point| point.starts_with(directory)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_those_of_the_file_system_and_leave_out_the_reserve() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_str().unwrap();
        let real = rustix::fs::statvfs(path).unwrap();
        let stats = stats(path).unwrap();
        let [bytes, inodes] = &stats.usage[..] else { panic!("two figures: {stats:?}") };
        assert_eq!((bytes.unit.unwrap(), inodes.unit.unwrap()), (Unit::BYTES, Unit::INODES));
        assert_eq!(bytes.total, real.f_blocks * real.f_frsize);
        assert!(bytes.available <= bytes.total - bytes.used);
        assert_eq!(inodes.total, real.f_files);
        assert!(!stats.volume_condition.abnormal && stats.volume_condition.message == "OK");
    }

    #[test]
    fn a_path_that_is_none_is_refused_and_a_missing_one_is_not_found() {
        for path in ["", "relative", "/a/../b", "/nul\0", &format!("/{}", "x".repeat(5000))] {
            assert!(matches!(stats(path).unwrap_err(), Error::Invalid(_)), "{path:.20?}");
            assert!(matches!(resize(path, 1).unwrap_err(), Error::Invalid(_)), "{path:.20?}");
        }
        for result in [stats("/no/such/volume").map(drop), resize("/no/such/volume", 1)] {
            assert!(matches!(result.unwrap_err(), Error::NotFound(_)));
        }
        let directory = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/", directory.path().join("link")).unwrap();
        let link = directory.path().join("link/tmp");
        assert!(matches!(stats(link.to_str().unwrap()).unwrap_err(), Error::Invalid(_)));
    }

    #[test]
    fn what_cannot_grow_is_named() {
        for (magic, name) in [(0x0102_1994, "tmpfs"), (0x6573_5546, "virtio-fs"), (0x1234, "0x1234")] {
            let error = Growth::of(magic, "/v").unwrap_err();
            assert!(matches!(error, Error::Unsupported(_)) && error.to_string().contains(name), "{error}");
        }
        assert_eq!(Growth::of(0xef53, "/v").unwrap(), Growth::Ext4);
        assert!(matches!(resize("/proc", 1).unwrap_err(), Error::Unsupported(_)));
    }

    #[test]
    fn a_size_lies_between_what_is_and_what_the_disk_holds() {
        let blocks = |wanted| blocks("/v", wanted, 4096 * 10, 4096 * 100 + 512, 4096);
        assert_eq!(blocks(0).unwrap(), 100);
        assert_eq!(blocks(4096 * 10).unwrap(), 10);
        assert_eq!(blocks(4096 * 50 + 1).unwrap(), 50);
        assert!(matches!(blocks(4096 * 10 - 1).unwrap_err(), Error::Invalid(_)));
        assert!(matches!(blocks(4096 * 101).unwrap_err(), Error::State(_)));
        assert!(matches!(super::blocks("/v", 1, 0, 1, 0).unwrap_err(), Error::State(_)));
    }

    #[test]
    fn mounts_are_found_below_the_share_only() {
        let mounts = "\
1 0 0:1 / / rw - tmpfs tmpfs rw
2 1 0:2 / /share rw - virtiofs kataShared rw
3 2 0:3 / /share/a\\040b\\134c rw - tmpfs t rw
4 1 0:4 / /shared rw - tmpfs t rw
5 2 0:5 / /share/a\\040b\\134c rw - tmpfs t rw
nonsense
";
        let found = mount_points_below(mounts, Path::new("/share"));
        assert_eq!(found, [Path::new("/share"), Path::new("/share/a b\\c")]);
        assert_eq!(unescape("\\04"), Path::new("\\04"));
    }

    #[tokio::test]
    async fn mounts_that_hang_do_not_keep_the_sweep_and_are_not_asked_again() {
        static ASKED: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        static RELEASED: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
        fn hang(path: &Path) -> std::io::Result<()> {
            if path.starts_with("/hangs") {
                ASKED.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                while !RELEASED.load(std::sync::atomic::Ordering::Relaxed) {
                    std::thread::park_timeout(Duration::from_millis(1));
                }
            }
            Ok(())
        }
        let sweep = Sweep::default();
        let paths = |hanging: usize| {
            (0..hanging).map(|n| format!("/hangs/{n}").into()).chain(["/fine".into()]).collect::<Vec<_>>()
        };
        sweep.ask(paths(2), hang).await;
        sweep.ask(paths(2), hang).await;
        assert_eq!(ASKED.load(std::sync::atomic::Ordering::Relaxed), 2);
        sweep.ask(paths(100), hang).await;
        assert_eq!(ASKED.load(std::sync::atomic::Ordering::Relaxed), SILENT);
        RELEASED.store(true, std::sync::atomic::Ordering::Relaxed);
    }
}
