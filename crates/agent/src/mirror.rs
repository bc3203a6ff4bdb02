//! A copy of a tree that is brought up to date by looking at the original again.
//!
//! ```text
//! scan ─► what differs from the last time? ─► new files, staged and renamed ─► scan again: still the same?
//!                                                        yes: links, `..data` first ─► what is gone goes
//! ```
//! So a reader of the copy sees what a reader of the original could see: a file is the old one or the new one, and a link
//! is swapped when all that it leads to is there. Links of the original are copied, never followed; whoever can write to
//! the copy cannot lead a write out of it.

use std::{
    collections::BTreeMap,
    ffi::{CString, OsStr},
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::{
    fs::{
        AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid,
        inotify::{self, WatchFlags},
    },
    io::Errno,
};

use crate::tree;

/// An original that changes while it is copied is begun again so often before it is left to the next time.
const TRIES: usize = 5;
/// The link that a Kubernetes volume is switched by.
const SWITCH: &str = "..data";
/// Modes on the way; the staging directory is nobody's but the agent's.
const PRIVATE: Mode = Mode::RWXU;

/// What there is to know of an original without reading its files, by the path below its root.
type Tree = BTreeMap<PathBuf, Entry>;

#[derive(Clone, Debug, PartialEq)]
struct Entry {
    kind: FileType,
    mode: u32,
    uid: u32,
    gid: u32,
    /// Of a directory these change with what is in it, which is compared anyway.
    content: Option<Content>,
    target: Option<CString>,
}

#[derive(Clone, Debug, PartialEq)]
struct Content {
    device: u64,
    inode: u64,
    size: i64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Entry {
    fn new(status: &Stat, target: Option<CString>) -> Entry {
        let kind = tree::kind(status);
        let nanoseconds = |part| i64::try_from(part).unwrap_or(0);
        let content = Content {
            device: status.st_dev,
            inode: status.st_ino,
            size: status.st_size,
            modified: (status.st_mtime, nanoseconds(status.st_mtime_nsec)),
            changed: (status.st_ctime, nanoseconds(status.st_ctime_nsec)),
        };
        Entry {
            kind,
            mode: status.st_mode & 0o7777,
            uid: status.st_uid,
            gid: status.st_gid,
            content: (!kind.is_dir()).then_some(content),
            target,
        }
    }

    fn owner(&self) -> (Option<Uid>, Option<Gid>) {
        (Some(Uid::from_raw(self.uid)), Some(Gid::from_raw(self.gid)))
    }
}

/// One original and its copy.
pub(crate) struct Mirror {
    source: PathBuf,
    /// Holds the copy, and beside it what is not complete.
    directory: OwnedFd,
    name: CString,
    staging: CString,
    seen: Tree,
    changes: Option<OwnedFd>,
}

/// How an update ended.
#[derive(Debug, PartialEq)]
pub(crate) enum Updated {
    /// The copy is as the original was a moment ago.
    Done,
    /// The original changes too fast.
    Again,
}

impl Mirror {
    /// A copy of `source` as `name` in `directory`, which is the agent's. Nothing is copied yet.
    pub(crate) fn new(source: PathBuf, directory: OwnedFd, name: CString) -> Mirror {
        let staging = [b".bulkhead-staging-", name.as_bytes()].concat();
        // A name has no NUL, and it comes from one.
        let staging = CString::new(staging).unwrap_or_default();
        Mirror { source, directory, name, staging, seen: Tree::new(), changes: None }
    }

    /// Has the kernel tell of changes, from the next update on.
    pub(crate) fn tell(&mut self, inotify: OwnedFd) {
        self.changes = Some(inotify);
    }

    /// Brings the copy up to date, unless `stopped`. Blocks as long as the original does.
    pub(crate) fn update(&mut self, stopped: &AtomicBool) -> io::Result<Updated> {
        for _ in 0..TRIES {
            let source = self.open_source()?;
            let now = scan(&source, self.changes.as_ref())?;
            if now == self.seen {
                return Ok(Updated::Done);
            }
            match self.take_over(&source, &now, stopped) {
                Ok(true) => {
                    self.seen = now;
                    return Ok(Updated::Done);
                }
                Ok(false) if stopped.load(Ordering::Relaxed) => return Ok(Updated::Done),
                Ok(false) => {}
                Err(errno) => {
                    // How much of it was done is anybody's guess; all of it is done again.
                    self.seen.clear();
                    // What was to be copied may be gone meanwhile.
                    if !matches!(errno, Errno::NOENT | Errno::NOTDIR | Errno::LOOP) {
                        return Err(errno.into());
                    }
                }
            }
        }
        Ok(Updated::Again)
    }

    fn open_source(&self) -> rustix::io::Result<OwnedFd> {
        tree::open(&self.source, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY)
    }

    /// Makes the copy what `now` says. False if the original has changed meanwhile, or nobody wants the copy any more.
    fn take_over(&self, source: &OwnedFd, now: &Tree, stopped: &AtomicBool) -> rustix::io::Result<bool> {
        tree::remove(&self.directory, &self.staging)?;
        rustix::fs::mkdirat(&self.directory, &self.staging, PRIVATE)?;
        let staging = tree::open_entry(&self.directory, &self.staging, OFlags::PATH | OFlags::DIRECTORY)?;
        let taken = self.take_over_through(&staging, source, now, stopped);
        tree::remove(&self.directory, &self.staging)?;
        taken
    }

    fn take_over_through(
        &self,
        staging: &OwnedFd,
        source: &OwnedFd,
        now: &Tree,
        stopped: &AtomicBool,
    ) -> rustix::io::Result<bool> {
        let changed = |path: &Path, entry: &Entry| self.seen.get(path) != Some(entry);
        // A directory sorts before what is in it.
        for (path, entry) in now.iter().filter(|(path, entry)| changed(path, entry)) {
            if stopped.load(Ordering::Relaxed) {
                return Ok(false);
            }
            if entry.kind.is_dir() {
                self.make_directory(path, entry)?;
            } else if entry.kind.is_file() && !self.make_file(staging, source, path, entry)? {
                return Ok(false);
            }
        }
        if scan(&self.open_source()?, self.changes.as_ref())? != *now {
            return Ok(false);
        }
        let mut links: Vec<_> =
            now.iter().filter(|(path, entry)| entry.target.is_some() && changed(path, entry)).collect();
        links.sort_by_key(|(path, _)| path.file_name() != Some(OsStr::new(SWITCH)));
        for (path, entry) in links {
            self.make_link(staging, path, entry)?;
        }
        for path in self.scan_copy()?.keys().rev().filter(|path| !now.contains_key(*path)) {
            match self.place(path) {
                Err(Errno::NOENT) => {}
                place => {
                    let (parent, name) = place?;
                    tree::remove(&parent, &name)?;
                }
            }
        }
        Ok(true)
    }

    /// What the copy really holds: also what an update left there that was begun again, and what its users made.
    fn scan_copy(&self) -> rustix::io::Result<Tree> {
        match tree::open_entry(&self.directory, &self.name, OFlags::RDONLY | OFlags::NONBLOCK) {
            Ok(copy) => scan(&copy, None),
            Err(Errno::NOENT) => Ok(Tree::new()),
            Err(errno) => Err(errno),
        }
    }

    /// The directory and the name of an entry in the copy.
    fn place(&self, path: &Path) -> rustix::io::Result<(OwnedFd, CString)> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let Some(name) = path.file_name() else {
            return Ok((rustix::fs::openat(&self.directory, c".", flags, Mode::empty())?, self.name.clone()));
        };
        let name = CString::new(name.to_owned().into_vec()).map_err(|_| Errno::INVAL)?;
        let root = Path::new(OsStr::from_bytes(self.name.as_bytes()));
        let parent = root.join(path.parent().unwrap_or(Path::new("")));
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        Ok((rustix::fs::openat2(&self.directory, parent, flags, Mode::empty(), resolve)?, name))
    }

    fn make_directory(&self, path: &Path, entry: &Entry) -> rustix::io::Result<()> {
        let (parent, name) = self.place(path)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let made = match tree::open_entry(&parent, &name, flags) {
            Ok(there) => there,
            Err(_) => {
                tree::remove(&parent, &name)?;
                rustix::fs::mkdirat(&parent, &name, PRIVATE)?;
                tree::open_entry(&parent, &name, flags)?
            }
        };
        let (uid, gid) = entry.owner();
        tree::set_owner(&made, uid, gid)?;
        tree::set_mode(&made, entry.mode)
    }

    /// False if the file is no longer the one that was seen.
    fn make_file(
        &self,
        staging: &OwnedFd,
        source: &OwnedFd,
        path: &Path,
        entry: &Entry,
    ) -> rustix::io::Result<bool> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let single = path.as_os_str().is_empty();
        let original = if single {
            self.open_source()?
        } else {
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
            rustix::fs::openat2(source, path, flags, Mode::empty(), resolve)?
        };
        let same = |file: &File| rustix::fs::fstat(file).map(|status| Entry::new(&status, None) == *entry);
        let mut original = File::from(original);
        if !same(&original)? {
            return Ok(false);
        }
        let (parent, name) = self.place(path)?;
        // Whoever bound a single file has bound the file and not its name, so that one keeps its inode.
        let (mut copy, staged) = match single.then(|| open_for_writing(&parent, &name)) {
            Some(Ok(there)) => (there, false),
            _ => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                tree::remove(staging, c"file")?;
                (File::from(rustix::fs::openat(staging, c"file", flags, PRIVATE)?), true)
            }
        };
        let failed = |error: io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
        if staged {
            io::copy(&mut original, &mut copy).map_err(failed)?;
        } else {
            overwrite(&mut original, &copy).map_err(failed)?;
        }
        if !same(&original)? {
            return Ok(false);
        }
        let (uid, gid) = entry.owner();
        rustix::fs::fchown(&copy, uid, gid)?;
        rustix::fs::fchmod(&copy, Mode::from_raw_mode(entry.mode))?;
        if let Some(Content { modified: (tv_sec, tv_nsec), .. }) = entry.content {
            let modified = Timespec { tv_sec, tv_nsec };
            rustix::fs::futimens(&copy, &Timestamps { last_access: modified, last_modification: modified })?;
        }
        if staged {
            self.put(staging, c"file", &parent, &name)?;
        }
        Ok(true)
    }

    fn make_link(&self, staging: &OwnedFd, path: &Path, entry: &Entry) -> rustix::io::Result<()> {
        let Some(target) = &entry.target else { return Ok(()) };
        let (parent, name) = self.place(path)?;
        rustix::fs::symlinkat(target, staging, c"link")?;
        let (uid, gid) = entry.owner();
        rustix::fs::chownat(staging, c"link", uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
        self.put(staging, c"link", &parent, &name)
    }

    /// Moves something complete to its place; a directory there has to go first.
    fn put(
        &self,
        staging: &OwnedFd,
        from: &std::ffi::CStr,
        parent: &OwnedFd,
        name: &std::ffi::CStr,
    ) -> rustix::io::Result<()> {
        match rustix::fs::renameat(staging, from, parent, name) {
            Err(Errno::ISDIR) => {
                tree::remove(parent, name)?;
                rustix::fs::renameat(staging, from, parent, name)
            }
            renamed => renamed,
        }
    }
}

