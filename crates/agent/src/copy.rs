//! Files from the host: what `CopyFile` makes below the share, and nowhere else.
//!
//! ```text
//! piece at 0 ──► staged, without a name ──piece──► ... ──last piece──► owner, mode ──► under its name, at once
//!                  └─ failed, started again, one of too many, end of the sandbox: gone
//! ```
//! Names are resolved by the kernel, beneath the share's root: a symbolic link on the way counts as long as it stays there
//! (hosts write through the `..data` of a volume), an absolute one, one that leads out, or one to a descriptor does not. The
//! last name is never followed but replaced.

use std::{
    collections::HashMap,
    ffi::CString,
    fs::File,
    hash::{BuildHasher, RandomState},
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt, FileExt},
    },
    path::{Path, PathBuf},
    sync::Mutex,
};

use bulkhead_protocol::{agent::CopyFileRequest, ports::GUEST_SHARE};
use rustix::{
    fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid},
    io::Errno,
};

use crate::{
    error::{During, Error, Result},
    sync::lock,
    tree,
};

/// So many files can be on their way; the one that has waited longest gives way to another.
const STAGED: usize = 64;
/// No file system of a guest holds a larger file: 16 TiB.
const LARGEST: u64 = 16 << 40;
/// The kernel's limits for a path and a name, without the NUL.
const PATH: usize = 4095;
const NAME: usize = 255;

/// The copies on their way, by where they go.
pub(crate) struct Copies {
    root: PathBuf,
    staged: Mutex<Staged>,
}

#[derive(Default)]
struct Staged {
    /// Counts beginnings and pieces.
    turns: u64,
    slots: HashMap<PathBuf, Slot>,
}

struct Slot {
    /// When it was begun: who began later owns the path.
    begun: u64,
    used: u64,
    /// None while a piece is being written.
    partial: Option<Partial>,
}

/// A file that is not complete.
struct Partial {
    file: File,
    parent: OwnedFd,
    /// Its name for the time being, on a file system that must have one.
    name: Option<CString>,
    size: u64,
    written: u64,
}

/// A request, understood.
#[derive(Debug, PartialEq)]
struct Copy {
    /// Below the root, without `.` and `..`.
    parent: PathBuf,
    name: CString,
    node: Node,
    owner: Owner,
    dir_mode: u32,
}

#[derive(Debug, PartialEq)]
enum Node {
    Directory { mode: u32 },
    Symlink { target: CString },
    File { mode: u32, size: u64, offset: u64, data: Vec<u8> },
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Owner {
    uid: Option<Uid>,
    gid: Option<Gid>,
}

impl Owner {
    /// The ids travel as signed numbers; -1 leaves things as they are, as in chown(2).
    fn new(uid: i32, gid: i32) -> Owner {
        Owner {
            uid: (uid != -1).then(|| Uid::from_raw(uid.cast_unsigned())),
            gid: (gid != -1).then(|| Gid::from_raw(gid.cast_unsigned())),
        }
    }
}

impl Copy {
    fn plan(request: CopyFileRequest) -> Result<Copy> {
        let (parent, name) = place(&request.path)?;
        let wrong = |what: String| Err(Error::Invalid(format!("copy to {:?}: {what}", request.path)));
        let (Ok(size), Ok(offset)) = (u64::try_from(request.file_size), u64::try_from(request.offset)) else {
            return wrong(format!(
                "a size of {} and an offset of {} must not be negative",
                request.file_size, request.offset
            ));
        };
        let mode = request.file_mode & 0o7777;
        // Of hosts that fill in no type, all mean a file.
        let node = match request.file_mode & libc::S_IFMT {
            libc::S_IFDIR => Node::Directory { mode },
            libc::S_IFLNK => match CString::new(request.data) {
                Ok(target) if (1..=PATH).contains(&target.as_bytes().len()) => Node::Symlink { target },
                _ => return wrong(format!("a link's target has 1 to {PATH} bytes and no NUL")),
            },
            libc::S_IFREG | 0 => {
                let end = offset.checked_add(request.data.len() as u64);
                if size > LARGEST || end.is_none_or(|end| end > size) {
                    return wrong(format!(
                        "{} bytes at {offset} do not fit in a file of {size}, or that is more than {LARGEST}",
                        request.data.len()
                    ));
                }
                // A set-uid program is no file to hand to a guest, and the kernel drops the bits with a change of owner.
                Node::File { mode: mode & 0o777, size, offset, data: request.data }
            }
            kind => return wrong(format!("a file of type {kind:#o} is neither regular, directory nor link")),
        };
        let owner = Owner::new(request.uid, request.gid);
        Ok(Copy { parent, name, node, owner, dir_mode: request.dir_mode & 0o777 })
    }

