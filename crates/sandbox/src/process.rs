//! One process of a container: its life on the host's side.
//!
//! ```text
//!            add_exec            start()          ExecProcess answered
//!   exec:  ───────────► Pending ────────► Starting ───────────────► Started ──┐
//!            CreateContainer     start()          StartContainer              ├─ output drained, WaitProcess ─► exit
//!   init:  ───────────► Parked  ────────► Starting ───────────────► Started ──┘      (or the VM is gone: 137)
//!                          └── killed before its start: exit
//! ```
//!
//! The exit is kept beside the stage, since init can end before the answer to its start arrives. It is published once,
//! and only after the output is drained.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use bulkhead_hypervisor::VmExit;
use bulkhead_protocol::{
    agent::{ExecProcessRequest, StartContainerRequest, TtyWinResizeRequest, WaitProcessRequest},
    oci,
    status::Kind,
};
use protobuf::MessageField;
use tokio::sync::watch;

use crate::{
    Error, Exit, Stdio,
    agent::Patience,
    guest::Guest,
    stdio::{Copier, Ends, Stdin, StreamId},
};

/// Exit code of a process whose VM was lost.
const LOST: i32 = 137;
/// Exit code of a process about which the guest knows nothing.
const UNKNOWN: i32 = 255;
/// When the VM is gone, output that is on its way still has this long.
const LAST_OUTPUT: Duration = Duration::from_secs(1);

#[derive(Debug)]
enum Stage {
    /// An exec that the guest has not heard of.
    Pending(Box<(oci::Process, Stdio)>),
    /// Init before its command.
    Parked,
    /// The guest has been asked.
    Starting,
    /// The command runs, or has run.
    Started,
    /// It could not be started.
    Failed,
}

/// A process of a container.
#[derive(Debug)]
pub(crate) struct Process {
    /// As users know it; init is `""`.
    exec_id: String,
    id: StreamId,
    terminal: bool,
    stage: Mutex<Stage>,
    exit: watch::Sender<Option<Exit>>,
    size: Mutex<Option<(u32, u32)>>,
    copier: Copier,
    stdin: Stdin,
    /// Ends of fifos that outlive the process, see `stdio::host`.
    kept: Mutex<Vec<OwnedFd>>,
}

impl Process {
    /// Init, parked in the guest; its streams are copied from now on.
    pub(crate) fn init(guest: &Arc<Guest>, container: &str, terminal: bool, ends: Ends) -> Arc<Process> {
        let id = StreamId { container: container.to_owned(), exec: container.to_owned() };
        let process = Process::new("", id, terminal, Stage::Parked);
        process.clone().live(guest.clone(), ends);
        process
    }

    /// An exec that the guest will hear of when it is started.
    pub(crate) fn exec(exec_id: &str, id: StreamId, process: oci::Process, stdio: Stdio) -> Arc<Process> {
        let terminal = stdio.terminal;
        Process::new(exec_id, id, terminal, Stage::Pending(Box::new((process, stdio))))
    }

    fn new(exec_id: &str, id: StreamId, terminal: bool, stage: Stage) -> Arc<Process> {
        Arc::new(Process {
            exec_id: exec_id.to_owned(),
            id,
            terminal,
            stage: Mutex::new(stage),
            exit: watch::channel(None).0,
            size: Mutex::new(None),
            copier: Copier::new(),
            stdin: Stdin::new(),
            kept: Mutex::new(Vec::new()),
        })
    }

    pub(crate) fn terminal(&self) -> bool {
        self.terminal
    }

    /// How it ended, when it has.
    pub(crate) fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Whether it was started.
    pub(crate) fn started(&self) -> bool {
        matches!(*lock(&self.stage), Stage::Started)
    }

    /// Whether the guest knows it.
    pub(crate) fn in_guest(&self) -> bool {
        matches!(*lock(&self.stage), Stage::Parked | Stage::Started)
    }

    /// Resolves when it has ended and its output is drained.
    pub(crate) async fn wait(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        let ended = exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        ended.unwrap_or_else(|| Exit { code: UNKNOWN, at: SystemTime::now() })
    }

    /// Nobody waits for the rest of its output.
    pub(crate) fn hurry(&self) {
        self.copier.hurry();
    }

