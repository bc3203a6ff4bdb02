//! The standard streams of a process, as the pull model of the protocol wants them: reads that wait for the first byte,
//! writes that take everything, and an end that always comes.
//!
//! A pipe ends when its last writer is gone. That writer may be a background process that outlives the process proper, so
//! what is in the pipe when the process is seen to have exited is the last of it: all that the process wrote is there by
//! then. Nothing polls: a read waits for whichever of the two events comes first.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Weak},
};

use rustix::{
    buffer::spare_capacity,
    io::Errno,
    termios::{LocalModes, SpecialCodeIndex, Winsize},
};
use tokio::{
    io::{AsyncWrite, AsyncWriteExt, Interest, unix::AsyncFd},
    sync::{Mutex, watch},
};

use crate::sys;

/// A read returns at most this much; with its envelope it must stay below ttrpc's 4 MiB.
const READ_LIMIT: usize = 1 << 20;

/// A copied output travels in pieces of at most this much.
const COPY: usize = 64 << 10;

/// An exit code once there is one.
pub(crate) type Exit = watch::Receiver<Option<i32>>;

type Descriptor = Arc<AsyncFd<OwnedFd>>;

/// The readable end of a process' output. Reads of one stream are served in turn.
pub(crate) struct Output {
    /// Gone once the end was seen.
    source: Mutex<Option<Source>>,
}

#[derive(Clone)]
struct Source {
    descriptor: Descriptor,
    /// Once its session has ended, a terminal ends for everybody; a pipe does not.
    terminal: bool,
    /// How many bytes of a pipe are still the process', known when it has exited.
    left: Option<usize>,
}

/// The writable end of a process' input. Writes are served in turn.
pub(crate) struct Input {
    writer: Mutex<Option<Writer>>,
}

struct Writer {
    descriptor: Descriptor,
    terminal: bool,
    /// A terminal line has been begun and not ended.
    open_line: bool,
}

/// A process' three streams and, when it has one, its terminal.
pub(crate) struct Streams {
    /// Standard input.
    pub(crate) stdin: Input,
    /// Standard output; a terminal's only output.
    pub(crate) stdout: Output,
    /// Standard error.
    pub(crate) stderr: Output,
    terminal: Option<Weak<AsyncFd<OwnedFd>>>,
}

impl Streams {
    /// Takes over the descriptors of a process; has to be called on the runtime. A `pipe_size` above 0 enlarges the output
    /// pipes.
    pub(crate) fn new(streams: bulkhead_executor::Streams, pipe_size: usize) -> io::Result<Streams> {
        if let Some(terminal) = streams.terminal {
            let master = Arc::new(sys::watch(terminal, Interest::READABLE | Interest::WRITABLE)?);
            return Ok(Streams {
                terminal: Some(Arc::downgrade(&master)),
                stdin: Input::new(Some(Arc::clone(&master)), true),
                stdout: Output::new(Some(master), true),
                stderr: Output::new(None, true),
            });
        }
        for output in [&streams.stdout, &streams.stderr].into_iter().flatten() {
            if pipe_size > 0
                && let Err(error) = rustix::pipe::fcntl_setpipe_size(output, pipe_size)
            {
                tracing::warn!(pipe_size, %error, "cannot resize an output pipe");
            }
        }
        Ok(Streams {
            terminal: None,
            stdin: Input::new(writable(streams.stdin)?, false),
            stdout: Output::new(readable(streams.stdout)?, false),
            stderr: Output::new(readable(streams.stderr)?, false),
        })
    }

    /// Sets the size of the terminal in characters. `None`: there is no terminal (any more).
    pub(crate) fn resize(&self, rows: u16, columns: u16) -> Option<io::Result<()>> {
        let terminal = self.terminal.as_ref()?.upgrade()?;
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        Some(rustix::termios::tcsetwinsize(terminal.get_ref(), size).map_err(io::Error::from))
    }

    /// Whether they are those of a terminal.
    pub(crate) fn terminal(&self) -> bool {
        self.terminal.is_some()
    }

    /// Whether every output has been read to its end.
    pub(crate) fn drained(&self) -> bool {
        let ended = |output: &Output| output.source.try_lock().is_ok_and(|source| source.is_none());
        ended(&self.stdout) && ended(&self.stderr)
    }
}

