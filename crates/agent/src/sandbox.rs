//! The pod: its containers by id, what they share, and its end.
//!
//! ```text
//! container:  Creating ──► Ready(container) ──► Removing ──► gone
//!                 └─ failed: gone     ▲             │
//!                                     └── failed ───┘
//! ```
//! The table's lock is held for moments only. A slot that is `Creating` or `Removing` belongs to one task, and who else
//! wants that container waits for a change of the table.

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
    time::Duration,
};

use bulkhead_protocol::{
    agent::{CreateContainerRequest, CreateSandboxRequest},
    oci,
};
use tokio::sync::Notify;

use crate::{
    boot::Guest,
    config::Config,
    container::Container,
    device::Devices,
    error::{Error, Result},
    namespaces::{self, Pod, Shared},
    network,
    oom::OomWatcher,
    passfd::Passed,
    reaper::Reaper,
    storage::Storages,
    sync::{blocking, lock},
};

/// The end of a sandbox waits this long for each container; then the power goes anyway.
const FAREWELL: Duration = Duration::from_secs(10);

/// The pod, and all that serves it.
pub(crate) struct Sandbox {
    /// The machine it lives in.
    pub(crate) guest: Arc<Guest>,
    /// How the agent was told to be.
    pub(crate) config: Config,
    /// Collects the children.
    pub(crate) reaper: Arc<Reaper>,
    /// Tells of containers that lacked memory.
    pub(crate) oom: Arc<OomWatcher>,
    /// Finds devices.
    pub(crate) devices: Arc<Devices>,
    /// Connections that become standard streams.
    pub(crate) passed: Arc<Passed>,
    storages: Storages,
    state: Mutex<State>,
    /// A slot or the phase has changed.
    changed: Notify,
    ended: Notify,
}

#[derive(Default)]
struct State {
    phase: Phase,
    shared: Shared,
    /// Whose pid namespace `shared.pid` is.
    pid_owner: String,
    containers: HashMap<String, Slot>,
}

#[derive(Default, PartialEq)]
enum Phase {
    /// Nobody has asked for a sandbox yet; containers share nothing but the network.
    #[default]
    Bare,
    Creating,
    Ready,
    Ending,
}

enum Slot {
    Creating,
    Ready(Arc<Container>),
    Removing,
}

impl Sandbox {
    /// An empty one.
    pub(crate) fn new(guest: Arc<Guest>, config: Config) -> Arc<Sandbox> {
        Arc::new(Sandbox {
            guest,
            devices: Arc::new(Devices::new(config.hotplug_timeout)),
            config,
            reaper: Arc::default(),
            oom: Arc::default(),
            passed: Arc::default(),
            storages: Storages::default(),
            state: Mutex::default(),
            changed: Notify::new(),
            ended: Notify::new(),
        })
    }

    /// Prepares what the pod's containers share. Once; a failure leaves nothing and may be tried again.
    pub(crate) async fn create(&self, request: CreateSandboxRequest) -> Result<()> {
        {
            let mut state = lock(&self.state);
            match state.phase {
                Phase::Bare => state.phase = Phase::Creating,
                Phase::Ending => return Err(ending()),
                Phase::Creating | Phase::Ready => return Err(Error::Exists("the sandbox".into())),
            }
        }
        let pod = self.prepare(request).await;
        let mut state = lock(&self.state);
        let (phase, result) = match pod {
            Ok(pod) => {
                state.shared.pod = Some(Arc::new(pod));
                (Phase::Ready, Ok(()))
            }
            Err(error) => (Phase::Bare, Err(error)),
        };
        if state.phase == Phase::Creating {
            state.phase = phase;
        }
        drop(state);
        self.changed.notify_waiters();
        result
    }

    async fn prepare(&self, request: CreateSandboxRequest) -> Result<Pod> {
        self.guest.prepared().await;
        let hostname = request.hostname.clone();
        let pod = blocking(move || Pod::create(&hostname)).await?;
        let (dns, init) = (request.dns.clone(), self.guest.init);
        blocking(move || network::write_resolv_conf(&dns, init)).await?;
        self.storages.add_all(request.storages, None).await?;
        Ok(pod)
    }

