//! Standard streams over connections of their own, instead of by request.
//!
//! The host connects first, once for each stream, and then names the ports it connected from in the request that makes
//! the process. Input ends when the host shuts its connection down; the exit is told once the output is with the host.
//! Nothing waits for a background process that holds an output: see `stream`.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::Notify,
};

use crate::{
    container::{Container, Found},
    error::{Error, Result},
    port,
    process::Process,
    stream::Output,
    sync::lock,
};

/// So many connections wait to be named; the oldest go first.
const WAITING: usize = 256;
/// A connection that nobody names within this time is closed when the next one comes.
const AGE: Duration = Duration::from_secs(60);
/// A request can overtake the connections that it names by this much.
const OVERTAKEN: Duration = Duration::from_millis(300);
/// Input travels in pieces of at most this much.
const PIECE: usize = 64 << 10;

/// A connection of the host.
pub(crate) trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

/// Connections that wait to be named, oldest first.
#[derive(Default)]
pub(crate) struct Passed {
    /// Nobody listens for connections unless the port is open.
    open: std::sync::atomic::AtomicBool,
    waiting: Mutex<VecDeque<Waiting>>,
    arrived: Notify,
}

struct Waiting {
    port: u32,
    since: Instant,
    connection: Box<dyn Connection>,
}

/// The connections of one process; a stream that has none is not wanted.
#[derive(Default)]
pub(crate) struct Streams {
    stdin: Option<Box<dyn Connection>>,
    stdout: Option<Box<dyn Connection>>,
    stderr: Option<Box<dyn Connection>>,
}

/// Takes connections at a vsock port. Has to be called on the runtime.
pub(crate) fn serve(port: u32, passed: Arc<Passed>) -> Result<()> {
    passed.open.store(true, std::sync::atomic::Ordering::Relaxed);
    port::serve(port, "standard streams", move |connection, peer| passed.arrive(peer, Box::new(connection)))
}

impl Passed {
    fn arrive(&self, port: u32, connection: Box<dyn Connection>) {
        let gone: Vec<Waiting> = {
            let mut waiting = lock(&self.waiting);
            let old = waiting.iter().take_while(|waiting| waiting.since.elapsed() > AGE).count();
            let excess = (waiting.len() + 1).saturating_sub(WAITING);
            let gone = waiting.drain(..old.max(excess)).collect();
            waiting.push_back(Waiting { port, since: Instant::now(), connection });
            gone
        };
        for waiting in &gone {
            tracing::warn!(port = waiting.port, "closed a connection for a stream that nobody has named");
        }
        self.arrived.notify_waiters();
    }

    /// The connections that a request names for input, output and errors; `None` when it names none at all.
    pub(crate) async fn take(&self, ports: [u32; 3]) -> Result<Option<Streams>> {
        let [stdin, stdout, stderr] = ports;
        if ports == [0; 3] {
            return Ok(None);
        }
        if !self.open.load(std::sync::atomic::Ordering::Relaxed) {
            return Err(Error::Unsupported(
                "standard streams over vsock ports unless agent.passfd_listener_port is set".into(),
            ));
        }
        Ok(Some(Streams {
            stdin: self.take_one(stdin, "stdin_port").await?,
            stdout: self.take_one(stdout, "stdout_port").await?,
            stderr: self.take_one(stderr, "stderr_port").await?,
        }))
    }

    async fn take_one(&self, port: u32, field: &str) -> Result<Option<Box<dyn Connection>>> {
        if port == 0 {
            return Ok(None);
        }
        let arrival = async {
            loop {
                let arrived = self.arrived.notified();
                {
                    let mut waiting = lock(&self.waiting);
                    // The last one: a port that is used again stands for its latest connection.
                    let found = waiting.iter().rposition(|waiting| waiting.port == port);
                    if let Some(found) = found.and_then(|index| waiting.remove(index)) {
                        return found.connection;
                    }
                }
                arrived.await;
            }
        };
        tokio::time::timeout(OVERTAKEN, arrival).await.map(Some).map_err(|_| {
            Error::Invalid(format!("{field} {port}: no connection came from that port of the host"))
        })
    }
}

/// Connects a process that a request just made with what the request named.
pub(crate) async fn attach(
    streams: Option<Streams>,
    container: &Arc<Container>,
    exec_id: &str,
) -> Result<()> {
    if let Some(streams) = streams
        && let Found::Live(process) = container.find(exec_id).await?
    {
        let (container, exec_id) = (Arc::clone(container), exec_id.to_owned());
        let drained = Arc::clone(&container);
        streams.attach(&process, move || drained.drained(&exec_id));
        if container.closed() {
            process.copy_ends();
        }
    }
    Ok(())
}

