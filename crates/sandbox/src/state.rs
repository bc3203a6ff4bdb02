//! What a pod leaves on disk while it lives (`<state root>/<id>/state.json`), and how another process cleans up after an
//! owner that died.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use bulkhead_hypervisor::Endpoint;
use nix::mount::{MntFlags, umount2};
use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, openat2, unlinkat},
    io::Errno,
};

use crate::{Error, error::os, processes};

/// How long killed processes may take to end.
const KILL_BOUND: Duration = Duration::from_secs(5);

/// A process that belongs to a pod. The start time tells it from a later process with the same pid.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Owned {
    /// Its pid.
    pub pid: u32,
    /// Field 22 of `/proc/<pid>/stat`.
    pub start_time: u64,
}

/// The state file.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct State {
    /// Format version, 1.
    pub version: u32,
    /// The pod.
    pub id: String,
    /// The process that runs it (shim or `bulkhead run`).
    pub owner: Owned,
    /// The VMM, and its helpers.
    pub processes: Vec<Owned>,
    /// How the agent is reached.
    pub endpoint: Endpoint,
    /// Ids of the containers.
    pub containers: Vec<String>,
    /// Whatever the owner put there.
    pub labels: BTreeMap<String, String>,
    /// Seconds since the epoch.
    pub created: u64,
}

impl State {
    /// Writes the file in one step: a reader sees the old state or the new one.
    pub(crate) fn save(&self, directory: &Path) -> Result<(), Error> {
        let (file, next) = (directory.join("state.json"), directory.join("state.json.new"));
        let text = serde_json::to_vec_pretty(self)
            .map_err(|error| os(format!("writing {}", file.display()))(error))?;
        fs::write(&next, text)
            .and_then(|()| fs::rename(&next, &file))
            .map_err(os(format!("writing {}", file.display())))
    }
}

/// Whether an id may name a pod, a container or an exec: it becomes part of paths on both sides.
pub(crate) fn check_id(what: &str, id: &str) -> Result<(), Error> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    let head = id.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    if head && id.len() <= 128 && id.chars().all(plain) {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "{what} id {id:?}: 1 to 128 letters, digits, '_', '.' and '-' are allowed, beginning with a letter or digit"
    )))
}

/// Reads the state of one pod.
pub fn load(state_root: &Path, id: &str) -> Result<State, Error> {
    check_id("sandbox", id)?;
    let file = state_root.join(id).join("state.json");
    let text = match fs::read(&file) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(Error::NotFound { what: "sandbox", id: id.to_owned() });
        }
        Err(error) => return Err(os(format!("reading {}", file.display()))(error)),
    };
    serde_json::from_slice(&text).map_err(|error| os(format!("reading {}", file.display()))(error))
}

/// The state of every pod; unreadable entries are left out.
pub fn list(state_root: &Path) -> Result<Vec<State>, Error> {
    let entries = match fs::read_dir(state_root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(os(format!("reading {}", state_root.display()))(error)),
    };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let mut pods: Vec<State> = names.filter_map(|id| load(state_root, &id).ok()).collect();
    pods.sort_by(|a, b| (a.created, &a.id).cmp(&(b.created, &b.id)));
    Ok(pods)
}

/// Removes everything a pod left: kills its processes (only those whose start time agrees), unmounts, removes its
/// directory. Idempotent; an unknown id is fine.
pub fn cleanup(state_root: &Path, id: &str) -> Result<(), Error> {
    check_id("sandbox", id)?;
    let directory = state_root.join(id);
    match load(state_root, id) {
        Ok(state) => {
            let survivors = processes::kill(&state.processes, KILL_BOUND);
            if !survivors.is_empty() {
                let pids: Vec<_> = survivors.iter().map(|process| process.pid).collect();
                tracing::warn!("processes {pids:?} of sandbox {id} did not end within {KILL_BOUND:?}");
            }
        }
        Err(Error::NotFound { .. }) => {}
        // The directory is to go all the same; processes die with their owner.
        Err(error) => tracing::warn!("{error}"),
    }
    remove(&directory)
}

/// Unmounts what is mounted below a pod's directory, and removes it. Never descends through a mount.
pub(crate) fn remove(directory: &Path) -> Result<(), Error> {
    for mount in mounts_below(directory)?.iter().rev() {
        umount2(mount, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
            .map_err(os(format!("unmounting {}", mount.display())))?;
    }
    let Some(name) = directory.file_name() else { return Ok(()) };
    let resolve = ResolveFlags::NO_SYMLINKS;
    let flags = OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC;
    let parent =
        match openat2(CWD, directory.parent().unwrap_or(Path::new(".")), flags, Mode::empty(), resolve) {
            Ok(parent) => parent,
            Err(Errno::NOENT) => return Ok(()),
            Err(errno) => {
                return Err(os(format!("opening the directory above {}", directory.display()))(errno));
            }
        };
    remove_tree(&parent, Path::new(name)).map_err(os(format!("removing {}", directory.display())))
}

fn remove_tree(parent: &impl std::os::fd::AsFd, name: &Path) -> Result<(), Errno> {
    match unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        // What unlink says of a directory (POSIX allows EPERM).
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(errno) => return Err(errno),
    }
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    // A mount that appeared meanwhile ends this with EXDEV instead of emptying what is mounted.
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let directory = openat2(parent, name, flags, Mode::empty(), resolve)?;
    for entry in Dir::read_from(&directory)? {
        let entry = entry?;
        let entry_name = entry.file_name();
        if entry_name == c"." || entry_name == c".." {
            continue;
        }
        if entry.file_type() == FileType::Directory || entry.file_type() == FileType::Unknown {
            use std::os::unix::ffi::OsStrExt;
            remove_tree(&directory, Path::new(std::ffi::OsStr::from_bytes(entry_name.to_bytes())))?;
        } else {
            unlinkat(&directory, entry_name, AtFlags::empty())?;
        }
    }
    unlinkat(parent, name, AtFlags::REMOVEDIR)
}

