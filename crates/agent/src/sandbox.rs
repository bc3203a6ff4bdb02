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

use bulkhead_executor::UserNames;
use bulkhead_protocol::{
    agent::{CreateContainerRequest, CreateSandboxRequest, SharedMount, Storage},
    oci,
};
use tokio::sync::Notify;

use crate::{
    boot::Guest,
    config::Config,
    container::Container,
    device::Devices,
    error::{Error, Result},
    hooks::{GuestHooks, Runner},
    namespaces::{self, Pod, Shared},
    network,
    oom::OomWatcher,
    passfd::Passed,
    reaper::Reaper,
    service::user_names,
    shared_mounts,
    storage::{Storages, allow_bound, is_bound},
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
    /// A CreateSandbox is under way, whatever the phase.
    creating: bool,
    /// The id that the host gave it; that of its pause container, if it has one.
    id: String,
    shared: Shared,
    /// Every container shares the pid namespace, asked for or not.
    share_pid: bool,
    /// Whose pid namespace `shared.pid` is, or will be: the first container's.
    pid_owner: String,
    guest_hooks: Arc<GuestHooks>,
    containers: HashMap<String, Slot>,
}

#[derive(Default, PartialEq)]
enum Phase {
    /// Nobody has asked for a sandbox yet; containers share nothing but the network.
    #[default]
    Bare,
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
        let devices = Arc::new(Devices::new(config.hotplug_timeout, guest.init));
        Arc::new(Sandbox {
            storages: Storages::new(Arc::clone(&guest), Arc::clone(&devices)),
            reaper: Arc::clone(&guest.reaper),
            guest,
            devices,
            config,
            oom: Arc::default(),
            passed: Arc::default(),
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
                Phase::Ending => return Err(ending()),
                Phase::Bare if !state.creating => state.creating = true,
                Phase::Bare | Phase::Ready => return Err(Error::Exists("the sandbox".into())),
            }
        }
        let (id, share_pid) = (request.sandbox_id.clone(), request.sandbox_pidns);
        let prepared = match self.prepare(request).await {
            // Whoever ends it waits for this, but not forever.
            Ok((.., storages)) if lock(&self.state).phase == Phase::Ending => {
                self.storages.cancel_all(&storages).await;
                Err(ending())
            }
            prepared => prepared,
        };
        let mut state = lock(&self.state);
        state.creating = false;
        let result = prepared.map(|(pod, guest_hooks, _)| {
            state.shared.pod = Some(Arc::new(pod));
            state.guest_hooks = Arc::new(guest_hooks);
            (state.id, state.share_pid) = (id, share_pid);
            if state.phase == Phase::Bare {
                state.phase = Phase::Ready;
            }
        });
        drop(state);
        self.changed.notify_waiters();
        result
    }

    /// Waits until no CreateSandbox is under way.
    async fn created(&self) {
        loop {
            let changed = self.changed.notified();
            if !lock(&self.state).creating {
                return;
            }
            changed.await;
        }
    }

    async fn prepare(&self, request: CreateSandboxRequest) -> Result<(Pod, GuestHooks, Vec<String>)> {
        self.guest.prepared().await;
        let hostname = request.hostname.clone();
        let pod = blocking(move || Pod::create(&hostname)).await?;
        let (dns, init) = (request.dns.clone(), self.guest.init);
        blocking(move || network::write_resolv_conf(&dns, init)).await?;
        let storages = self.storages.add_all(request.storages, None).await?;
        // They may be in one of the storages.
        match blocking(move || GuestHooks::scan(&request.guest_hook_path)).await {
            Ok(guest_hooks) => Ok((pod, guest_hooks, storages)),
            Err(error) => {
                self.storages.cancel_all(&storages).await;
                Err(error)
            }
        }
    }

    /// Whether an id is that of the sandbox itself, and a container of that name the pod's own.
    pub(crate) fn is_its_own(&self, id: &str) -> bool {
        lock(&self.state).id == id
    }

    /// Makes a container whose init is parked before its command.
    pub(crate) async fn create_container(&self, request: CreateContainerRequest) -> Result<()> {
        let id = request.container_id;
        self.reserve(&id)?;
        let created = async {
            self.guest.prepared().await;
            let mut spec = request
                .OCI
                .into_option()
                .ok_or_else(|| Error::Invalid("the request has no OCI spec".into()))?;
            let shared = self.shared(request.sandbox_pidns, &id).await?;
            let (guest, kinds): (_, Vec<String>) = (
                Arc::clone(&self.guest),
                request.devices.iter().map(|device| device.type_.clone()).collect(),
            );
            let missing = blocking(move || guest.load_drivers(&kinds)).await?;
            let plugged = self.devices.plug(&id, &request.devices, &mut spec).await;
            plugged.map_err(|error| missing.explain(error))?;
            let guest_hooks = Arc::clone(&lock(&self.state).guest_hooks);
            guest_hooks.add_to(&mut spec);
            let user = user_names(request.string_user.into_option());
            let bound = request.storages.iter().filter(|storage| is_bound(storage)).cloned().collect();
            let storages = self.storages.add_all(request.storages, Some(&id)).await?;
            let made = self.make(&id, spec, bound, user, &shared, storages.clone()).await;
            let made = self.complete(made, request.shared_mounts).await;
            if made.is_err() {
                self.storages.cancel_all(&storages).await;
            }
            made
        }
        .await;
        let mut state = lock(&self.state);
        let result = match created {
            Ok((container, pid_namespace)) => {
                if let Some(namespace) = pid_namespace {
                    state.shared.pid = Some(Arc::new(namespace));
                }
                state.containers.insert(id, Slot::Ready(container));
                Ok(())
            }
            Err(error) => {
                self.devices.forget(&id);
                state.forget(&id);
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
        // Only the pod's first container, its pause container, lends its pid namespace to others.
        if state.containers.is_empty() {
            id.clone_into(&mut state.pid_owner);
        }
        state.containers.insert(id.to_owned(), Slot::Creating);
        Ok(())
    }

    /// What a new container shares: the pid namespace only when it or the sandbox wants that, and then there must be one,
    /// unless it is the first and its own becomes the pod's. A first one that is still being made is waited for.
    async fn shared(&self, pid: bool, id: &str) -> Result<Shared> {
        loop {
            let changed = self.changed.notified();
            {
                let state = lock(&self.state);
                if !pid && !state.share_pid {
                    return Ok(Shared { pid: None, ..state.shared.clone() });
                }
                match state.containers.get(&state.pid_owner) {
                    _ if state.pid_owner == id => return Ok(state.shared.clone()),
                    Some(Slot::Creating) => {}
                    Some(Slot::Ready(owner)) if owner.runs() => return Ok(state.shared.clone()),
                    Some(Slot::Ready(_) | Slot::Removing) | None => {
                        return Err(Error::State(
                            "the sandbox has no pid namespace to join: its first container is gone".into(),
                        ));
                    }
                }
            }
            changed.await;
        }
    }

    async fn make(
        &self,
        id: &str,
        mut spec: oci::Spec,
        bound: Vec<Storage>,
        user: UserNames,
        shared: &Shared,
        storages: Vec<String>,
    ) -> Result<Arc<Container>> {
        namespaces::settle(&mut spec, shared);
        let spec = blocking(move || allow_bound(&bound, &mut spec).map(|()| spec)).await?;
        let config = bulkhead_executor::Config {
            id: id.to_owned(),
            spec,
            cgroup_mount: self.guest.cgroups(),
            user,
            hooks: Arc::new(Runner(Arc::clone(&self.reaper))),
        };
        Container::create(config, storages, self.config.pipe_size, &self.reaper).await
    }

    /// Gives a new container the mounts of others, and pins the pid namespace of the pod's first one. A container that
    /// cannot be completed goes.
    async fn complete(
        &self,
        made: Result<Arc<Container>>,
        mounts: Vec<SharedMount>,
    ) -> Result<(Arc<Container>, Option<OwnedFd>)> {
        let container = made?;
        let completed = self.share_mounts(&container, mounts).await.and_then(|()| {
            let first = lock(&self.state).pid_owner == container.id();
            first.then(|| container.pid_namespace()).transpose()
        });
        match completed {
            Ok(namespace) => Ok((container, namespace)),
            Err(error) => {
                if let Err(left) = container.destroy().await {
                    tracing::error!(container = container.id(), error = %left, "a failed container was not removed");
                }
                Err(error)
            }
        }
    }

    /// The host names both sides as the pod does; entries for other containers than this one are not meant for now.
    async fn share_mounts(&self, target: &Arc<Container>, mounts: Vec<SharedMount>) -> Result<()> {
        for mount in mounts {
            if !mount.dst_ctr.is_empty() && !target.is_called(&mount.dst_ctr) {
                continue;
            }
            let source = self.named(&mount.src_ctr).ok_or_else(|| {
                let (path, source) = (&mount.src_path, &mount.src_ctr);
                Error::State(format!("cannot share {path:?}: there is no container named {source:?}"))
            })?;
            let target = Arc::clone(target);
            blocking(move || shared_mounts::share(&source, &target, &mount)).await?;
        }
        Ok(())
    }

    fn named(&self, name: &str) -> Option<Arc<Container>> {
        let state = lock(&self.state);
        let ready = state.containers.values().filter_map(|slot| match slot {
            Slot::Ready(container) => Some(container),
            Slot::Creating | Slot::Removing => None,
        });
        ready.into_iter().find(|container| container.is_called(name)).cloned()
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
        // The last look, after which it is still watched if it stays: the figure goes with the cgroup.
        self.oom.look_at(container.id());
        let destroyed = container.destroy().await;
        if destroyed.is_ok() {
            self.oom.unwatch(container.id());
            self.storages.release_all(&container.storages).await;
            self.devices.forget(container.id());
        }
        let mut state = lock(&self.state);
        if destroyed.is_ok() {
            state.forget(container.id());
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
                crate::sync::spawn(async move {
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
        if tokio::time::timeout(FAREWELL, self.created()).await.is_err() {
            tracing::error!("the sandbox was not made in time for its end");
        }
        for removal in removals {
            // A task that panicked has nothing left to wait for.
            let _ = removal.await;
        }
        self.storages.clear().await;
        self.oom.close();
        lock(&self.state).shared = Shared::default();
        self.ended.notify_one();
    }

    /// Changes what ephemeral storages are mounted with.
    pub(crate) async fn update_ephemeral(&self, storages: Vec<Storage>) -> Result<()> {
        self.storages.update_ephemeral(storages).await
    }

    /// Waits for the end of the sandbox.
    pub(crate) async fn ended(&self) {
        self.ended.notified().await;
    }
}

impl State {
    fn forget(&mut self, id: &str) {
        self.containers.remove(id);
        if self.pid_owner == id {
            self.shared.pid = None;
            self.pid_owner.clear();
        }
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

    #[tokio::test]
    async fn only_the_first_container_may_ask_for_a_pid_namespace_that_is_not_there() {
        let sandbox = sandbox();
        sandbox.reserve("first").unwrap();
        assert!(sandbox.shared(true, "first").await.is_ok());
        sandbox.reserve("second").unwrap();
        assert!(sandbox.shared(false, "second").await.is_ok());
        // The first is being made, and waited for; it fails.
        let asking = Arc::clone(&sandbox);
        let second = tokio::spawn(async move { asking.shared(true, "second").await.map(drop) });
        tokio::task::yield_now().await;
        assert!(!second.is_finished());
        lock(&sandbox.state).forget("first");
        sandbox.changed.notify_waiters();
        assert!(matches!(second.await.unwrap(), Err(Error::State(_))));
        // Once nobody is left, the next is the first.
        lock(&sandbox.state).forget("second");
        lock(&sandbox.state).share_pid = true;
        sandbox.reserve("third").unwrap();
        assert!(sandbox.shared(false, "third").await.is_ok());
    }

    /// A CreateSandbox with three directories that has made the first and waits for the second, which another mounts.
    async fn half_made() -> (Arc<Sandbox>, tempfile::TempDir, [tokio::task::JoinHandle<Result<()>>; 2]) {
        let config = Config { hotplug_timeout: Duration::from_secs(3600), ..Config::default() };
        let sandbox = Sandbox::new(Arc::new(Guest::plain()), config);
        let directory = tempfile::tempdir().unwrap();
        let storage = |name: &str| Storage {
            driver: "local".into(),
            mount_point: directory.path().join(name).to_str().unwrap().into(),
            ..Default::default()
        };
        let missing = "/dev/bulkhead-no-such-disk";
        let hanging = Storage { driver: "mmioblk".into(), source: missing.into(), ..storage("2") };
        let other = Arc::clone(&sandbox);
        let other = tokio::spawn(async move { other.storages.add_all(vec![hanging], None).await.map(drop) });
        tokio::task::yield_now().await;
        let request =
            CreateSandboxRequest { storages: ["1", "2", "3"].map(storage).to_vec(), ..Default::default() };
        let creating = Arc::clone(&sandbox);
        let creation = tokio::spawn(async move { creating.create(request).await });
        while !directory.path().join("1").exists() {
            tokio::time::sleep(Duration::from_millis(1)).await;
            assert!(!creation.is_finished());
        }
        (sandbox, directory, [creation, other])
    }

    #[tokio::test]
    async fn the_end_waits_for_a_sandbox_that_is_being_made_and_leaves_nothing_of_it() {
        if !rustix::process::geteuid().is_root() {
            return eprintln!("skipped: making namespaces needs root");
        }
        let (sandbox, directory, [creation, other]) = half_made().await;
        let ending = Arc::clone(&sandbox);
        let end = tokio::spawn(async move { ending.destroy().await });
        while lock(&sandbox.state).phase != Phase::Ending {
            tokio::task::yield_now().await;
        }
        let again = sandbox.create(CreateSandboxRequest::default()).await;
        assert!(matches!(again, Err(Error::State(_))), "{again:?}");
        assert!(!end.is_finished());
        other.abort();
        assert!(matches!(creation.await.unwrap(), Err(Error::State(_))));
        end.await.unwrap();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_sandbox_that_is_made_after_its_end_takes_itself_back() {
        if !rustix::process::geteuid().is_root() {
            return eprintln!("skipped: making namespaces needs root");
        }
        let (sandbox, directory, [creation, other]) = half_made().await;
        // As if the end had waited long enough.
        lock(&sandbox.state).phase = Phase::Ending;
        other.abort();
        assert!(matches!(creation.await.unwrap(), Err(Error::State(_))));
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        assert!(lock(&sandbox.state).shared.pod.is_none());
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
