//! Starting a child: this same binary, executed again.
//!
//! Nothing runs between fork and exec (`Command` without hooks is posix_spawn(3)), so that threads and their locks do
//! not matter. The child inherits its end of the channel as standard input and nothing else; every other descriptor
//! travels over the channel.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Command, Stdio},
    sync::OnceLock,
    time::Duration,
};

use rustix::fs::{MemfdFlags, SealFlags};

use crate::{
    Error, Stage,
    channel::{Channel, Failure, FromChild, ToChild},
    plan::Plan,
    sys,
};

/// What the child is called, which is also how it knows that it is one.
pub(crate) const NAME: &str = "bulkhead-init";

/// A child that does not answer for so long is stuck in the kernel, in a file system that does not answer either.
const PATIENCE: Duration = Duration::from_secs(120);

/// The descriptors that go with a plan, in the order it names.
#[derive(Debug, Default)]
pub(crate) struct Descriptors {
    /// The cgroup's directory.
    pub(crate) cgroup: Option<OwnedFd>,
    /// The child's ends of its standard streams; empty for a terminal.
    pub(crate) stdio: Vec<OwnedFd>,
    /// Namespaces to join.
    pub(crate) namespaces: Vec<OwnedFd>,
}

/// A child that has been started. Dropping it closes the channel, which ends a parked one.
#[derive(Debug)]
pub(crate) struct Child {
    /// As the caller sees it.
    pub(crate) pid: i32,
    /// Refers to it whatever becomes of the pid.
    pub(crate) pidfd: OwnedFd,
    channel: Channel,
    early: VecDeque<(FromChild, Vec<OwnedFd>)>,
    terminal: Option<OwnedFd>,
}

impl Child {
    /// Starts a child; returns when the process exists.
    pub(crate) fn spawn(plan: Plan, descriptors: &Descriptors) -> Result<Child, Error> {
        let executable = executable().map_err(Error::io("copying /proc/self/exe to memory"))?;
        let (channel, theirs) = Channel::pair().map_err(Error::io("making a socket pair"))?;
        let patience = PATIENCE.saturating_add(plan.setup.hooks.patience());
        channel.set_timeout(patience).map_err(Error::io("setting a socket timeout"))?;
        #[allow(clippy::zombie_processes, reason = "whoever owns SIGCHLD reaps")]
        Command::new(format!("/proc/self/fd/{}", executable.as_raw_fd()))
            .arg0(NAME)
            .env_clear()
            .stdin(Stdio::from(theirs))
            .spawn()
            .map_err(Error::io(format!("starting {NAME}")))?;

        let fds: Vec<BorrowedFd<'_>> = descriptors
            .cgroup
            .iter()
            .chain(&descriptors.stdio)
            .chain(&descriptors.namespaces)
            .map(AsFd::as_fd)
            .collect();
        let sent = channel.send(&ToChild::Plan(Box::new(plan)), &fds);
        // The process speaks on the same channel as the child that made it, and may be the first to.
        let mut early = VecDeque::new();
        loop {
            // A child that is gone may have said why.
            match receive(&channel) {
                Ok((FromChild::Spawned { pid }, fds)) => match fds.into_iter().next() {
                    Some(pidfd) => return Ok(Child { pid, pidfd, channel, early, terminal: None }),
                    None => return Err(unexpected("no pidfd")),
                },
                Ok(message) => early.push_back(message),
                Err(error) => {
                    return Err(sent.err().map_or(error, Error::io(format!("sending a plan to {NAME}"))));
                }
            }
        }
    }

    fn next(&mut self) -> Result<(FromChild, Vec<OwnedFd>), Error> {
        self.early.pop_front().map_or_else(|| receive(&self.channel), Ok)
    }