    /// Ends its input after what was written so far.
    pub(crate) fn close_stdin(&self) {
        self.stdin.close();
    }

    /// Ends the life of a process that the guest never knew; of any other, nothing changes.
    pub(crate) fn forget(&self) -> Option<Exit> {
        let mut stage = lock(&self.stage);
        if matches!(*stage, Stage::Pending(_)) {
            *stage = Stage::Failed;
            drop(stage);
            self.publish(Exit { code: UNKNOWN, at: SystemTime::now() });
        }
        self.exit()
    }

    /// Starts it; returns when the guest executes its command.
    pub(crate) async fn start(self: Arc<Self>, guest: Arc<Guest>) -> Result<(), Error> {
        match self.begin()? {
            None => {
                let request =
                    StartContainerRequest { container_id: self.id.container.clone(), ..Default::default() };
                let started =
                    guest.call("StartContainer", Patience::Request, async move |client, context| {
                        client.start_container(context, &request).await
                    });
                let outcome = started.await;
                *lock(&self.stage) = if outcome.is_ok() { Stage::Started } else { Stage::Parked };
                outcome?;
            }
            Some((process, stdio)) => {
                if let Err(error) = self.clone().start_exec(&guest, process, stdio).await {
                    *lock(&self.stage) = Stage::Failed;
                    self.publish(Exit { code: start_failure(&error), at: SystemTime::now() });
                    return Err(error);
                }
            }
        }
        if let Err(error) = self.apply_size(&guest).await {
            // It runs all the same, and the terminal's owner will set the size again.
            tracing::warn!("setting the terminal's size of {}: {error}", self.name());
        }
        Ok(())
    }

    /// Enters `Starting`; an exec hands its plan out.
    fn begin(&self) -> Result<Option<(oci::Process, Stdio)>, Error> {
        let ended = self.exit();
        let mut stage = lock(&self.stage);
        if ended.is_some() {
            return Err(Error::WrongState(format!("{} has ended already", self.name())));
        }
        match std::mem::replace(&mut *stage, Stage::Starting) {
            Stage::Parked => Ok(None),
            Stage::Pending(plan) => Ok(Some(*plan)),
            other => {
                *stage = other;
                Err(Error::WrongState(format!("{} was started already", self.name())))
            }
        }
    }

    async fn start_exec(
        self: Arc<Self>,
        guest: &Arc<Guest>,
        mut process: oci::Process,
        stdio: Stdio,
    ) -> Result<(), Error> {
        let ends = Ends::open(stdio)?;
        if let Some((rows, columns)) = *lock(&self.size) {
            // So that even its first look at the terminal sees the size.
            process.ConsoleSize =
                MessageField::some(oci::Box { Height: rows, Width: columns, ..Default::default() });
        }
        let request = ExecProcessRequest {
            container_id: self.id.container.clone(),
            exec_id: self.id.exec.clone(),
            process: MessageField::some(process),
            ..Default::default()
        };
        let executed = guest.call("ExecProcess", Patience::Request, async move |client, context| {
            client.exec_process(context, &request).await
        });
        executed.await?;
        *lock(&self.stage) = Stage::Started;
        self.live(guest.clone(), ends);
        Ok(())
    }

    /// Sets the terminal's size, now or when it is started.
    pub(crate) async fn resize(&self, guest: &Guest, rows: u32, columns: u32) -> Result<(), Error> {
        if !self.terminal {
            return Err(Error::WrongState(format!("{} has no terminal", self.name())));
        }
        *lock(&self.size) = Some((rows, columns));
        if self.started() && self.exit().is_none() { self.apply_size(guest).await } else { Ok(()) }
    }

    async fn apply_size(&self, guest: &Guest) -> Result<(), Error> {
        let Some((row, column)) = *lock(&self.size) else { return Ok(()) };
        let request = TtyWinResizeRequest {
            container_id: self.id.container.clone(),
            exec_id: self.id.exec.clone(),
            row,
            column,
            ..Default::default()
        };
        let resized = guest.call("TtyWinResize", Patience::Request, async move |client, context| {
            client.tty_win_resize(context, &request).await
        });
        match resized.await {
            // It may have ended meanwhile; a size is of no use to it any more.
            Err(Error::Agent { kind: Kind::NotFound, .. }) => Ok(()),
            outcome => outcome.map(drop),
        }
    }

