//! The caller's `/proc`: a descriptor taken before any container is entered, so that what is written there cannot land
//! in something that a container has put in its place (CVE-2019-16884, CVE-2025-52881).

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::fault::Fault;

/// linux/magic.h
pub(super) const PROC_MAGIC: i64 = 0x9fa0;

/// A proc file system.
#[derive(Debug)]
pub(super) struct Procfs(OwnedFd);

impl Procfs {
    /// That of the caller.
    pub(super) fn open() -> Result<Procfs, Fault> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(rustix::fs::CWD, "/proc", flags, Mode::empty())?;
        if !is_proc(fd.as_fd())? {
            return Err(Fault::new(libc::ENODEV, "the caller's /proc is not a proc file system"));
        }
        Ok(Procfs(fd))
    }

    fn file(&self, path: &str, flags: OFlags) -> io::Result<OwnedFd> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        Ok(rustix::fs::openat2(&self.0, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)?)
    }

    /// Reads a small file.
    pub(super) fn read(&self, path: &str) -> io::Result<String> {
        io::read_to_string(std::fs::File::from(self.file(path, OFlags::RDONLY)?))
    }

    /// Writes a file with one call, as the kernel wants it.
    pub(super) fn write(&self, path: &str, value: &str) -> io::Result<()> {
        let written = rustix::io::write(self.file(path, OFlags::WRONLY)?, value.as_bytes())?;
        if written == value.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// A namespace that the process is in.
    pub(super) fn namespace(&self, name: &str) -> io::Result<OwnedFd> {
        // A magic link, on purpose: the way into the file system that namespaces are files of.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&self.0, format!("self/ns/{name}"), flags, Mode::empty())?)
    }
}

/// Whether `fd` is in a proc file system.
pub(super) fn is_proc(fd: impl AsFd) -> io::Result<bool> {
    Ok(rustix::fs::fstatfs(fd)?.f_type == PROC_MAGIC)
}