    /// Waits until a container is made and its init parked; returns its namespaces. `mounted` is called with the pid
    /// once the container has its mounts, if the plan has the child wait for that.
    pub(crate) fn ready(
        &mut self,
        mounted: impl Fn(i32) -> Result<(), Error>,
    ) -> Result<Vec<OwnedFd>, Error> {
        loop {
            match self.next()? {
                (FromChild::Mounted, _) => {
                    mounted(self.pid)?;
                    // A child that is gone says so in its stead.
                    let _ = self.channel.send(&ToChild::Continue, &[]);
                }
                (FromChild::Ready, namespaces) => return Ok(namespaces),
                (FromChild::Terminal, fds) => self.terminal = fds.into_iter().next(),
                (other, _) => return Err(unexpected(&format!("{other:?}"))),
            }
        }
    }

    /// Waits until the command is being executed.
    pub(crate) fn executed(&mut self) -> Result<(), Error> {
        loop {
            match self.next()? {
                (FromChild::Terminal, fds) => self.terminal = fds.into_iter().next(),
                (FromChild::Executing, _) => return silence(&self.channel),
                (other, _) => return Err(unexpected(&format!("{other:?}"))),
            }
        }
    }

    /// The terminal's master, if the child sent one.
    pub(crate) fn take_terminal(&mut self) -> Option<OwnedFd> {
        self.terminal.take()
    }

    /// Kills the process.
    pub(crate) fn kill(&self) {
        // The only failure is that it is gone already.
        let _ = sys::pidfd_signal(self.pidfd.as_fd(), libc::SIGKILL);
    }

    /// Gives the parts away: the pid, the pidfd, and the channel for [`release`].
    pub(crate) fn into_parts(self) -> (i32, OwnedFd, Channel) {
        (self.pid, self.pidfd, self.channel)
    }
}

/// Lets a parked init go on; returns when its command is being executed.
pub(crate) fn release(channel: &Channel) -> Result<(), Error> {
    let sent = channel.send(&ToChild::Release, &[]);
    executed(channel).map_err(|error| match sent {
        Err(source) if source.kind() != io::ErrorKind::BrokenPipe => {
            Error::Io { what: "releasing the container".to_owned(), source }
        }
        _ => error,
    })
}

fn executed(channel: &Channel) -> Result<(), Error> {
    match receive(channel)? {
        (FromChild::Executing, _) => silence(channel),
        (other, _) => Err(unexpected(&format!("{other:?}"))),
    }
}

/// From `Executing` on, silence is success: execve closes the channel.
fn silence(channel: &Channel) -> Result<(), Error> {
    match channel.receive::<FromChild>() {
        Ok(None) => Ok(()),
        Ok(Some((FromChild::Spawned { .. }, _))) => silence(channel),
        Ok(Some((FromChild::Failed(failure), _))) => Err(error(failure)),
        Ok(Some((other, _))) => Err(unexpected(&format!("{other:?}"))),
        Err(source) => Err(broken(source)),
    }
}

fn receive(channel: &Channel) -> Result<(FromChild, Vec<OwnedFd>), Error> {
    match channel.receive() {
        Ok(Some((FromChild::Failed(failure), _))) => Err(error(failure)),
        Ok(Some(message)) => Ok(message),
        Ok(None) => Err(ended()),
        Err(source) => Err(broken(source)),
    }
}

fn ended() -> Error {
    Error::Child {
        stage: Stage::Spawn,
        detail: None,
        source: io::Error::new(io::ErrorKind::UnexpectedEof, "it ended before its command was executed"),
    }
}

/// Whether a child has ended without a word, and so was killed.
pub(crate) fn is_end(error: &Error) -> bool {
    matches!(error, Error::Child { stage: Stage::Spawn, source, .. } if source.kind() == io::ErrorKind::UnexpectedEof)
}

fn broken(source: io::Error) -> Error {
    let source = match source.kind() {
        // It was killed with a message of ours unread.
        io::ErrorKind::ConnectionReset => return ended(),
        io::ErrorKind::WouldBlock => io::Error::new(
            io::ErrorKind::TimedOut,
            format!("no answer for {} s; is a file system it uses stuck?", PATIENCE.as_secs()),
        ),
        _ => source,
    };
    Error::Io { what: format!("hearing from {NAME}"), source }
}