/// The mount points at and below a directory, in the order in which they were mounted.
fn mounts_below(directory: &Path) -> Result<Vec<PathBuf>, Error> {
    let table = fs::read_to_string("/proc/thread-self/mountinfo").map_err(os("reading mountinfo"))?;
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape);
    Ok(points.filter(|point| point.starts_with(directory)).collect())
}

/// mountinfo writes blank, tab, newline and backslash as `\ooo`.
fn unescape(field: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let [first, tail @ ..] = rest {
        let octal =
            tail.get(..3).filter(|_| *first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        if let Some(byte) = octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            bytes.push(byte);
            rest = &tail[3..];
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn state(id: &str, processes: Vec<Owned>) -> State {
        State {
            version: 1,
            id: id.into(),
            owner: Owned::of(std::process::id()).unwrap(),
            processes,
            endpoint: Endpoint::Hybrid { path: "/run/x".into() },
            containers: vec!["c1".into()],
            labels: BTreeMap::from([("name".into(), "web".into())]),
            created: 7,
        }
    }

    #[test]
    fn what_is_saved_is_loaded_and_listed() {
        let root = tempfile::tempdir().unwrap();
        assert!(list(&root.path().join("absent")).unwrap().is_empty());
        for id in ["pod-b", "pod-a"] {
            fs::create_dir(root.path().join(id)).unwrap();
            state(id, vec![]).save(&root.path().join(id)).unwrap();
        }
        fs::create_dir(root.path().join("half-made")).unwrap();
        assert_eq!(load(root.path(), "pod-a").unwrap(), state("pod-a", vec![]));
        assert!(matches!(load(root.path(), "pod-c"), Err(Error::NotFound { what: "sandbox", .. })));
        let ids: Vec<_> = list(root.path()).unwrap().into_iter().map(|state| state.id).collect();
        assert_eq!(ids, ["pod-a", "pod-b"]);
        assert!(!root.path().join("pod-a/state.json.new").exists());
    }

    #[test]
    fn ids_cannot_lead_elsewhere() {
        for bad in ["", "..", "../x", "a/b", ".hidden", "-x", "a b", "é1", &"x".repeat(129)] {
            assert!(matches!(check_id("sandbox", bad), Err(Error::Invalid(_))), "{bad:?}");
            assert!(cleanup(Path::new("/nonexistent"), bad).is_err(), "{bad:?}");
        }
        for good in ["a", "0x", "web-1.example_2", &"f".repeat(64)] {
            check_id("sandbox", good).unwrap();
        }
    }

    #[test]
    fn cleanup_kills_and_removes_and_may_be_repeated() {
        let root = tempfile::tempdir().unwrap();
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pod = root.path().join("pod");
        fs::create_dir_all(pod.join("share/c1/rootfs")).unwrap();
        std::os::unix::fs::symlink("/etc", pod.join("share/link")).unwrap();
        state("pod", vec![Owned::of(child.id()).unwrap()]).save(&pod).unwrap();
        cleanup(root.path(), "pod").unwrap();
        assert_eq!(child.wait().unwrap().code(), None, "killed by a signal");
        assert!(!pod.exists());
        assert!(Path::new("/etc/passwd").exists());
        cleanup(root.path(), "pod").unwrap();
    }

    #[test]
    fn removal_unmounts_and_spares_what_was_mounted() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: mounting needs root");
            return;
        }
        let root = tempfile::tempdir().unwrap();
        let precious = root.path().join("precious dir");
        fs::create_dir(&precious).unwrap();
        fs::write(precious.join("file"), "x").unwrap();
        let target = root.path().join("pod/a b/target");
        fs::create_dir_all(&target).unwrap();
        let bind = nix::mount::MsFlags::MS_BIND;
        for _ in 0..2 {
            nix::mount::mount(Some(&precious), &target, None::<&str>, bind, None::<&str>).unwrap();
        }
        assert_eq!(mounts_below(&root.path().join("pod")).unwrap(), [target.clone(), target]);
        remove(&root.path().join("pod")).unwrap();
        assert!(!root.path().join("pod").exists());
        assert_eq!(fs::read(precious.join("file")).unwrap(), b"x");
    }

    #[test]
    fn mount_points_are_unescaped() {
        for (field, path) in
            [("/a\\040b", "/a b"), ("/a\\134b", "/a\\b"), ("/plain", "/plain"), ("/x\\04", "/x\\04")]
        {
            assert_eq!(unescape(field), Path::new(path));
        }
    }
}