    /// Makes a container whose init is parked before its command.
    pub(crate) async fn create_container(&self, request: CreateContainerRequest) -> Result<()> {
        let id = request.container_id;
        self.reserve(&id)?;
        let created = async {
            self.guest.prepared().await;
            let spec = request
                .OCI
                .into_option()
                .ok_or_else(|| Error::Invalid("the request has no OCI spec".into()))?;
            let shared = self.shared(request.sandbox_pidns, &id)?;
            let storages = self.storages.add_all(request.storages, Some(&id)).await?;
            let made = self.make(&id, spec, &shared, storages.clone()).await;
            if made.is_err() {
                self.storages.release_all(&storages).await;
            }
            made
        }
        .await;
        let mut state = lock(&self.state);
        let result = match created {
            Ok((container, pid_namespace)) => {
                // Only the pod's first container, its pause container, lends its pid namespace to others.
                if let Some(namespace) = pid_namespace
                    && state.containers.len() == 1
                {
                    state.shared.pid = Some(Arc::new(namespace));
                    state.pid_owner.clone_from(&id);
                }
                state.containers.insert(id, Slot::Ready(container));
                Ok(())
            }
            Err(error) => {
                state.containers.remove(&id);
                Err(error)
            }
        };
        drop(state);
        self.changed.notify_waiters();
        result
    }

    fn reserve(&self, id: &str) -> Result<()> {
        let mut state = lock(&self.state);
        if state.phase == Phase::Ending {
            return Err(ending());
        }
        if state.containers.contains_key(id) {
            return Err(Error::Exists(format!("container {id:?}")));
        }
        state.containers.insert(id.to_owned(), Slot::Creating);
        Ok(())
    }

    /// What a new container shares: the pid namespace only when it asks, and then there must be one, unless it is the
    /// first and its own becomes the pod's.
    fn shared(&self, pid: bool, id: &str) -> Result<Shared> {
        let state = lock(&self.state);
        let mut shared = state.shared.clone();
        if !pid {
            shared.pid = None;
        } else if shared.pid.is_none() && state.containers.keys().any(|other| other != id) {
            return Err(Error::State(
                "the sandbox has no pid namespace to join: its first container is gone".into(),
            ));
        }
        Ok(shared)
    }

    /// Also pins the pid namespace of the pod's first container.
    async fn make(
        &self,
        id: &str,
        mut spec: oci::Spec,
        shared: &Shared,
        storages: Vec<String>,
    ) -> Result<(Arc<Container>, Option<OwnedFd>)> {
        namespaces::settle(&mut spec, shared);
        let config =
            bulkhead_executor::Config { id: id.to_owned(), spec, cgroup_mount: self.guest.cgroups() };
        let container = Container::create(config, storages, self.config.pipe_size, &self.reaper).await?;
        if lock(&self.state).shared.pid.is_some() {
            return Ok((container, None));
        }
        match container.pid_namespace() {
            Ok(namespace) => Ok((container, Some(namespace))),
            Err(error) => {
                container.destroy().await?;
                Err(error)
            }
        }
    }

    /// Finds a container that can be used.
    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>> {
        match lock(&self.state).containers.get(id) {
            Some(Slot::Ready(container)) => Ok(Arc::clone(container)),
            Some(Slot::Creating | Slot::Removing) | None => Err(Error::UnknownContainer(id.to_owned())),
        }
    }

    /// Removes a container and all that was made for it; one that is gone already is no error. Who comes while another
    /// removes it waits for that one.
    pub(crate) async fn remove_container(&self, id: &str) -> Result<()> {
        loop {
            let changed = self.changed.notified();
            let container = {
                let mut state = lock(&self.state);
                match state.containers.get_mut(id) {
                    None => return Ok(()),
                    Some(Slot::Creating | Slot::Removing) => None,
                    Some(slot) => match std::mem::replace(slot, Slot::Removing) {
                        Slot::Ready(container) => Some(container),
                        Slot::Creating | Slot::Removing => None,
                    },
                }
            };
            let Some(container) = container else {
                changed.await;
                continue;
            };
            return self.take_apart(container).await;
        }
    }