fn readable(descriptor: Option<OwnedFd>) -> io::Result<Option<Descriptor>> {
    descriptor.map(|fd| sys::watch(fd, Interest::READABLE).map(Arc::new)).transpose()
}

fn writable(descriptor: Option<OwnedFd>) -> io::Result<Option<Descriptor>> {
    descriptor.map(|fd| sys::watch(fd, Interest::WRITABLE).map(Arc::new)).transpose()
}

async fn exited(exit: &mut Exit) {
    // An error means that the process' owner is gone, which ends its streams as well.
    let _ = exit.wait_for(Option::is_some).await;
}

impl Output {
    fn new(descriptor: Option<Descriptor>, terminal: bool) -> Output {
        let source = descriptor.map(|descriptor| Source { descriptor, terminal, left: None });
        Output { source: Mutex::new(source) }
    }

    /// Waits for output and returns up to `limit` bytes of it; empty at the end, and ever after.
    pub(crate) async fn read(&self, limit: usize, exit: Exit) -> io::Result<Vec<u8>> {
        let mut slot = self.source.lock().await;
        let Some(source) = slot.as_mut() else { return Ok(Vec::new()) };
        let data = source.read(limit, exit).await?;
        if data.is_empty() {
            *slot = None;
        }
        Ok(data)
    }
}

impl Output {
    /// Sends everything to `sink`, to the end. Reads that come meanwhile wait for it, and see the end. When the sink takes
    /// no more, the process writes into a closed pipe.
    pub(crate) async fn copy_to(&self, sink: &mut (impl AsyncWrite + Unpin), exit: Exit) -> io::Result<()> {
        let mut slot = self.source.lock().await;
        let Some(mut source) = slot.take() else { return Ok(()) };
        loop {
            let data = source.read(COPY, exit.clone()).await?;
            if data.is_empty() {
                return Ok(());
            }
            sink.write_all(&data).await?;
        }
    }
}

impl Source {
    async fn read(&mut self, limit: usize, mut exit: Exit) -> io::Result<Vec<u8>> {
        loop {
            let ended = exit.borrow().is_some() && !self.terminal;
            if ended && self.left.is_none() {
                self.left = Some(pending(self.descriptor.get_ref()));
            }
            if self.left == Some(0) {
                return Ok(Vec::new());
            }
            let limit = limit.min(self.left.unwrap_or(limit));
            tokio::select! {
                biased;
                ready = self.descriptor.readable() => {
                    if let Ok(data) = ready?.try_io(|fd| receive(fd.get_ref(), limit)) {
                        let data = data?;
                        self.left = self.left.map(|left| left.saturating_sub(data.len()));
                        return Ok(data);
                    }
                }
                () = exited(&mut exit), if self.left.is_none() => {
                    if self.terminal {
                        return match receive(self.descriptor.get_ref(), limit) {
                            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Vec::new()),
                            data => data,
                        };
                    }
                    // Once the owner of the exit is gone there is no code to be seen, and no more output either.
                    self.left = Some(pending(self.descriptor.get_ref()));
                }
            }
        }
    }
}

/// How many bytes are there now.
fn pending(descriptor: &OwnedFd) -> usize {
    rustix::io::ioctl_fionread(descriptor).map_or(READ_LIMIT, |n| usize::try_from(n).unwrap_or(READ_LIMIT))
}

/// Reads what is there. The memory is taken only now, so a waiting read costs none.
fn receive(descriptor: &OwnedFd, limit: usize) -> io::Result<Vec<u8>> {
    // At least one byte is asked for, or the end would never be seen.
    let mut data = Vec::with_capacity(pending(descriptor).clamp(1, limit.clamp(1, READ_LIMIT)));
    match rustix::io::retry_on_intr(|| rustix::io::read(descriptor, spare_capacity(&mut data))) {
        Ok(_) => Ok(data),
        // What the master of a terminal answers once no one has the terminal open.
        Err(Errno::IO) => Ok(Vec::new()),
        Err(errno) => Err(errno.into()),
    }
}

impl Input {
    fn new(descriptor: Option<Descriptor>, terminal: bool) -> Input {
        Input {
            writer: Mutex::new(descriptor.map(|descriptor| Writer {
                descriptor,
                terminal,
                open_line: false,
            })),
        }
    }

