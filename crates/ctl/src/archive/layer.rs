//! Applies one image layer to a directory.
//!
//! The members come from a stranger. Each name is split and checked, its parent is opened beneath the root by the kernel
//! ([`Root`]), and the last component is only ever created, replaced or removed by name in that parent, never followed.
//! What a layer removes of the layers below it is written as white-outs: `.wh.<name>` removes a name, `.wh..wh..opq`
//! everything that the layers below put into the directory.

use std::{
    collections::HashSet,
    ffi::OsStr,
    io::{self, Read},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::{
    fs::{self, AtFlags, Dir, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags},
    io::Errno,
};
use tar::EntryType;

use super::tarball::{Member, Tarball};
use crate::{inroot::Root, tree};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Further names of the white-out scheme (`.wh..wh.plnk`, `.wh..wh.aufs`): bookkeeping of one file system.
const BOOKKEEPING: &[u8] = b".wh..wh.";
/// Deeper than any package; white-outs walk directories with a descriptor a level.
const MAX_DEPTH: usize = 256;
/// More files than any image has; a compressed layer of nothing but headers could otherwise eat every inode.
const MAX_MEMBERS: u64 = 4_000_000;

/// A layer that is being applied.
#[derive(Debug)]
pub(crate) struct Layer<'a> {
    root: &'a Root,
    /// Inodes this layer made or listed: what its own white-outs must spare.
    own: HashSet<u64>,
    /// Times of directories, set last because their content changes them.
    times: Vec<(Vec<u8>, (i64, u32))>,
}

