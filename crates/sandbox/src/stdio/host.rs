//! The host's ends of standard streams. Opening never blocks, and a fifo's reader may come late or never:
//!
//! - an output fifo is opened for reading too, so that what a fast process wrote stays in it until the process is deleted,
//!   and writing is never a broken pipe;
//! - an input fifo is only read: it ends when its last writer has gone, and not before the first has come.

use std::{
    fs,
    io::{self, ErrorKind},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{DirBuilderExt, FileTypeExt},
    },
    path::Path,
};

use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl, open};
use tokio::io::{Interest, unix::AsyncFd};

use super::{Stdio, StdioTarget, sys::watch};
use crate::{Error, error::os};

/// One end, ready for use by the runtime.
#[derive(Debug)]
pub(crate) enum HostEnd {
    /// Pipes, terminals, sockets: the kernel tells when they are ready.
    Evented(AsyncFd<OwnedFd>),
    /// Files and such devices as are always ready.
    Direct(OwnedFd),
}

/// The host's ends of a process' streams; `None` is nowhere.
#[derive(Debug, Default)]
pub(crate) struct Ends {
    pub(crate) stdin: Option<HostEnd>,
    pub(crate) stdout: Option<HostEnd>,
    pub(crate) stderr: Option<HostEnd>,
    /// Read ends of output fifos, to be kept until the process is deleted.
    pub(crate) kept: Vec<OwnedFd>,
    /// The output goes to a descriptor of ours, whose reader may take all the time there is: a pager, say.
    pub(crate) patient: bool,
}

impl Ends {
    /// Opens what the streams name. To be called inside the runtime.
    pub(crate) fn open(stdio: Stdio) -> Result<Ends, Error> {
        let patient =
            [&stdio.stdout, &stdio.stderr].iter().any(|target| matches!(target, StdioTarget::Fd(_)));
        let mut ends = Ends { stdin: input(stdio.stdin)?, patient, ..Default::default() };
        ends.stdout = output(stdio.stdout, &mut ends.kept)?;
        if !stdio.terminal {
            ends.stderr = output(stdio.stderr, &mut ends.kept)?;
        }
        Ok(ends)
    }
}

impl HostEnd {
    fn new(fd: OwnedFd, interest: Interest) -> Result<HostEnd, Error> {
        watch(fd, interest).map(HostEnd::Evented).or_else(|(fd, error)| {
            // epoll's answer to files and to devices that are always ready.
            let direct = error.kind() == ErrorKind::PermissionDenied;
            if direct { Ok(HostEnd::Direct(fd)) } else { Err(os("waiting for a stream")(error)) }
        })
    }

    /// Reads what is there, waiting for something to be there; 0 is the end. Cancelling loses nothing.
    pub(crate) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            HostEnd::Evented(end) => end.async_io(Interest::READABLE, |fd| read_end(fd, buffer)).await,
            HostEnd::Direct(fd) => read_end(fd, buffer),
        }
    }

    /// Reads what is there now.
    pub(crate) fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            HostEnd::Evented(end) => read_end(end.get_ref(), buffer),
            HostEnd::Direct(fd) => read_end(fd, buffer),
        }
    }

    /// Writes some, waiting for room. Cancelling writes nothing.
    pub(crate) async fn write(&self, data: &[u8]) -> io::Result<usize> {
        match self {
            HostEnd::Evented(end) => {
                end.async_io(Interest::WRITABLE, |fd| Ok(rustix::io::write(fd, data)?)).await
            }
            HostEnd::Direct(fd) => Ok(rustix::io::write(fd, data)?),
        }
    }
}

fn read_end(fd: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    match rustix::io::read(fd, buffer) {
        // A terminal whose other side is gone.
        Err(rustix::io::Errno::IO) => Ok(0),
        result => Ok(result?),
    }
}

