//! Copies between the host's ends and the guest's streams, by the agent's pull model: `ReadStdout` returns what is there,
//! and nothing at the end.

use std::{sync::Arc, time::Duration};

use bulkhead_protocol::{
    agent::{CloseStdinRequest, ReadStreamRequest, WriteStreamRequest},
    ports::STDIO_CHUNK,
};
use tokio::sync::watch;

use super::host::HostEnd;
use crate::{Error, agent::Patience, guest::Guest};

/// Output that nobody takes for this long raises the question whether its process still lives.
const STALL: Duration = Duration::from_secs(10);
/// After the exit, output that nobody has taken any of for this long does not hold the exit back any more.
const IDLE: Duration = Duration::from_secs(10);
/// For a process that is being deleted: after the exit, a step of draining that takes longer than this is the last.
const DRAIN_IN_HURRY: Duration = Duration::from_secs(1);

/// A process as the agent names it.
#[derive(Clone, Debug)]
pub(crate) struct StreamId {
    pub(crate) container: String,
    pub(crate) exec: String,
}

/// What the copying of a process' output and whoever awaits its exit tell each other.
#[derive(Clone, Copy, Debug, Default)]
struct Phase {
    stalled: bool,
    hurried: bool,
    exited: bool,
    /// Counts what was delivered while it mattered.
    progress: u64,
}

/// Which of the two outputs.
#[derive(Clone, Copy, Debug)]
enum Output {
    Stdout,
    Stderr,
}

/// Copies the output of one process.
#[derive(Debug)]
pub(crate) struct Copier {
    phase: watch::Sender<Phase>,
}

impl Copier {
    pub(crate) fn new() -> Copier {
        Copier { phase: watch::channel(Phase::default()).0 }
    }

    /// Copies both outputs until their ends; with a terminal there is only one.
    pub(crate) async fn drain(
        &self,
        guest: &Guest,
        id: &StreamId,
        terminal: bool,
        stdout: Option<HostEnd>,
        stderr: Option<HostEnd>,
    ) {
        let errors = async {
            if !terminal {
                self.drain_one(guest, id, Output::Stderr, stderr).await;
            }
        };
        tokio::join!(self.drain_one(guest, id, Output::Stdout, stdout), errors);
    }

    /// Resolves when it is time to ask for the exit before the output has ended: nobody takes it, or somebody is in a hurry.
    pub(crate) async fn stalled(&self) {
        let _ = self.phase.subscribe().wait_for(|phase| phase.stalled || phase.hurried).await;
    }

    /// The process has ended.
    pub(crate) fn exited(&self) {
        self.phase.send_modify(|phase| phase.exited = true);
    }

    /// The process is to end and nobody waits for its output.
    pub(crate) fn hurry(&self) {
        self.phase.send_modify(|phase| phase.hurried = true);
    }

    async fn drain_one(&self, guest: &Guest, id: &StreamId, output: Output, mut end: Option<HostEnd>) {
        let mut piece = self.read(guest, id, output).await;
        while let Some(data) = piece {
            // One piece ahead: the guest fills the next while the host takes this one.
            let (next, taken) = tokio::join!(self.read(guest, id, output), self.deliver(&mut end, &data));
            if !taken {
                tracing::warn!(
                    "{output:?} of {id:?} had no taker; {} bytes and what follows are dropped",
                    data.len()
                );
                return;
            }
            piece = next;
        }
    }

    /// The next piece; `None` at the end, which an error is, too.
    async fn read(&self, guest: &Guest, id: &StreamId, output: Output) -> Option<Vec<u8>> {
        let request = ReadStreamRequest {
            container_id: id.container.clone(),
            exec_id: id.exec.clone(),
            len: u32::try_from(STDIO_CHUNK).unwrap_or(u32::MAX),
            ..Default::default()
        };
        let answer = async {
            match output {
                Output::Stdout => {
                    let rpc = async move |client: bulkhead_protocol::agent_ttrpc::AgentServiceClient,
                                          context| {
                        client.read_stdout(context, &request).await
                    };
                    guest.call("ReadStdout", Patience::Unbounded, rpc).await
                }
                Output::Stderr => {
                    let rpc = async move |client: bulkhead_protocol::agent_ttrpc::AgentServiceClient,
                                          context| {
                        client.read_stderr(context, &request).await
                    };
                    guest.call("ReadStderr", Patience::Unbounded, rpc).await
                }
            }
        };
        let answer = tokio::select! {
            biased;
            answer = answer => answer,
            () = self.overdue() => return None,
        };
        match answer {
            Ok(piece) if piece.data.len() > STDIO_CHUNK => {
                tracing::warn!(
                    "the guest sent {} bytes of {output:?} where {STDIO_CHUNK} were asked for",
                    piece.data.len()
                );
                None
            }
            Ok(piece) => Some(piece.data).filter(|data| !data.is_empty()),
            Err(error) => {
                tracing::debug!("end of {output:?} of {id:?}: {error}");
                None
            }
        }
    }

