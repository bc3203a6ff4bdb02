//! Trees of files that others write to as well: each step is taken on a descriptor, so that a name that turns into a
//! symbolic link, or a directory that is moved, between a look and an act leads nowhere else.

use std::{
    ffi::{CStr, CString, OsStr},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Uid},
    io::{Errno, Result},
};

/// Directories nested deeper than this are an error: a walk holds a descriptor for each.
pub(crate) const DEPTH: usize = 512;

/// A resolution that a rename crosses is tried so often.
const TRIES: usize = 16;

/// Opens an absolute path on which nothing is a symbolic link.
pub(crate) fn open(path: &Path, flags: OFlags) -> Result<OwnedFd> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat2(rustix::fs::CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)
}

/// Opens a path below a directory. Symbolic links on the way are followed as long as they stay below; `EXDEV` else.
pub(crate) fn open_below(root: impl AsFd, path: &Path, flags: OFlags) -> Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { OsStr::new(".") } else { path.as_os_str() };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let mut tries = 0;
    loop {
        match rustix::fs::openat2(root.as_fd(), path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
            Err(Errno::AGAIN) if tries < TRIES => tries += 1,
            opened => return opened,
        }
    }
}

/// Opens what a directory itself holds: no link, and nothing that is mounted there (`EXDEV`). With `PATH` also a link itself.
pub(crate) fn open_entry(directory: impl AsFd, name: &CStr, flags: OFlags) -> Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat2(directory, name, flags, Mode::empty(), resolve)
}

/// The names in a directory, sorted.
pub(crate) fn entries(directory: impl AsFd) -> Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// What kind of file a status is of.
pub(crate) fn kind(status: &Stat) -> FileType {
    FileType::from_raw_mode(status.st_mode)
}

/// Changes the owner of what a descriptor refers to, a link itself included.
pub(crate) fn set_owner(file: impl AsFd, uid: Option<Uid>, gid: Option<Gid>) -> Result<()> {
    rustix::fs::chownat(file, c"", uid, gid, AtFlags::EMPTY_PATH)
}

/// Changes the mode of what a descriptor refers to, also of one that cannot be read or written; not of a link.
pub(crate) fn set_mode(file: impl AsFd, mode: u32) -> Result<()> {
    rustix::fs::chmod(by_descriptor(file), Mode::from_raw_mode(mode))
}

/// A path that leads to what a descriptor refers to and cannot be redirected while it is open.
pub(crate) fn by_descriptor(file: impl AsFd) -> String {
    format!("/proc/self/fd/{}", file.as_fd().as_raw_fd())
}

/// Deletes an entry of a directory with all below it. Links are deleted, not followed; what is mounted below stays, and is
/// an error.
pub(crate) fn remove(directory: impl AsFd, name: &CStr) -> Result<()> {
    remove_at(directory.as_fd(), name, 0)
}

fn remove_at(directory: rustix::fd::BorrowedFd<'_>, name: &CStr, depth: usize) -> Result<()> {
    match rustix::fs::unlinkat(directory, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => {}
        Err(Errno::NOENT) => return Ok(()),
        unlinked => return unlinked,
    }
    if depth == DEPTH {
        return Err(Errno::NAMETOOLONG);
    }
    {
        let below = open_entry(directory, name, OFlags::RDONLY | OFlags::DIRECTORY)?;
        for name in entries(&below)? {
            remove_at(below.as_fd(), &name, depth + 1)?;
        }
    }
    rustix::fs::unlinkat(directory, name, AtFlags::REMOVEDIR)
}

#[cfg(any(test, fuzzing))]
/// Paths below a directory: nothing is opened beside it.
pub(crate) fn fuzz(text: &str) {
    let world = crate::fuzz::World::new();
    let Ok(root) = open(&world.root(), OFlags::RDONLY | OFlags::DIRECTORY) else { return };
    for line in crate::fuzz::lines(text) {
        let name = CString::new(line).unwrap_or_default();
        let opened =
            [open_below(&root, Path::new(line), OFlags::PATH), open_entry(&root, &name, OFlags::PATH)];
        for found in opened.into_iter().flatten() {
            let real = std::fs::read_link(by_descriptor(&found)).unwrap_or_default();
            assert!(real.starts_with(world.root()), "{line:?} is {}", real.display());
        }
    }
    for name in entries(&root).unwrap_or_default() {
        let _ = remove(&root, &name);
    }
    world.unharmed();
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    fn directory(path: &Path) -> OwnedFd {
        open(path, OFlags::RDONLY | OFlags::DIRECTORY).unwrap()
    }

    #[test]
    fn a_tree_is_removed_and_links_are_not_followed() {
        let keep = tempfile::tempdir().unwrap();
        fs::write(keep.path().join("precious"), "x").unwrap();
        let tree = tempfile::tempdir().unwrap();
        fs::create_dir_all(tree.path().join("a/b")).unwrap();
        fs::write(tree.path().join("a/b/file"), "x").unwrap();
        symlink(keep.path(), tree.path().join("a/link")).unwrap();
        symlink(keep.path(), tree.path().join("link")).unwrap();
        let root = directory(tree.path());
        for name in [c"a", c"link", c"missing"] {
            remove(&root, name).unwrap();
        }
        assert_eq!(entries(&root).unwrap(), Vec::<CString>::new());
        assert!(keep.path().join("precious").exists());
    }

    #[test]
    fn links_are_followed_only_below() {
        let tree = tempfile::tempdir().unwrap();
        fs::create_dir_all(tree.path().join("a/b")).unwrap();
        symlink("a", tree.path().join("in")).unwrap();
        symlink("../a", tree.path().join("a/up")).unwrap();
        symlink("../..", tree.path().join("a/out")).unwrap();
        symlink("/", tree.path().join("absolute")).unwrap();
        let root = directory(tree.path());
        let open =
            |path: &str| open_below(&root, Path::new(path), OFlags::PATH | OFlags::DIRECTORY).map(drop);
        for path in ["", "a", "in/b", "a/up/b"] {
            assert_eq!(open(path), Ok(()), "{path:?}");
        }
        for path in ["a/out", "absolute", "a/../..", "absolute/tmp"] {
            assert_eq!(open(path), Err(Errno::XDEV), "{path:?}");
        }
        assert!(open_entry(&root, c"in", OFlags::RDONLY).is_err());
        assert!(super::open(&tree.path().join("in"), OFlags::RDONLY).is_err());
    }
}
