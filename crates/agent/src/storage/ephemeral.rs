//! `ephemeral`: memory that lives as long as the pod, such as its `/dev/shm` or an emptyDir of medium Memory or HugePages.

use bulkhead_protocol::agent::Storage;
use rustix::{
    io::Errno,
    mount::{FsPickFlags, MountFlags},
};

use super::{
    Job, Mounted,
    hugepages::Need,
    mount::{Options, Target, give_to_group, mount as mount_on, source},
};
use crate::error::{During, Error, Result};

/// Mounts a tmpfs or a hugetlbfs with all of its options; `fsgid=<gid>` hands its root to a group.
pub(super) fn mount(job: &Job, mounted: &mut Mounted) -> Result<()> {
    let storage = &job.storage;
    let mut options = Options::parse(&storage.options)?;
    let group = options.take_group()?;
    options.data.retain(|option| option != "remount");
    let kind = match storage.fstype.as_str() {
        "tmpfs" | "" => "tmpfs",
        "hugetlbfs" => {
            let need = Need::parse(options.take("pagesize"), options.take("size"))?;
            if !job.guest.init {
                return Err(Error::State(
                    "the huge pages are not the agent's to reserve: it is not the init of a guest".into(),
                ));
            }
            mounted.did(need.reserve()?);
            options.data.extend([format!("pagesize={}", need.page), format!("size={}", need.size)]);
            "hugetlbfs"
        }
        other => return Err(Error::Unsupported(format!("ephemeral storage of type {other:?}"))),
    };
    mounted.keep = true;
    let target = Target::directory(&storage.mount_point, mounted)?;
    let name = if storage.source.is_empty() { kind } else { &storage.source };
    mount_on(name, &target, kind, &options, mounted)?;
    group.map_or(Ok(()), |group| give_to_group(target.path(), group))
}

/// Gives a mounted tmpfs other options, its size above all. What the request does not name stays as it is. Blocks.
pub(super) fn update(present: &Storage, wanted: &Storage) -> Result<()> {
    let what = || format!("update the ephemeral storage on {}", wanted.mount_point);
    let mut options = Options::parse(&wanted.options)?;
    let group = options.take_group()?;
    options.data.retain(|option| option != "remount");
    if present.fstype == "hugetlbfs" && !options.data.is_empty() {
        return Err(Error::Unsupported(format!(
            "other options for the hugetlbfs on {}: the kernel takes them at its mount only",
            wanted.mount_point
        )));
    }
    let (target, _) = source(&wanted.mount_point)?;
    if !options.data.is_empty() {
        reconfigure(&target, &options.data, what)?;
    }
    if !options.flags.is_empty() {
        // The flags are all set anew, so those that are to stay are named.
        let now = rustix::fs::statvfs(target.fixed_path()).during(what)?.f_flag;
        let kept = MountFlags::from_bits_truncate(u32::try_from(now.bits()).unwrap_or(0)) & KEPT;
        rustix::mount::mount_remount(target.fixed_path(), kept | options.flags | MountFlags::BIND, c"")
            .during(what)?;
    }
    group.map_or(Ok(()), |group| give_to_group(target.path(), group))
}

/// Flags that statvfs(2) and mount(2) have in common, by the same bits.
const KEPT: MountFlags = MountFlags::RDONLY
    .union(MountFlags::NOSUID)
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC)
    .union(MountFlags::NOATIME)
    .union(MountFlags::NODIRATIME);

