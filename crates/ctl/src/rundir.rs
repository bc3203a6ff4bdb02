//! The directory of one run: an image's unpacked layers, the bundle, and the claim to a name.
//!
//! `<cache>/runs/<state root's hash>-<name>`, locked by its owner for as long as it lives. The kernel gives the lock back
//! however the owner ends, so a directory whose lock is free belongs to nobody and is removed by whoever finds it. Two
//! runs cannot have one name, because they cannot have one directory.

use std::{
    ffi::OsStr,
    fs::File,
    io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use rustix::{
    fs::{self, FlockOperation, Mode, OFlags},
    io::Errno,
};
use sha2::{Digest as _, Sha256};

use crate::tree;

/// A claimed directory; dropping it removes it.
#[derive(Debug)]
pub(crate) struct RunDir {
    path: PathBuf,
    parent: OwnedFd,
    entry: String,
    /// Holds the lock.
    _lock: File,
}

impl RunDir {
    /// Claims the directory of `name`. What a dead owner left in it is removed first.
    pub(crate) fn claim(cache: &Path, state_root: &Path, name: &str) -> Result<RunDir> {
        let runs = cache.join("runs");
        let what = || format!("directory {}", runs.display());
        std::fs::create_dir_all(&runs).with_context(what)?;
        let parent = open_runs(&runs).with_context(what)?;
        fs::fchmod(&parent, Mode::from_raw_mode(0o700)).with_context(what)?;
        let entry = entry(state_root, name);
        let path = runs.join(&entry);
        loop {
            match lock(&parent, &entry).with_context(|| format!("directory {}", path.display()))? {
                Lock::Held => bail!(
                    "the name {name} is in use by a live run; choose another one, or end it with `bulkhead rm -f {name}`"
                ),
                Lock::Taken(_) => {
                    tree::remove(&parent, entry.as_bytes()).with_context(|| path.display().to_string())?
                }
                Lock::Absent => {}
            }
            match fs::mkdirat(&parent, entry.as_str(), Mode::from_raw_mode(0o700)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => {
                    return Err(error).with_context(|| format!("make directory {}", path.display()));
                }
            }
            // Between the two, somebody may have found it ownerless and removed it, or claimed it.
            if let Lock::Taken(lock) = lock(&parent, &entry)? {
                return Ok(RunDir { path, parent, entry, _lock: lock });
            }
        }
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a directory in it with exactly this mode.
    pub(crate) fn make(&self, name: &str, mode: u32) -> Result<PathBuf> {
        use std::os::unix::fs::PermissionsExt as _;
        let path = self.path.join(name);
        let made = std::fs::create_dir(&path)
            .and_then(|()| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)));
        made.with_context(|| format!("make directory {}", path.display()))?;
        Ok(path)
    }

    /// Removes it and all that is in it.
    pub(crate) fn remove(&self) -> Result<()> {
        let what = || format!("remove {}", self.path.display());
        tree::remove(&self.parent, self.entry.as_bytes()).with_context(what)
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            tracing::error!("{error:#}; the next run tries again");
        }
    }
}

/// Removes every directory whose owner is dead. Best effort: what cannot be removed now is met again.
pub(crate) fn sweep(cache: &Path) {
    let runs = cache.join("runs");
    let Ok(parent) = open_runs(&runs) else { return };
    for entry in std::fs::read_dir(&runs).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if let Ok(Lock::Taken(_lock)) = lock(&parent, &name)
            && let Err(error) = tree::remove(&parent, name.as_bytes())
        {
            tracing::warn!("remove {}: {error}", entry.path().display());
        }
    }
}

fn open_runs(path: &Path) -> io::Result<OwnedFd> {
    Ok(fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

fn entry(state_root: &Path, name: &str) -> String {
    let hash = Sha256::digest(state_root.as_os_str().as_bytes());
    let hash: String = hash.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    format!("{hash}-{name}")
}

enum Lock {
    /// Nothing of that name is there.
    Absent,
    /// A live process has it.
    Held,
    /// It is ours now.
    Taken(File),
}

fn lock(parent: &OwnedFd, entry: impl AsRef<OsStr>) -> io::Result<Lock> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = match fs::openat(parent, entry.as_ref(), flags, Mode::empty()) {
        Ok(dir) => dir,
        Err(Errno::NOENT) => return Ok(Lock::Absent),
        Err(error) => return Err(error.into()),
    };
    match fs::flock(&dir, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Ok(Lock::Held),
        Err(error) => return Err(error.into()),
    }
    // The lock is on what we opened; the name may stand for something else by now.
    let named = match fs::statat(parent, entry.as_ref(), fs::AtFlags::SYMLINK_NOFOLLOW) {
        Ok(named) => named,
        Err(Errno::NOENT) => return Ok(Lock::Absent),
        Err(error) => return Err(error.into()),
    };
    if named.st_ino == fs::fstat(&dir)?.st_ino { Ok(Lock::Taken(File::from(dir))) } else { Ok(Lock::Held) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_one_owner() {
        let cache = tempfile::tempdir().unwrap();
        let (here, elsewhere) = (Path::new("/run/a"), Path::new("/run/b"));
        let first = RunDir::claim(cache.path(), here, "web").unwrap();
        let error = RunDir::claim(cache.path(), here, "web").unwrap_err().to_string();
        assert!(error.contains("in use"), "{error}");
        let other = RunDir::claim(cache.path(), elsewhere, "web").unwrap();
        assert_ne!(first.path(), other.path());
        let path = first.path().to_owned();
        first.make("rootfs", 0o755).unwrap();
        drop(first);
        assert!(!path.exists());
        RunDir::claim(cache.path(), here, "web").unwrap();
    }

    #[test]
    fn what_the_dead_left_is_removed() {
        let cache = tempfile::tempdir().unwrap();
        let left = cache.path().join("runs").join(entry(Path::new("/s"), "dead"));
        std::fs::create_dir_all(left.join("rootfs/sub")).unwrap();
        let claimed = RunDir::claim(cache.path(), Path::new("/s"), "dead").unwrap();
        assert!(!left.join("rootfs").exists());
        std::fs::create_dir_all(cache.path().join("runs/other/x")).unwrap();
        sweep(cache.path());
        assert!(claimed.path().exists());
        assert!(!cache.path().join("runs/other").exists());
    }
}