impl<'a> Layer<'a> {
    /// A layer to be applied below `root`.
    pub(crate) fn new(root: &'a Root) -> Layer<'a> {
        Layer { root, own: HashSet::new(), times: Vec::new() }
    }

    /// Applies every member of the archive.
    pub(crate) fn apply<R: Read>(mut self, tarball: &mut Tarball<R>) -> Result<()> {
        let mut count = 0;
        while let Some(member) = tarball.next()? {
            count += 1;
            ensure!(count <= MAX_MEMBERS, "the layer has more than {MAX_MEMBERS} members");
            let name = String::from_utf8_lossy(&member.path).into_owned();
            self.member(&member, tarball).with_context(|| format!("layer member {name:?}"))?;
        }
        for (path, mtime) in &self.times {
            // A directory that a later member replaced has no times to set.
            if let Ok(dir) = self.root.open_at(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW) {
                fs::futimens(&dir, &timestamps(*mtime))?;
            }
        }
        Ok(())
    }

    fn member(&mut self, member: &Member, content: &mut impl Read) -> Result<()> {
        if member.kind == EntryType::XGlobalHeader {
            return Ok(());
        }
        let names = components(&member.path)?;
        let Some((name, parents)) = names.split_last() else {
            ensure!(member.kind == EntryType::Directory, "the root of a layer is not a directory");
            let dir = self.root.open_at(b"", OFlags::RDONLY | OFlags::DIRECTORY)?;
            return self.finish_dir(&dir, member);
        };
        let own = &mut self.own;
        let parent = self.root.make_dir(&parents.join(&b'/'), &mut |dir| own.extend(inode(dir)))?;
        if name.starts_with(WHITEOUT) {
            return self.white_out(&parent, name);
        }
        if let Some(dir) = self.clear(&parent, name, member.kind)? {
            return self.finish_dir(&dir, member);
        }
        match member.kind {
            EntryType::Directory => {
                fs::mkdirat(&parent, os(name), Mode::from_raw_mode(0o700))?;
                self.finish_dir(&open_dir(&parent, name)?, member)
            }
            EntryType::Regular | EntryType::Continuous => self.file(&parent, name, member, content),
            EntryType::Symlink => {
                fs::symlinkat(os(&member.link), &parent, os(name))?;
                self.finish_link(&parent, name, member)
            }
            EntryType::Link => self.hard_link(&parent, name, &member.link),
            EntryType::Fifo => self.node(&parent, name, member, FileType::Fifo),
            EntryType::Char => self.node(&parent, name, member, FileType::CharacterDevice),
            EntryType::Block => self.node(&parent, name, member, FileType::BlockDevice),
            other => bail!("tar members of type {:?} are not supported", char::from(other.as_byte())),
        }
    }

    /// Makes room for a member: removes what bears its name, unless both are directories; that one is handed back.
    fn clear(&mut self, parent: &OwnedFd, name: &[u8], kind: EntryType) -> Result<Option<OwnedFd>> {
        match fs::statat(parent, os(name), AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
            Ok(stat)
                if kind == EntryType::Directory
                    && FileType::from_raw_mode(stat.st_mode) == FileType::Directory =>
            {
                Ok(Some(open_dir(parent, name)?))
            }
            Ok(_) => {
                tree::remove(parent, name)?;
                Ok(None)
            }
        }
    }

    fn white_out(&mut self, parent: &OwnedFd, name: &[u8]) -> Result<()> {
        if name == OPAQUE {
            let dir = fs::openat(
                parent,
                c".",
                OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            )?;
            return self.remove_lower(&dir, 0);
        }
        if name.starts_with(BOOKKEEPING) {
            return Ok(());
        }
        let name = &name[WHITEOUT.len()..];
        ensure!(!matches!(name, b"" | b"." | b".."), "a white-out of {:?}", String::from_utf8_lossy(name));
        match fs::statat(parent, os(name), AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
            Ok(stat) if self.own.contains(&stat.st_ino) => match open_dir(parent, name) {
                // The layer lists the directory itself as well: only what is below it from other layers goes.
                Ok(dir) => self.remove_lower(&dir, 0),
                Err(_) => Ok(()),
            },
            Ok(_) => Ok(tree::remove(parent, name)?),
        }
    }

    /// Removes what is below a directory, except what this layer put there.
    fn remove_lower(&self, dir: &OwnedFd, depth: usize) -> Result<()> {
        ensure!(depth < MAX_DEPTH, "directories are nested too deep");
        for entry in Dir::read_from(dir)? {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let stat = fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
            let own = self.own.contains(&stat.st_ino);
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                self.remove_lower(&open_dir(dir, name.to_bytes())?, depth + 1)?;
                if !own {
                    // Something of ours may be left in it.
                    match fs::unlinkat(dir, name, AtFlags::REMOVEDIR) {
                        Ok(()) | Err(Errno::NOTEMPTY | Errno::EXIST) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
            } else if !own {
                fs::unlinkat(dir, name, AtFlags::empty())?;
            }
        }
        Ok(())
    }

    fn file(
        &mut self,
        parent: &OwnedFd,
        name: &[u8],
        member: &Member,
        content: &mut impl Read,
    ) -> Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = fs::openat(parent, os(name), flags, Mode::from_raw_mode(0o600))?;
        let mut file = std::fs::File::from(fd);
        io::copy(content, &mut file)?;
        self.finish(file.as_fd(), member)?;
        Ok(fs::futimens(&file, &timestamps(member.mtime))?)
    }

    fn hard_link(&mut self, parent: &OwnedFd, name: &[u8], target: &[u8]) -> Result<()> {
        let names = components(target).context("hard link")?;
        let Some((last, parents)) = names.split_last() else { bail!("a hard link to the root") };
        let from = self.root.dir(&parents.join(&b'/')).context("hard link")?;
        fs::linkat(&from, os(last), parent, os(name), AtFlags::empty())
            .with_context(|| format!("hard link to {:?}", String::from_utf8_lossy(target)))?;
        self.own.insert(fs::statat(parent, os(name), AtFlags::SYMLINK_NOFOLLOW)?.st_ino);
        Ok(())
    }

    fn node(&mut self, parent: &OwnedFd, name: &[u8], member: &Member, kind: FileType) -> Result<()> {
        let (major, minor) = member.device;
        fs::mknodat(parent, os(name), kind, Mode::from_raw_mode(0o600), fs::makedev(major, minor))?;
        self.finish_link(parent, name, member)?;
        // A node just made by us cannot be a link.
        Ok(fs::chmodat(parent, os(name), Mode::from_raw_mode(member.mode), AtFlags::empty())?)
    }

    /// Owner and times of what cannot be opened.
    fn finish_link(&mut self, parent: &OwnedFd, name: &[u8], member: &Member) -> Result<()> {
        let (uid, gid) = owner(member);
        fs::chownat(parent, os(name), uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
        fs::utimensat(parent, os(name), &timestamps(member.mtime), AtFlags::SYMLINK_NOFOLLOW)?;
        self.own.insert(fs::statat(parent, os(name), AtFlags::SYMLINK_NOFOLLOW)?.st_ino);
        Ok(())
    }

    fn finish_dir(&mut self, dir: &OwnedFd, member: &Member) -> Result<()> {
        self.times.push((member.path.clone(), member.mtime));
        self.finish(dir.as_fd(), member)
    }

    /// Owner, then mode (a change of owner clears the set-id bits), then attributes.
    fn finish(&mut self, fd: BorrowedFd<'_>, member: &Member) -> Result<()> {
        let (uid, gid) = owner(member);
        fs::fchown(fd, uid, gid)?;
        fs::fchmod(fd, Mode::from_raw_mode(member.mode))?;
        for (name, value) in &member.xattrs {
            // The rest (trusted.overlay.*, system.*, labels of the build host) means something only where it was made.
            if name == "security.capability" || name.starts_with("user.") {
                match fs::fsetxattr(fd, name.as_str(), value, XattrFlags::empty()) {
                    Ok(()) | Err(Errno::OPNOTSUPP) => {}
                    Err(error) => return Err(error).with_context(|| format!("attribute {name}")),
                }
            }
        }
        self.own.extend(inode(fd));
        Ok(())
    }
}

/// The names in a path. A leading `/` is the layer's root; `..` has no place in an image.
fn components(path: &[u8]) -> Result<Vec<&[u8]>> {
    let names: Vec<&[u8]> =
        path.split(|byte| *byte == b'/').filter(|name| !matches!(*name, b"" | b".")).collect();
    ensure!(
        !names.contains(&&b".."[..]),
        "the path {:?} leads out of the layer",
        String::from_utf8_lossy(path)
    );
    ensure!(names.len() <= MAX_DEPTH, "the path has {} components", names.len());
    Ok(names)
}

fn os(name: &[u8]) -> &OsStr {
    OsStr::from_bytes(name)
}

fn inode(fd: impl AsFd) -> Option<u64> {
    fs::fstat(fd).ok().map(|stat| stat.st_ino)
}

fn open_dir(parent: &OwnedFd, name: &[u8]) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(fs::openat(parent, os(name), flags, Mode::empty())?)
}

fn owner(member: &Member) -> (Option<Uid>, Option<Gid>) {
    (Some(Uid::from_raw(member.uid)), Some(Gid::from_raw(member.gid)))
}

fn timestamps((seconds, nanos): (i64, u32)) -> Timestamps {
    let time = Timespec { tv_sec: seconds, tv_nsec: i64::from(nanos) };
    Timestamps { last_access: time, last_modification: time }
}
