//! The two ends of a process' standard streams.

use std::os::fd::OwnedFd;

use rustix::{
    fs::OFlags,
    pipe::{PipeFlags, pipe_with},
};

use crate::{Error, container::Streams};

/// The child's ends (none for a terminal, which the child opens itself) and the caller's.
pub(crate) fn make(terminal: bool) -> Result<(Vec<OwnedFd>, Streams), Error> {
    if terminal {
        return Ok((Vec::new(), Streams::default()));
    }
    let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(Error::io("making a pipe"));
    let (stdin, stdin_writer) = pipe()?;
    let (stdout_reader, stdout) = pipe()?;
    let (stderr_reader, stderr) = pipe()?;
    let streams = Streams {
        stdin: Some(non_blocking(stdin_writer)?),
        stdout: Some(non_blocking(stdout_reader)?),
        stderr: Some(non_blocking(stderr_reader)?),
        terminal: None,
    };
    Ok((vec![stdin, stdout, stderr], streams))
}

impl Streams {
    /// With the terminal's master that the child sent.
    pub(crate) fn with_terminal(mut self, terminal: Option<OwnedFd>) -> Result<Streams, Error> {
        self.terminal = terminal.map(non_blocking).transpose()?;
        Ok(self)
    }
}

/// The flag belongs to this end alone, since each end of a pipe is an open file of its own, as is a pty's master.
fn non_blocking(fd: OwnedFd) -> Result<OwnedFd, Error> {
    let flags = rustix::fs::fcntl_getfl(&fd).map_err(Error::io("reading flags of a stream"))?;
    rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(Error::io("setting flags of a stream"))?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_ends_do_not_block() {
        let (theirs, ours) = make(false).unwrap();
        let blocks = |fd: &OwnedFd| !rustix::fs::fcntl_getfl(fd).unwrap().contains(OFlags::NONBLOCK);
        assert_eq!(theirs.len(), 3);
        assert!(theirs.iter().all(blocks));
        assert!(![ours.stdin, ours.stdout, ours.stderr].iter().flatten().any(blocks));
        let (theirs, ours) = make(true).unwrap();
        assert!(theirs.is_empty() && ours.stdin.is_none());
    }
}