fn input(target: StdioTarget) -> Result<Option<HostEnd>, Error> {
    let fd = match target {
        StdioTarget::Null => return Ok(None),
        StdioTarget::Fd(fd) => unblocked(fd, OFlags::RDONLY)?,
        StdioTarget::Uri(uri) => match place(&uri)? {
            None => return Ok(None),
            Some(Place::File(_)) => {
                return Err(Error::Invalid(format!("stdin {uri}: file:// is for output; name a fifo")));
            }
            // A fifo that no writer has opened yet is not readable, neither is it at its end.
            Some(Place::Path(path)) => open_end(path, OFlags::RDONLY)?,
        },
    };
    HostEnd::new(fd, Interest::READABLE).map(Some)
}

fn output(target: StdioTarget, kept: &mut Vec<OwnedFd>) -> Result<Option<HostEnd>, Error> {
    let fd = match target {
        StdioTarget::Null => return Ok(None),
        StdioTarget::Fd(fd) => unblocked(fd, OFlags::WRONLY)?,
        StdioTarget::Uri(uri) => match place(&uri)? {
            None => return Ok(None),
            Some(Place::File(path)) => log_file(path)?,
            Some(Place::Path(path)) if is_fifo(path)? => {
                // The read end first: with it, opening the write end does not wait for a reader.
                kept.push(open_end(path, OFlags::RDONLY)?);
                open_end(path, OFlags::WRONLY)?
            }
            Some(Place::Path(path)) => open_end(path, OFlags::WRONLY | OFlags::APPEND)?,
        },
    };
    HostEnd::new(fd, Interest::WRITABLE).map(Some)
}

enum Place<'u> {
    /// A fifo, or something else that exists.
    Path(&'u Path),
    /// A file that is made when it is not there.
    File(&'u Path),
}

fn place(uri: &str) -> Result<Option<Place<'_>>, Error> {
    let (place, path): (fn(_) -> _, &str) = match uri.split_once("://") {
        None => (Place::Path, uri),
        Some(("fifo", path)) => (Place::Path, path),
        Some(("file", path)) => (Place::File, path),
        Some((scheme, _)) => {
            return Err(Error::Unsupported(format!(
                "the stream {uri}: {scheme}:// (use a fifo, or file://)"
            )));
        }
    };
    if path.is_empty() {
        return Ok(None);
    }
    if !path.starts_with('/') {
        return Err(Error::Invalid(format!("the stream {uri}: an absolute path is expected")));
    }
    Ok(Some(place(Path::new(path))))
}

fn is_fifo(path: &Path) -> Result<bool, Error> {
    let metadata = fs::metadata(path).map_err(os(format!("opening the stream {}", path.display())))?;
    Ok(metadata.file_type().is_fifo())
}

fn open_end(path: &Path, flags: OFlags) -> Result<OwnedFd, Error> {
    let flags = flags | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    open(path, flags, Mode::empty()).map_err(os(format!("opening the stream {}", path.display())))
}

fn log_file(path: &Path) -> Result<OwnedFd, Error> {
    let failed = |error: io::Error| os(format!("opening the stream {}", path.display()))(error);
    if let Some(parent) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(parent).map_err(failed)?;
    }
    let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOCTTY;
    open(path, flags, Mode::from_raw_mode(0o640)).map_err(|errno| failed(errno.into()))
}

