//! `blk`, `mmioblk`, `scsi`: a file system on a disk.
//!
//! The driver option `create_filesystem` has it made first, each time the disk is mounted: the host asks for that on disks
//! whose content it does not want. One that carries a file system is formatted as well, and that is logged.
//!
//! With the fstype or an option `bind` it is the disk itself that a container wants: its node is bound to a file.

use std::{fs::File, os::unix::fs::FileExt, path::Path, process::Command, time::Duration};

use bulkhead_protocol::{agent::Storage, oci::Spec};
use rustix::{fs::FileType, mount::MountFlags};

use super::{
    Job, Mounted,
    mount::{Options, Target, bind, mount as mount_on, source},
};
use crate::{
    boot::Guest,
    device::allow_disk,
    error::{During, Error, Result},
    program,
};

const CREATE_FILESYSTEM: &str = "create_filesystem";
const ENCRYPTION_KEY: &str = "encryption_key";
/// Large disks take their time.
const MKFS_LIMIT: Duration = Duration::from_secs(300);

/// Mounts the file system of the job's disk, or binds the disk.
pub(super) fn mount(job: &Job, mounted: &mut Mounted) -> Result<()> {
    let storage = &job.storage;
    let node = job.node.as_deref();
    let node =
        node.ok_or_else(|| Error::Invalid(format!("the storage {:?} has no device", storage.source)))?;
    let options = Options::parse(&storage.options)?;
    if let Some(option) = options.data.iter().find(|option| option.starts_with("X-kata.")) {
        // Above all a disk that is to be verified is not mounted as it is.
        return Err(Error::Unsupported(format!(
            "the option {option:?} of a {} storage on its own",
            storage.driver
        )));
    }
    let bound = is_bound(storage);
    let target = if bound { Target::file } else { Target::directory };
    let target = target(&storage.mount_point, mounted)?;
    if target.is_mount_point()? {
        return Err(Error::State(format!(
            "something else is mounted on {} already",
            target.path().display()
        )));
    }
    if bound {
        bind_disk(storage, node, &target, &options, mounted)
    } else {
        mount_disk(&job.guest, storage, node, &target, &options, mounted)
    }
}

/// Whether a storage is to be bound, and may be a disk for which a container needs leave.
pub(crate) fn is_bound(storage: &Storage) -> bool {
    let mut options = storage.options.iter().flat_map(|list| list.split(','));
    storage.fstype == "bind" || options.any(|option| matches!(option.trim(), "bind" | "rbind"))
}

/// Lets a container use the disks among its bound storages. A mount that is read-only does not keep anybody from writing to
/// a device, so that is said here. Blocks.
pub(crate) fn allow_bound(storages: &[Storage], spec: &mut Spec) -> Result<()> {
    for storage in storages {
        let status =
            rustix::fs::lstat(&storage.mount_point).during(|| format!("look at {}", storage.mount_point))?;
        if FileType::from_raw_mode(status.st_mode).is_block_device() {
            let read_only = Options::parse(&storage.options)?.flags.contains(MountFlags::RDONLY);
            let (major, minor) = (rustix::fs::major(status.st_rdev), rustix::fs::minor(status.st_rdev));
            allow_disk(spec, major, minor, if read_only { "rm" } else { "rwm" });
        }
    }
    Ok(())
}

/// Binds the node of a disk.
fn bind_disk(
    storage: &Storage,
    node: &Path,
    target: &Target,
    options: &Options,
    mounted: &mut Mounted,
) -> Result<()> {
    if wants_filesystem(storage)? {
        return Err(Error::Invalid(format!(
            "{CREATE_FILESYSTEM} on {:?}, which is to be bound as it is",
            storage.source
        )));
    }
    let (node, _) = source(&node.to_string_lossy())?;
    bind(&node, target, options, mounted)
}

/// Mounts a disk, on which a file system is made first if the storage says so.
pub(super) fn mount_disk(
    guest: &Guest,
    storage: &Storage,
    node: &Path,
    target: &Target,
    options: &Options,
    mounted: &mut Mounted,
) -> Result<()> {
    let disk = node.to_str().ok_or_else(|| Error::Invalid(format!("{} is not UTF-8", node.display())))?;
    let fstype = &storage.fstype;
    if fstype.is_empty() {
        return Err(Error::Invalid(format!("the storage {:?} does not say its fstype", storage.source)));
    }
    if wants_filesystem(storage)? {
        make_filesystem(guest, node)?;
    }
    guest.load_filesystem(fstype)?;
    mount_on(disk, target, fstype, options, mounted)
}