    /// Copies its streams and awaits its end, in tasks of their own.
    fn live(self: Arc<Self>, guest: Arc<Guest>, mut ends: Ends) {
        lock(&self.kept).append(&mut ends.kept);
        let input = ends.stdin.take();
        let feeding = tokio::spawn({
            let (process, guest) = (self.clone(), guest.clone());
            async move { process.stdin.feed(guest, process.id.clone(), process.terminal, input).await }
        });
        tokio::spawn(async move {
            let exit = self.outlive(&guest, ends).await;
            feeding.abort();
            self.publish(exit);
        });
    }

    async fn outlive(&self, guest: &Guest, ends: Ends) -> Exit {
        let mut life = std::pin::pin!(self.drain_and_wait(guest, ends));
        tokio::select! {
            biased;
            exit = &mut life => exit,
            gone = guest.gone() => {
                tokio::time::timeout(LAST_OUTPUT, life).await.unwrap_or_else(|_| lost(&gone))
            }
        }
    }

    /// The output first: an agent may forget a process, and what it wrote, once its exit has been asked for. Only when
    /// nobody takes the output is the exit asked for meanwhile, since the process may have ended long ago; and only when
    /// nobody takes any of it then either is the exit published before the output is drained. What is left stays to be
    /// taken until the process is deleted.
    async fn drain_and_wait(&self, guest: &Guest, ends: Ends) -> Exit {
        let patient = ends.patient;
        let draining = self.copier.drain(guest, &self.id, self.terminal, ends.stdout, ends.stderr);
        let mut draining = std::pin::pin!(draining);
        tokio::select! {
            biased;
            () = &mut draining => return self.ask_for_exit(guest).await,
            () = self.copier.stalled() => {}
        }
        let mut asking = std::pin::pin!(self.ask_for_exit(guest));
        let exit = tokio::select! {
            biased;
            exit = &mut asking => exit,
            () = &mut draining => return asking.await,
        };
        self.copier.exited();
        tokio::select! {
            biased;
            () = &mut draining => return exit,
            () = self.copier.idle(), if !patient => {}
        }
        self.publish(exit);
        draining.await;
        exit
    }

    async fn ask_for_exit(&self, guest: &Guest) -> Exit {
        let request = WaitProcessRequest {
            container_id: self.id.container.clone(),
            exec_id: self.id.exec.clone(),
            ..Default::default()
        };
        let answer = guest.call("WaitProcess", Patience::Unbounded, async move |client, context| {
            client.wait_process(context, &request).await
        });
        let error = match answer.await {
            Ok(answer) if (0..=255).contains(&answer.status) => {
                return Exit { code: answer.status, at: SystemTime::now() };
            }
            Ok(answer) => Error::Invalid(format!("the guest reported the exit code {}", answer.status)),
            Err(error) => error,
        };
        if let Some(exit) = guest.exit() {
            return lost(&exit);
        }
        tracing::warn!("the exit code of {} is unknown: {error}", self.name());
        Exit { code: UNKNOWN, at: SystemTime::now() }
    }

    fn publish(&self, exit: Exit) {
        self.exit.send_if_modified(|known| known.is_none() && known.replace(exit).is_none());
    }

    fn name(&self) -> String {
        match self.exec_id.as_str() {
            "" => format!("container {}", self.id.container),
            exec_id => format!("exec {exec_id} of container {}", self.id.container),
        }
    }

    /// The process as the agent names it.
    pub(crate) fn id(&self) -> &StreamId {
        &self.id
    }
}

fn lost(exit: &VmExit) -> Exit {
    Exit { code: LOST, at: exit.at }
}

/// The exit code that stands for a command that could not be started, as shells and runc have it.
fn start_failure(error: &Error) -> i32 {
    match error {
        Error::Agent { kind: Kind::PermissionDenied, .. } => 126,
        Error::Agent { kind: Kind::InvalidArgument | Kind::NotFound, message, .. }
            if message.contains("exec: ") =>
        {
            127
        }
        _ => UNKNOWN,
    }
}

/// A lock that is held for a few instructions; what it guards is valid whoever panicked.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[path = "process_tests.rs"]
mod tests;