impl Streams {
    /// Connects a process that was just made. `drained` is called once its output has been copied.
    fn attach(self, process: &Arc<Process>, drained: impl FnOnce() + Send + 'static) {
        process.copy_begins();
        let copied = Arc::clone(process);
        let (stdout, stderr) = (self.stdout, self.stderr);
        crate::sync::spawn(async move {
            let outputs = async {
                tokio::join!(
                    send(&copied.streams.stdout, stdout, &copied),
                    send(&copied.streams.stderr, stderr, &copied),
                )
            };
            tokio::select! {
                _ = outputs => {}
                // The process is being removed, and whoever should read its output does not.
                () = copied.copied() => {}
            }
            drained();
            copied.copy_ends();
        });
        let process = Arc::clone(process);
        crate::sync::spawn(async move {
            match self.stdin {
                Some(stdin) => receive(stdin, &process).await,
                // To close it would be to type the end of input into it.
                None if process.streams.terminal() => return,
                None => {}
            }
            process.streams.stdin.close(process.exit()).await;
        });
    }
}

/// Output that is not wanted is read all the same, or the process would wait for a reader.
async fn send(output: &Output, connection: Option<Box<dyn Connection>>, process: &Process) {
    // An error means that the host is gone, and the output is lost with it.
    let _ = match connection {
        Some(mut connection) => {
            let copied = output.copy_to(&mut connection, process.exit()).await;
            let _ = connection.shutdown().await;
            copied
        }
        None => output.copy_to(&mut tokio::io::sink(), process.exit()).await,
    };
}

