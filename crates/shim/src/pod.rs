//! The pod behind one server: the VM, booted by the first Create, and the tasks in it.
//!
//! ```text
//! no VM ──create() of the owner──► booting ──► running ──owner's init exits──► stopping ──delete() of the owner──► no VM
//!                                     └── failed: stopped, everything as before
//! ```
//!
//! The owner is the sandbox container of a Kubernetes pod, or the only container there is; the VM ends with it. The exit
//! of the owner is published first and the VM is stopped behind it, so that nobody waits for a teardown to learn of an exit.

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bulkhead_protocol::status::Kind;
use bulkhead_sandbox::{Config, ContainerSpec, Error, Exit, Sandbox, Stdio, StdioTarget};
use containerd_shim_protos::{
    api::CreateTaskRequest,
    events::task::{TaskCreate, TaskDelete, TaskIO, TaskOOM},
};
use protobuf::MessageField;
use tokio::sync::{Notify, watch};

use crate::{
    annotations::{self, Role},
    args::is_identifier,
    bundle::{self, DefaultSize},
    events::{Events, timestamp},
    options,
    process::{Phase, Process, Streams, exit_status},
    socket,
    task::Task,
};

/// The label under which a pod's state names the server's address, by which `delete` knows whose the state is: ids are
/// unique in one namespace only.
pub(crate) const ADDRESS_LABEL: &str = "containerd.shim.address";

/// The pod of this server.
#[derive(Debug)]
pub(crate) struct Pod {
    /// The server's socket.
    socket: PathBuf,
    events: Events,
    state: Mutex<State>,
    /// Told when the server may go.
    quit: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// The container the VM ends with, from the moment its creation begins.
    owner: Option<String>,
    sandbox: Option<Arc<Sandbox>>,
    tasks: HashMap<String, Slot>,
    /// Tasks that containerd gave up while they were being created or deleted: the server goes after the last of them.
    abandoned: HashSet<String>,
    /// The socket was removed.
    retired: bool,
}

#[derive(Debug)]
enum Slot {
    /// Being created; closed when that has ended.
    Creating(watch::Receiver<()>),
    Ready(Arc<Task>),
}

/// A claimed id. Dropped without [`Reservation::keep`], the id is free again.
struct Reservation<'a> {
    pod: &'a Pod,
    id: String,
    kept: bool,
    _ended: watch::Sender<()>,
}

impl Pod {
    /// A pod without a VM, served at `socket`.
    pub(crate) fn new(socket: PathBuf, events: Events) -> Arc<Pod> {
        Arc::new(Pod { socket, events, state: Mutex::default(), quit: Notify::new() })
    }

    /// Resolves when the server may go.
    pub(crate) async fn quit(&self) {
        self.quit.notified().await;
    }

