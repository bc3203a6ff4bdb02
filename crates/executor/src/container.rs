//! A container: create, start, exec, signal, pause, update, delete.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bulkhead_protocol::oci;

use crate::{
    Error, HookRunner, Stats, UserNames,
    cgroup::{self, Cgroup},
    channel::Channel,
    hooks::Hooks,
    host, namespace_files,
    plan::{self, NamespaceKind, NamespacePlan, labels},
    seccomp,
    spawn::{Child, Descriptors, is_end, release},
    streams, sys,
};

/// What a container is made from.
#[derive(Clone, Debug)]
pub struct Config {
    /// The container's id, already validated.
    pub id: String,
    /// The OCI configuration as it came over the wire. `Root.Path` is absolute. A namespace with a path is joined, one
    /// without is made; a namespace that is not listed is shared with the caller.
    pub spec: oci::Spec,
    /// The cgroup2 mount below which the container's cgroup is made (`<mount>/<CgroupsPath, or the id>`). `None`: this
    /// machine has no usable cgroup2; the container runs without, and a spec that sets limits is refused.
    pub cgroup_mount: Option<PathBuf>,
    /// The user of the container's own process by name.
    pub user: UserNames,
    /// Runs the hooks that belong to the caller's side.
    pub hooks: Arc<dyn HookRunner>,
}

/// The caller's ends of a process' standard streams, non-blocking and close-on-exec.
#[derive(Debug, Default)]
pub struct Streams {
    /// Write end of the standard input (without a terminal).
    pub stdin: Option<OwnedFd>,
    /// Read end of the standard output (without a terminal).
    pub stdout: Option<OwnedFd>,
    /// Read end of the standard error (without a terminal).
    pub stderr: Option<OwnedFd>,
    /// The terminal's master, and then nothing else.
    pub terminal: Option<OwnedFd>,
}

/// A process in a container. Dropping it closes the streams; the process itself is untouched.
#[derive(Debug)]
pub struct Process {
    /// Its pid as the caller sees it. It is the caller's child: the caller reaps it.
    pub pid: i32,
    /// Refers to the process whatever becomes of its pid.
    pub pidfd: OwnedFd,
    /// The caller's ends of its standard streams.
    pub streams: Streams,
}

/// A terminal's size in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
}

/// The state of a container in the OCI specification's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Init is parked before its command.
    Created,
    /// Init runs its command.
    Running,
    /// Every process is frozen.
    Paused,
    /// Init has been reaped, or the container is being deleted.
    Stopped,
}

impl Status {
    /// The OCI specification's word.
    fn name(self) -> &'static str {
        match self {
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Stopped => "stopped",
        }
    }
}

/// A running (or parked) container. All methods are synchronous, may block, and may be called from several threads; no
/// lock is held while a child is waited for.
///
/// ```text
/// create() -> Created --start()--> Running <--pause()/resume()--> Paused
///                 \________________________|__ exited() __> Stopped --delete()
/// ```
#[derive(Debug)]
pub struct Container {
    id: String,
    spec: oci::Spec,
    init_pid: i32,
    init: OwnedFd,
    kinds: Vec<NamespaceKind>,
    seccomp: Option<seccomp::Filter>,
    cgroup: Option<Cgroup>,
    hooks: Hooks,
    runner: Arc<dyn HookRunner>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    /// Beside the phase: a container can be paused before it is started, too.
    paused: bool,
    /// The namespaces as they were made: init may move itself elsewhere, and a further process must not follow it.
    /// Closed when init ends, since they hold the container's mounts.
    namespaces: Vec<OwnedFd>,
    /// The hooks that follow the end have been run, or are.
    buried: bool,
}

#[derive(Debug)]
enum Phase {
    /// Init listens on the channel.
    Created(Channel),
    /// Somebody releases it.
    Starting,
    Running,
    Stopped,
}

/// How long a killed init may take to end; it waits for every process of its pid namespace.
const PATIENCE: Duration = Duration::from_secs(10);