    fn path(&self) -> PathBuf {
        self.parent.join(std::ffi::OsStr::new(self.name.to_str().unwrap_or_default()))
    }
}

/// Sorts a path of a request into the directory below the share's root and the name in it.
fn place(path: &str) -> Result<(PathBuf, CString)> {
    let wrong = |what: String| Error::Invalid(format!("copy to {path:?}: {what}"));
    let below = path
        .strip_prefix(GUEST_SHARE)
        .filter(|below| below.starts_with('/'))
        .ok_or_else(|| wrong(format!("files go below {GUEST_SHARE}")))?;
    if path.len() > PATH {
        return Err(wrong(format!("the path has {} bytes, {PATH} are possible", path.len())));
    }
    let mut names: Vec<&str> = below.split('/').filter(|name| !matches!(*name, "" | ".")).collect();
    if let Some(name) = names.iter().find(|name| **name == ".." || name.len() > NAME) {
        return Err(wrong(format!("{name:?} is no name for a file")));
    }
    let name = names.pop().ok_or_else(|| wrong("that is the share itself".into()))?;
    if path.contains('\0') {
        return Err(wrong("a path has no NUL".into()));
    }
    Ok((names.iter().collect(), CString::new(name).map_err(|error| wrong(error.to_string()))?))
}

impl Copies {
    /// Copies to a share that is at `root` in the agent's own sight.
    pub(crate) fn below(root: impl Into<PathBuf>) -> Copies {
        Copies { root: root.into(), staged: Mutex::default() }
    }

    /// Does what a request asks for. Blocks.
    pub(crate) fn copy(&self, request: CopyFileRequest) -> Result<()> {
        let text = request.path.clone();
        let copy = Copy::plan(request)?;
        let parent = self.parent(&copy).map_err(|errno| refused(&text, errno))?;
        let what = || format!("copy to {text:?}");
        match &copy.node {
            Node::Directory { mode } => directory(&parent, &copy, *mode).during(what),
            Node::Symlink { target } => link(&parent, &copy, target).during(what),
            Node::File { mode, size, offset, data } => {
                let path = copy.path();
                let (begun, mut partial) = if *offset == 0 {
                    (self.begin(&path)?, Partial::new(parent, *size).during(what))
                } else {
                    let (begun, partial) = self.resume(&path, *size, *offset)?;
                    (begun, Ok(partial))
                };
                if let Ok(partial) = &mut partial
                    && let Err(error) = partial.write(*offset, data).during(what)
                {
                    self.forget(&path, begun);
                    return Err(error);
                }
                match partial {
                    Ok(partial) if partial.written < *size => {
                        self.park(&path, begun, partial);
                        Ok(())
                    }
                    partial => {
                        self.forget(&path, begun);
                        partial?.publish(&copy, *mode).during(what)
                    }
                }
            }
        }
    }

    /// Drops what is not complete: the sandbox ends.
    pub(crate) fn clear(&self) {
        lock(&self.staged).slots.clear();
    }

    /// Opens the directory that a copy goes to; makes it, and those above it, with the mode and owner of the request.
    fn parent(&self, copy: &Copy) -> rustix::io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let root = match tree::open(&self.root, flags) {
            Err(Errno::NOENT) => {
                std::fs::DirBuilder::new()
                    .recursive(true)
                    .mode(0o755)
                    .create(&self.root)
                    .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
                tree::open(&self.root, flags)?
            }
            root => root?,
        };
        match tree::open_below(&root, &copy.parent, flags) {
            Err(Errno::NOENT) => {}
            parent => return parent,
        }
        let mut path = PathBuf::new();
        let mut at = tree::open_below(&root, &path, flags)?;
        for name in &copy.parent {
            path.push(name);
            at = match tree::open_below(&root, &path, flags) {
                Err(Errno::NOENT) => match rustix::fs::mkdirat(&at, name, Mode::RWXU) {
                    Ok(()) => {
                        let made = tree::open_below(&at, Path::new(name), flags | OFlags::NOFOLLOW)?;
                        tree::set_owner(&made, copy.owner.uid, copy.owner.gid)?;
                        tree::set_mode(&made, copy.dir_mode)?;
                        made
                    }
                    // Somebody was quicker. Or it is a link that leads to nothing, which this says.
                    Err(Errno::EXIST) => tree::open_below(&root, &path, flags)?,
                    Err(errno) => return Err(errno),
                },
                opened => opened?,
            };
        }
        Ok(at)
    }