fn unexpected(what: &str) -> Error {
    Error::Io {
        what: format!("hearing from {NAME}"),
        source: io::Error::other(format!("unexpected: {what}")),
    }
}

/// What a failure in the child is to the caller. The command's own failures carry their text in the detail.
fn error(failure: Failure) -> Error {
    let Failure { stage, detail, errno } = failure;
    match (stage, errno, detail) {
        (Stage::FindCommand | Stage::Exec, libc::ENOENT | libc::ENOTDIR, Some(text)) => {
            Error::CommandNotFound(text)
        }
        (Stage::User, libc::ENOENT, Some(text)) => Error::Invalid(text),
        (Stage::Hook, _, Some(text)) => Error::Hook(text),
        (Stage::FindCommand, _, Some(text))
        | (
            Stage::Exec,
            libc::EACCES
            | libc::EPERM
            | libc::ENOEXEC
            | libc::EISDIR
            | libc::ELIBBAD
            | libc::ELOOP
            | libc::ETXTBSY,
            Some(text),
        ) => Error::CommandNotExecutable(text),
        (stage, errno, detail) => Error::Child { stage, detail, source: io::Error::from_raw_os_error(errno) },
    }
}

/// This program, in memory that nobody can write to.
///
/// A container's process can reach the file that an executor's child was executed from (`/proc/<pid>/exe`), and write
/// to it once nothing runs from it any more (CVE-2019-5736). It gets at this copy instead, which is sealed. The copy is
/// made once, at the first container.
fn executable() -> io::Result<&'static OwnedFd> {
    static COPY: OnceLock<OwnedFd> = OnceLock::new();
    if let Some(copy) = COPY.get() {
        return Ok(copy);
    }
    let copy = sealed_copy()?;
    Ok(COPY.get_or_init(|| copy))
}

fn sealed_copy() -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // Kernels before 6.3 do not know that memory files may be executable, and let them be.
    let copy = match rustix::fs::memfd_create(NAME, flags | MemfdFlags::EXEC) {
        Err(rustix::io::Errno::INVAL) => rustix::fs::memfd_create(NAME, flags)?,
        copy => copy?,
    };
    let mut copy = File::from(copy);
    io::copy(&mut File::open("/proc/self/exe")?, &mut copy)?;
    let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&copy, seals)?;
    Ok(copy.into())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn the_copy_of_the_program_cannot_be_written_to() {
        let copy = executable().unwrap();
        let mut file =
            File::options().write(true).open(format!("/proc/self/fd/{}", copy.as_raw_fd())).unwrap();
        assert_eq!(file.write(b"x").unwrap_err().raw_os_error(), Some(libc::EPERM));
        let own = std::fs::metadata("/proc/self/exe").unwrap().len();
        assert_eq!(file.metadata().unwrap().len(), own);
        assert!(std::ptr::eq(copy, executable().unwrap()), "it is made once");
    }

    #[test]
    fn failures_of_the_command_have_kinds_of_their_own() {
        let fail =
            |stage, errno, detail: &str| error(Failure { stage, errno, detail: Some(detail.to_owned()) });
        assert!(matches!(fail(Stage::FindCommand, libc::ENOENT, "x"), Error::CommandNotFound(t) if t == "x"));
        assert!(matches!(fail(Stage::FindCommand, libc::EACCES, "x"), Error::CommandNotExecutable(_)));
        assert!(matches!(fail(Stage::Exec, libc::ENOEXEC, "x"), Error::CommandNotExecutable(_)));
        assert!(matches!(fail(Stage::Exec, libc::E2BIG, "x"), Error::Child { .. }));
        assert_eq!(
            fail(Stage::Mounts, libc::EPERM, "proc at /proc").to_string(),
            "container process failed while mounting (proc at /proc): Operation not permitted (os error 1)"
        );
    }
}
