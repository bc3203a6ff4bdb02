//! Removes directory trees that somebody hostile may have written.
//!
//! A container can nest directories deeper than any path or stack is long. So a directory that is not empty is moved up to
//! the top before it is emptied: no recursion, two descriptors, and no path is ever followed.

use std::{ffi::CString, io, os::fd::AsFd};

use rustix::{
    fs::{self, AtFlags, Dir, DirEntry, FileType, Mode, OFlags},
    io::Errno,
};

/// Removes `name` in `parent` with all that is below it; nothing there is fine.
pub(crate) fn remove(parent: impl AsFd, name: &[u8]) -> io::Result<()> {
    let name = CString::new(name)?;
    let parent = parent.as_fd();
    match fs::unlinkat(parent, &name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        // EPERM is what POSIX names for a directory, EISDIR what Linux says.
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(error) => return Err(error.into()),
    }
    let mut moved: u64 = 0;
    let top = open(parent, &name)?;
    loop {
        // Each round takes one level off; what was moved up is met in the next one.
        if !empty(&top, &top, &mut moved)? {
            break;
        }
    }
    Ok(fs::unlinkat(parent, &name, AtFlags::REMOVEDIR)?)
}

/// Removes what is in `dir`, moving directories that are not empty up to `top`. Whether there is more to do.
fn empty(top: impl AsFd, dir: impl AsFd, moved: &mut u64) -> io::Result<bool> {
    let mut more = false;
    for entry in Dir::read_from(&dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        if unlink(&dir, &entry)? {
            continue;
        }
        more = true;
        lift(&top, &open(&dir, name)?, moved)?;
    }
    Ok(more)
}

/// Removes the files of `dir` and moves its directories to `top`.
fn lift(top: impl AsFd, dir: impl AsFd, moved: &mut u64) -> io::Result<()> {
    for entry in Dir::read_from(&dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        if unlink(&dir, &entry)? {
            continue;
        }
        loop {
            *moved += 1;
            let target = CString::new(format!(".removed-{moved}"))?;
            match fs::renameat_with(&dir, name, &top, &target, fs::RenameFlags::NOREPLACE) {
                Ok(()) => break,
                Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}

/// Removes a file, or a directory that is empty; `false` when it is not.
fn unlink(dir: impl AsFd, entry: &DirEntry) -> io::Result<bool> {
    let name = entry.file_name();
    if entry.file_type() != FileType::Directory {
        match fs::unlinkat(&dir, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => return Ok(true),
            // A file system that does not tell types.
            Err(Errno::ISDIR | Errno::PERM) => {}
            Err(error) => return Err(error.into()),
        }
    }
    match fs::unlinkat(&dir, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(true),
        Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn open(dir: impl AsFd, name: impl rustix::path::Arg) -> io::Result<std::os::fd::OwnedFd> {
    Ok(fs::openat(
        dir,
        name,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::symlink, path::Path};

    use super::*;

    fn parent(path: &Path) -> std::fs::File {
        std::fs::File::open(path).unwrap()
    }

    #[test]
    fn links_are_removed_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("tree/sub/.removed-1/x")).unwrap();
        std::fs::create_dir(dir.path().join("kept")).unwrap();
        std::fs::write(dir.path().join("kept/file"), "").unwrap();
        symlink(dir.path().join("kept"), dir.path().join("tree/sub/link")).unwrap();
        std::fs::write(dir.path().join("tree/file"), "").unwrap();
        remove(parent(dir.path()), b"tree").unwrap();
        assert!(!dir.path().join("tree").exists());
        assert!(dir.path().join("kept/file").exists());
        remove(parent(dir.path()), b"tree").unwrap();
        symlink("kept", dir.path().join("link")).unwrap();
        remove(parent(dir.path()), b"link").unwrap();
        assert!(dir.path().join("kept/file").exists());
    }

    #[test]
    fn no_depth_is_too_deep() {
        let dir = tempfile::tempdir().unwrap();
        let mut at = std::os::fd::OwnedFd::from(parent(dir.path()));
        for depth in 0..1500 {
            let name = if depth == 0 { "tree" } else { "d" };
            fs::mkdirat(&at, name, Mode::from_raw_mode(0o700)).unwrap();
            at = open(&at, name).unwrap();
        }
        remove(parent(dir.path()), b"tree").unwrap();
        assert!(!dir.path().join("tree").exists());
    }
}