    async fn take_apart(&self, container: Arc<Container>) -> Result<()> {
        // The last look: the figure goes with the cgroup.
        self.oom.unwatch(container.id());
        let destroyed = container.destroy().await;
        if destroyed.is_ok() {
            self.storages.release_all(&container.storages).await;
        }
        let mut state = lock(&self.state);
        if destroyed.is_ok() {
            state.containers.remove(container.id());
            if state.pid_owner == container.id() {
                state.shared.pid = None;
                state.pid_owner.clear();
            }
        } else {
            state.containers.insert(container.id().to_owned(), Slot::Ready(container));
        }
        drop(state);
        self.changed.notify_waiters();
        destroyed
    }

    /// Ends everything: containers, storages, and the wait of [`Sandbox::ended`].
    pub(crate) async fn destroy(self: &Arc<Self>) {
        let ids: Vec<String> = {
            let mut state = lock(&self.state);
            state.phase = Phase::Ending;
            state.containers.keys().cloned().collect()
        };
        let removals: Vec<_> = ids
            .into_iter()
            .map(|id| {
                let sandbox = Arc::clone(self);
                tokio::spawn(async move {
                    match tokio::time::timeout(FAREWELL, sandbox.remove_container(&id)).await {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => {
                            tracing::error!(container = id, %error, "container was not removed")
                        }
                        Err(_) => tracing::error!(container = id, "container was not removed in time"),
                    }
                })
            })
            .collect();
        for removal in removals {
            // A task that panicked has nothing left to wait for.
            let _ = removal.await;
        }
        self.storages.clear().await;
        self.oom.close();
        lock(&self.state).shared = Shared::default();
        self.ended.notify_one();
    }

    /// Waits for the end of the sandbox.
    pub(crate) async fn ended(&self) {
        self.ended.notified().await;
    }
}

fn ending() -> Error {
    Error::State("the sandbox is being destroyed".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox() -> Arc<Sandbox> {
        Sandbox::new(Arc::new(Guest::plain()), Config::default())
    }

    #[tokio::test]
    async fn an_id_is_taken_once_and_a_failed_create_frees_it() {
        let sandbox = sandbox();
        sandbox.reserve("c").unwrap();
        assert!(matches!(sandbox.reserve("c"), Err(Error::Exists(_))));
        let request = CreateContainerRequest { container_id: "d".into(), ..Default::default() };
        assert!(matches!(sandbox.create_container(request.clone()).await, Err(Error::Invalid(_))));
        assert!(matches!(sandbox.create_container(request).await, Err(Error::Invalid(_))), "and not Exists");
    }

    #[tokio::test]
    async fn removing_what_is_not_there_is_no_error() {
        sandbox().remove_container("nobody").await.unwrap();
    }

    #[tokio::test]
    async fn a_removal_waits_for_the_creation() {
        let sandbox = sandbox();
        sandbox.reserve("c").unwrap();
        let removing = Arc::clone(&sandbox);
        let removal = tokio::spawn(async move { removing.remove_container("c").await });
        tokio::task::yield_now().await;
        assert!(!removal.is_finished());
        lock(&sandbox.state).containers.remove("c");
        sandbox.changed.notify_waiters();
        removal.await.unwrap().unwrap();
    }

    #[test]
    fn only_the_first_container_may_ask_for_a_pid_namespace_that_is_not_there() {
        let sandbox = sandbox();
        sandbox.reserve("first").unwrap();
        assert!(sandbox.shared(true, "first").is_ok());
        sandbox.reserve("second").unwrap();
        assert!(matches!(sandbox.shared(true, "second"), Err(Error::State(_))));
        assert!(sandbox.shared(false, "second").is_ok());
    }

    #[tokio::test]
    async fn nothing_is_made_in_a_sandbox_that_ends() {
        let sandbox = sandbox();
        sandbox.destroy().await;
        sandbox.ended().await;
        assert!(matches!(sandbox.reserve("c"), Err(Error::State(_))));
        assert!(matches!(sandbox.create(CreateSandboxRequest::default()).await, Err(Error::State(_))));
        assert_eq!(sandbox.oom.next().await, None);
    }
}
