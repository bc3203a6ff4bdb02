//! A container and its processes.
//!
//! ```text
//! exec:  Starting ──► Live ──exit──► Live, ended ──drained──► Exited(code)
//!            └─ failed: gone                └─────── oldest of too many: gone
//! ```
//! There is no request that forgets an exec, so the code of one that has ended stays readable until the container goes; the
//! memory is bounded by how many are kept, and descriptors go once they are drained.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, Weak},
};

use bulkhead_protocol::oci;

use crate::{
    error::{During, Error, Result},
    process::Process,
    reaper::Reaper,
    sync::{blocking, lock},
};

/// So many ended execs are remembered in a container; the oldest are forgotten.
const ENDED_EXECS: usize = 1024;

/// A container that was created.
pub(crate) struct Container {
    id: String,
    /// The executor's half.
    pub(crate) executor: Arc<bulkhead_executor::Container>,
    init: Arc<Process>,
    execs: Mutex<Execs>,
    /// Mount points of the storages it uses, in the order they were mounted.
    pub(crate) storages: Vec<String>,
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
}

enum Exec {
    Starting,
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
        let spawning = reaper.spawning();
        let (executor, process) = blocking(move || Ok(bulkhead_executor::Container::create(config)?)).await?;
        let executor = Arc::new(executor);
        let exiting = Arc::clone(&executor);
        let init = Process::adopt(process, pipe_size, &spawning, Box::new(move |_| exiting.exited()))?;
        Ok(Arc::new(Container { id, executor, init, execs: Mutex::default(), storages }))
    }

    /// Its id.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// Runs a further process in it. A failed start leaves no trace of the id.
    pub(crate) async fn exec(
        self: &Arc<Self>,
        exec_id: &str,
        process: oci::Process,
        pipe_size: usize,
        reaper: &Arc<Reaper>,
    ) -> Result<()> {
        lock(&self.execs).reserve(exec_id, &self.id)?;
        let started = self.spawn(exec_id, process, pipe_size, reaper).await;
        match started {
            Ok(process) => {
                let ended = process.exit_code().is_some();
                lock(&self.execs).by_id.insert(exec_id.to_owned(), Exec::Live(process));
                if ended {
                    self.ended(exec_id);
                }
                Ok(())
            }
            Err(error) => {
                lock(&self.execs).by_id.remove(exec_id);
                Err(error)
            }
        }
    }

    async fn spawn(
        self: &Arc<Self>,
        exec_id: &str,
        process: oci::Process,
        pipe_size: usize,
        reaper: &Arc<Reaper>,
    ) -> Result<Arc<Process>> {
        let spawning = reaper.spawning();
        let executor = Arc::clone(&self.executor);
        let process = blocking(move || Ok(executor.exec(process)?)).await?;
        let (container, id) = (Arc::downgrade(self), exec_id.to_owned());
        let on_exit = move |_| {
            if let Some(container) = Weak::upgrade(&container) {
                container.ended(&id);
            }
        };
        Process::adopt(process, pipe_size, &spawning, Box::new(on_exit))
    }

    /// Finds a process: init by the empty id or the container's, others by their exec id.
    pub(crate) fn find(&self, exec_id: &str) -> Result<Found> {
        if self.is_init(exec_id) {
            return Ok(Found::Live(Arc::clone(&self.init)));
        }
        match lock(&self.execs).by_id.get(exec_id) {
            Some(Exec::Live(process) | Exec::Ended(process)) => Ok(Found::Live(Arc::clone(process))),
            Some(Exec::Exited(code)) => Ok(Found::Exited(*code)),
            Some(Exec::Starting) | None => {
                Err(Error::UnknownProcess { container: self.id.clone(), exec: exec_id.to_owned() })
            }
        }
    }

    /// Whether an exec id stands for init.
    pub(crate) fn is_init(&self, exec_id: &str) -> bool {
        exec_id.is_empty() || exec_id == self.id
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
        let execs = self.kill_execs()?;
        let executor = Arc::clone(&self.executor);
        blocking(move || Ok(executor.delete()?)).await?;
        for process in execs.iter().chain([&self.init]) {
            process.ended().await;
            process.copy_ends();
        }
        Ok(())
    }

    /// Kills every process of the container; one that has ended already is no error.
    pub(crate) async fn kill_all(&self) -> Result<()> {
        self.kill_execs()?;
        let executor = Arc::clone(&self.executor);
        blocking(move || match executor.signal_all(libc::SIGKILL) {
            Err(bulkhead_executor::Error::WrongState { .. }) => Ok(()),
            killed => Ok(killed?),
        })
        .await
    }

    /// Without a cgroup, and in a pid namespace that the container shares, nothing but this reaches the execs.
    fn kill_execs(&self) -> Result<Vec<Arc<Process>>> {
        let execs = lock(&self.execs).live();
        execs.iter().try_for_each(|process| process.signal(libc::SIGKILL))?;
        Ok(execs)
    }

    /// A descriptor that keeps init's pid namespace.
    pub(crate) fn pid_namespace(&self) -> Result<std::os::fd::OwnedFd> {
        let path = format!("/proc/{}/ns/pid", self.executor.init_pid());
        std::fs::File::open(&path).during(|| format!("open {path}")).map(Into::into)
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
        self.by_id.insert(exec_id.to_owned(), Exec::Starting);
        Ok(())
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
        {
            self.by_id.remove(&oldest);
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

    fn live(&self) -> Vec<Arc<Process>> {
        let live =
            |exec: &Exec| if let Exec::Live(process) = exec { Some(Arc::clone(process)) } else { None };
        self.by_id.values().filter_map(live).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exec_id_is_taken_once_and_is_never_inits() {
        let mut execs = Execs::default();
        execs.reserve("e", "c").unwrap();
        assert!(matches!(execs.reserve("e", "c"), Err(Error::Exists(_))));
        assert!(matches!(execs.reserve("c", "c"), Err(Error::Exists(_))));
        assert!(matches!(execs.reserve("", "c"), Err(Error::Invalid(_))));
    }

    #[tokio::test]
    async fn only_so_many_ended_execs_are_remembered() {
        let own = rustix::process::getpid();
        let process = bulkhead_executor::Process {
            pid: own.as_raw_nonzero().get(),
            pidfd: rustix::process::pidfd_open(own, rustix::process::PidfdFlags::empty()).unwrap(),
            streams: bulkhead_executor::Streams::default(),
        };
        let spawning = Arc::<Reaper>::default().spawning();
        let process = Process::adopt(process, 0, &spawning, Box::new(|_| {})).unwrap();
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

    #[test]
    fn an_exec_that_ends_while_it_starts_is_not_counted_before_it_is_live() {
        let mut execs = Execs::default();
        execs.reserve("e", "c").unwrap();
        execs.ended("e");
        assert!(execs.ended.is_empty());
        assert!(matches!(execs.by_id["e"], Exec::Starting));
    }
}
