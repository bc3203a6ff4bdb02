//! A container of a pod, and its processes: create, start, exec, kill, wait, delete.

use std::{
    collections::BTreeMap,
    future::Future,
    path::PathBuf,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use bulkhead_protocol::{
    agent::{
        self, CreateContainerRequest, PauseContainerRequest, RemoveContainerRequest, ResumeContainerRequest,
        SignalProcessRequest, StatsContainerRequest, UpdateContainerRequest,
    },
    oci_json,
    status::Kind,
};
use oci_spec::runtime as oci;
use protobuf::MessageField;

use crate::{
    Error, Stdio,
    agent::Patience,
    guest::Guest,
    process::{Process, lock},
    roster::{Reservation, Roster},
    spec::{self, GuestSpec},
    stdio::{Ends, StreamId},
    storage::{self, Holdings, ShareRoot},
};

const SIGKILL: u32 = 9;

/// One mount of a root file system, in containerd's form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootfsMount {
    /// `overlay`, `bind`, `ext4`...
    pub kind: String,
    /// What is mounted.
    pub source: String,
    /// Mount options.
    pub options: Vec<String>,
}

/// Where a container's root file system comes from.
#[derive(Clone, Debug)]
pub enum Rootfs {
    /// A directory that is there already.
    Directory(PathBuf),
    /// Mounts to be applied, one over the other, on `<bundle>/rootfs`; unmounted when the container is deleted. None at
    /// all means that `<bundle>/rootfs` is there already.
    Mounts(Vec<RootfsMount>),
}

/// What a container is made from.
#[derive(Debug)]
pub struct ContainerSpec {
    /// Its id; init's exec id is the empty string everywhere.
    pub id: String,
    /// The bundle directory.
    pub bundle: PathBuf,
    /// The parsed `config.json`.
    pub spec: oci::Spec,
    /// Its root file system.
    pub rootfs: Rootfs,
    /// Init's streams. `terminal` agrees with `spec.process.terminal`.
    pub stdio: Stdio,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, or 128 + signal; 137 when the VM was lost under it.
    pub code: i32,
    /// When.
    pub at: SystemTime,
}

/// Where in its life a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessState {
    /// Known, not started.
    Created,
    /// Started.
    Running,
    /// Frozen with its container.
    Paused,
    /// Ended.
    Stopped(Exit),
}

/// A container. Cheap to clone a handle of (`Arc`); methods may be called from any task, and none holds a lock over an RPC.
/// What changes a container goes on to its end even when the caller stops waiting for it.
#[derive(Debug)]
pub struct Container {
    id: String,
    bundle: PathBuf,
    guest: Arc<Guest>,
    roster: Weak<Roster>,
    this: Weak<Container>,
    processes: Mutex<BTreeMap<String, Arc<Process>>>,
    /// Execs that were ever registered: an id may be used again after its deletion, and the agent remembers.
    exec_count: AtomicU64,
    paused: AtomicBool,
    deleting: AtomicBool,
    holdings: Mutex<Option<Holdings>>,
}

