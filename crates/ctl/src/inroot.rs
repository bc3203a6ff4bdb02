//! A directory that paths are resolved beneath, whatever symbolic links are in it.
//!
//! Image layers and root file systems are written by strangers. Each path from them is resolved by the kernel
//! (`openat2` with `RESOLVE_IN_ROOT`) on a descriptor of the root: an absolute link or a `..` that leads out leads back to
//! the root, and links of `/proc` are refused. Nothing here ever joins strings to a host path.

use std::{
    ffi::OsStr,
    io::{self, Read as _},
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{self, Mode, OFlags, ResolveFlags},
    io::Errno,
};

/// The directory that is `/` for everything resolved through it.
#[derive(Debug)]
pub(crate) struct Root(OwnedFd);

impl Root {
    /// Opens a directory of the host as a root.
    pub(crate) fn open(path: &Path) -> io::Result<Root> {
        Ok(Root(fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?))
    }

    /// Opens what `path` names, following links inside the root. With `NOFOLLOW` in `flags` a link at the end is not
    /// followed.
    pub(crate) fn open_at(&self, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
        let relative = relative(path);
        loop {
            let opened = fs::openat2(
                &self.0,
                OsStr::from_bytes(relative),
                flags | OFlags::CLOEXEC,
                Mode::empty(),
                ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
            );
            match opened {
                // The kernel could not prove that a concurrent rename did not move the path out of the root.
                Err(Errno::AGAIN | Errno::INTR) => continue,
                other => return Ok(other?),
            }
        }
    }

    /// The path inside the root of what was opened below it, all links resolved.
    pub(crate) fn place(&self, fd: impl AsFd) -> io::Result<PathBuf> {
        let path = |fd: BorrowedFd<'_>| std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        let (path, root) = (path(fd.as_fd())?, path(self.0.as_fd())?);
        Ok(Path::new("/").join(path.strip_prefix(root).map_err(io::Error::other)?))
    }

    /// Opens a directory below the root, as a handle for `*at` calls.
    pub(crate) fn dir(&self, path: &[u8]) -> io::Result<OwnedFd> {
        self.open_at(path, OFlags::PATH | OFlags::DIRECTORY)
    }

    /// Opens a directory below the root, making what is missing of it (mode 0755); `made` hears of each one made.
    pub(crate) fn make_dir(&self, path: &[u8], made: &mut dyn FnMut(BorrowedFd<'_>)) -> io::Result<OwnedFd> {
        match self.dir(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => return other,
        }
        let path = relative(path);
        let mut parent = self.dir(b"")?;
        let mut end = 0;
        for name in path.split(|byte| *byte == b'/') {
            end += name.len();
            parent = match self.dir(&path[..end]) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    fs::mkdirat(&parent, OsStr::from_bytes(name), Mode::from_raw_mode(0o755))?;
                    let dir = self.dir(&path[..end])?;
                    made(dir.as_fd());
                    dir
                }
                other => other?,
            };
            end += 1;
        }
        Ok(parent)
    }

    /// Reads a small regular file below the root; `None` when there is none. One that is larger than `limit` bytes or not
    /// a regular file is an error, so that a fifo or an endless file of an image cannot hold us.
    pub(crate) fn read(&self, path: &str, limit: u64) -> io::Result<Option<Vec<u8>>> {
        // Looked at before it is opened: merely opening a device can have effects.
        let fd = match self.open_at(path.as_bytes(), OFlags::PATH) {
            Ok(fd) => fd,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        if fs::FileType::from_raw_mode(fs::fstat(&fd)?.st_mode) != fs::FileType::RegularFile {
            return Err(io::Error::other("not a regular file"));
        }
        let file = std::fs::File::open(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        let mut text = Vec::new();
        file.take(limit + 1).read_to_end(&mut text)?;
        if text.len() as u64 > limit {
            return Err(io::Error::other(format!("larger than {limit} bytes")));
        }
        Ok(Some(text))
    }
}

/// The path without its leading slashes; the root itself is `.`.
fn relative(path: &[u8]) -> &[u8] {
    let start = path.iter().position(|byte| *byte != b'/').unwrap_or(path.len());
    let path = &path[start..];
    let end = path.iter().rposition(|byte| *byte != b'/').map_or(0, |last| last + 1);
    if end == 0 { b"." } else { &path[..end] }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn root() -> (tempfile::TempDir, Root) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir(&root).unwrap();
        std::fs::write(dir.path().join("secret"), "host").unwrap();
        let opened = Root::open(&root).unwrap();
        (dir, opened)
    }

    #[test]
    fn links_stay_inside() {
        let (dir, root) = root();
        let at = dir.path().join("root");
        symlink("../secret", at.join("up")).unwrap();
        symlink(dir.path().join("secret"), at.join("absolute")).unwrap();
        symlink("/etc", at.join("link")).unwrap();
        std::fs::create_dir(at.join("etc")).unwrap();
        std::fs::write(at.join("etc/passwd"), "inside").unwrap();
        assert_eq!(root.read("up", 100).unwrap(), None);
        assert_eq!(root.read("absolute", 100).unwrap(), None);
        assert_eq!(root.read("../../etc/passwd", 100).unwrap().unwrap(), b"inside");
        assert_eq!(root.read("/link/passwd", 100).unwrap().unwrap(), b"inside");
    }

    #[test]
    fn places_are_told_without_links() {
        let (dir, root) = root();
        std::fs::create_dir_all(dir.path().join("root/usr/bin")).unwrap();
        symlink("/usr/bin", dir.path().join("root/bin")).unwrap();
        let place = |path: &[u8]| root.place(root.dir(path).unwrap()).unwrap();
        assert_eq!(place(b"/bin/"), Path::new("/usr/bin"));
        assert_eq!(place(b"/"), Path::new("/"));
        assert!(root.place(std::fs::File::open(dir.path().join("secret")).unwrap()).is_err());
    }

    #[test]
    fn reads_are_bounded() {
        let (dir, root) = root();
        std::fs::write(dir.path().join("root/big"), "0123456789").unwrap();
        assert!(root.read("big", 9).is_err());
        assert!(root.read("big", 10).is_ok());
        rustix::fs::mknodat(
            rustix::fs::CWD,
            dir.path().join("root/fifo"),
            rustix::fs::FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        assert!(root.read("fifo", 10).is_err());
    }

    #[test]
    fn missing_directories_are_made_inside() {
        let (dir, root) = root();
        symlink("/var", dir.path().join("root/v")).unwrap();
        std::fs::create_dir(dir.path().join("root/var")).unwrap();
        let mut made = 0;
        root.make_dir(b"/v/lib/x/", &mut |_| made += 1).unwrap();
        assert_eq!(made, 2);
        assert!(dir.path().join("root/var/lib/x").is_dir());
        assert!(root.make_dir(b"", &mut |_| ()).is_ok());
    }
}
