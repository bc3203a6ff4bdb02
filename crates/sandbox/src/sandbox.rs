//! The pod: boots the VM, shakes hands with the agent, owns the containers, and leaves nothing behind.
//!
//! ```text
//!             launch()                       VM dies, or the agent's connection breaks
//!   (nothing) ───────► Running ──────────────────────────────────────────────────► Lost
//!       ▲                 │ stop(): no new containers; DestroySandbox                │ every process: exit 137
//!       │ error           ▼                                                          ▼
//!   cleaned up         Stopping ──► VM stopped ──► shares unmounted ──► directory removed: Stopped
//! ```
//!
//! The keeper, one task, owns the news of the VM's end. `stop()` is one teardown for any number of callers; dropping a
//! pod that was not stopped does the same without asking the guest, synchronously.

use std::{
    future::Future,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bulkhead_hypervisor::{Accel, Vm, VmExit};
use bulkhead_protocol::agent::{DestroySandboxRequest, GetMetricsRequest, GetOOMEventRequest};
use tokio::{
    sync::{OnceCell, watch},
    task::JoinHandle,
};

use crate::{
    Config, Container, ContainerSpec, Error,
    agent::{Agent, Patience},
    container::{blocking, detached},
    guest::Guest,
    launch,
    roster::Roster,
    state,
    storage::ShareRoot,
};

/// How long the guest may take to end its containers, and then to power itself off, on hardware virtualization.
const FAREWELL_BOUND: Duration = Duration::from_secs(3);
/// The same at most, whatever the accelerator: whoever stops a pod with a hung agent waits no longer than this.
const FAREWELL_MAX: Duration = Duration::from_secs(10);
/// A VM whose agent is gone may still be writing its last words, and ending by itself.
const LAST_WORDS_GRACE: Duration = Duration::from_secs(1);

/// What a pod is made from.
#[derive(Clone, Debug, Default)]
pub struct SandboxSpec {
    /// Its id.
    pub id: String,
    /// The guest's host name (cut to 64 bytes).
    pub hostname: String,
    /// Lines of the guest's resolv.conf.
    pub dns: Vec<String>,
    /// Size of the pod's shared memory; `None` is 64 MiB.
    pub shm_bytes: Option<u64>,
    /// Virtual CPUs, when sized by somebody.
    pub vcpus: Option<u32>,
    /// Memory in MiB, when sized by somebody.
    pub memory_mib: Option<u64>,
    /// Network namespace of the pod.
    pub netns: Option<PathBuf>,
    /// Anything the owner wants to find again in the state file (`bulkhead run` keeps the container's name here).
    pub labels: std::collections::BTreeMap<String, String>,
}

/// Where the time went until the pod was ready.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timings {
    /// From the call until the VMM process ran.
    pub vmm_spawn: Duration,
    /// From then until the agent's first answer.
    pub agent_ready: Duration,
    /// CreateSandbox.
    pub sandbox_created: Duration,
}

/// Where the time went inside the guest, by the guest's own clock, which starts with its kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestTimings {
    /// When the agent's `main` began.
    pub agent_started: Duration,
    /// When the agent began to listen.
    pub agent_listening: Duration,
}

/// What `launch` hands over.
pub(crate) struct Pod {
    pub(crate) spec: SandboxSpec,
    pub(crate) state_root: PathBuf,
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) agent: Agent,
    pub(crate) share: Arc<ShareRoot>,
    pub(crate) roster: Arc<Roster>,
    pub(crate) timings: Timings,
}

/// A running pod. Dropping it ends the VM and removes what the host holds for it; [`Sandbox::stop`] does so in order.
pub struct Sandbox {
    pod: Pod,
    guest: Arc<Guest>,
    stopping: Arc<AtomicBool>,
    stopped: OnceCell<()>,
    keeper: JoinHandle<()>,
}

impl std::fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sandbox")
            .field("id", &self.pod.spec.id)
            .field("guest", &self.guest)
            .finish_non_exhaustive()
    }
}

impl Sandbox {
    /// Boots the VM and creates the sandbox in the guest. On error nothing is left behind.
    pub async fn start(config: &Config, spec: SandboxSpec) -> Result<Arc<Sandbox>, Error> {
        let config = config.clone();
        // When the caller gives up meanwhile, what was made is dropped as a whole, and with it cleaned up.
        detached(async move { Ok(Arc::new(Sandbox::keep(launch::launch(&config, spec).await?))) }).await
    }

    fn keep(pod: Pod) -> Sandbox {
        let (gone, news) = watch::channel(None);
        let stopping = Arc::new(AtomicBool::new(false));
        let keeper = tokio::spawn(keeper(pod.vm.clone(), pod.agent.broken(), stopping.clone(), gone));
        let guest = Arc::new(Guest::new(pod.agent.clone(), news));
        Sandbox { pod, guest, stopping, stopped: OnceCell::new(), keeper }
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.pod.spec.id
    }

    /// Pid of the VMM, which stands for every process of the pod on the host.
    pub fn vm_pid(&self) -> u32 {
        self.pod.vm.pid()
    }

    /// What the VM runs under.
    pub fn accel(&self) -> Accel {
        self.pod.vm.accel()
    }

    /// Where the time went.
    pub fn timings(&self) -> Timings {
        self.pod.timings
    }