impl Container {
    /// Makes the container and its init process, which is parked right before its command. The command is looked up
    /// here, so that one that is missing fails now.
    ///
    /// # Errors
    /// Everything in [`Error`]; nothing is left behind then (the child is killed; the caller's reaper collects it).
    pub fn create(config: Config) -> Result<(Container, Process), Error> {
        let Config { id, mut spec, cgroup_mount, user, hooks: runner } = config;
        let missed = labels::leave_out(&mut spec, &host::enforces);
        if !missed.is_empty() {
            tracing::warn!(container = id, labels = ?missed, "this kernel does not enforce security labels of the container");
        }
        let hooks = Hooks::new(&id, &spec)?;
        let place = cgroup_mount.map(|mount| CgroupPlace::new(mount, &id, &spec)).transpose()?;
        let dir = place.as_ref().map(CgroupPlace::dir).transpose()?;
        let mut plan = plan::create(&spec, host::facts()?, dir.as_deref())?;
        plan.setup.hooks = hooks.of_child();
        plan.process.names = user;
        let seccomp = plan.process.seccomp.clone();
        let kinds: Vec<NamespaceKind> = plan.namespaces.listed().collect();
        let join = namespace_files::open(&plan.namespaces, NamespacePlan::paths(&spec.Linux.Namespaces))?;
        let (theirs, streams) = streams::make(plan.process.terminal)?;
        let cgroup = make_cgroup(&spec, place)?;
        let made = cgroup
            .as_ref()
            .map(|cgroup| cgroup.open(None))
            .transpose()
            .map(|dir| Descriptors { cgroup: dir, stdio: theirs, namespaces: join })
            .and_then(|descriptors| park(plan, &descriptors, |pid| hooks.run_creating(&*runner, pid)));
        let (mut child, namespaces) = match made {
            Ok(made) => made,
            Err(error) => {
                if let Some(Err(left)) = cgroup.as_ref().map(Cgroup::remove) {
                    tracing::warn!(container = id, error = %left, "removing the cgroup after a failed create");
                }
                // Its first hooks may have been run, and have something to take back.
                hooks.run_stopped(&*runner);
                return Err(error);
            }
        };
        let streams = streams.with_terminal(child.take_terminal());
        let (pid, init, channel) = child.into_parts();
        let state = State { phase: Phase::Created(channel), paused: false, namespaces, buried: false };
        let state = Mutex::new(state);
        let container =
            Container { id, spec, init_pid: pid, init, kinds, seccomp, cgroup, hooks, runner, state };
        let pidfd = container.init.try_clone().map_err(Error::io("duplicating a pidfd"));
        match (streams, pidfd) {
            (Ok(streams), Ok(pidfd)) => Ok((container, Process { pid, pidfd, streams })),
            (Err(error), _) | (_, Err(error)) => {
                container.delete()?;
                Err(error)
            }
        }
    }

    /// Releases init; returns when its command is being executed and the hooks that follow have been run, or with why it
    /// could not be.
    pub fn start(&self) -> Result<(), Error> {
        let channel = {
            let mut state = self.state();
            match std::mem::replace(&mut state.phase, Phase::Starting) {
                Phase::Created(channel) if !state.paused && !self.init_has_ended() => channel,
                before => {
                    state.phase = before;
                    return Err(self.wrong_state(&state, "start"));
                }
            }
        };
        let result = release(&channel).map_err(|error| self.start_failed(error));
        let mut state = self.state();
        if let Phase::Starting = state.phase {
            state.phase = if result.is_ok() { Phase::Running } else { Phase::Stopped };
        }
        drop(state);
        if result.is_ok() {
            self.hooks.run_started(&*self.runner, self.init_pid);
        }
        result
    }

    /// Runs a further process in the container; returns when its command is being executed, or with why it could not be.
    /// Absent capabilities and security labels are those of the container's own process; seccomp is always the container's.
    pub fn exec(&self, mut process: oci::Process, user: UserNames) -> Result<Process, Error> {
        let namespaces = {
            let state = self.state();
            if !matches!(self.status_of(&state), Status::Created | Status::Running) || self.init_has_ended() {
                return Err(self.wrong_state(&state, "exec"));
            }
            let copies = state.namespaces.iter().map(OwnedFd::try_clone).collect::<io::Result<Vec<_>>>();
            copies.map_err(Error::io("duplicating namespaces"))?
        };
        let cgroup = self.cgroup.as_ref().map(|cgroup| cgroup.open(Some(self.init_pid))).transpose()?;
        labels::inherit(&mut process, self.spec.Process.get_or_default(), &host::enforces);
        let seccomp = self.seccomp.clone();
        let kinds = self.kinds.clone();
        let mut plan = plan::exec(&process, &self.spec, seccomp, host::facts()?, kinds, cgroup.is_some())?;
        plan.process.names = user;
        let (theirs, streams) = streams::make(plan.process.terminal)?;
        let descriptors = Descriptors { cgroup, stdio: theirs, namespaces };
        let mut child = Child::spawn(plan, &descriptors).map_err(|error| self.exec_failed(error))?;
        drop(descriptors);
        if let Err(error) = child.executed() {
            child.kill();
            return Err(self.exec_failed(error));
        }
        let terminal = child.take_terminal();
        let (pid, pidfd, _) = child.into_parts();
        Ok(Process { pid, pidfd, streams: streams.with_terminal(terminal)? })
    }

