//! A container and its processes.
//!
//! ```text
//! exec:  Starting ──► Live ──exit──► Live, ended ──drained──► Exited(code)
//!            └─ failed: gone                └─────── oldest of too many: gone
//! ```
//! An exec has its entry from the request on: whoever gave up on a slow start can still signal it, wait for it, and find
//! it. A signal to one that is starting is kept for it.
//!
//! There is no request that forgets an exec, so the code of one that has ended stays readable until the container goes; the
//! memory is bounded by how many are kept, and descriptors go once they are drained.

use std::{
    collections::{HashMap, VecDeque},
    os::fd::{BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, Weak},
};

use bulkhead_executor::UserNames;
use bulkhead_protocol::oci;
use rustix::event::{PollFd, PollFlags, Timespec};
use tokio::sync::Notify;

use crate::{
    diagnostics,
    error::{During, Error, Result},
    process::Process,
    reaper::Reaper,
    sync::{Lane, blocking, lock},
};

/// So many ended execs are remembered in a container; the oldest are forgotten.
const ENDED_EXECS: usize = 1024;

/// So many starts and execs of a container may hang at a time; more wait.
const STARTS: usize = 16;

/// And so many requests that are not expected to hang, and must get through beside those that do.
const CONTROLS: usize = 4;

/// The annotations that carry the name a pod knows a container by.
const NAMES: [&str; 2] = ["io.kubernetes.cri.container-name", "io.kubernetes.cri-o.ContainerName"];

/// A container that was created.
pub(crate) struct Container {
    id: String,
    /// The executor's half.
    pub(crate) executor: Arc<bulkhead_executor::Container>,
    init: Arc<Process>,
    execs: Mutex<Execs>,
    /// An exec is live, or has failed.
    changed: Notify,
    starts: Lane,
    controls: Lane,
    /// Mount points of the storages it uses, in the order they were mounted.
    pub(crate) storages: Vec<String>,
    /// The file in the guest that holds its termination message, if it has one.
    pub(crate) termination_log: Option<String>,
}

/// What an id of a process stands for.
pub(crate) enum Found {
    /// A process, running or ended, whose streams may still hold something.
    Live(Arc<Process>),
    /// A process that has ended, drained: its code.
    Exited(i32),
}

#[derive(Default)]
struct Execs {
    by_id: HashMap<String, Exec>,
    /// The ended ones, oldest first.
    ended: VecDeque<String>,
    /// The container is being destroyed.
    closed: bool,
}

enum Exec {
    /// With the signals that it will get.
    Starting(Vec<i32>),
    Live(Arc<Process>),
    /// Ended, and counted in `Execs::ended`; its streams are not drained yet.
    Ended(Arc<Process>),
    Exited(i32),
}

impl Container {
    /// Makes a container; its init is parked before its command.
    pub(crate) async fn create(
        config: bulkhead_executor::Config,
        storages: Vec<String>,
        pipe_size: usize,
        reaper: &Arc<Reaper>,
    ) -> Result<Arc<Container>> {
        let id = config.id.clone();
        let termination_log = diagnostics::termination_log(&config.spec);
        let spawning = reaper.spawning();
        let (executor, process) = blocking(move || Ok(bulkhead_executor::Container::create(config)?)).await?;
        let executor = Arc::new(executor);
        let exiting = Arc::clone(&executor);
        // The last descriptor of its mount namespace may go with it, and so the mounts, which can hang.
        let on_exit = move |_| crate::sync::spawn_blocking(move || exiting.exited());
        match Process::adopt(process, pipe_size, &spawning, Box::new(on_exit)) {
            Ok(init) => Ok(Arc::new(Container {
                id,
                executor,
                init,
                execs: Mutex::default(),
                changed: Notify::new(),
                starts: Lane::new(STARTS),
                controls: Lane::new(CONTROLS),
                storages,
                termination_log,
            })),
            Err(error) => {
                if let Err(left) = blocking(move || Ok(executor.delete()?)).await {
                    tracing::error!(container = id, error = %left, "a failed container was not removed");
                }
                Err(error)
            }
        }
    }

    /// Its id.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// Whether its pod knows it by this name, which the host tells in annotations; the id will do, too.
    pub(crate) fn is_called(&self, name: &str) -> bool {
        let annotations = &self.executor.spec().Annotations;
        name == self.id || NAMES.into_iter().any(|key| annotations.get(key).is_some_and(|own| own == name))
    }

    /// Whether its init has not ended.
    pub(crate) fn runs(&self) -> bool {
        self.init.exit_code().is_none()
    }

    /// Releases its init.
    pub(crate) async fn start(&self) -> Result<()> {
        let executor = Arc::clone(&self.executor);
        self.starts.blocking(move || Ok(executor.start()?)).await
    }