    fn begin(&self, path: &Path) -> Result<u64> {
        let mut staged = lock(&self.staged);
        if !staged.slots.contains_key(path) && staged.slots.len() >= STAGED {
            let idle = staged.slots.iter().filter(|(_, slot)| slot.partial.is_some());
            let oldest = idle.min_by_key(|(_, slot)| slot.used).map(|(path, _)| path.clone());
            let oldest =
                oldest.ok_or_else(|| Error::State(format!("{STAGED} files are being copied at once")))?;
            tracing::warn!(path = %oldest.display(), "a copy was not completed and is dropped for another");
            staged.slots.remove(&oldest);
        }
        staged.turns += 1;
        let begun = staged.turns;
        staged.slots.insert(path.to_owned(), Slot { begun, used: begun, partial: None });
        Ok(begun)
    }

    fn resume(&self, path: &Path, size: u64, offset: u64) -> Result<(u64, Partial)> {
        let wrong = |what: String| Error::State(format!("copy to {:?}: {what}", path.display()));
        let mut staged = lock(&self.staged);
        staged.turns += 1;
        let used = staged.turns;
        let slot = staged
            .slots
            .get_mut(path)
            .ok_or_else(|| wrong(format!("a piece at {offset} without the ones before it")))?;
        let partial = slot.partial.as_ref();
        let partial = partial.ok_or_else(|| wrong("another piece is being written".into()))?;
        if partial.size != size {
            return Err(Error::Invalid(format!(
                "copy to {:?}: a file of {} bytes cannot become one of {size}",
                path.display(),
                partial.size
            )));
        }
        if offset > partial.written {
            return Err(wrong(format!("a piece at {offset} when {} bytes are there", partial.written)));
        }
        slot.used = used;
        let begun = slot.begun;
        slot.partial.take().map(|partial| (begun, partial)).ok_or_else(|| wrong("it is gone".into()))
    }

    /// Keeps a file until its next piece, unless it was begun again meanwhile.
    fn park(&self, path: &Path, begun: u64, partial: Partial) {
        if let Some(slot) = lock(&self.staged).slots.get_mut(path).filter(|slot| slot.begun == begun) {
            slot.partial = Some(partial);
        }
    }

    fn forget(&self, path: &Path, begun: u64) {
        let mut staged = lock(&self.staged);
        if staged.slots.get(path).is_some_and(|slot| slot.begun == begun) {
            staged.slots.remove(path);
        }
    }
}

fn refused(path: &str, errno: Errno) -> Error {
    match errno {
        Errno::XDEV | Errno::LOOP => {
            Error::Invalid(format!("copy to {path:?}: a link on the way leads out of the share"))
        }
        Errno::NOTDIR => Error::State(format!("copy to {path:?}: what is above it is not a directory")),
        errno => Error::Io { what: format!("prepare the directory of {path:?}"), source: errno.into() },
    }
}

impl Partial {
    fn new(parent: OwnedFd, size: u64) -> rustix::io::Result<Partial> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let (file, name) = match rustix::fs::openat(&parent, c".", flags | OFlags::TMPFILE, mode) {
            // What a file system says that has no files without a name.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOSYS) => {
                let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
                let (file, name) = with_new_name(|name| rustix::fs::openat(&parent, name, flags, mode))?;
                (file, Some(name))
            }
            file => (file?, None),
        };
        Ok(Partial { file: file.into(), parent, name, size, written: 0 })
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.file.write_all_at(data, offset)?;
        self.written = self.written.max(offset + data.len() as u64);
        Ok(())
    }

    /// Gives it owner and mode, and then its name.
    fn publish(mut self, copy: &Copy, mode: u32) -> rustix::io::Result<()> {
        rustix::fs::fchown(&self.file, copy.owner.uid, copy.owner.gid)?;
        rustix::fs::fchmod(&self.file, Mode::from_raw_mode(mode))?;
        if self.name.is_none() {
            let from = tree::by_descriptor(&self.file);
            let link = |name: &std::ffi::CStr| {
                rustix::fs::linkat(rustix::fs::CWD, &from, &self.parent, name, AtFlags::SYMLINK_FOLLOW)
            };
            match link(&copy.name) {
                Err(Errno::EXIST) => {}
                linked => return linked,
            }
            self.name = Some(with_new_name(link)?.1);
        }
        if let Some(name) = &self.name {
            replace(&self.parent, name, &copy.name)?;
            self.name = None;
        }
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            // Nobody is left to hear of it.
            let _ = rustix::fs::unlinkat(&self.parent, name, AtFlags::empty());
        }
    }
}