    /// Where events go.
    pub(crate) fn events(&self) -> &Events {
        &self.events
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A task, once its creation has ended.
    pub(crate) async fn task(&self, id: &str) -> Result<Arc<Task>, Error> {
        loop {
            let mut ended = match self.state().tasks.get(id) {
                None => return Err(Error::NotFound { what: "container", id: id.to_owned() }),
                Some(Slot::Ready(task)) => return Ok(task.clone()),
                Some(Slot::Creating(ended)) => ended.clone(),
            };
            // Closed without ever being changed.
            let _ = ended.changed().await;
        }
    }

    /// The VMM's pid behind a container that is there already; 0 for every other.
    pub(crate) fn pid(&self, id: &str) -> u32 {
        match self.state().tasks.get(id) {
            Some(Slot::Ready(task)) => task.pid(),
            _ => 0,
        }
    }

    /// Creates a container, and the VM before it when it is the first. On error everything is as it was before.
    pub(crate) async fn create(self: &Arc<Self>, request: CreateTaskRequest) -> Result<Arc<Task>, Error> {
        if !is_identifier(&request.id) {
            return Err(Error::Invalid(format!("container id {:?} is not a valid identifier", request.id)));
        }
        if !request.checkpoint.is_empty() {
            return Err(Error::Unsupported("restoring a container from a checkpoint".to_owned()));
        }
        let reservation = self.reserve(&request.id)?;
        let bundle = PathBuf::from(&request.bundle);
        let spec = bundle::spec(&bundle)?;
        let role = annotations::role(spec.annotations().as_ref().unwrap_or(&HashMap::new()))
            .map_err(|error| Error::Invalid(error.to_string()))?;
        let owner = !matches!(role, Role::Member { .. });
        let sandbox = match &role {
            Role::Member { sandbox } => self.running(sandbox)?,
            Role::Single | Role::Sandbox => self.boot(&request, &role, &spec).await?,
        };
        let streams = Streams {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let container = ContainerSpec {
            id: request.id.clone(),
            rootfs: bundle::rootfs(&bundle, &spec, request.rootfs.clone()),
            bundle,
            spec,
            stdio: stdio(&streams),
        };
        let container = match sandbox.create_container(container).await {
            Ok(container) => container,
            Err(error) => {
                if owner {
                    self.stop(&sandbox).await;
                    self.forget_sandbox(&request.id);
                }
                return Err(error);
            }
        };
        let init = Process::new(&request.id, "", sandbox.vm_pid(), streams, self.events.clone());
        let task = Arc::new(Task::new(container, init, sandbox, owner, self.events.clone()));
        self.events.publish(&created(request, task.pid()));
        reservation.keep(&task);
        tokio::spawn(watch_init(self.clone(), task.clone()));
        if self.state().abandoned.contains(task.id()) {
            tracing::warn!(id = task.id(), "nobody waits for this container any more; deleting it");
            self.delete(&task).await?;
        }
        Ok(task)
    }

    fn reserve(&self, id: &str) -> Result<Reservation<'_>, Error> {
        let mut state = self.state();
        if state.tasks.contains_key(id) {
            return Err(Error::AlreadyExists { what: "container", id: id.to_owned() });
        }
        let (sender, ended) = watch::channel(());
        state.tasks.insert(id.to_owned(), Slot::Creating(ended));
        Ok(Reservation { pod: self, id: id.to_owned(), kept: false, _ended: sender })
    }

    /// The VM for a further container of the pod `sandbox`.
    fn running(&self, sandbox: &str) -> Result<Arc<Sandbox>, Error> {
        let state = self.state();
        match (&state.owner, &state.sandbox) {
            (Some(owner), Some(running)) if owner == sandbox => Ok(running.clone()),
            (Some(owner), _) if owner != sandbox => {
                Err(Error::Invalid(format!("this shim serves the pod {owner}, not {sandbox}")))
            }
            _ => Err(Error::WrongState(format!(
                "the pod {sandbox} is not running; create its sandbox container first"
            ))),
        }
    }

    /// Boots the VM of which `request`'s container is the owner.
    async fn boot(
        self: &Arc<Self>,
        request: &CreateTaskRequest,
        role: &Role,
        spec: &oci_spec::runtime::Spec,
    ) -> Result<Arc<Sandbox>, Error> {
        {
            let mut state = self.state();
            if let Some(owner) = &state.owner {
                let text =
                    format!("this shim serves the pod {owner} already; {} cannot be a pod in it", request.id);
                return Err(Error::WrongState(text));
            }
            state.owner = Some(request.id.clone());
        }
        let booted = async {
            let config: Config = options::configuration(request.options.as_ref())?;
            let root = config.state_root.display().to_string();
            bundle::write(request.bundle.as_ref(), bundle::STATE_ROOT, &root)?;
            let default = DefaultSize { vcpus: config.default_vcpus, memory_mib: config.default_memory_mib };
            let mut sandbox = bundle::sandbox_spec(&request.id, role, spec, default);
            sandbox.labels.insert(ADDRESS_LABEL.to_owned(), socket::address(&self.socket));
            Sandbox::start(&config, sandbox).await
        };
        match booted.await {
            Ok(sandbox) => {
                self.state().sandbox = Some(sandbox.clone());
                tokio::spawn(watch_oom(Arc::downgrade(self), sandbox.clone()));
                Ok(sandbox)
            }
            Err(error) => {
                self.state().owner = None;
                Err(error)
            }
        }
    }

    fn forget_sandbox(&self, owner: &str) {
        let mut state = self.state();
        if state.owner.as_deref() == Some(owner) {
            state.owner = None;
            state.sandbox = None;
        }
    }

    async fn stop(&self, sandbox: &Sandbox) {
        if let Err(error) = sandbox.stop().await {
            tracing::error!(id = sandbox.id(), %error, "the pod was not stopped cleanly");
        }
    }

    /// Deletes a container, and with the owner the VM. Of several callers one succeeds; the others find nothing.
    pub(crate) async fn delete(&self, task: &Arc<Task>) -> Result<Exit, Error> {
        if task.is_owner() && matches!(task.init().phase(), Phase::Exited(_)) {
            self.stop(task.sandbox()).await;
        }
        let exit = match task.delete_container().await {
            Ok(exit) => Some(exit),
            // Gone with its VM, which is as good.
            Err(error) if matches!(error.kind(), Kind::NotFound | Kind::Unavailable) => None,
            Err(error) => return Err(error),
        };
        if let Some(exit) = exit {
            task.init().finish(exit).await;
        }
        let exit = match task.init().phase() {
            Phase::Exited(exit) => exit,
            _ => task.lost().await,
        };
        if task.is_owner() {
            self.stop(task.sandbox()).await;
        }
        if !self.remove(task) {
            return Err(Error::NotFound { what: "container", id: task.id().to_owned() });
        }
        self.events.publish(&TaskDelete {
            container_id: task.id().to_owned(),
            pid: task.pid(),
            exit_status: exit_status(exit),
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        });
        self.left(task.id());
        Ok(exit)
    }

    fn remove(&self, task: &Arc<Task>) -> bool {
        let mut state = self.state();
        if !matches!(state.tasks.get(task.id()), Some(Slot::Ready(known)) if Arc::ptr_eq(known, task)) {
            return false;
        }
        state.tasks.remove(task.id());
        if task.is_owner() {
            state.owner = None;
            state.sandbox = None;
        }
        true
    }

    /// A task is gone, and was perhaps the last that was given up.
    fn left(&self, id: &str) {
        let last = {
            let mut state = self.state();
            state.abandoned.remove(id) && state.tasks.is_empty()
        };
        if last {
            self.retire();
            self.quit.notify_one();
        }
    }

    /// containerd is done with container `id`. Returns whether the server may go: when no container is left, or when told
    /// to go `now`.
    pub(crate) fn shutdown(&self, id: &str, now: bool) -> bool {
        let mut state = self.state();
        if state.tasks.contains_key(id) {
            state.abandoned.insert(id.to_owned());
        }
        now || state.tasks.is_empty()
    }

    /// Removes the server's socket, once: the next `start` for the same id must not find a server that is leaving, and may
    /// make a socket in the same place.
    pub(crate) fn retire(&self) {
        if std::mem::replace(&mut self.state().retired, true) {
            return;
        }
        if let Err(error) = socket::remove(&self.socket) {
            tracing::warn!(socket = %self.socket.display(), %error, "not removed");
        }
    }

    /// Lets the server go.
    pub(crate) fn release(&self) {
        self.quit.notify_one();
    }

    /// Stops the VM, if there is one still.
    pub(crate) async fn close(&self) {
        let sandbox = self.state().sandbox.take();
        if let Some(sandbox) = sandbox {
            self.stop(&sandbox).await;
        }
    }
}

impl Reservation<'_> {
    /// Puts the task into its place.
    fn keep(mut self, task: &Arc<Task>) {
        self.kept = true;
        self.pod.state().tasks.insert(self.id.clone(), Slot::Ready(task.clone()));
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if !self.kept {
            self.pod.state().tasks.remove(&self.id);
            self.pod.left(&self.id);
        }
    }
}

