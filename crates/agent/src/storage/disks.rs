//! For the tests of drivers: disks that are files, and a thread whose mounts are its own.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use bulkhead_protocol::agent::Storage;

use super::{Driver, Job, Mounted, Undo};
use crate::{boot::Guest, error::Result};

/// A file as a block device; both go with it.
pub(super) struct Disk {
    pub(super) node: PathBuf,
    _file: tempfile::NamedTempFile,
}

impl Disk {
    /// A disk of 4 MiB of zeros; none, and a word why, where there are no loop devices.
    pub(super) fn blank() -> Option<Disk> {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4 << 20).unwrap();
        Disk::of(file)
    }

    /// A disk with an ext4 that holds a file `name`.
    pub(super) fn ext4(name: &str) -> Option<Disk> {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4 << 20).unwrap();
        let tree = tree(name);
        made(Command::new("mkfs.ext4").args(["-q", "-d"]).arg(tree.path()).arg(file.path()))?;
        Disk::of(file)
    }

    /// A disk with an EROFS that holds a file `name`.
    pub(super) fn erofs(name: &str) -> Option<Disk> {
        let file = tempfile::NamedTempFile::new().unwrap();
        let tree = tree(name);
        made(Command::new("mkfs.erofs").arg("--quiet").arg(file.path()).arg(tree.path()))?;
        Disk::of(file)
    }

    fn of(file: tempfile::NamedTempFile) -> Option<Disk> {
        let node = made(Command::new("losetup").args(["--find", "--show"]).arg(file.path()))?;
        Some(Disk { node: node.trim_end().into(), _file: file })
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let detached = Command::new("losetup").arg("--detach").arg(&self.node).status();
        assert!(detached.is_ok_and(|status| status.success()));
    }
}

fn tree(name: &str) -> tempfile::TempDir {
    let tree = tempfile::tempdir().unwrap();
    std::fs::write(tree.path().join(name), name).unwrap();
    tree
}

/// What the program says; none, and a word why, where it does not work.
fn made(command: &mut Command) -> Option<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    match command.output() {
        Ok(output) if output.status.success() => Some(String::from_utf8_lossy(&output.stdout).into_owned()),
        Ok(output) => skip(&format!("{program}: {}", String::from_utf8_lossy(&output.stderr))),
        Err(error) => skip(&format!("{program}: {error}")),
    }
}

fn skip<T>(why: &str) -> Option<T> {
    eprintln!("skipped: {why}");
    None
}

/// Runs a test with mounts, and an empty `/run`, of its own.
pub(super) fn alone(test: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let test = scope.spawn(|| {
            if nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).is_err() {
                return eprintln!("skipped: not root");
            }
            use rustix::mount::{MountFlags, MountPropagationFlags};
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            rustix::mount::mount_change("/", private).unwrap();
            rustix::mount::mount("tmpfs", "/run", "tmpfs", MountFlags::empty(), c"").unwrap();
            test();
        });
        test.join().unwrap();
    });
}

/// What `driver` is asked to do with disks.
pub(super) fn job(storage: Storage, node: Option<&Path>) -> Job {
    let node = node.map(Path::to_owned);
    Job { storage, node, layers: Vec::new(), container: Some("c1".into()), guest: Arc::new(Guest::plain()) }
}

/// As `Storages` does it: a failure is undone.
pub(super) fn run(driver: Driver, job: &Job) -> Result<Mounted> {
    let mut mounted = Mounted::default();
    match driver(job, &mut mounted) {
        Ok(()) => Ok(mounted),
        Err(error) => {
            mounted.undo(&job.storage.mount_point);
            Err(error)
        }
    }
}

/// The mount points below a directory, in this thread's namespace.
pub(super) fn mounts_below(directory: &str) -> Vec<String> {
    let table = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let point = |line: &str| line.split(' ').nth(4).map(str::to_owned);
    table.lines().filter_map(point).filter(|point| point.starts_with(&format!("{directory}/"))).collect()
}

/// Whether a directory is empty or not there.
pub(super) fn nothing_in(directory: &str) -> bool {
    std::fs::read_dir(directory).map_or(true, |mut entries| entries.next().is_none())
}

/// Whether a file can be made in a directory.
pub(super) fn writable(directory: &str) -> bool {
    File::create(Path::new(directory).join("new")).is_ok()
}

#[test]
fn steps_are_undone_last_first_and_all_of_them() {
    alone(|| {
        std::fs::create_dir_all("/run/a/b").unwrap();
        let mut mounted = Mounted::default();
        mounted.did(Undo::RemoveDirectory("/run/a".into()));
        mounted.did(Undo::RemoveDirectory("/run/a/b".into()));
        // Fails: nothing is mounted there. The others are undone all the same.
        mounted.did(Undo::Unmount("/run/a".into()));
        mounted.undo("/run/a");
        assert!(nothing_in("/run"));
    });
}