    /// Writes all of `data`, waiting while the process does not read. A process that exits, or has closed its input, is a
    /// broken pipe.
    pub(crate) async fn write(&self, data: &[u8], exit: Exit) -> io::Result<()> {
        let mut slot = self.writer.lock().await;
        let Some(writer) = slot.as_mut() else {
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, "standard input is closed"));
        };
        let written = writer.write(data, exit).await;
        if written.is_err() {
            *slot = None;
        }
        written
    }

    /// Ends the input, after all that has been written. A terminal stays: its reader is sent the end-of-file character.
    pub(crate) async fn close(&self, exit: Exit) {
        if let Some(mut writer) = self.writer.lock().await.take()
            && writer.terminal
        {
            // The reader may be gone by now, and has its end of file then.
            let _ = writer.end_line(exit).await;
        }
    }

    /// Lets go of the descriptor of a process that has exited. A write in progress sees the exit itself.
    pub(crate) fn abandon(&self) {
        if let Ok(mut writer) = self.writer.try_lock() {
            *writer = None;
        }
    }
}

impl Writer {
    async fn write(&mut self, mut data: &[u8], mut exit: Exit) -> io::Result<()> {
        let Some(&last) = data.last() else { return Ok(()) };
        while !data.is_empty() {
            tokio::select! {
                biased;
                ready = self.descriptor.writable() => {
                    let written = ready?.try_io(|fd| Ok(rustix::io::write(fd.get_ref().as_fd(), data)?));
                    if let Ok(written) = written {
                        data = &data[written?..];
                    }
                }
                () = exited(&mut exit) => {
                    return Err(io::Error::new(io::ErrorKind::BrokenPipe, "the process has exited"));
                }
            }
        }
        self.open_line = last != b'\n' && last != b'\r';
        Ok(())
    }

    /// Types the end-of-file character. In canonical mode it first hands over a line that was begun, and only a second one
    /// is the end of file; a program in raw mode sees the key that a person would press.
    async fn end_line(&mut self, exit: Exit) -> io::Result<()> {
        let modes = rustix::termios::tcgetattr(self.descriptor.get_ref())?;
        let end_of_file = modes.special_codes[SpecialCodeIndex::VEOF];
        let keys = [end_of_file; 2];
        let twice = self.open_line && modes.local_modes.contains(LocalModes::ICANON);
        self.write(&keys[..1 + usize::from(twice)], exit).await
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rustix::{
        fs::OFlags,
        pipe::{PipeFlags, pipe_with},
        pty::OpenptFlags,
    };

    use super::*;

    fn pipes() -> (OwnedFd, Streams) {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        let streams = bulkhead_executor::Streams { stdout: Some(reader), ..Default::default() };
        (writer, Streams::new(streams, 0).unwrap())
    }

    fn terminal() -> (OwnedFd, Streams) {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = rustix::pty::openpt(flags).unwrap();
        rustix::pty::grantpt(&master).unwrap();
        rustix::pty::unlockpt(&master).unwrap();
        let name = rustix::pty::ptsname(&master, Vec::new()).unwrap();
        let slave = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY, rustix::fs::Mode::empty()).unwrap();
        let status = rustix::fs::fcntl_getfl(&master).unwrap();
        rustix::fs::fcntl_setfl(&master, status | OFlags::NONBLOCK).unwrap();
        let streams = bulkhead_executor::Streams { terminal: Some(master), ..Default::default() };
        (slave, Streams::new(streams, 0).unwrap())
    }

    fn exit() -> (watch::Sender<Option<i32>>, Exit) {
        watch::channel(None)
    }

    #[tokio::test]
    async fn a_read_returns_what_is_there_and_no_more_than_asked() {
        let (writer, streams) = pipes();
        let (_running, exit) = exit();
        rustix::io::write(&writer, b"hello").unwrap();
        assert_eq!(streams.stdout.read(3, exit.clone()).await.unwrap(), b"hel");
        assert_eq!(streams.stdout.read(1 << 30, exit.clone()).await.unwrap(), b"lo");
        drop(writer);
        assert_eq!(streams.stdout.read(9, exit.clone()).await.unwrap(), b"");
        assert!(streams.drained());
        assert_eq!(streams.stdout.read(9, exit).await.unwrap(), b"");
    }