/// Not a remount, which would set the mount's flags anew as well.
fn reconfigure(target: &Target, options: &[String], what: impl Fn() -> String + Copy) -> Result<()> {
    let tmpfs = rustix::mount::fspick(rustix::fs::CWD, target.fixed_path(), FsPickFlags::FSPICK_CLOEXEC)
        .during(what)?;
    for option in options {
        let set = match option.split_once('=') {
            Some((key, value)) => rustix::mount::fsconfig_set_string(&tmpfs, key, value),
            None => rustix::mount::fsconfig_set_flag(&tmpfs, option),
        };
        match set {
            Err(Errno::INVAL) => {
                return Err(Error::Invalid(format!("{}: tmpfs does not take {option:?}", what())));
            }
            set => set.during(what)?,
        }
    }
    match rustix::mount::fsconfig_reconfigure(&tmpfs) {
        Err(Errno::INVAL) => Err(Error::State(format!(
            "{}: it does not take {:?} now; is that less than what it holds?",
            what(),
            options.join(",")
        ))),
        done => done.during(what),
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use super::*;
    use crate::{
        boot::Guest,
        device::Devices,
        storage::{
            Storages,
            apart::apart,
            disks::{alone, mounts_below},
        },
    };

    fn storage(mount_point: &str, options: &[&str]) -> Storage {
        Storage {
            driver: "ephemeral".into(),
            source: "shm".into(),
            fstype: "tmpfs".into(),
            mount_point: mount_point.into(),
            options: options.iter().map(|option| (*option).into()).collect(),
            ..Default::default()
        }
    }

    fn bytes(path: &str) -> u64 {
        let figures = rustix::fs::statvfs(path).unwrap();
        figures.f_blocks * figures.f_frsize
    }

    fn mount_line(path: &str) -> String {
        let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        mounts.lines().find(|line| line.contains(path)).unwrap().to_owned()
    }

    #[test]
    fn every_option_is_honoured_and_an_update_changes_the_size_and_nothing_else() {
        apart(async |storages, path| {
            let path = format!("{path}/memory");
            let options =
                ["noexec,nosuid", "nodev", "mode=1711", "size=1048576", "nr_inodes=100", "fsgid=77"];
            storages.add_all(vec![storage(&path, &options)], Some("c")).await.unwrap();
            assert_eq!(bytes(&path), 1 << 20);
            for word in ["noexec", "nosuid", "nodev", "nr_inodes=100", "mode=3711", "gid=77"] {
                // The options that the mount was made with are told until the root's inode says otherwise.
                let status = rustix::fs::stat(&path).unwrap();
                let told =
                    format!("{} mode={:o} gid={}", mount_line(&path), status.st_mode & 0o7777, status.st_gid);
                assert!(told.contains(word), "{word}: {told}");
            }
            std::fs::write(format!("{path}/data"), vec![7; 900_000]).unwrap();
            assert!(std::fs::write(format!("{path}/more"), vec![7; 900_000]).is_err());
            for options in [&["size=4194304"][..], &["remount", "size=4194304"]] {
                storages.update_ephemeral(vec![storage(&path, options)]).await.unwrap();
                assert_eq!(bytes(&path), 4 << 20);
                let line = mount_line(&path);
                for word in ["noexec", "nosuid", "nodev", "nr_inodes=100"] {
                    assert!(line.contains(word), "{line}");
                }
            }
            std::fs::write(format!("{path}/more"), vec![7; 900_000]).unwrap();
            let smaller = storages.update_ephemeral(vec![storage(&path, &["size=4096"])]).await;
            assert!(matches!(smaller.unwrap_err(), Error::State(_)));
            storages.update_ephemeral(vec![storage(&path, &["ro"])]).await.unwrap();
            let line = mount_line(&path);
            assert!(line.contains(" ro,") && line.contains("noexec"), "{line}");
            storages.clear().await;
            assert!(!std::fs::exists(&path).unwrap(), "neither mount nor mount point is left");
        });
    }

    #[test]
    fn only_what_is_mounted_and_ephemeral_is_updated() {
        apart(async |storages, path| {
            let path = format!("{path}/memory");
            let update = |storage: Storage| storages.update_ephemeral(vec![storage]);
            let error = update(storage(&path, &["size=1m"])).await.unwrap_err();
            assert!(matches!(error, Error::State(_)), "{error:?}");
            let other = Storage { driver: "local".into(), ..storage(&path, &[]) };
            assert!(matches!(update(other.clone()).await.unwrap_err(), Error::Invalid(_)));
            storages.add_all(vec![other], Some("c")).await.unwrap();
            assert!(matches!(update(storage(&path, &["size=1m"])).await.unwrap_err(), Error::State(_)));
            storages.clear().await;
            storages.add_all(vec![storage(&path, &[])], Some("c")).await.unwrap();
            assert!(matches!(update(storage(&path, &["colour=red"])).await.unwrap_err(), Error::Invalid(_)));
            assert!(matches!(update(storage("/../x", &[])).await.unwrap_err(), Error::Invalid(_)));
            storages.clear().await;
        });
    }

    #[test]
    fn huge_pages_of_a_request_that_fails_go_back_to_the_pool() {
        const POOLS: &str = "/sys/kernel/mm/hugepages";
        if !std::fs::exists(format!("{POOLS}/hugepages-2048kB")).unwrap() {
            return eprintln!("skipped: the kernel has no huge pages of 2 MiB");
        }
        alone(|| {
            // A pool of the test's own.
            rustix::mount::mount("tmpfs", POOLS, "tmpfs", MountFlags::empty(), c"").unwrap();
            let pool = format!("{POOLS}/hugepages-2048kB/nr_hugepages");
            std::fs::create_dir(format!("{POOLS}/hugepages-2048kB")).unwrap();
            std::fs::write(&pool, "5").unwrap();
            let huge = |name: &str, pages: u64| Storage {
                fstype: "hugetlbfs".into(),
                source: "nodev".into(),
                ..storage(
                    &format!("/run/kata-containers/sandbox/ephemeral/{name}"),
                    &[&format!("pagesize=2097152,size={}", pages << 21)],
                )
            };
            let bad = storage("relative", &[]);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            runtime.block_on(async {
                let devices = Arc::new(Devices::new(Duration::ZERO, false));
                let storages = Storages::new(Arc::new(Guest::own()), devices);
                let pages = || std::fs::read_to_string(&pool).unwrap();
                let first = huge("first", 3);
                storages.add_all(vec![first.clone()], Some("c1")).await.unwrap();
                assert_eq!(pages(), "8");
                for _ in 0..2 {
                    let request = vec![first.clone(), huge("second", 2), bad.clone()];
                    assert!(storages.add_all(request, Some("c2")).await.is_err());
                    assert_eq!(pages(), "8");
                    assert_eq!(mounts_below("/run"), [first.mount_point.as_str()]);
                }
                storages.clear().await;
                assert_eq!(pages(), "5");
            });
        });
    }

    #[test]
    fn huge_pages_are_left_alone_by_a_plain_agent() {
        apart(async |storages, path| {
            let path = format!("{path}/memory");
            let huge = Storage {
                fstype: "hugetlbfs".into(),
                source: "nodev".into(),
                ..storage(&path, &["pagesize=2097152,size=4194304"])
            };
            let error = storages.add_all(vec![huge], Some("c")).await.unwrap_err();
            assert!(matches!(error, Error::State(_)), "{error:?}");
        });
    }
}