/// Whether the driver options ask for a new file system.
pub(super) fn wants_filesystem(storage: &Storage) -> Result<bool> {
    let mut wanted = false;
    for option in &storage.driver_options {
        let (key, value) = option.split_once('=').unwrap_or((option, "true"));
        match (key, value) {
            (CREATE_FILESYSTEM, "true") if storage.fstype == "ext4" => wanted = true,
            (CREATE_FILESYSTEM, "true") => {
                return Err(Error::Invalid(format!(
                    "{CREATE_FILESYSTEM} makes ext4, and the fstype of {:?} is {:?}",
                    storage.source, storage.fstype
                )));
            }
            (CREATE_FILESYSTEM, "false") => {}
            // Without its encryption the volume must not be mounted at all. The value is nobody's to read.
            (ENCRYPTION_KEY, _) => {
                return Err(Error::Unsupported(format!(
                    "encrypted volumes ({ENCRYPTION_KEY} on {:?})",
                    storage.source
                )));
            }
            _ => {
                return Err(Error::Unsupported(format!(
                    "the driver option {key:?}, or its value, of a {} storage",
                    storage.driver
                )));
            }
        }
    }
    Ok(wanted)
}

/// No journal and few inodes: what is made here does not outlive the pod.
fn make_filesystem(guest: &Guest, node: &Path) -> Result<()> {
    let program = ["/sbin", "/usr/sbin", "/bin", "/usr/bin"]
        .iter()
        .map(|directory| Path::new(directory).join("mkfs.ext4"))
        .find(|program| program.exists())
        .ok_or_else(|| {
            Error::State(format!(
                "{CREATE_FILESYSTEM} on {}: the guest has no mkfs.ext4; use a guest image that has it, or format the disk on the host",
                node.display()
            ))
        })?;
    if carries_ext4(node)? {
        tracing::warn!(device = %node.display(), "a disk that carries a file system is formatted, as the host wants it");
    }
    let mut command = Command::new(program);
    command.args(["-F", "-q", "-O", "^has_journal", "-m", "0", "-i", "163840", "-I", "128"]).arg(node);
    let output = program::run(&guest.reaper, command, &[], MKFS_LIMIT)?;
    match output.code {
        0 => Ok(()),
        code => Err(std::io::Error::other(format!("mkfs.ext4 ended with {code}: {}", output.words())))
            .during(|| format!("make a file system on {}", node.display())),
    }
}

/// The magic number of the superblock, which starts at 1024.
fn carries_ext4(node: &Path) -> Result<bool> {
    let mut magic = [0; 2];
    File::open(node)
        .and_then(|disk| disk.read_exact_at(&mut magic, 1024 + 0x38))
        .during(|| format!("read {}", node.display()))?;
    Ok(magic == [0x53, 0xef])
}

#[cfg(test)]
mod tests {
    use super::super::disks::{Disk, alone, job, mounts_below, nothing_in, run, writable};
    use super::*;

    const POINT: &str = "/run/kata-containers/sandbox/storage/x";

    fn storage(options: &[&str], driver_options: &[&str]) -> Storage {
        let strings = |list: &[&str]| list.iter().map(|option| (*option).to_owned()).collect();
        Storage {
            driver: "blk".into(),
            source: "02".into(),
            fstype: "ext4".into(),
            mount_point: POINT.into(),
            options: strings(options),
            driver_options: strings(driver_options),
            ..Default::default()
        }
    }

    #[test]
    fn a_disk_is_mounted_as_its_options_say_and_goes_without_a_trace() {
        let Some(disk) = Disk::ext4("hello") else { return };
        alone(|| {
            for (options, can_write) in
                [(&["ro"][..], false), (&["rw,noatime", "errors=continue"], true), (&[], true)]
            {
                let mounted = run(mount, &job(storage(options, &[]), Some(&disk.node))).unwrap();
                assert_eq!(std::fs::read_to_string(format!("{POINT}/hello")).unwrap(), "hello");
                assert_eq!(writable(POINT), can_write, "{options:?}");
                mounted.undo(POINT);
                assert!(mounts_below("/run").is_empty());
                assert!(nothing_in("/run/kata-containers/sandbox/storage"));
            }
        });
    }

    #[test]
    fn a_failure_leaves_nothing_and_says_what_failed_on_what() {
        let Some(disk) = Disk::blank() else { return };
        alone(|| {
            let no_type = Storage { fstype: String::new(), ..storage(&[], &[]) };
            let cases = [
                (storage(&[], &[]), disk.node.to_str().unwrap()),
                (storage(&["surely-no-option"], &[]), "ext4"),
                (no_type, "fstype"),
                (storage(&["X-kata.dmverity-enabled=true"], &[]), "dmverity-enabled"),
                (storage(&[], &["encryption_key=ephemeral", "create_filesystem"]), "encrypted volumes"),
                (storage(&[], &["surely-no-option"]), "surely-no-option"),
            ];
            for (storage, expected) in cases {
                let error = run(mount, &job(storage, Some(&disk.node))).err().unwrap().to_string();
                assert!(error.contains(expected), "{expected}: {error}");
                assert!(mounts_below("/run").is_empty());
                assert!(nothing_in("/run/kata-containers/sandbox/storage"));
            }
        });
    }