    /// Asks or tells the executor something that does not wait for the container's processes.
    pub(crate) async fn control<T, F>(&self, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&bulkhead_executor::Container) -> std::result::Result<T, bulkhead_executor::Error>
            + Send
            + 'static,
    {
        let executor = Arc::clone(&self.executor);
        self.controls.blocking(move || Ok(work(&executor)?)).await
    }

    /// Runs a further process in it. A failed start leaves no trace of the id.
    pub(crate) async fn exec(
        self: &Arc<Self>,
        exec_id: &str,
        process: oci::Process,
        user: UserNames,
        pipe_size: usize,
        reaper: &Arc<Reaper>,
    ) -> Result<()> {
        lock(&self.execs).reserve(exec_id, &self.id)?;
        let started = self.spawn(exec_id, process, user, pipe_size, reaper).await;
        let result = match started {
            Ok(process) => self.live(exec_id, process),
            Err(error) => {
                lock(&self.execs).by_id.remove(exec_id);
                Err(error)
            }
        };
        self.changed.notify_waiters();
        result
    }

    /// Gives a started exec the signals that were meant for it. In a container that goes it has to go, too.
    fn live(&self, exec_id: &str, process: Arc<Process>) -> Result<()> {
        let ended = process.exit_code().is_some();
        let signals = lock(&self.execs).live(exec_id, Arc::clone(&process));
        if ended {
            self.ended(exec_id);
        }
        signals.into_iter().try_for_each(|signal| process.signal(signal))
    }

    async fn spawn(
        self: &Arc<Self>,
        exec_id: &str,
        process: oci::Process,
        user: UserNames,
        pipe_size: usize,
        reaper: &Arc<Reaper>,
    ) -> Result<Arc<Process>> {
        let executor = Arc::clone(&self.executor);
        let reaper = Arc::clone(reaper);
        let start = move || {
            let spawning = reaper.spawning();
            Ok((executor.exec(process, user)?, spawning))
        };
        let (process, spawning) = self.starts.blocking(start).await?;
        let (container, id) = (Arc::downgrade(self), exec_id.to_owned());
        let on_exit = move |_| {
            if let Some(container) = Weak::upgrade(&container) {
                container.ended(&id);
            }
        };
        Process::adopt(process, pipe_size, &spawning, Box::new(on_exit))
    }

    /// Finds a process: init by the empty id or the container's, others by their exec id. One that is starting is waited
    /// for.
    pub(crate) async fn find(&self, exec_id: &str) -> Result<Found> {
        loop {
            let changed = self.changed.notified();
            if let Some(found) = self.look(exec_id)? {
                return Ok(found);
            }
            changed.await;
        }
    }

    /// `None`: it is starting.
    fn look(&self, exec_id: &str) -> Result<Option<Found>> {
        if self.is_init(exec_id) {
            return Ok(Some(Found::Live(Arc::clone(&self.init))));
        }
        match lock(&self.execs).by_id.get(exec_id) {
            Some(Exec::Live(process) | Exec::Ended(process)) => Ok(Some(Found::Live(Arc::clone(process)))),
            Some(Exec::Exited(code)) => Ok(Some(Found::Exited(*code))),
            Some(Exec::Starting(_)) => Ok(None),
            None => Err(self.unknown(exec_id)),
        }
    }

    /// Sends a signal to one process, now or once it has started. One that has ended needs none any more.
    pub(crate) fn signal(&self, exec_id: &str, signal: i32) -> Result<()> {
        if self.is_init(exec_id) {
            return if self.init.exit_code().is_none() { self.init.signal_init(signal) } else { Ok(()) };
        }
        let process = match lock(&self.execs).by_id.get_mut(exec_id) {
            Some(Exec::Live(process)) => Arc::clone(process),
            Some(Exec::Ended(_) | Exec::Exited(_)) => return Ok(()),
            Some(Exec::Starting(signals)) => {
                remember(signals, signal);
                return Ok(());
            }
            None => return Err(self.unknown(exec_id)),
        };
        process.signal(signal)
    }

    fn is_init(&self, exec_id: &str) -> bool {
        exec_id.is_empty() || exec_id == self.id
    }

    fn unknown(&self, exec_id: &str) -> Error {
        Error::UnknownProcess { container: self.id.clone(), exec: exec_id.to_owned() }
    }

    /// To be called when a read saw the end of an output.
    pub(crate) fn drained(&self, exec_id: &str) {
        lock(&self.execs).compact(exec_id);
    }

    fn ended(&self, exec_id: &str) {
        lock(&self.execs).ended(exec_id);
    }