fn scan(root: &OwnedFd, changes: Option<&OwnedFd>) -> rustix::io::Result<Tree> {
    let status = rustix::fs::fstat(root)?;
    let mut found = Tree::new();
    if tree::kind(&status).is_dir() {
        scan_directory(root, &PathBuf::new(), changes, &mut found, 0)?;
    } else if let Some(changes) = changes {
        inotify::add_watch(changes, tree::by_descriptor(root), TOLD)?;
    }
    found.insert(PathBuf::new(), Entry::new(&status, None));
    Ok(found)
}

fn scan_directory(
    directory: &OwnedFd,
    path: &Path,
    changes: Option<&OwnedFd>,
    found: &mut Tree,
    depth: usize,
) -> rustix::io::Result<()> {
    if depth == tree::DEPTH {
        return Err(Errno::NAMETOOLONG);
    }
    if let Some(changes) = changes {
        // Before it is read, so that nothing falls between.
        inotify::add_watch(changes, tree::by_descriptor(directory), TOLD)?;
    }
    for name in tree::entries(directory)? {
        let below = path.join(OsStr::from_bytes(name.as_bytes()));
        let status = match rustix::fs::statat(directory, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => continue,
            status => status?,
        };
        let kind = tree::kind(&status);
        let mut target = None;
        if kind.is_dir() {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            match rustix::fs::openat(directory, &name, flags, Mode::empty()) {
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                opened => scan_directory(&opened?, &below, changes, found, depth + 1)?,
            }
        } else if kind.is_symlink() {
            match rustix::fs::readlinkat(directory, &name, Vec::new()) {
                Err(Errno::NOENT | Errno::INVAL) => continue,
                read => target = Some(read?),
            }
        } else if !kind.is_file() {
            // Pipes, sockets and devices are no content.
            continue;
        }
        found.insert(below, Entry::new(&status, target));
    }
    Ok(())
}

/// All that changes what a scan finds.
const TOLD: WatchFlags = WatchFlags::MODIFY
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::CREATE)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVE)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE_SELF);

fn open_for_writing(parent: &impl AsFd, name: &std::ffi::CStr) -> rustix::io::Result<File> {
    tree::open_entry(parent, name, OFlags::WRONLY).map(File::from)
}

/// Replaces what a file holds from its beginning, piece by piece, and cuts it last: it is never shorter than both.
fn overwrite(from: &mut impl io::Read, mut to: &File) -> io::Result<()> {
    let length = io::copy(from, &mut to)?;
    to.set_len(length)
}

#[cfg(test)]
#[path = "mirror_tests.rs"]
mod tests;
