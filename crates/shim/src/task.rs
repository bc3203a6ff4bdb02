//! A container as containerd's "task": the sandbox crate's container, and its processes' phases.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use bulkhead_protocol::status::Kind;
use bulkhead_sandbox::{Container, Error, Exit, ProcessState, Sandbox};
use containerd_shim_protos::events::task::{TaskDelete, TaskExecAdded};
use oci_spec::runtime as oci;
use protobuf::MessageField;

use crate::{
    error::{already_finished, exit_code_of_failed_start, status},
    events::{Events, timestamp},
    pod::stdio,
    process::{Phase, Process, Streams, exit_status},
};

/// What a process that was lost with its VM ended with: as if killed.
const LOST: i32 = 128 + libc::SIGKILL;

/// A container and its processes.
#[derive(Debug)]
pub(crate) struct Task {
    container: Arc<Container>,
    init: Arc<Process>,
    execs: Mutex<HashMap<String, Arc<Process>>>,
    sandbox: Arc<Sandbox>,
    owner: bool,
    events: Events,
}

impl Task {
    /// A created container; `owner` when the VM ends with it.
    pub(crate) fn new(
        container: Arc<Container>,
        init: Process,
        sandbox: Arc<Sandbox>,
        owner: bool,
        events: Events,
    ) -> Task {
        Task { container, init: Arc::new(init), execs: Mutex::default(), sandbox, owner, events }
    }

    /// The container's id.
    pub(crate) fn id(&self) -> &str {
        self.container.id()
    }

    /// The VMM's pid, for every process of the pod.
    pub(crate) fn pid(&self) -> u32 {
        self.sandbox.vm_pid()
    }

    /// Whether the VM ends with it.
    pub(crate) fn is_owner(&self) -> bool {
        self.owner
    }

    /// The pod's VM.
    pub(crate) fn sandbox(&self) -> &Arc<Sandbox> {
        &self.sandbox
    }

    /// The sandbox crate's container.
    pub(crate) fn container(&self) -> &Arc<Container> {
        &self.container
    }

    /// The container's init.
    pub(crate) fn init(&self) -> &Arc<Process> {
        &self.init
    }

    fn execs(&self) -> MutexGuard<'_, HashMap<String, Arc<Process>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A process; init's id is empty.
    pub(crate) fn process(&self, exec_id: &str) -> Result<Arc<Process>, Error> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        self.execs()
            .get(exec_id)
            .cloned()
            .ok_or_else(|| Error::NotFound { what: "exec", id: exec_id.to_owned() })
    }

    /// Registers a further process.
    pub(crate) fn add_exec(
        &self,
        exec_id: &str,
        process: oci::Process,
        streams: Streams,
    ) -> Result<(), Error> {
        if let Phase::Exited(_) = self.init.phase() {
            return Err(Error::WrongState(format!(
                "container {} has ended; nothing can be executed in it",
                self.id()
            )));
        }
        self.container.add_exec(exec_id, process, stdio(&streams))?;
        // Queued before it can be found, so that its start comes after.
        self.events.publish(&TaskExecAdded {
            container_id: self.id().to_owned(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        });
        let process = Process::new(self.id(), exec_id, self.pid(), streams, self.events.clone());
        self.execs().insert(exec_id.to_owned(), Arc::new(process));
        Ok(())
    }

    /// Starts init or an exec.
    pub(crate) async fn start(self: &Arc<Self>, exec_id: &str) -> Result<(), Error> {
        let process = self.process(exec_id)?;
        process.begin_start()?;
        if let Err(error) = self.container.start(exec_id).await {
            process.abandon(Exit { code: exit_code_of_failed_start(&error), at: SystemTime::now() });
            return Err(error);
        }
        process.started();
        if !exec_id.is_empty() {
            let (task, exec_id) = (self.clone(), exec_id.to_owned());
            tokio::spawn(async move { task.watch(&exec_id).await });
        }
        Ok(())
    }

    /// Waits in the guest for the end of a process and publishes it; one watcher a process.
    pub(crate) async fn watch(&self, exec_id: &str) {
        let Ok(process) = self.process(exec_id) else { return };
        let exit = match self.container.wait(exec_id).await {
            Ok(exit) => exit,
            Err(error) => {
                tracing::warn!(id = self.id(), exec_id, %error, "process lost");
                Exit { code: LOST, at: SystemTime::now() }
            }
        };
        tracing::info!(id = self.id(), exec_id, code = exit.code, "process ended");
        process.finish(exit).await;
    }

    /// Init is gone with its VM: publishes that, unless it was published before.
    pub(crate) async fn lost(&self) -> Exit {
        let exit = Exit { code: LOST, at: SystemTime::now() };
        self.init.finish(exit).await;
        match self.init.phase() {
            Phase::Exited(exit) => exit,
            _ => exit,
        }
    }

    /// Signals a process. To one that has ended, the two signals that ask for an end succeed: clients send them again.
    pub(crate) async fn kill(&self, exec_id: &str, signal: u32, all: bool) -> ttrpc::Result<()> {
        let process = self.process(exec_id).map_err(status)?;
        let wants_end = [libc::SIGKILL, libc::SIGTERM].iter().any(|end| u32::try_from(*end) == Ok(signal));
        let finished = || if wants_end { Ok(()) } else { Err(already_finished()) };
        if let Phase::Exited(_) = process.phase() {
            return finished();
        }
        match self.container.kill(exec_id, signal, all).await {
            Err(error) if error.kind() == Kind::NotFound => finished(),
            Err(error) if error.kind() == Kind::Unavailable && wants_end => Ok(()),
            other => other.map_err(status),
        }
    }

    /// Removes the container from guest and host, whatever still runs in it.
    pub(crate) async fn delete_container(&self) -> Result<Exit, Error> {
        let exit = self.container.delete("").await?;
        // Execs that were never started are released; those that were have watchers.
        let execs: Vec<_> = self.execs().values().cloned().collect();
        for exec in execs.iter().filter(|exec| exec.phase() == Phase::Created) {
            exec.abandon(exit);
        }
        Ok(exit)
    }

    /// Forgets an exec that has ended or was never started.
    pub(crate) async fn delete_exec(&self, exec_id: &str) -> Result<Exit, Error> {
        let process = self.process(exec_id)?;
        let exit = match self.container.delete(exec_id).await {
            Ok(exit) => exit,
            Err(error) if matches!(error.kind(), Kind::NotFound | Kind::Unavailable) => {
                Exit { code: LOST, at: SystemTime::now() }
            }
            Err(error) => return Err(error),
        };
        match process.phase() {
            Phase::Created => process.abandon(exit),
            _ => process.finish(exit).await,
        }
        let exit = match process.phase() {
            Phase::Exited(exit) => exit,
            _ => exit,
        };
        if self.execs().remove(exec_id).is_none() {
            return Err(Error::NotFound { what: "exec", id: exec_id.to_owned() });
        }
        self.events.publish(&TaskDelete {
            container_id: self.id().to_owned(),
            id: process.exec_id().to_owned(),
            pid: self.pid(),
            exit_status: exit_status(exit),
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        });
        Ok(exit)
    }

    /// Whether a process that has not ended is frozen.
    pub(crate) fn is_paused(&self, exec_id: &str) -> bool {
        matches!(self.container.state(exec_id), Ok(ProcessState::Paused))
    }
}
