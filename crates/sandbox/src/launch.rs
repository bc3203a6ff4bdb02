//! From nothing to a pod that is ready: directories, VM, agent, CreateSandbox. What was made goes away again when a later
//! step fails.

use std::{
    fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bulkhead_hypervisor::{self as hypervisor, Accel, Endpoint, Error as VmError, Kind, Share, Vm, VmConfig};
use bulkhead_protocol::{agent::CreateSandboxRequest, ports};

use crate::{
    Config, Error, Hypervisor, SandboxSpec, State, Timings,
    agent::{Agent, Patience},
    container::blocking,
    error::os,
    roster::Roster,
    sandbox::Pod,
    state::{self, Owned},
    storage::{self, ShareRoot},
};

/// How long the end of a VM may take to be seen after its sockets have closed.
const DYING_BOUND: Duration = Duration::from_secs(2);
/// The hypervisor's limit on the VM's directory.
const VM_PATH_MAX: usize = 80;
/// A host name's limit, without its terminating NUL.
const HOSTNAME_MAX: usize = 64;

/// The pod's directory on the host; removed with everything in it when dropped, unless kept.
#[derive(Debug)]
struct Site {
    directory: PathBuf,
    kept: bool,
}

impl Site {
    fn make(state_root: &Path, id: &str) -> Result<Site, Error> {
        let failed = |path: &Path| os(format!("making {}", path.display()));
        fs::DirBuilder::new().recursive(true).mode(0o700).create(state_root).map_err(failed(state_root))?;
        let directory = state_root.join(id);
        match fs::DirBuilder::new().mode(0o700).create(&directory) {
            Ok(()) => Ok(Site { directory, kept: false }),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                Err(Error::AlreadyExists { what: "sandbox", id: id.to_owned() })
            }
            Err(error) => Err(failed(&directory)(error)),
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if !self.kept {
            state::remove(&self.directory).unwrap_or_else(|error| tracing::warn!("{error}"));
        }
    }
}

/// Boots the VM and creates the sandbox in the guest.
pub(crate) async fn launch(config: &Config, spec: SandboxSpec) -> Result<Pod, Error> {
    let begun = Instant::now();
    state::check_id("sandbox", &spec.id)?;
    forget_the_dead(config, &spec.id).await?;
    let mut site = Site::make(&config.state_root, &spec.id)?;
    let local = matches!(config.hypervisor, Hypervisor::Local { .. });
    let share = Arc::new(ShareRoot::create(&site.directory.join("share"), local)?);
    let vm_config = vm_config(config, &spec, &site.directory, share.path());
    // Whose it is stands there from the beginning, for whoever finds it after a crash.
    let endpoint = Endpoint::Hybrid { path: vm_config.dir.join("vsock.sock") };
    state_of(&spec, endpoint, std::iter::empty()).save(&site.directory)?;
    // From here on there are sockets and processes; dropping the VM ends them.
    let vm: Arc<dyn Vm> = hypervisor::boot(vm_config).await?.into();
    let vmm_spawn = begun.elapsed();
    if vm.accel() == Accel::Tcg && !local {
        tracing::warn!(
            "sandbox {} runs under TCG (no usable /dev/kvm): expect it to be several times slower",
            spec.id
        );
    }
    if let Some(netns) = &spec.netns {
        tracing::warn!(
            "sandbox {}: the interfaces of {} are not connected to the VM; it has only its loopback",
            spec.id,
            netns.display()
        );
    }
    match greet(&vm, &spec, config.dial_timeout).await {
        Ok((agent, agent_ready, sandbox_created)) => {
            let pids = std::iter::once(vm.pid()).chain(vm.helper_pids());
            let state = state_of(&spec, vm.endpoint().clone(), pids);
            let roster = Roster::new(state, site.directory.clone());
            let roster = match roster {
                Ok(roster) => roster,
                Err(error) => return Err(abandon(vm, error).await),
            };
            site.kept = true;
            let timings = Timings { vmm_spawn, agent_ready, sandbox_created };
            Ok(Pod { spec, state_root: config.state_root.clone(), vm, agent, share, roster, timings })
        }
        Err(error) => Err(abandon(vm, error).await),
    }
}

/// A sandbox of the same id whose owner is dead is in nobody's use, but in the way.
async fn forget_the_dead(config: &Config, id: &str) -> Result<(), Error> {
    let (state_root, id) = (config.state_root.clone(), id.to_owned());
    blocking(move || match state::load(&state_root, &id) {
        Ok(state) if !state.owner.is_alive() => {
            tracing::warn!(
                "sandbox {id} was left by process {}, which is dead; cleaning up",
                state.owner.pid
            );
            state::cleanup(&state_root, &id)
        }
        _ => Ok(()),
    })
    .await
}

/// Shakes hands with the agent within a bound for hardware virtualization, and creates the sandbox; ends at once when the
/// VM does.
async fn greet(
    vm: &Arc<dyn Vm>,
    spec: &SandboxSpec,
    bound: Duration,
) -> Result<(Agent, Duration, Duration), Error> {
    let begun = Instant::now();
    let bound = vm.accel().scale(bound);
    let greeting = async {
        let agent = match Agent::connect(vm.endpoint(), vm.accel(), bound).await {
            Ok(agent) => agent,
            Err(VmError::Timeout { .. }) => {
                return Err(Error::AgentSilent { bound, last_words: vm.last_words() });
            }
            Err(error) => return Err(better_explanation(vm.as_ref(), error).await),
        };
        let ready = begun.elapsed();
        create_sandbox(&agent, spec).await.map_err(|error| with_last_words(error, vm.as_ref()))?;
        Ok((agent, ready, begun.elapsed().saturating_sub(ready)))
    };
    tokio::select! {
        biased;
        exit = vm.wait() => Err(crate::guest::vm_gone(exit)),
        result = greeting => result,
    }
}

/// A guest that hangs up is mostly one whose VM is dying, and the VM's end, a moment later, says why.
async fn better_explanation(vm: &dyn Vm, error: VmError) -> Error {
    match tokio::time::timeout(DYING_BOUND, vm.wait()).await {
        Ok(exit) => crate::guest::vm_gone(exit),
        Err(_) => error.with_last_words(|| vm.last_words()).into(),
    }
}

async fn create_sandbox(agent: &Agent, spec: &SandboxSpec) -> Result<(), Error> {
    let request = CreateSandboxRequest {
        hostname: hostname(&spec.hostname).to_owned(),
        dns: spec.dns.clone(),
        storages: storage::sandbox_storages(spec.shm_bytes.unwrap_or(ports::SHM_BYTES)),
        sandbox_id: spec.id.clone(),
        ..Default::default()
    };
    let created = agent.call("CreateSandbox", Patience::Request, async move |client, context| {
        client.create_sandbox(context, &request).await
    });
    created.await.map(drop)
}

fn with_last_words(error: Error, vm: &dyn Vm) -> Error {
    match error {
        Error::Agent { operation, kind, message } => {
            let message = format!("{message}; the guest's last words:\n{}", vm.last_words());
            Error::Agent { operation, kind, message }
        }
        other => other,
    }
}

/// Ends a VM that came too little way to be of use. A VM that has died meanwhile is the better explanation.
async fn abandon(vm: Arc<dyn Vm>, error: Error) -> Error {
    if let Err(stop) = vm.stop(Duration::ZERO).await {
        tracing::warn!("stopping the VM: {stop}");
    }
    error
}

fn vm_config(config: &Config, spec: &SandboxSpec, directory: &Path, share: &Path) -> VmConfig {
    let dir = vm_directory(directory);
    let kind = match &config.hypervisor {
        Hypervisor::Qemu => Kind::Qemu,
        Hypervisor::Local { agent } => Kind::Local {
            program: agent.clone(),
            args: vec!["--server".into(), format!("unix://{}", dir.join("agent.sock").display())],
            share_at: ports::GUEST_SHARE.into(),
        },
    };
    VmConfig {
        kind,
        id: spec.id.clone(),
        dir,
        vmm: config.vmm.clone(),
        backend: config.backend.clone(),
        kernel: config.kernel.clone(),
        initramfs: config.initramfs.clone(),
        kernel_params: config.kernel_params.clone(),
        vcpus: spec.vcpus.unwrap_or(config.default_vcpus),
        memory_mib: spec.memory_mib.unwrap_or(config.default_memory_mib),
        accel: config.accel,
        machine: config.machine.clone(),
        share: Some(Share { tag: ports::SHARE_TAG.into(), path: share.to_owned() }),
        cache_dir: config.cache_dir.clone(),
        paused: false,
        netns: spec.netns.clone(),
    }
}

/// `vm`, or `v` where that is what the limit on socket paths leaves room for: containerd's ids have 64 letters.
fn vm_directory(directory: &Path) -> PathBuf {
    let usual = directory.join("vm");
    if usual.as_os_str().len() <= VM_PATH_MAX { usual } else { directory.join("v") }
}

fn state_of(spec: &SandboxSpec, endpoint: Endpoint, pids: impl Iterator<Item = u32>) -> State {
    State {
        version: 1,
        id: spec.id.clone(),
        owner: Owned::of(std::process::id()).unwrap_or(Owned { pid: std::process::id(), start_time: 0 }),
        processes: pids.filter_map(Owned::of).collect(),
        endpoint,
        containers: Vec::new(),
        labels: spec.labels.clone(),
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
    }
}

/// Cut at a character's border to what the kernel takes.
fn hostname(name: &str) -> &str {
    let mut end = name.len().min(HOSTNAME_MAX);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    &name[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_usual_id_leaves_room_for_sockets() {
        assert_eq!(vm_directory(Path::new("/run/bulkhead/web")), Path::new("/run/bulkhead/web/vm"));
        let directory = vm_directory(&Path::new("/run/bulkhead").join("f".repeat(64)));
        assert!(directory.as_os_str().len() <= VM_PATH_MAX, "{}", directory.display());
    }

    #[test]
    fn host_names_are_cut_to_what_the_kernel_takes() {
        assert_eq!(hostname("web"), "web");
        assert_eq!(hostname(&"x".repeat(70)).len(), 64);
        assert_eq!(hostname(&format!("{}é", "x".repeat(63))).len(), 63);
    }
}