    /// Writes a piece. An end that fails is dropped, and with it what follows; the process is not to notice. `false`: the
    /// process has ended and nobody takes its output.
    async fn deliver(&self, end: &mut Option<HostEnd>, mut data: &[u8]) -> bool {
        while let Some(open) = end.as_ref().filter(|_| !data.is_empty()) {
            let written = tokio::select! {
                biased;
                written = open.write(data) => written,
                () = self.overdue() => return false,
                () = self.grow_suspicious() => return false,
            };
            match written {
                Ok(count) => {
                    data = &data[count..];
                    self.phase.send_if_modified(|phase| {
                        phase.progress += u64::from(phase.stalled);
                        phase.stalled
                    });
                }
                Err(error) => {
                    tracing::debug!("an output stream's reader is gone: {error}");
                    *end = None;
                }
            }
        }
        true
    }

    /// Raises the question after a while; never resolves.
    async fn grow_suspicious(&self) {
        if !self.phase.borrow().stalled {
            tokio::time::sleep(STALL).await;
            self.phase.send_modify(|phase| phase.stalled = true);
        }
        std::future::pending().await
    }

    /// Resolves when the process has ended and for a while nobody has taken any of its output.
    pub(crate) async fn idle(&self) {
        let mut phase = self.phase.subscribe();
        if phase.wait_for(|phase| phase.exited).await.is_ok() {
            while let Ok(Ok(())) = tokio::time::timeout(IDLE, phase.changed()).await {}
        }
    }

    /// Resolves when a step has taken too long for a process that has ended and is being deleted.
    async fn overdue(&self) {
        let mut phase = self.phase.subscribe();
        if phase.wait_for(|phase| phase.exited && phase.hurried).await.is_ok() {
            tokio::time::sleep(DRAIN_IN_HURRY).await;
        }
    }
}

/// The standard input of one process; lives as long as the process is known.
#[derive(Debug)]
pub(crate) struct Stdin {
    closing: watch::Sender<bool>,
}

impl Stdin {
    pub(crate) fn new() -> Stdin {
        Stdin { closing: watch::channel(false).0 }
    }

    /// Ends the input after what was written so far.
    pub(crate) fn close(&self) {
        self.closing.send_replace(true);
    }

    /// Copies until the input ends, is closed, or the process takes no more.
    pub(crate) async fn feed(&self, guest: Arc<Guest>, id: StreamId, terminal: bool, input: Option<HostEnd>) {
        if let Some(end) = input
            && let Err(error) = self.copy(&guest, &id, &end).await
        {
            tracing::debug!("stdin of {id:?} takes no more: {error}");
            return;
        }
        if terminal {
            // Closing a terminal's input would hang the terminal up.
            return;
        }
        let request = CloseStdinRequest {
            container_id: id.container.clone(),
            exec_id: id.exec.clone(),
            ..Default::default()
        };
        let closed = guest.call("CloseStdin", Patience::Request, async move |client, context| {
            client.close_stdin(context, &request).await
        });
        if let Err(error) = closed.await {
            tracing::debug!("closing stdin of {id:?}: {error}");
        }
    }

    async fn copy(&self, guest: &Guest, id: &StreamId, end: &HostEnd) -> Result<(), Error> {
        let mut buffer = vec![0; STDIO_CHUNK];
        let mut closing = self.closing.subscribe();
        loop {
            let count = tokio::select! {
                biased;
                count = end.read(&mut buffer) => count,
                _ = closing.wait_for(|closing| *closing) => break,
            };
            match count {
                Ok(0) => return Ok(()),
                Ok(count) => write(guest, id, &buffer[..count]).await?,
                Err(error) => {
                    tracing::debug!("reading stdin for {id:?}: {error}");
                    return Ok(());
                }
            }
        }
        while let Ok(count @ 1..) = end.try_read(&mut buffer) {
            write(guest, id, &buffer[..count]).await?;
        }
        Ok(())
    }
}

async fn write(guest: &Guest, id: &StreamId, mut data: &[u8]) -> Result<(), Error> {
    while !data.is_empty() {
        let request = WriteStreamRequest {
            container_id: id.container.clone(),
            exec_id: id.exec.clone(),
            data: data.to_vec(),
            ..Default::default()
        };
        let answer = guest
            .call("WriteStdin", Patience::Unbounded, async move |client, context| {
                client.write_stdin(context, &request).await
            })
            .await?;
        let taken = usize::try_from(answer.len).unwrap_or(usize::MAX).min(data.len());
        if taken == 0 {
            return Err(Error::WrongState("the guest took none of the input".into()));
        }
        data = &data[taken..];
    }
    Ok(())
}