    /// Kills what is left, waits until all of it is gone, and removes the cgroup.
    pub(crate) async fn destroy(&self) -> Result<()> {
        // First of all: an init that is still parked would end by itself, with a code of its own, once it is let go.
        self.init.signal(libc::SIGKILL)?;
        lock(&self.execs).closed = true;
        self.kill_execs()?;
        let executor = Arc::clone(&self.executor);
        blocking(move || Ok(executor.delete()?)).await?;
        // Also those that had ended before: their output may be on the way to a host that does not read.
        let execs = lock(&self.execs).processes();
        for process in execs.iter().chain([&self.init]) {
            process.ended().await;
            process.copy_ends();
        }
        Ok(())
    }

    /// Whether it is being destroyed, or was.
    pub(crate) fn closed(&self) -> bool {
        lock(&self.execs).closed
    }

    /// Kills every process of the container; one that has ended already is no error.
    pub(crate) async fn kill_all(&self) -> Result<()> {
        self.kill_execs()?;
        self.control(|executor| match executor.signal_all(libc::SIGKILL) {
            Err(bulkhead_executor::Error::WrongState { .. }) => Ok(()),
            killed => killed,
        })
        .await
    }

    /// Without a cgroup, and in a pid namespace that the container shares, nothing but this reaches the execs.
    fn kill_execs(&self) -> Result<()> {
        let execs = lock(&self.execs).killed();
        execs.iter().try_for_each(|process| process.signal(libc::SIGKILL))
    }

    /// A descriptor that keeps init's pid namespace.
    pub(crate) fn pid_namespace(&self) -> Result<OwnedFd> {
        pid_namespace(self.executor.init_pid(), self.executor.init_pidfd())
    }
}

fn pid_namespace(pid: i32, pidfd: BorrowedFd<'_>) -> Result<OwnedFd> {
    let path = format!("/proc/{pid}/ns/pid");
    let namespace = std::fs::File::open(&path).during(|| format!("open {path}"))?;
    // Until its process ends, a pid is no other's.
    let mut ended = [PollFd::new(&pidfd, PollFlags::IN)];
    match rustix::event::poll(&mut ended, Some(&Timespec::default()))
        .during(|| format!("poll process {pid}"))?
    {
        0 => Ok(namespace.into()),
        _ => Err(Error::State(format!("process {pid} ended before its pid namespace was kept"))),
    }
}

impl Execs {
    fn reserve(&mut self, exec_id: &str, container: &str) -> Result<()> {
        if exec_id.is_empty() {
            return Err(Error::Invalid("an exec id must not be empty: that is the container's init".into()));
        }
        if exec_id == container || self.by_id.contains_key(exec_id) {
            return Err(Error::Exists(format!("process {exec_id:?} of container {container:?}")));
        }
        if self.closed {
            return Err(Error::State(format!("container {container:?} is being removed")));
        }
        self.by_id.insert(exec_id.to_owned(), Exec::Starting(Vec::new()));
        Ok(())
    }

    /// An exec has started; returns the signals that have come for it.
    fn live(&mut self, exec_id: &str, process: Arc<Process>) -> Vec<i32> {
        let before = self.by_id.insert(exec_id.to_owned(), Exec::Live(process));
        let mut signals = if let Some(Exec::Starting(signals)) = before { signals } else { Vec::new() };
        if self.closed {
            remember(&mut signals, libc::SIGKILL);
        }
        signals
    }

    fn ended(&mut self, exec_id: &str) {
        // An exit may come before the entry is live; whoever makes it live looks again.
        let Some(entry) = self.by_id.get_mut(exec_id) else { return };
        let Exec::Live(process) = entry else { return };
        *entry = Exec::Ended(Arc::clone(process));
        self.ended.push_back(exec_id.to_owned());
        self.compact(exec_id);
        if self.ended.len() > ENDED_EXECS
            && let Some(oldest) = self.ended.pop_front()
            && let Some(Exec::Ended(process)) = self.by_id.remove(&oldest)
        {
            // Nobody could tell whoever copies its output to give up later.
            process.copy_ends();
        }
    }

    fn compact(&mut self, exec_id: &str) {
        if let Some(entry) = self.by_id.get_mut(exec_id)
            && let Exec::Ended(process) = entry
            && process.streams.drained()
            && let Some(code) = process.exit_code()
        {
            *entry = Exec::Exited(code);
        }
    }

    /// Everything that is live, or has ended and is not drained.
    fn processes(&self) -> Vec<Arc<Process>> {
        let process = |exec: &Exec| match exec {
            Exec::Live(process) | Exec::Ended(process) => Some(Arc::clone(process)),
            Exec::Starting(_) | Exec::Exited(_) => None,
        };
        self.by_id.values().filter_map(process).collect()
    }

