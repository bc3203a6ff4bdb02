//! Paths inside the container's root, on descriptors: whatever an image or a volume contains, and whoever changes it
//! meanwhile, nothing outside of the root is reached.

use std::{
    collections::VecDeque,
    ffi::{OsStr, OsString},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
};

/// What to make where nothing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Node {
    /// An empty directory.
    Directory,
    /// An empty file.
    File,
}

/// A directory that paths are resolved in as if it were `/`.
#[derive(Debug)]
pub struct Root(OwnedFd);

/// As many as the kernel follows.
const MAX_LINKS: usize = 40;

const DIRECTORY_MODE: Mode = Mode::from_raw_mode(0o755);
const FILE_MODE: Mode = Mode::from_raw_mode(0o644);

impl Root {
    /// Paths are resolved below `fd`.
    pub fn new(fd: OwnedFd) -> Root {
        Root(fd)
    }

    /// The root of the process.
    pub fn own() -> io::Result<Root> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Root(rustix::fs::openat(CWD, "/", flags, Mode::empty())?))
    }

    /// Opens what is at `path`, following links inside the root.
    pub fn open(&self, path: impl AsRef<Path>, flags: OFlags) -> io::Result<OwnedFd> {
        self.resolve(path.as_ref(), flags, ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
    }

    fn resolve(&self, path: &Path, flags: OFlags, resolve: ResolveFlags) -> io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() { Path::new("/") } else { path };
        loop {
            match rustix::fs::openat2(&self.0, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
                // A rename elsewhere raced with a ".." of the path.
                Err(Errno::AGAIN) => {}
                result => return Ok(result?),
            }
        }
    }

    /// Opens `path` as a path descriptor; what is missing on the way is made, links that dangle included.
    pub fn create(&self, path: impl AsRef<Path>, node: Node) -> io::Result<OwnedFd> {
        match self.open(&path, OFlags::PATH) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            result => return result,
        }
        let mut queue: VecDeque<OsString> = parts(path.as_ref());
        // Free of links: each part was looked at.
        let mut done = PathBuf::new();
        let mut links = 0;
        while let Some(part) = queue.pop_front() {
            if part == ".." {
                done.pop();
                continue;
            }
            match self.resolved(&done.join(&part), OFlags::PATH | OFlags::NOFOLLOW) {
                Ok(fd) if file_type(fd.as_fd())? == FileType::Symlink => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Errno::LOOP.into());
                    }
                    let target = rustix::fs::readlinkat(&fd, "", Vec::new())?;
                    let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
                    if target.is_absolute() {
                        done.clear();
                    }
                    parts(&target).into_iter().rev().for_each(|part| queue.push_front(part));
                }
                Ok(_) => done.push(part),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    let node = if queue.is_empty() { node } else { Node::Directory };
                    self.make(&done, &part, node)?;
                    done.push(part);
                }
                Err(e) => return Err(e),
            }
        }
        self.resolved(&done, OFlags::PATH)
    }

    fn make(&self, parent: &Path, name: &OsStr, node: Node) -> io::Result<()> {
        let parent = self.resolved(parent, OFlags::PATH | OFlags::DIRECTORY)?;
        let made = match node {
            Node::Directory => rustix::fs::mkdirat(&parent, name, DIRECTORY_MODE),
            Node::File => {
                let flags =
                    OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                rustix::fs::openat(&parent, name, flags, FILE_MODE).map(drop)
            }
        };
        match made {
            // Somebody else was faster; the final open looks at what it is.
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Opens a path that must contain no link (but may end in one, with `NOFOLLOW`).
    fn resolved(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        self.resolve(path, flags, ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS)
    }

    /// The directory that `path` is in, made if missing, and the name in it.
    pub(crate) fn parent<'p>(&self, path: &'p str) -> io::Result<(OwnedFd, &'p OsStr)> {
        let path = Path::new(path);
        match (path.parent(), path.file_name()) {
            (Some(parent), Some(name)) => Ok((self.create(parent, Node::Directory)?, name)),
            _ => Err(Errno::INVAL.into()),
        }
    }

    /// The path inside the root of what `fd` refers to; `None` when it is outside. For checks, not for opening.
    pub(crate) fn path_of(&self, fd: BorrowedFd<'_>) -> io::Result<Option<PathBuf>> {
        let name = |fd: BorrowedFd<'_>| std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        let root = name(self.0.as_fd())?;
        Ok(name(fd)?.strip_prefix(root).ok().map(|path| Path::new("/").join(path)))
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn parts(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|part| match part {
            Component::Normal(part) => Some(part.to_owned()),
            Component::ParentDir => Some("..".into()),
            _ => None,
        })
        .collect()
}

/// The type of what `fd` refers to.
pub(crate) fn file_type(fd: BorrowedFd<'_>) -> io::Result<FileType> {
    let stat = rustix::fs::statat(fd, "", AtFlags::EMPTY_PATH)?;
    Ok(FileType::from_raw_mode(stat.st_mode))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    fn root() -> (tempfile::TempDir, Root) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("root")).unwrap();
        let file = fs::File::open(dir.path().join("root")).unwrap();
        (dir, Root::new(file.into()))
    }

    #[test]
    fn missing_parts_are_made_inside_the_root() {
        let (dir, root) = root();
        let fd = root.create("/a/b/c", Node::Directory).unwrap();
        assert_eq!(file_type(fd.as_fd()).unwrap(), FileType::Directory);
        assert_eq!(root.path_of(fd.as_fd()).unwrap().unwrap(), Path::new("/a/b/c"));
        let fd = root.create("a/b/../f", Node::File).unwrap();
        assert_eq!(file_type(fd.as_fd()).unwrap(), FileType::RegularFile);
        assert!(dir.path().join("root/a/f").is_file());
        root.create("/../../../x", Node::Directory).unwrap();
        assert!(dir.path().join("root/x").is_dir() && !dir.path().join("x").exists());
    }

    #[test]
    fn links_are_followed_inside_the_root_even_when_they_dangle() {
        let (dir, root) = root();
        let at = |name: &str| dir.path().join("root").join(name);
        symlink("/", at("up")).unwrap();
        root.create("up/here", Node::Directory).unwrap();
        assert!(at("here").is_dir() && !Path::new("/here").exists());
        symlink("../../../../run/x/resolv.conf", at("resolv.conf")).unwrap();
        let fd = root.create("/resolv.conf", Node::File).unwrap();
        assert_eq!(root.path_of(fd.as_fd()).unwrap().unwrap(), Path::new("/run/x/resolv.conf"));
        symlink(dir.path(), at("out")).unwrap();
        root.create("/out/y", Node::File).unwrap();
        assert!(!dir.path().join("y").exists());
        symlink("loop", at("loop")).unwrap();
        assert_eq!(root.create("loop/z", Node::File).unwrap_err().raw_os_error(), Some(libc::ELOOP));
    }

    #[test]
    fn a_file_on_the_way_is_an_error() {
        let (dir, root) = root();
        fs::write(dir.path().join("root/f"), "").unwrap();
        let error = root.create("/f/x", Node::Directory).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTDIR));
    }

    #[test]
    fn magic_links_are_not_followed() {
        let root = Root::own().unwrap();
        let error = root.open("/proc/self/fd/0/..", OFlags::PATH).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
    }
}
