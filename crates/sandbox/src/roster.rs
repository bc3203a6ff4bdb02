//! The containers of a pod by id, and the state file that names them.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{Container, Error, State, process::lock};

/// The containers of a pod; `None` is an id whose container is being made.
#[derive(Debug)]
pub(crate) struct Roster {
    containers: Mutex<BTreeMap<String, Option<Arc<Container>>>>,
    state: Mutex<State>,
    directory: PathBuf,
    closed: AtomicBool,
}

impl Roster {
    /// An empty one; writes the state file.
    pub(crate) fn new(state: State, directory: PathBuf) -> Result<Arc<Roster>, Error> {
        state.save(&directory)?;
        Ok(Arc::new(Roster {
            containers: Mutex::default(),
            state: Mutex::new(state),
            directory,
            closed: AtomicBool::new(false),
        }))
    }

    /// Takes an id for a container that is about to be made.
    pub(crate) fn reserve(self: &Arc<Self>, id: &str) -> Result<Reservation, Error> {
        crate::state::check_id("container", id)?;
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::WrongState("the sandbox is being stopped".into()));
        }
        let mut containers = lock(&self.containers);
        if containers.contains_key(id) {
            return Err(Error::AlreadyExists { what: "container", id: id.to_owned() });
        }
        containers.insert(id.to_owned(), None);
        Ok(Reservation { roster: self.clone(), id: id.to_owned() })
    }

    pub(crate) fn get(&self, id: &str) -> Result<Arc<Container>, Error> {
        let found = lock(&self.containers).get(id).cloned().flatten();
        found.ok_or_else(|| Error::NotFound { what: "container", id: id.to_owned() })
    }

    pub(crate) fn all(&self) -> Vec<Arc<Container>> {
        lock(&self.containers).values().flatten().cloned().collect()
    }

    pub(crate) fn remove(&self, id: &str) {
        lock(&self.containers).remove(id);
        self.save();
    }

    /// No containers are taken any more, and the state file is left alone, since the directory is about to go.
    pub(crate) fn close(&self) {
        let _state = lock(&self.state);
        self.closed.store(true, Ordering::Release);
    }

    /// The state file follows; it helps those who look from outside, and a pod does not fail for it.
    fn save(&self) {
        let mut state = lock(&self.state);
        if self.closed.load(Ordering::Acquire) {
            return;
        }
        state.containers = self.all().iter().map(|container| container.id().to_owned()).collect();
        if let Err(error) = state.save(&self.directory) {
            tracing::warn!("{error}");
        }
    }
}

/// An id that is taken for a container in the making; given back when dropped.
#[derive(Debug)]
pub(crate) struct Reservation {
    roster: Arc<Roster>,
    id: String,
}

impl Reservation {
    pub(crate) fn roster(&self) -> Weak<Roster> {
        Arc::downgrade(&self.roster)
    }

    /// The container is made.
    pub(crate) fn fill(self, container: Arc<Container>) {
        lock(&self.roster.containers).insert(self.id.clone(), Some(container));
        self.roster.save();
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut containers = lock(&self.roster.containers);
        if containers.get(&self.id).is_some_and(Option::is_none) {
            containers.remove(&self.id);
        }
    }
}