    /// Asks the agent (GetMetrics, `bulkhead_agent_boot_seconds{stage="started"|"listening"}`) where the time went.
    pub async fn guest_timings(&self) -> Result<GuestTimings, Error> {
        let metrics = self.guest.call("GetMetrics", Patience::Request, async move |client, context| {
            client.get_metrics(context, &GetMetricsRequest::new()).await
        });
        guest_timings(&metrics.await?.metrics).ok_or_else(|| {
            Error::Unsupported("boot timings by this guest's agent; use Bulkhead's own".into())
        })
    }

    /// Makes a container in the guest, parked before its command.
    pub async fn create_container(&self, spec: ContainerSpec) -> Result<Arc<Container>, Error> {
        let reservation = self.pod.roster.reserve(&spec.id)?;
        detached(Container::create(self.guest.clone(), self.pod.share.clone(), reservation, spec)).await
    }

    /// A container by id.
    pub fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        self.pod.roster.get(id)
    }

    /// Every container that is known.
    pub fn containers(&self) -> Vec<Arc<Container>> {
        self.pod.roster.all()
    }

    /// The id of the next container that ran out of memory; an error when the guest is gone.
    pub async fn next_oom(&self) -> Result<String, Error> {
        loop {
            let event = self.guest.call("GetOOMEvent", Patience::Unbounded, async move |client, context| {
                client.get_oom_event(context, &GetOOMEventRequest::new()).await
            });
            let id = event.await?.container_id;
            if self.container(&id).is_ok() {
                return Ok(id);
            }
            tracing::warn!("the guest reports that {id:?}, which is no container here, ran out of memory");
        }
    }

    /// Resolves when the VM is gone, by order or by accident.
    pub async fn wait(&self) -> VmExit {
        self.guest.gone().await
    }

    /// Ends the pod: agent's DestroySandbox, VM, helper processes, mounts, files. Idempotent; concurrent callers all wait for
    /// the one teardown.
    pub async fn stop(&self) -> Result<(), Error> {
        self.stopped.get_or_try_init(|| self.tear_down()).await?;
        Ok(())
    }

    async fn tear_down(&self) -> Result<(), Error> {
        self.stopping.store(true, Ordering::Release);
        self.pod.roster.close();
        let grace = if self.say_farewell().await { self.farewell_bound() } else { Duration::ZERO };
        let stopped = self.pod.vm.stop(grace).await;
        for container in self.containers() {
            container.release_holdings().await.unwrap_or_else(|error| tracing::warn!("{error}"));
        }
        let (share, directory) = (self.pod.share.clone(), self.pod.state_root.join(self.id()));
        blocking(move || {
            share.unmount()?;
            state::remove(&directory)
        })
        .await?;
        stopped?;
        Ok(())
    }

    /// Asks the agent to end everything and to power the guest off. Whether it agreed.
    async fn say_farewell(&self) -> bool {
        let patience = Patience::Within(self.farewell_bound());
        let destroyed = self.guest.call("DestroySandbox", patience, async move |client, context| {
            client.destroy_sandbox(context, &DestroySandboxRequest::new()).await
        });
        match destroyed.await {
            Ok(_) => true,
            Err(Error::Vm(_)) => false,
            Err(error) => {
                tracing::warn!("sandbox {}: {error}; the VM is stopped without the guest's help", self.id());
                false
            }
        }
    }

    fn farewell_bound(&self) -> Duration {
        self.accel().scale(FAREWELL_BOUND).min(FAREWELL_MAX)
    }
}

impl Drop for Sandbox {
    /// The last resort: no guest is asked, nothing is awaited.
    fn drop(&mut self) {
        if self.stopped.initialized() {
            return;
        }
        self.keeper.abort();
        self.pod.roster.close();
        if let Err(error) = state::cleanup(&self.pod.state_root, self.id()) {
            tracing::warn!("{error}");
        }
    }
}

/// Awaits the VM's end and publishes it. A VM that has lost its agent is of no use to anybody, and is ended.
async fn keeper(
    vm: Arc<dyn Vm>,
    broken: impl Future<Output = ()>,
    stopping: Arc<AtomicBool>,
    gone: watch::Sender<Option<VmExit>>,
) {
    let exit = tokio::select! {
        biased;
        exit = vm.wait() => exit,
        () = broken => {
            if !stopping.load(Ordering::Acquire) {
                tracing::warn!("the connection to the guest's agent is broken; ending the VM");
                if let Err(error) = vm.stop(LAST_WORDS_GRACE).await {
                    tracing::warn!("{error}");
                }
            }
            vm.wait().await
        }
    };
    gone.send_replace(Some(exit));
}

fn guest_timings(metrics: &str) -> Option<GuestTimings> {
    let stage = |stage: &str| {
        let name = format!("bulkhead_agent_boot_seconds{{stage=\"{stage}\"}} ");
        let seconds = metrics.lines().find_map(|line| line.strip_prefix(&name))?.trim().parse().ok()?;
        Duration::try_from_secs_f64(seconds).ok()
    };
    Some(GuestTimings { agent_started: stage("started")?, agent_listening: stage("listening")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boot_timings_are_found_among_the_metrics() {
        let text = "# HELP x\nkata_agent_threads 3\nbulkhead_agent_boot_seconds{stage=\"started\"} 1.25\n\
                    bulkhead_agent_boot_seconds{stage=\"listening\"} 1.5\n";
        let expected = GuestTimings {
            agent_started: Duration::from_millis(1250),
            agent_listening: Duration::from_millis(1500),
        };
        assert_eq!(guest_timings(text), Some(expected));
        assert_eq!(guest_timings("kata_agent_threads 3\n"), None);
        assert_eq!(guest_timings(&text.replace("1.5", "-1")), None);
    }
}