    /// An init that is killed before its command has no state to be started from any more.
    fn start_failed(&self, error: Error) -> Error {
        if !is_end(&error) {
            return error;
        }
        let operation = "start: it ended before its command was executed";
        Error::WrongState { id: self.id.clone(), status: Status::Stopped.name(), operation }
    }

    /// An init that ends takes along what is on its way in, which fails in any way then: its end is the news.
    fn exec_failed(&self, error: Error) -> Error {
        let ended = self.status() == Status::Stopped || self.init_has_ended() || is_exiting(self.init_pid);
        if !ended {
            return error;
        }
        Error::WrongState { id: self.id.clone(), status: Status::Stopped.name(), operation: "exec" }
    }

    /// The container's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The configuration it was made from.
    pub fn spec(&self) -> &oci::Spec {
        &self.spec
    }

    /// The pid of init.
    pub fn init_pid(&self) -> i32 {
        self.init_pid
    }

    /// Refers to init whatever becomes of its pid; readable once it has ended.
    pub fn init_pidfd(&self) -> BorrowedFd<'_> {
        self.init.as_fd()
    }

    /// The mount namespace as it was made, wherever init may be now.
    pub fn mount_namespace(&self) -> Result<OwnedFd, Error> {
        let state = self.state();
        let at = self.kinds.iter().position(|kind| *kind == NamespaceKind::Mount);
        match at.and_then(|at| state.namespaces.get(at)) {
            Some(namespace) => namespace.try_clone().map_err(Error::io("duplicating a namespace")),
            None => Err(self.wrong_state(&state, "enter the mount namespace")),
        }
    }

    /// Where in its life the container is.
    pub fn status(&self) -> Status {
        self.status_of(&self.state())
    }

    /// To be called by the owner of SIGCHLD once init has been reaped.
    pub fn exited(&self) {
        self.state().stop();
    }

    /// Sends a signal to every process of the container, nested cgroups included (`cgroup.kill` for SIGKILL). Without a
    /// cgroup: to init, whose pid namespace dies with it.
    pub fn signal_all(&self, signal: i32) -> Result<(), Error> {
        let paused = {
            let state = self.state();
            if let Phase::Stopped = state.phase
                && self.cgroup.is_none()
            {
                return Err(self.wrong_state(&state, "signal"));
            }
            state.paused
        };
        match &self.cgroup {
            Some(cgroup) => cgroup.signal(signal, paused),
            None => sys::pidfd_signal(self.init.as_fd(), signal)
                .map_err(Error::io(format!("sending signal {signal} to container {}", self.id))),
        }
    }

    /// The pids of every process in the container.
    pub fn pids(&self) -> Result<Vec<i32>, Error> {
        if let Some(cgroup) = &self.cgroup {
            return cgroup.pids();
        }
        let namespace = self.kinds.iter().position(|kind| *kind == NamespaceKind::Pid);
        let state = self.state();
        let Some(file) = namespace.and_then(|at| state.namespaces.get(at)) else {
            let ended = matches!(state.phase, Phase::Stopped) || self.init_has_ended();
            return Ok(if ended { Vec::new() } else { vec![self.init_pid] });
        };
        namespace_files::members(file)
    }

    /// Freezes every process.
    pub fn pause(&self) -> Result<(), Error> {
        self.freeze(true)
    }

    /// Thaws every process.
    pub fn resume(&self) -> Result<(), Error> {
        self.freeze(false)
    }

    fn freeze(&self, freeze: bool) -> Result<(), Error> {
        let operation = if freeze { "pause" } else { "resume" };
        let cgroup = self.cgroup.as_ref().ok_or_else(|| {
            Error::Unsupported(format!("cannot {operation} container {} without cgroup v2", self.id))
        })?;
        {
            let mut state = self.state();
            let fits = match self.status_of(&state) {
                Status::Created | Status::Running => freeze,
                Status::Paused => !freeze,
                Status::Stopped => false,
            };
            if !fits {
                return Err(self.wrong_state(&state, operation));
            }
            // Before it happens: nothing may be started into a container that is being frozen.
            state.paused = freeze;
        }
        cgroup.freeze(freeze).inspect_err(|_| self.state().paused = !freeze)
    }

    /// Applies new limits; what the request leaves out stays as it is.
    pub fn update(&self, resources: &oci::LinuxResources) -> Result<(), Error> {
        {
            let state = self.state();
            if let Phase::Stopped = state.phase {
                return Err(self.wrong_state(&state, "update"));
            }
        }
        match &self.cgroup {
            Some(cgroup) => cgroup.update(resources),
            None => cgroup::refuse_limits(resources),
        }
    }

    /// Reads the container's figures.
    pub fn stats(&self) -> Result<Stats, Error> {
        self.cgroup.as_ref().map_or_else(|| Ok(Stats::default()), Cgroup::stats)
    }

    /// The path of `memory.events` in the container's cgroup, for an OOM watcher; `None` without a cgroup, or where the
    /// kernel does not count memory.
    pub fn memory_events(&self) -> Option<PathBuf> {
        self.cgroup.as_ref().map(|cgroup| cgroup.file("memory.events")).filter(|file| file.exists())
    }

    /// Kills what is left, removes the cgroup, and runs the hooks that follow the end, once. Idempotent.
    ///
    /// Whoever reaps must be at it meanwhile: init of a pid namespace ends only after every other process in it has been
    /// reaped, and those that [`Container::exec`] made are the caller's children.
    pub fn delete(&self) -> Result<(), Error> {
        self.state().stop();
        // ESRCH: it has been reaped.
        let _ = sys::pidfd_signal(self.init.as_fd(), libc::SIGKILL);
        if let Some(cgroup) = &self.cgroup {
            cgroup.remove()?;
        }
        if !wait_for_end(&self.init, PATIENCE).map_err(Error::io("waiting for init to end"))? {
            return Err(Error::Io {
                what: format!("killing init of container {}", self.id),
                source: io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("it has not ended after {} s", PATIENCE.as_secs()),
                ),
            });
        }
        if !std::mem::replace(&mut self.state().buried, true) {
            self.hooks.run_stopped(&*self.runner);
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere does not make the values wrong.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn status_of(&self, state: &State) -> Status {
        match state.phase {
            Phase::Stopped => Status::Stopped,
            _ if state.paused => Status::Paused,
            Phase::Created(_) | Phase::Starting => Status::Created,
            Phase::Running => Status::Running,
        }
    }

    fn init_has_ended(&self) -> bool {
        wait_for_end(&self.init, Duration::ZERO).unwrap_or(false)
    }

    fn wrong_state(&self, state: &State, operation: &'static str) -> Error {
        let status = if self.init_has_ended() { Status::Stopped } else { self.status_of(state) };
        Error::WrongState { id: self.id.clone(), status: status.name(), operation }
    }
}