    #[test]
    fn a_bound_disk_is_a_file_that_is_the_disk() {
        use std::os::unix::fs::{FileTypeExt, MetadataExt};
        let Some(disk) = Disk::ext4("hello") else { return };
        alone(|| {
            let bound =
                |fstype: &str, options: &[&str]| Storage { fstype: fstype.into(), ..storage(options, &[]) };
            // As the hosts send it: the type and the options of the container's own mount.
            for (fstype, options, read_only) in [
                ("bind", &["bind"][..], false),
                ("bind", &["rbind", "rprivate", "rw"], false),
                ("bind", &["ro"], true),
                ("", &["rbind,ro", "nosuid"], true),
            ] {
                let mounted = run(mount, &job(bound(fstype, options), Some(&disk.node))).unwrap();
                let there = std::fs::metadata(POINT).unwrap();
                assert!(there.file_type().is_block_device(), "{fstype:?} {options:?}");
                assert_eq!(there.rdev(), std::fs::metadata(&disk.node).unwrap().rdev());
                assert!(carries_ext4(Path::new(POINT)).unwrap());
                let mut spec = Spec::new();
                allow_bound(&[bound(fstype, options)], &mut spec).unwrap();
                let rule = &spec.Linux.Resources.Devices[0];
                assert_eq!(rule.Access, if read_only { "rm" } else { "rwm" });
                let device = (rule.Major.cast_unsigned(), rule.Minor.cast_unsigned());
                let (major, minor) = (rustix::fs::major(there.rdev()), rustix::fs::minor(there.rdev()));
                assert_eq!(
                    (rule.Allow, rule.Type.as_str(), device),
                    (true, "b", (major.into(), minor.into()))
                );
                let flags = rustix::fs::statvfs(POINT).unwrap().f_flag;
                assert_eq!(flags.contains(rustix::fs::StatVfsMountFlags::RDONLY), read_only, "{options:?}");
                mounted.undo(POINT);
                assert!(mounts_below("/run").is_empty());
                assert!(nothing_in("/run/kata-containers/sandbox/storage"));
            }
            let formatted =
                Storage { driver_options: vec!["create_filesystem".into()], ..bound("ext4", &["bind"]) };
            let error = run(mount, &job(formatted, Some(&disk.node))).err().unwrap();
            assert!(matches!(error, Error::Invalid(_)), "{error}");
            assert!(nothing_in("/run/kata-containers/sandbox/storage"));
        });
    }

    #[test]
    fn the_value_of_an_option_that_may_be_secret_is_not_told() {
        for option in ["encryption_key=0123abcd", "encryption-key=0123abcd"] {
            let error = wants_filesystem(&storage(&[], &[option])).unwrap_err().to_string();
            assert!(error.contains("encryption") && !error.contains("0123abcd"), "{error}");
        }
    }

    #[test]
    fn what_is_mounted_already_is_not_covered() {
        let Some(disk) = Disk::ext4("hello") else { return };
        alone(|| {
            let mounted = run(mount, &job(storage(&[], &[]), Some(&disk.node))).unwrap();
            assert!(matches!(run(mount, &job(storage(&[], &[]), Some(&disk.node))), Err(Error::State(_))));
            assert_eq!(mounts_below("/run"), [POINT]);
            mounted.undo(POINT);
        });
    }

    #[test]
    fn a_file_system_is_made_only_when_asked_for() {
        for (options, fstype, wanted) in [
            (&[][..], "xfs", Some(false)),
            (&["create_filesystem"], "ext4", Some(true)),
            (&["create_filesystem=true"], "ext4", Some(true)),
            (&["create_filesystem=false"], "ext4", Some(false)),
            (&["create_filesystem"], "xfs", None),
            (&["encryption_key=ephemeral"], "ext4", None),
        ] {
            let storage = Storage { fstype: fstype.into(), ..storage(&[], options) };
            assert_eq!(wants_filesystem(&storage).ok(), wanted, "{options:?} {fstype}");
        }
        let Some((full, blank)) = Disk::ext4("hello").zip(Disk::blank()) else { return };
        assert!(carries_ext4(&full.node).unwrap());
        assert!(!carries_ext4(&blank.node).unwrap());
    }
}