    /// Everything that runs, to be killed; what is starting will be.
    fn killed(&mut self) -> Vec<Arc<Process>> {
        let killed = |exec: &mut Exec| match exec {
            Exec::Live(process) => Some(Arc::clone(process)),
            Exec::Starting(signals) => {
                remember(signals, libc::SIGKILL);
                None
            }
            Exec::Ended(_) | Exec::Exited(_) => None,
        };
        self.by_id.values_mut().filter_map(killed).collect()
    }
}

/// A signal that is pending is not sent twice, so that there are never more than there are signals.
fn remember(signals: &mut Vec<i32>, signal: i32) {
    if !signals.contains(&signal) {
        signals.push(signal);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn an_exec_id_is_taken_once_and_is_never_inits() {
        let mut execs = Execs::default();
        execs.reserve("e", "c").unwrap();
        assert!(matches!(execs.reserve("e", "c"), Err(Error::Exists(_))));
        assert!(matches!(execs.reserve("c", "c"), Err(Error::Exists(_))));
        assert!(matches!(execs.reserve("", "c"), Err(Error::Invalid(_))));
    }

    #[test]
    fn the_pid_namespace_of_a_process_that_has_ended_is_not_taken_from_another_of_its_pid() {
        let own = rustix::process::getpid();
        let open = |pid| rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
        let own_number = own.as_raw_nonzero().get();
        pid_namespace(own_number, open(own).as_fd()).unwrap();
        let mut child = std::process::Command::new("/bin/sleep").arg("1000").spawn().unwrap();
        let ended = open(rustix::process::Pid::from_child(&child));
        child.kill().unwrap();
        // The reaper of another test may have been quicker.
        let _ = child.wait();
        let taken = pid_namespace(own_number, ended.as_fd());
        assert!(matches!(taken, Err(Error::State(_))), "{taken:?}");
    }

    fn own_process() -> Arc<Process> {
        let own = rustix::process::getpid();
        let process = bulkhead_executor::Process {
            pid: own.as_raw_nonzero().get(),
            pidfd: rustix::process::pidfd_open(own, rustix::process::PidfdFlags::empty()).unwrap(),
            streams: bulkhead_executor::Streams::default(),
        };
        let spawning = Arc::<Reaper>::default().spawning();
        Process::adopt(process, 0, &spawning, Box::new(|_| {})).unwrap()
    }

    #[tokio::test]
    async fn only_so_many_ended_execs_are_remembered() {
        let process = own_process();
        let mut execs = Execs::default();
        for n in 0..=ENDED_EXECS {
            let id = n.to_string();
            execs.reserve(&id, "c").unwrap();
            execs.by_id.insert(id.clone(), Exec::Live(Arc::clone(&process)));
            execs.ended(&id);
            execs.ended(&id);
        }
        assert_eq!((execs.by_id.len(), execs.ended.len()), (ENDED_EXECS, ENDED_EXECS));
        assert!(!execs.by_id.contains_key("0") && execs.by_id.contains_key("1"));
    }

    #[tokio::test]
    async fn an_exec_that_has_ended_is_told_of_a_removal_and_when_it_is_forgotten() {
        let (oldest, other) = (own_process(), own_process());
        oldest.copy_begins();
        let mut execs = Execs::default();
        for n in 0..=ENDED_EXECS {
            let id = n.to_string();
            let process = if n == 0 { &oldest } else { &other };
            execs.by_id.insert(id.clone(), Exec::Live(Arc::clone(process)));
            assert!(n > 1 || execs.killed().len() == 1);
            execs.ended(&id);
            assert!(n > 0 || execs.killed().is_empty() && execs.processes().len() == 1);
        }
        // Its output is not drained; whoever copies that gives up.
        assert!(tokio::time::timeout(std::time::Duration::from_secs(30), oldest.copied()).await.is_ok());
    }

    #[test]
    fn an_exec_that_ends_while_it_starts_is_not_counted_before_it_is_live() {
        let mut execs = Execs::default();
        execs.reserve("e", "c").unwrap();
        execs.ended("e");
        assert!(execs.ended.is_empty());
        assert!(matches!(execs.by_id["e"], Exec::Starting(_)));
    }

    #[tokio::test]
    async fn signals_to_an_exec_that_starts_are_kept_for_it_once_each() {
        let mut execs = Execs::default();
        execs.reserve("e", "c").unwrap();
        for signal in [15, 15, 1] {
            if let Some(Exec::Starting(signals)) = execs.by_id.get_mut("e") {
                remember(signals, signal);
            }
        }
        assert!(execs.killed().is_empty(), "it does not run yet");
        assert_eq!(execs.live("e", own_process()), [15, 1, 9]);
        assert_eq!(execs.killed().len(), 1);

        execs.reserve("late", "c").unwrap();
        execs.closed = true;
        assert_eq!(execs.live("late", own_process()), [9]);
        assert!(matches!(execs.reserve("later", "c"), Err(Error::State(_))));
    }
}