impl State {
    fn stop(&mut self) {
        self.phase = Phase::Stopped;
        self.namespaces.clear();
    }
}

/// Where a container's cgroup will be.
struct CgroupPlace {
    mount: PathBuf,
    relative: PathBuf,
}

impl CgroupPlace {
    fn new(mount: PathBuf, id: &str, spec: &oci::Spec) -> Result<CgroupPlace, Error> {
        let path = &spec.Linux.get_or_default().CgroupsPath;
        let relative = cgroup::relative_path(if path.is_empty() { id } else { path })?;
        Ok(CgroupPlace { mount, relative })
    }

    fn dir(&self) -> Result<String, Error> {
        let dir = self.mount.join(&self.relative).into_os_string();
        dir.into_string().map_err(|dir| Error::Invalid(format!("cgroup path {dir:?} is not UTF-8")))
    }
}

fn make_cgroup(spec: &oci::Spec, place: Option<CgroupPlace>) -> Result<Option<Cgroup>, Error> {
    let linux = spec.Linux.get_or_default();
    let resources = linux.Resources.get_or_default();
    let Some(CgroupPlace { mount, relative }) = place else {
        cgroup::refuse_limits(resources)?;
        return Ok(None);
    };
    Cgroup::create(&mount, &relative, resources, &linux.Devices).map(Some)
}

/// Starts a child and waits until its container is made; a child that fails at it is killed.
fn park(
    plan: plan::Plan,
    descriptors: &Descriptors,
    mounted: impl Fn(i32) -> Result<(), Error>,
) -> Result<(Child, Vec<OwnedFd>), Error> {
    let mut child = Child::spawn(plan, descriptors)?;
    match child.ready(mounted) {
        Ok(namespaces) => Ok((child, namespaces)),
        Err(error) => {
            child.kill();
            Err(error)
        }
    }
}

/// Whether a process is on its way out, which for init of a pid namespace lasts until all others in it are gone.
fn is_exiting(pid: i32) -> bool {
    // linux/sched.h
    const PF_EXITING: u32 = 4;
    let flags = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok().and_then(|stat| {
        let (_, fields) = stat.rsplit_once(") ")?;
        fields.split(' ').nth(6)?.parse::<u32>().ok()
    });
    // Without a file it is gone.
    flags.is_none_or(|flags| flags & PF_EXITING != 0)
}

/// Whether the process behind `pidfd` has ended, or does within `patience`.
pub(crate) fn wait_for_end(pidfd: &OwnedFd, patience: Duration) -> io::Result<bool> {
    let timeout = rustix::event::Timespec {
        tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: patience.subsec_nanos().into(),
    };
    let mut fds = [rustix::event::PollFd::new(pidfd, rustix::event::PollFlags::IN)];
    Ok(rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, Some(&timeout)))? > 0)
}