/// Hands input to a process until either ends.
pub(crate) async fn receive(mut connection: impl AsyncRead + Unpin, process: &Process) {
    let mut piece = vec![0; PIECE];
    let mut exit = process.exit();
    loop {
        let read = tokio::select! {
            read = connection.read(&mut piece) => read,
            _ = exit.wait_for(Option::is_some) => return,
        };
        let Some(data) = read.ok().and_then(|read| piece.get(..read)).filter(|data| !data.is_empty()) else {
            return;
        };
        if process.streams.stdin.write(data, process.exit()).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::{
        fs::{Mode, OFlags},
        pipe::{PipeFlags, pipe_with},
        pty::OpenptFlags,
    };
    use tokio::io::DuplexStream;

    use super::*;
    use crate::reaper::Reaper;

    fn passed() -> Arc<Passed> {
        let passed = Passed::default();
        passed.open.store(true, std::sync::atomic::Ordering::Relaxed);
        Arc::new(passed)
    }

    fn connection() -> (DuplexStream, Box<dyn Connection>) {
        let (host, guest) = tokio::io::duplex(1 << 20);
        (host, Box::new(guest))
    }

    #[tokio::test]
    async fn a_request_waits_for_its_connections_and_names_one_that_does_not_come() {
        let passed = passed();
        assert!(passed.take([0, 0, 0]).await.unwrap().is_none());
        let early = Arc::clone(&passed);
        let taking = tokio::spawn(async move { early.take([7, 8, 0]).await });
        tokio::task::yield_now().await;
        let hosts: Vec<_> = [8, 7]
            .into_iter()
            .map(|port| {
                let (host, guest) = connection();
                passed.arrive(port, guest);
                host
            })
            .collect();
        let streams = taking.await.unwrap().unwrap().unwrap();
        assert!(streams.stdin.is_some() && streams.stdout.is_some() && streams.stderr.is_none());
        drop(hosts);
        match passed.take([0, 0, 8]).await {
            Err(Error::Invalid(text)) => assert!(text.starts_with("stderr_port 8: "), "{text}"),
            _ => panic!("it was taken twice"),
        }
    }

    #[tokio::test]
    async fn without_a_listener_ports_are_refused() {
        assert!(matches!(Passed::default().take([1, 0, 0]).await, Err(Error::Unsupported(_))));
    }

    #[tokio::test]
    async fn connections_that_nobody_names_are_bounded() {
        let passed = passed();
        let mut hosts = Vec::new();
        for port in 1..=u32::try_from(WAITING).unwrap() + 3 {
            let (host, guest) = connection();
            passed.arrive(port, guest);
            hosts.push(host);
        }
        assert_eq!(lock(&passed.waiting).len(), WAITING);
        assert_eq!(hosts[0].read(&mut [0]).await.unwrap(), 0, "the oldest is closed");
        assert!(passed.take_one(4, "x").await.is_ok());
    }

    /// A process of which only the streams and the exit matter; it "exits" through the returned function.
    fn process(streams: bulkhead_executor::Streams) -> (Arc<Process>, impl FnOnce(i32)) {
        let own = rustix::process::getpid();
        let process = bulkhead_executor::Process {
            pid: own.as_raw_nonzero().get(),
            pidfd: rustix::process::pidfd_open(own, rustix::process::PidfdFlags::empty()).unwrap(),
            streams,
        };
        let reaper = Arc::<Reaper>::default();
        let spawning = reaper.spawning();
        let pid = process.pid;
        let process = Process::adopt(process, 0, &spawning, Box::new(|_| {})).unwrap();
        (process, move |code| reaper.pretend(pid, code))
    }

    #[tokio::test]
    async fn data_flows_both_ways_and_the_exit_waits_for_the_output_but_not_for_a_background_process() {
        let flags = PipeFlags::CLOEXEC | PipeFlags::NONBLOCK;
        let (stdin, stdin_writer) = pipe_with(flags).unwrap();
        let (stdout_reader, stdout) = pipe_with(flags).unwrap();
        let streams = bulkhead_executor::Streams {
            stdin: Some(stdin_writer),
            stdout: Some(stdout_reader),
            ..Default::default()
        };
        let (process, exits) = process(streams);
        let (mut input, guest_input) = connection();
        // It holds less than the output, so the copy stalls while nobody reads.
        let (mut output, guest_output) = tokio::io::duplex(4);
        let streams =
            Streams { stdin: Some(guest_input), stdout: Some(Box::new(guest_output)), stderr: None };
        let drained = Arc::new(Notify::new());
        let told = Arc::clone(&drained);
        streams.attach(&process, move || told.notify_one());

        input.write_all(b"in").await.unwrap();
        input.shutdown().await.unwrap();
        let stdin = crate::sys::watch(stdin, tokio::io::Interest::READABLE).unwrap();
        let mut received: Vec<u8> = Vec::new();
        loop {
            let mut ready = stdin.readable().await.unwrap();
            let mut piece = [0; 8];
            match ready.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut piece)?)) {
                Ok(Ok(0)) => break,
                Ok(read) => received.extend(&piece[..read.unwrap()]),
                Err(_) => {}
            }
        }
        assert_eq!(received, b"in", "and then its end");

        // A background process keeps the pipe: `stdout` is not closed.
        rustix::io::write(&stdout, b"last words").unwrap();
        exits(3);
        assert_eq!(process.ended().await, 3);
        let waiting = Arc::clone(&process);
        let waiting = tokio::spawn(async move { waiting.wait().await });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished(), "the output is not with the host yet");
        let mut told = Vec::new();
        output.read_to_end(&mut told).await.unwrap();
        assert_eq!(told, b"last words");
        assert_eq!(waiting.await.unwrap(), 3);
        drained.notified().await;
        assert!(process.streams.drained());
    }

    #[tokio::test]
    async fn without_input_a_pipe_ends_and_nothing_is_typed_into_a_terminal() {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
        let master = rustix::pty::openpt(flags).unwrap();
        rustix::pty::grantpt(&master).unwrap();
        rustix::pty::unlockpt(&master).unwrap();
        let name = rustix::pty::ptsname(&master, Vec::new()).unwrap();
        let slave =
            rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK, Mode::empty()).unwrap();
        let (with_terminal, _exits) =
            process(bulkhead_executor::Streams { terminal: Some(master), ..Default::default() });
        let (stdin, stdin_writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        let (with_pipe, _exits) =
            process(bulkhead_executor::Streams { stdin: Some(stdin_writer), ..Default::default() });
        Streams::default().attach(&with_terminal, || ());
        Streams::default().attach(&with_pipe, || ());

        let stdin = crate::sys::watch(stdin, tokio::io::Interest::READABLE).unwrap();
        let mut byte = [0];
        stdin
            .readable()
            .await
            .unwrap()
            .try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut byte)?))
            .unwrap()
            .unwrap();
        // The pipe has ended, so the terminal's task has run, too. What was typed then would come before this.
        with_terminal.streams.stdin.write(b"typed\n", with_terminal.exit()).await.unwrap();
        let mut line = [0; 16];
        let read = rustix::io::read(&slave, &mut line).unwrap();
        assert_eq!(&line[..read], b"typed\n");
    }

    #[tokio::test]
    async fn a_host_that_does_not_read_does_not_keep_a_process_from_being_removed() {
        let (stdout_reader, stdout) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        let (process, exits) =
            process(bulkhead_executor::Streams { stdout: Some(stdout_reader), ..Default::default() });
        let (_host, guest) = tokio::io::duplex(1);
        Streams { stdout: Some(Box::new(guest)), ..Default::default() }.attach(&process, || ());
        rustix::io::write(&stdout, b"more than one").unwrap();
        exits(0);
        process.ended().await;
        tokio::task::yield_now().await;
        process.copy_ends();
        assert_eq!(process.wait().await, 0);
    }
}
