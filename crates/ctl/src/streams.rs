//! The user's standard streams, and what goes between them and a container.
//!
//! The descriptors 0, 1 and 2 belong to the user's shell and its other programs as well: they are never made non-blocking.
//! Blocking reads and writes happen on threads, and pipes of our own stand between those and everything asynchronous.

use std::{
    io::{self, Read, Write as _},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, OnceLock},
    time::Instant,
};

use bulkhead_protocol::ports::STDIO_CHUNK;
use rustix::{
    event::{PollFd, PollFlags, poll},
    pipe::PipeFlags,
};
use tokio::{
    net::unix::pipe::Receiver,
    sync::{Notify, watch},
};

/// One of the user's outputs.
#[derive(Clone, Debug)]
pub(crate) struct Sink {
    fd: Arc<OwnedFd>,
    name: &'static str,
    health: Arc<Health>,
}

/// What is known of all outputs together.
#[derive(Debug, Default)]
pub(crate) struct Health {
    first: OnceLock<Instant>,
    failure: OnceLock<(&'static str, io::Error)>,
    failed: Notify,
}

impl Health {
    /// When the container's first byte came.
    pub(crate) fn first_output(&self) -> Option<Instant> {
        self.first.get().copied()
    }

    /// Resolves when an output can take no more. Cancel safe.
    pub(crate) async fn failed(&self) {
        let notified = self.failed.notified();
        if self.failure.get().is_none() {
            notified.await;
        }
    }

    /// Why an output can take no more: its name and the error.
    pub(crate) fn failure(&self) -> Option<&(&'static str, io::Error)> {
        self.failure.get()
    }

    /// Whether an output's reader has gone, which is nothing to complain about.
    pub(crate) fn reader_is_gone(&self) -> bool {
        self.failure().is_some_and(|(_, error)| error.kind() == io::ErrorKind::BrokenPipe)
    }
}

impl Sink {
    /// The user's standard output.
    pub(crate) fn stdout(health: &Arc<Health>) -> io::Result<Sink> {
        Sink::new(io::stdout().as_fd(), "standard output", health)
    }

    /// The user's standard error.
    pub(crate) fn stderr(health: &Arc<Health>) -> io::Result<Sink> {
        Sink::new(io::stderr().as_fd(), "standard error", health)
    }

    fn new(fd: BorrowedFd<'_>, name: &'static str, health: &Arc<Health>) -> io::Result<Sink> {
        Ok(Sink { fd: Arc::new(fd.try_clone_to_owned()?), name, health: Arc::clone(health) })
    }

    /// Writes all of it; `false` when the output can take no more.
    pub(crate) async fn write(&self, bytes: Vec<u8>) -> bool {
        if bytes.is_empty() {
            return true;
        }
        self.health.first.get_or_init(Instant::now);
        let fd = Arc::clone(&self.fd);
        let written = tokio::task::spawn_blocking(move || write_all(fd.as_fd(), &bytes)).await;
        match written.map_err(io::Error::other).and_then(|written| written) {
            Ok(()) => true,
            Err(error) => {
                let _ = self.health.failure.set((self.name, error));
                self.health.failed.notify_waiters();
                false
            }
        }
    }
}

/// A pipe for an output of the container: the end to give away, and the task that copies to the user until the pipe ends,
/// or until `ended` says that all is in it and it is empty.
pub(crate) fn output(
    sink: Sink,
    ended: watch::Receiver<bool>,
) -> io::Result<(OwnedFd, tokio::task::JoinHandle<()>)> {
    let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let receiver = Receiver::from_owned_fd(read)?;
    Ok((write, tokio::spawn(copy(receiver, sink, ended))))
}

async fn copy(pipe: Receiver, sink: Sink, mut ended: watch::Receiver<bool>) {
    loop {
        let mut bytes = vec![0; 2 * STDIO_CHUNK];
        match pipe.try_read(&mut bytes) {
            Ok(0) => return,
            Ok(read) => {
                bytes.truncate(read);
                if !sink.write(bytes).await {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if *ended.borrow() {
                    return;
                }
                tokio::select! {
                    ready = pipe.readable() => if ready.is_err() { return },
                    changed = ended.changed() => if changed.is_err() { return },
                }
            }
            Err(_) => return,
        }
    }
}

/// The user's standard input as the read end of a pipe. The thread that fills it ends with the input, with the reader of
/// the pipe, or with this process.
pub(crate) fn input() -> io::Result<OwnedFd> {
    let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    std::thread::Builder::new().name("stdin".into()).spawn(move || {
        let mut buffer = vec![0; STDIO_CHUNK];
        let mut stdin = std::fs::File::from(io::stdin().as_fd().try_clone_to_owned()?);
        loop {
            match stdin.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(read) => write_all(write.as_fd(), &buffer[..read])?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    wait(stdin.as_fd(), PollFlags::IN)?
                }
                Err(error) => return Err(error),
            }
        }
    })?;
    Ok(read)
}

/// Writes all of it, also to a descriptor that somebody else has made non-blocking.
fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(fd, bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => wait(fd, PollFlags::OUT)?,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn wait(fd: BorrowedFd<'_>, flags: PollFlags) -> io::Result<()> {
    match poll(&mut [PollFd::from_borrowed_fd(fd, flags)], None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// One line to the user, who may be in raw mode and may have gone.
pub(crate) fn say(text: &str) {
    let end = if crate::tty::needs_return() { "\r\n" } else { "\n" };
    let _ = write!(io::stderr(), "{text}{end}");
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn pipe() -> (OwnedFd, OwnedFd) {
        rustix::pipe::pipe_with(PipeFlags::CLOEXEC).unwrap()
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    #[test]
    fn output_is_complete_though_the_writer_keeps_its_end() {
        runtime().block_on(async {
            let (mut to_read, to_write) = {
                let (read, write) = pipe();
                (std::fs::File::from(read), write)
            };
            let health = Arc::new(Health::default());
            let sink = Sink::new(to_write.as_fd(), "x", &health).unwrap();
            drop(to_write);
            let (end, ended) = watch::channel(false);
            let (write, task) = output(sink, ended).unwrap();
            let mut kept = std::fs::File::from(write);
            let reader = std::thread::spawn(move || {
                let mut all = Vec::new();
                to_read.read_to_end(&mut all).unwrap();
                all.len()
            });
            let kept = tokio::task::spawn_blocking(move || {
                kept.write_all(&vec![7; 3_000_000]).unwrap();
                kept
            });
            let kept = kept.await.unwrap();
            end.send(true).unwrap();
            task.await.unwrap();
            assert!(health.first_output().is_some());
            drop(kept);
            assert_eq!(reader.join().unwrap(), 3_000_000);
        });
    }

    #[test]
    fn a_reader_that_goes_is_noticed() {
        runtime().block_on(async {
            let (read, write) = pipe();
            let health = Arc::new(Health::default());
            let sink = Sink::new(write.as_fd(), "x", &health).unwrap();
            assert!(sink.write(b"a".to_vec()).await);
            assert!(health.failure().is_none());
            drop(read);
            assert!(!sink.write(b"b".to_vec()).await);
            health.failed().await;
            assert!(health.reader_is_gone());
        });
    }
}