/// A non-blocking descriptor for the same thing. It is opened anew, since the flag belongs to the open file and would
/// otherwise change for everybody else who has it: a shell's terminal, for one.
fn unblocked(fd: OwnedFd, access: OFlags) -> Result<OwnedFd, Error> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let kind = fs::metadata(&path).map_err(os("looking at a stream"))?.file_type();
    if kind.is_file() {
        // Anew would mean another position; files never block.
        return Ok(fd);
    }
    let flags = access | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    match open(path.as_str(), flags, Mode::empty()) {
        Ok(anew) => Ok(anew),
        // Sockets cannot be opened, and a terminal may belong to another user.
        Err(_) => {
            let set = fcntl_getfl(&fd).and_then(|flags| fcntl_setfl(&fd, flags | OFlags::NONBLOCK));
            set.map_err(os("making a stream non-blocking"))?;
            Ok(fd)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::unix::fs::PermissionsExt,
        time::Duration,
    };

    use super::*;

    fn fifo(directory: &Path, name: &str) -> String {
        let path = directory.join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        path.to_str().unwrap().to_owned()
    }

    #[tokio::test]
    async fn a_fifo_keeps_output_for_a_reader_who_comes_late() {
        let directory = tempfile::tempdir().unwrap();
        let path = fifo(directory.path(), "out");
        let stdio = Stdio { stdout: StdioTarget::Uri(path.clone()), ..Default::default() };
        let mut ends = Ends::open(stdio).unwrap();
        assert_eq!(ends.stdout.as_ref().unwrap().write(b"early").await.unwrap(), 5);
        ends.stdout = None;
        // The writer is gone, the kept end is not: whoever opens now without waiting still finds the text, and its end.
        let mut reader = fs::File::from(open_end(Path::new(&path), OFlags::RDONLY).unwrap());
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "early");
    }

    #[tokio::test]
    async fn an_input_fifo_ends_with_its_last_writer_and_not_before_its_first() {
        let directory = tempfile::tempdir().unwrap();
        let path = fifo(directory.path(), "in");
        let ends = Ends::open(Stdio { stdin: StdioTarget::Uri(path.clone()), ..Default::default() }).unwrap();
        let end = ends.stdin.unwrap();
        let mut buffer = [0; 8];
        let early = tokio::time::timeout(Duration::from_millis(50), end.read(&mut buffer)).await;
        assert!(early.is_err(), "no writer has come: {early:?}");
        let mut writer = fs::OpenOptions::new().write(true).open(&path).unwrap();
        writer.write_all(b"abc").unwrap();
        assert_eq!(end.read(&mut buffer).await.unwrap(), 3);
        assert_eq!(end.try_read(&mut buffer).unwrap_err().kind(), ErrorKind::WouldBlock);
        drop(writer);
        assert_eq!(end.read(&mut buffer).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_log_file_is_made_and_appended_to() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b/log");
        for text in ["one ", "two"] {
            let target = || StdioTarget::Uri(format!("file://{}", path.display()));
            let ends =
                Ends::open(Stdio { stdout: target(), stderr: target(), ..Default::default() }).unwrap();
            ends.stdout.unwrap().write(text.as_bytes()).await.unwrap();
            ends.stderr.unwrap().write(b"! ").await.unwrap();
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "one ! two! ");
        let mode = fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode & !0o640, 0, "{mode:o}");
    }

    #[tokio::test]
    async fn what_is_no_stream_is_refused() {
        let open = |uri: &str, input: bool| {
            let target = StdioTarget::Uri(uri.to_owned());
            let stdio = Stdio::default();
            let stdio =
                if input { Stdio { stdin: target, ..stdio } } else { Stdio { stdout: target, ..stdio } };
            Ends::open(stdio).map(drop)
        };
        assert!(matches!(open("binary:///bin/log?x=1", false), Err(Error::Unsupported(_))));
        assert!(matches!(open("relative", false), Err(Error::Invalid(_))));
        assert!(matches!(open("file:///tmp/x", true), Err(Error::Invalid(_))));
        assert!(matches!(open("/nonexistent/fifo", false), Err(Error::Io { .. })));
        assert!(open("", true).is_ok() && open("", false).is_ok());
    }

    #[tokio::test]
    async fn descriptors_keep_their_flags() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let ours = writer.try_clone().unwrap();
        let ends = Ends::open(Stdio { stdout: StdioTarget::Fd(ours), ..Default::default() }).unwrap();
        assert_eq!(ends.stdout.unwrap().write(b"x").await.unwrap(), 1);
        assert!(!fcntl_getfl(&writer).unwrap().contains(OFlags::NONBLOCK));
        drop((reader, writer));
        let null = OwnedFd::from(fs::File::open("/dev/null").unwrap());
        let ends = Ends::open(Stdio { stdin: StdioTarget::Fd(null), ..Default::default() }).unwrap();
        assert_eq!(ends.stdin.unwrap().read(&mut [0; 8]).await.unwrap(), 0);
    }
}