    #[tokio::test]
    async fn output_left_in_the_pipe_survives_the_exit_and_then_ends() {
        // The writer stays open: a background process holds it.
        let (writer, streams) = pipes();
        let (process, exit) = exit();
        rustix::io::write(&writer, b"last words").unwrap();
        process.send_replace(Some(0));
        assert_eq!(streams.stdout.read(100, exit.clone()).await.unwrap(), b"last words");
        assert_eq!(streams.stdout.read(100, exit).await.unwrap(), b"");
    }

    #[tokio::test]
    async fn a_waiting_read_ends_when_the_process_exits() {
        let (_writer, streams) = pipes();
        let (process, exit) = exit();
        let streams = Arc::new(streams);
        let reading = Arc::clone(&streams);
        let read = tokio::spawn(async move { reading.stdout.read(100, exit).await });
        tokio::task::yield_now().await;
        process.send_replace(Some(0));
        assert_eq!(read.await.unwrap().unwrap(), b"");
    }

    #[tokio::test]
    async fn a_background_process_that_never_stops_writing_does_not_delay_the_end() {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        let output = Output::new(readable(Some(reader)).unwrap(), false);
        let (process, exit) = exit();
        rustix::io::write(&writer, b"the process' own").unwrap();
        process.send_replace(Some(0));
        let mut received = Vec::new();
        loop {
            let data = output.read(5, exit.clone()).await.unwrap();
            if data.is_empty() {
                break;
            }
            received.extend(data);
            rustix::io::write(&writer, b"somebody else's").unwrap();
        }
        assert_eq!(received, b"the process' own");
    }

    #[tokio::test]
    async fn a_write_takes_everything_and_a_close_is_the_end() {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        let streams = bulkhead_executor::Streams { stdin: Some(writer), ..Default::default() };
        let streams = Arc::new(Streams::new(streams, 0).unwrap());
        let (_running, exit) = exit();
        let data: Vec<u8> = (0..300_000u32).map(|n| n.to_le_bytes()[0]).collect();
        let (writing, sent, ending) = (Arc::clone(&streams), data.clone(), exit.clone());
        let write = tokio::spawn(async move {
            writing.stdin.write(&sent, ending.clone()).await.unwrap();
            writing.stdin.close(ending).await;
        });
        let reader = Output::new(readable(Some(reader)).unwrap(), false);
        let mut received = Vec::new();
        loop {
            let data = reader.read(1000, exit.clone()).await.unwrap();
            if data.is_empty() {
                break;
            }
            received.extend(data);
        }
        write.await.unwrap();
        assert_eq!(received, data);
        let error = streams.stdin.write(b"x", exit).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[tokio::test]
    async fn a_write_that_nobody_reads_ends_with_the_process() {
        let (_reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        let streams = bulkhead_executor::Streams { stdin: Some(writer), ..Default::default() };
        let streams = Streams::new(streams, 0).unwrap();
        let (process, exit) = exit();
        let data = vec![0; 1 << 20];
        let write = streams.stdin.write(&data, exit);
        tokio::pin!(write);
        assert!(tokio::time::timeout(Duration::from_millis(20), &mut write).await.is_err());
        process.send_replace(Some(0));
        assert_eq!(write.await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[tokio::test]
    async fn closing_a_terminal_ends_its_input_and_not_the_terminal() {
        let (slave, streams) = terminal();
        let (_running, exit) = exit();
        streams.stdin.write(b"begun", exit.clone()).await.unwrap();
        streams.stdin.close(exit.clone()).await;
        let read = |slave: &OwnedFd| {
            let mut line = Vec::with_capacity(100);
            rustix::io::read(slave, spare_capacity(&mut line)).unwrap();
            line
        };
        assert_eq!(read(&slave), b"begun");
        assert_eq!(read(&slave), b"", "the second end-of-file character ends the input");
        rustix::io::write(&slave, b"still here").unwrap();
        let mut output = Vec::new();
        while !output.ends_with(b"still here") {
            output.extend(streams.stdout.read(100, exit.clone()).await.unwrap());
        }
        assert_eq!(streams.stderr.read(100, exit.clone()).await.unwrap(), b"");
        assert!(streams.resize(24, 80).unwrap().is_ok());
        drop(slave);
        assert_eq!(streams.stdout.read(100, exit).await.unwrap(), b"", "hang-up is the end");
        assert!(streams.resize(24, 80).is_none());
    }
}