impl Container {
    /// Makes a container in the guest; on error nothing stays, on either side.
    pub(crate) async fn create(
        guest: Arc<Guest>,
        share: Arc<ShareRoot>,
        reservation: Reservation,
        spec: ContainerSpec,
    ) -> Result<Arc<Container>, Error> {
        let ContainerSpec { id, bundle, spec, rootfs, stdio } = spec;
        let terminal = spec.process().as_ref().and_then(oci::Process::terminal).unwrap_or_default();
        if terminal != stdio.terminal {
            return Err(Error::Invalid(format!(
                "container {id}: process.terminal is {terminal} in config.json and {} in the request",
                stdio.terminal
            )));
        }
        let wire = oci_json::spec(&spec)?;
        let plan = storage::plan(&id, &bundle, &wire.Mounts, storage::inspect)?;
        let guest_spec = spec::for_guest(&id, wire, &plan.sources)?;
        let ends = Ends::open(stdio)?;
        let mut holdings = blocking({
            let (id, bundle) = (id.clone(), bundle.clone());
            move || Holdings::apply(share, &id, &bundle, &rootfs, &plan)
        })
        .await?;
        if let Err(error) = create_in_guest(&guest, &id, guest_spec).await {
            blocking(move || holdings.release()).await.unwrap_or_else(|error| tracing::warn!("{error}"));
            return Err(error);
        }
        let init = Process::init(&guest, &id, terminal, ends);
        let container = Arc::new_cyclic(|this| Container {
            id,
            bundle,
            guest,
            roster: reservation.roster(),
            this: this.clone(),
            processes: Mutex::new(BTreeMap::from([(String::new(), init)])),
            exec_count: AtomicU64::new(0),
            paused: AtomicBool::new(false),
            deleting: AtomicBool::new(false),
            holdings: Mutex::new(Some(holdings)),
        });
        reservation.fill(container.clone());
        Ok(container)
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its bundle.
    pub fn bundle(&self) -> &std::path::Path {
        &self.bundle
    }

    /// The state of a process; init is `""`.
    pub fn state(&self, exec_id: &str) -> Result<ProcessState, Error> {
        let process = self.process(exec_id)?;
        Ok(match process.exit() {
            Some(exit) => ProcessState::Stopped(exit),
            None if !process.started() => ProcessState::Created,
            None if self.paused.load(Ordering::Acquire) => ProcessState::Paused,
            None => ProcessState::Running,
        })
    }

    /// Whether a process has a terminal.
    pub fn terminal(&self, exec_id: &str) -> Result<bool, Error> {
        Ok(self.process(exec_id)?.terminal())
    }

    /// Ids of the execs that are known.
    pub fn execs(&self) -> Vec<String> {
        lock(&self.processes).keys().filter(|exec_id| !exec_id.is_empty()).cloned().collect()
    }

    /// Registers a further process; the guest hears of it only at [`Container::start`].
    pub fn add_exec(&self, exec_id: &str, process: oci::Process, mut stdio: Stdio) -> Result<(), Error> {
        crate::state::check_id("exec", exec_id)?;
        let mut process = spec::process_for_guest(&process)?;
        // The request's word counts: clients copy the process from the container and change only what they need.
        process.Terminal = stdio.terminal;
        if stdio.terminal {
            stdio.stderr = crate::StdioTarget::Null;
        }
        let mut processes = lock(&self.processes);
        if processes.contains_key(exec_id) {
            return Err(Error::AlreadyExists { what: "exec", id: exec_id.to_owned() });
        }
        // Different for each, whatever the ids; and never the container's own, which to the agent means init.
        let guest_id = format!("{exec_id}:{}", self.exec_count.fetch_add(1, Ordering::Relaxed));
        let id = StreamId { container: self.id.clone(), exec: guest_id };
        processes.insert(exec_id.to_owned(), Process::exec(exec_id, id, process, stdio));
        Ok(())
    }

    /// Starts init or an exec; returns when the command is being executed. The error of a command that is missing or cannot
    /// be executed keeps the executor's (runc's) text.
    pub async fn start(&self, exec_id: &str) -> Result<(), Error> {
        if self.paused.load(Ordering::Acquire) {
            return Err(Error::WrongState(format!("container {} is paused", self.id)));
        }
        let process = self.process(exec_id)?;
        detached(process.start(self.guest.clone())).await
    }

    /// Sends a signal to a process, or with `all` to every process of the container. A process that has ended is
    /// [`Error::NotFound`].
    pub async fn kill(&self, exec_id: &str, signal: u32, all: bool) -> Result<(), Error> {
        let process = self.process(exec_id)?;
        let ended = || Error::NotFound { what: "process", id: format!("{}/{exec_id}", self.id) };
        if process.exit().is_some() {
            return Err(ended());
        }
        if !process.in_guest() {
            return Err(Error::WrongState(format!("exec {exec_id} of container {} is not started", self.id)));
        }
        match self.signal(if all { "" } else { &process.id().exec }, signal).await {
            Err(Error::Agent { kind: Kind::NotFound, .. }) => Err(ended()),
            // The VM is gone, and the process with it.
            Err(Error::Vm(_)) => Err(ended()),
            outcome => outcome,
        }
    }

    /// Resolves when the process has ended and its output is drained; any number of callers, before start and after exit.
    /// When the VM is lost: code 137.
    pub async fn wait(&self, exec_id: &str) -> Result<Exit, Error> {
        Ok(self.process(exec_id)?.wait().await)
    }

    /// Sets the size of the process' terminal; remembered when it is not started yet.
    pub async fn resize(&self, exec_id: &str, rows: u32, columns: u32) -> Result<(), Error> {
        self.process(exec_id)?.resize(&self.guest, rows, columns).await
    }

    /// Ends the process' standard input after what was written so far.
    pub async fn close_stdin(&self, exec_id: &str) -> Result<(), Error> {
        self.process(exec_id)?.close_stdin();
        Ok(())
    }

    /// Freezes the container.
    pub async fn pause(&self) -> Result<(), Error> {
        let this = self.handle();
        detached(async move {
            let request = PauseContainerRequest { container_id: this.id.clone(), ..Default::default() };
            let paused =
                this.guest.call("PauseContainer", Patience::Request, async move |client, context| {
                    client.pause_container(context, &request).await
                });
            paused.await?;
            this.paused.store(true, Ordering::Release);
            Ok(())
        })
        .await
    }

    /// Thaws the container.
    pub async fn resume(&self) -> Result<(), Error> {
        let this = self.handle();
        detached(async move {
            let request = ResumeContainerRequest { container_id: this.id.clone(), ..Default::default() };
            let resumed =
                this.guest.call("ResumeContainer", Patience::Request, async move |client, context| {
                    client.resume_container(context, &request).await
                });
            resumed.await?;
            this.paused.store(false, Ordering::Release);
            Ok(())
        })
        .await
    }

    /// The agent's figures.
    pub async fn stats(&self) -> Result<agent::StatsContainerResponse, Error> {
        let request = StatsContainerRequest { container_id: self.id.clone(), ..Default::default() };
        let stats = self.guest.call("StatsContainer", Patience::Request, async move |client, context| {
            client.stats_container(context, &request).await
        });
        stats.await
    }

    /// New limits.
    pub async fn update(&self, resources: &oci::LinuxResources) -> Result<(), Error> {
        let request = UpdateContainerRequest {
            container_id: self.id.clone(),
            resources: MessageField::some(spec::resources_for_guest(resources)?),
            ..Default::default()
        };
        let updated = self.guest.call("UpdateContainer", Patience::Request, async move |client, context| {
            client.update_container(context, &request).await
        });
        updated.await.map(drop)
    }

    /// Forgets an exec (`exec_id`), or with `""` removes the container from guest and host: kills what still runs, unshares
    /// and unmounts. A running exec is [`Error::WrongState`]. Returns how the process had ended.
    pub async fn delete(&self, exec_id: &str) -> Result<Exit, Error> {
        if exec_id.is_empty() {
            let this = self.handle();
            return detached(async move { this.delete_container().await }).await;
        }
        let process = self.process(exec_id)?;
        let exit = process.forget().ok_or_else(|| {
            Error::WrongState(format!("exec {exec_id} of container {} is running", self.id))
        })?;
        lock(&self.processes).remove(exec_id);
        Ok(exit)
    }

    async fn delete_container(&self) -> Result<Exit, Error> {
        if self.deleting.swap(true, Ordering::AcqRel) {
            return Err(Error::WrongState(format!("container {} is being deleted already", self.id)));
        }
        let outcome = async {
            let exit = self.remove_from_guest().await?;
            self.release_holdings().await.map(|()| exit)
        };
        let exit = outcome.await.inspect_err(|_| self.deleting.store(false, Ordering::Release))?;
        if let Some(roster) = self.roster.upgrade() {
            roster.remove(&self.id);
        }
        Ok(exit)
    }

    async fn remove_from_guest(&self) -> Result<Exit, Error> {
        let init = self.process("")?;
        let processes: Vec<_> = lock(&self.processes).values().cloned().collect();
        for process in &processes {
            process.hurry();
            process.forget();
        }
        if init.exit().is_none() {
            match self.signal("", SIGKILL).await {
                Ok(()) | Err(Error::Vm(_) | Error::Agent { kind: Kind::NotFound, .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let bound = Patience::Request.bound(self.guest.agent().accel()).unwrap_or(Duration::MAX);
        let exit = tokio::time::timeout(bound, init.wait()).await.map_err(|_| {
            Error::WrongState(format!("container {} did not end within {bound:?} of being killed", self.id))
        })?;
        let request = RemoveContainerRequest { container_id: self.id.clone(), ..Default::default() };
        let removed = self.guest.call("RemoveContainer", Patience::Request, async move |client, context| {
            client.remove_container(context, &request).await
        });
        match removed.await {
            // Without a VM there is nothing to remove it from.
            Ok(_) | Err(Error::Vm(_) | Error::Agent { kind: Kind::NotFound, .. }) => Ok(exit),
            Err(error) => Err(error),
        }
    }

    /// Unshares and unmounts what the host holds for it.
    pub(crate) async fn release_holdings(&self) -> Result<(), Error> {
        let holdings = lock(&self.holdings).take();
        match holdings {
            Some(mut holdings) => blocking(move || holdings.release()).await,
            None => Ok(()),
        }
    }

    async fn signal(&self, exec_id: &str, signal: u32) -> Result<(), Error> {
        let request = SignalProcessRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            signal,
            ..Default::default()
        };
        let signalled = self.guest.call("SignalProcess", Patience::Request, async move |client, context| {
            client.signal_process(context, &request).await
        });
        signalled.await.map(drop)
    }

    fn process(&self, exec_id: &str) -> Result<Arc<Process>, Error> {
        let process = lock(&self.processes).get(exec_id).cloned();
        process.ok_or_else(|| Error::NotFound { what: "exec", id: format!("{}/{exec_id}", self.id) })
    }

    fn handle(&self) -> Arc<Container> {
        self.this.upgrade().expect("a container exists only in the Arc that create() made")
    }
}

async fn create_in_guest(guest: &Guest, id: &str, spec: GuestSpec) -> Result<(), Error> {
    let request = CreateContainerRequest {
        container_id: id.to_owned(),
        exec_id: id.to_owned(),
        OCI: MessageField::some(spec.spec),
        sandbox_pidns: spec.sandbox_pidns,
        ..Default::default()
    };
    let created = guest.call("CreateContainer", Patience::Request, async move |client, context| {
        client.create_container(context, &request).await
    });
    let error = match created.await {
        Ok(_) => return Ok(()),
        Err(error) => error,
    };
    if error.kind() == Kind::DeadlineExceeded {
        // The guest may have made it after all.
        let request = RemoveContainerRequest { container_id: id.to_owned(), ..Default::default() };
        let removed = guest.call("RemoveContainer", Patience::Request, async move |client, context| {
            client.remove_container(context, &request).await
        });
        if let Err(error) = removed.await {
            tracing::warn!("removing container {id} after its creation took too long: {error}");
        }
    }
    Err(error)
}

/// Runs to its end whatever becomes of the caller.
pub(crate) async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Error> {
    tokio::spawn(work).await.unwrap_or_else(|join| Err(interrupted(&join)))
}

/// Runs what may block on a thread for that.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|join| Err(interrupted(&join)))
}

fn interrupted(join: &tokio::task::JoinError) -> Error {
    Error::Io { what: "a task of the sandbox".into(), source: std::io::Error::other(join.to_string()) }
}