/// Waits for init, publishes its exit, and stops the VM behind its owner.
async fn watch_init(pod: Arc<Pod>, task: Arc<Task>) {
    task.watch("").await;
    if task.is_owner() {
        pod.stop(task.sandbox()).await;
    }
}

/// Publishes out-of-memory kills. The id comes from the guest: only a container of this pod is believed.
async fn watch_oom(pod: std::sync::Weak<Pod>, sandbox: Arc<Sandbox>) {
    while let Ok(id) = sandbox.next_oom().await {
        let Some(pod) = pod.upgrade() else { return };
        if matches!(pod.state().tasks.get(&id), Some(Slot::Ready(_))) {
            pod.events.publish(&TaskOOM { container_id: id, ..Default::default() });
        }
    }
}

fn created(request: CreateTaskRequest, pid: u32) -> TaskCreate {
    let io = TaskIO {
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
        terminal: request.terminal,
        ..Default::default()
    };
    TaskCreate {
        container_id: request.id,
        bundle: request.bundle,
        rootfs: request.rootfs,
        io: MessageField::some(io),
        checkpoint: request.checkpoint,
        pid,
        ..Default::default()
    }
}

/// containerd's names for the streams; an empty one is no stream.
pub(crate) fn stdio(streams: &Streams) -> Stdio {
    let target = |name: &str| match name {
        "" => StdioTarget::Null,
        name => StdioTarget::Uri(name.to_owned()),
    };
    Stdio {
        stdin: target(&streams.stdin),
        stdout: target(&streams.stdout),
        stderr: target(&streams.stderr),
        terminal: streams.terminal,
    }
}