/// Makes something under a name that nothing else has, nor comes to have.
fn with_new_name<T>(
    make: impl Fn(&std::ffi::CStr) -> rustix::io::Result<T>,
) -> rustix::io::Result<(T, CString)> {
    loop {
        // Its keys are the kernel's randomness.
        let random = RandomState::new().hash_one(0);
        let name = CString::new(format!(".bulkhead-copy-{random:016x}")).map_err(|_| Errno::INVAL)?;
        match make(&name) {
            Err(Errno::EXIST) => {}
            made => return made.map(|made| (made, name)),
        }
    }
}

/// Moves something complete to its name, over what is there; a directory cannot be covered and goes first.
fn replace(parent: &OwnedFd, from: &std::ffi::CStr, to: &std::ffi::CStr) -> rustix::io::Result<()> {
    match rustix::fs::renameat(parent, from, parent, to) {
        Err(Errno::ISDIR) => {
            tree::remove(parent, to)?;
            rustix::fs::renameat(parent, from, parent, to)
        }
        renamed => renamed,
    }
}

fn directory(parent: &OwnedFd, copy: &Copy, mode: u32) -> rustix::io::Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let made = match rustix::fs::openat(parent, &copy.name, flags, Mode::empty()) {
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {
            match rustix::fs::unlinkat(parent, &copy.name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT | Errno::ISDIR) => {}
                Err(errno) => return Err(errno),
            }
            match rustix::fs::mkdirat(parent, &copy.name, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno),
            }
            rustix::fs::openat(parent, &copy.name, flags, Mode::empty())?
        }
        opened => opened?,
    };
    tree::set_owner(&made, copy.owner.uid, copy.owner.gid)?;
    tree::set_mode(&made, mode)
}

fn link(parent: &OwnedFd, copy: &Copy, target: &std::ffi::CStr) -> rustix::io::Result<()> {
    let ((), name) = with_new_name(|name| rustix::fs::symlinkat(target, parent, name))?;
    let own = rustix::fs::chownat(parent, &name, copy.owner.uid, copy.owner.gid, AtFlags::SYMLINK_NOFOLLOW);
    let made = own.and_then(|()| replace(parent, &name, &copy.name));
    if made.is_err() {
        let _ = rustix::fs::unlinkat(parent, &name, AtFlags::empty());
    }
    made
}

/// The file type bits are the wire's; this keeps them honest.
const _: () = assert!(libc::S_IFMT == 0o170_000 && FileType::RegularFile.as_raw_mode() == libc::S_IFREG);

#[cfg(any(test, fuzzing))]
/// Lines of kind, offset, size, path and contents: nothing beside the share is changed.
pub(crate) fn fuzz(text: &str) {
    let world = crate::fuzz::World::new();
    let copies = Copies::below(world.root());
    for line in crate::fuzz::lines(text) {
        let [kind, offset, size, path, data] = crate::fuzz::words(line);
        let file_mode = match kind {
            "d" => libc::S_IFDIR | 0o755,
            "l" => libc::S_IFLNK,
            "f" => libc::S_IFREG | 0o644,
            other => other.parse().unwrap_or(0),
        };
        let file_size = size.parse().unwrap_or_else(|_| i64::try_from(data.len()).unwrap_or(0));
        let (uid, gid) = (7, -1);
        let path = format!("{GUEST_SHARE}/{path}");
        let (data, offset) = (data.as_bytes().to_vec(), offset.parse().unwrap_or(0));
        let request =
            CopyFileRequest { path, file_size, file_mode, uid, gid, offset, data, ..Default::default() };
        let _ = copies.copy(request);
    }
    copies.clear();
    world.unharmed();
}

#[cfg(test)]
#[path = "copy_tests.rs"]
mod tests;
