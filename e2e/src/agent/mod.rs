//! The guest agent under test, alone: in a real VM without shim or sandbox, or as a plain process.
//!
//! ```ignore
//! fn a_plugged_disk_is_mounted(scratch: &Scratch) -> anyhow::Result<()> {
//!     in_vm(scratch, Hardware { max_cpus: 2, ..Hardware::default() }, async |agent| {
//!         agent.pod().await?;                                   // CreateSandbox: the share, /dev/shm
//!         let path = agent.plug_disk(&disk)?;                   // "02/01", the agent's grammar
//!         agent.run("c1", &["sleep", "1000"]).await?;           // in the busybox of agent.rootfs()
//!         let (output, code) = agent.shell("c1", "e1", "ls /dev").await?;
//!         ensure!(code == 0, "{output}");
//!         Ok(())
//!     })
//! }
//! ```
//!
//! - [`in_vm`] boots, connects, runs the body and ends the VM; [`plain`] does the same with a process in mount namespace and
//!   `/run` of its own. An error is told with the end of the guest's console. When the VM ends, calls fail at once.
//! - A boot takes about four seconds without hardware virtualization: a case does several things in one VM.
//! - Nothing has been asked of the agent when the body starts. [`Agent::pod`] is the usual CreateSandbox; without it the
//!   guest has no share, hence no [`Agent::rootfs`].
//! - [`Agent::put`] puts a file into the share: below [`Agent::share`] in the guest, and in `/share` of no container.
//! - [`Hardware::files`] is what the guest's image holds: programs, hooks, a policy. Usually that is nothing.
//! - Any RPC: `agent.client.some_call(context(), &request).await?`; refusals: [`failed`], which asserts the kind and returns
//!   the text. RPCs that must not end with the call's deadline: `Context::default()`.
//! - [`Agent::plug_disk`], `plug_nic`, `plug_cpu`, `plug_memory`, `unplug` and [`Agent::qmp`]; [`Agent::addresses`] for what
//!   was there from the start; [`Agent::dial`] and [`Agent::listen`] for vsock ports; [`Agent::descriptors`] of a process.
//!
//! The programs are those of `BULKHEAD_PREFIX`. To test another agent, build it (static), and name it:
//!
//! ```sh
//! CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS="-C target-feature=+crt-static" cargo build -p bulkhead-agent \
//!     --target x86_64-unknown-linux-gnu --config "profile.dev.strip='debuginfo'" &&
//! BULKHEAD_AGENT=$CARGO_TARGET_DIR/x86_64-unknown-linux-gnu/debug/bulkhead-agent \
//!     BULKHEAD_PREFIX=<prefix> cargo test -p bulkhead-e2e --test agent -- <part of a case's name>
//! ```
//! An initramfs is then made of it and of the kernel beside the prefix (`<prefix>/../kernel`).

mod client;
mod hardware;
mod hotplug;
mod qmp;
mod spec;
mod vm;

use std::{
    env,
    future::Future,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::AtomicU8,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use bulkhead_protocol::{agent_ttrpc::AgentServiceClient, health_ttrpc::HealthClient, ports};
use tokio::net::{UnixListener, UnixStream};
use ttrpc::r#async::{Client, transport::Socket};

use crate::{Scratch, busybox_rootfs};
use vm::{Process, Vm};

pub use bulkhead_image::initramfs::Extra;
pub use client::{context, failed};
pub use hardware::{Addresses, Disk, Hardware, Nic, Pmem};
pub use spec::{grant, mount, process, spec};

/// A case that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(240);
/// What a body may still do when its VM has ended.
const AFTERMATH: Duration = Duration::from_secs(10);

/// An agent that runs, and a connection to it.
pub struct Agent {
    /// The agent's service.
    pub client: AgentServiceClient,
    /// The health service.
    pub health: HealthClient,
    /// On the host.
    share: PathBuf,
    next_slot: AtomicU8,
    place: Place,
}

enum Place {
    Vm(Box<Vm>),
    Plain { process: Process, socket: PathBuf },
}

/// Runs a body with an agent in a VM.
///
/// # Errors
/// The body's, or why there is no VM; both with the end of the console.
pub fn in_vm(
    scratch: &Scratch,
    hardware: Hardware,
    body: impl AsyncFnOnce(&Agent) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    block_on(async {
        let agent = Agent::in_vm(scratch, hardware).await?;
        let (console, mut ended) = (agent.vm()?.console(), agent.vm()?.ended());
        let over = async {
            // An error means the same.
            let _ = ended.wait_for(|ended| *ended).await;
            tokio::time::sleep(AFTERMATH).await;
        };
        let done = tokio::select! {
            done = body(&agent) => done,
            () = over => Err(anyhow::anyhow!("the VM has ended")),
            () = tokio::time::sleep(PATIENCE) => Err(anyhow::anyhow!("the case hangs")),
        };
        done.with_context(|| format!("the guest's console:\n{}\n", console.text()))
    })
}

/// Runs a body with an agent that is a plain process.
///
/// # Errors
/// The body's, or why there is no agent.
pub fn plain(scratch: &Scratch, body: impl AsyncFnOnce(&Agent) -> anyhow::Result<()>) -> anyhow::Result<()> {
    block_on(async {
        let agent = Agent::plain(scratch).await?;
        tokio::time::timeout(PATIENCE, body(&agent)).await.context("the case hangs")??;
        agent.end().await
    })
}

/// Runs a future to its end, on two threads.
///
/// # Errors
/// The future's.
pub fn block_on(body: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let done = runtime.block_on(body);
    runtime.shutdown_timeout(Duration::from_secs(5));
    done
}

impl Agent {
    /// Boots a VM and connects to its agent. The VM ends with this handle.
    pub async fn in_vm(scratch: &Scratch, hardware: Hardware) -> anyhow::Result<Agent> {
        let share = share(scratch)?;
        let vm = Vm::start(scratch, &hardware, &share)?;
        let console = vm.console();
        let stream = vm
            .dial(ports::AGENT)
            .await
            .with_context(|| format!("the guest's console:\n{}\n", console.text()))?;
        Ok(Agent::over(stream, share, vm.addresses.next_bridged, Place::Vm(Box::new(vm))))
    }

    /// Starts an agent as a process with mount namespace and `/run` of its own, and connects to it.
    pub async fn plain(scratch: &Scratch) -> anyhow::Result<Agent> {
        let program = env::var_os("BULKHEAD_AGENT").map(PathBuf::from);
        let program =
            program.unwrap_or_else(|| scratch.prefix().root.join("libexec/bulkhead/bulkhead-agent"));
        let share = share(scratch)?;
        let socket = scratch.path().join("agent.sock");
        let script =
            "mount -t tmpfs tmpfs /run && mkdir /run/kata-containers && exec \"$0\" --server \"unix://$1\"";
        let mut process = Process::start(
            Command::new("unshare")
                .args(["-m", "--propagation", "private", "sh", "-c", script])
                .args([&program, &socket]),
        )?;
        let start = Instant::now();
        let stream = loop {
            match UnixStream::connect(&socket).await {
                Ok(stream) => break stream,
                Err(error) if start.elapsed() > AFTERMATH => {
                    return Err(error).context("the agent does not listen");
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
            if let Some(status) = process.0.try_wait()? {
                bail!("the agent ended: {status}");
            }
        };
        Ok(Agent::over(stream, share, 0, Place::Plain { process, socket }))
    }

    fn over(stream: UnixStream, share: PathBuf, next_slot: u8, place: Place) -> Agent {
        let client = Client::new(Socket::new(stream));
        Agent {
            client: AgentServiceClient::new(client.clone()),
            health: HealthClient::new(client),
            share,
            next_slot: AtomicU8::new(next_slot),
            place,
        }
    }

    fn vm(&self) -> anyhow::Result<&Vm> {
        match &self.place {
            Place::Vm(vm) => Ok(vm),
            Place::Plain { .. } => bail!("this agent has no VM"),
        }
    }

    /// Whether the agent is the first process of a VM.
    pub fn is_in_vm(&self) -> bool {
        matches!(self.place, Place::Vm(_))
    }

    /// The process' id; an agent in a VM has none here.
    pub fn pid(&self) -> anyhow::Result<u32> {
        match &self.place {
            Place::Vm(_) => bail!("this agent is in a VM"),
            Place::Plain { process, .. } => Ok(process.0.id()),
        }
    }

    /// Open descriptors of the process.
    pub fn descriptors(&self) -> anyhow::Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", self.pid()?))?.count())
    }

    /// Resident memory of the process, in bytes.
    pub fn resident(&self) -> anyhow::Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()?))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
    }

    /// Where the share is for the agent.
    pub fn share(&self) -> String {
        match self.place {
            Place::Vm(_) => ports::GUEST_SHARE.to_owned(),
            Place::Plain { .. } => self.share.display().to_string(),
        }
    }

    /// Where the share is on the host.
    pub fn host_share(&self) -> &Path {
        &self.share
    }

    /// Puts a file into the share; its path for the agent.
    pub fn put(&self, path: &str, bytes: &[u8], mode: u32) -> anyhow::Result<String> {
        use std::os::unix::fs::PermissionsExt;
        let file = self.share.join(path);
        std::fs::create_dir_all(file.parent().context("a file")?)?;
        std::fs::write(&file, bytes)?;
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode))?;
        Ok(format!("{}/{path}", self.share()))
    }

    /// The busybox root file system in the share, as the agent sees it. All containers of [`Agent::spec`] have it in common.
    pub fn rootfs(&self) -> String {
        format!("{}/rootfs", self.share())
    }

    /// A further root file system of that kind.
    pub fn another_rootfs(&self, name: &str) -> anyhow::Result<String> {
        busybox_rootfs(&self.share.join(name))?;
        Ok(format!("{}/{name}", self.share()))
    }

    /// A further connection to the agent's port.
    pub async fn connect(&self) -> anyhow::Result<UnixStream> {
        match &self.place {
            Place::Vm(vm) => vm.dial(ports::AGENT).await,
            Place::Plain { socket, .. } => Ok(UnixStream::connect(socket).await?),
        }
    }

    /// A client with a connection of its own.
    pub async fn another_client(&self) -> anyhow::Result<AgentServiceClient> {
        Ok(AgentServiceClient::new(Client::new(Socket::new(self.connect().await?))))
    }

    /// Connects to a vsock port of the guest, once somebody listens there.
    pub async fn dial(&self, port: u32) -> anyhow::Result<UnixStream> {
        self.vm()?.dial(port).await
    }

    /// Connects to a vsock port of the guest; `None` when nobody listens there.
    pub async fn try_dial(&self, port: u32) -> anyhow::Result<Option<UnixStream>> {
        self.vm()?.try_dial(port).await
    }

    /// Connects to a vsock port of the guest; also the port of the host that the guest sees.
    pub async fn dial_from(&self, port: u32) -> anyhow::Result<(UnixStream, u32)> {
        self.vm()?.try_dial_from(port).await?.with_context(|| format!("nobody listens on port {port}"))
    }

    /// Takes connections that the guest makes to a vsock port of the host.
    pub fn listen(&self, port: u32) -> anyhow::Result<UnixListener> {
        self.vm()?.listen(port)
    }

    /// The end of the guest's console.
    pub fn console(&self) -> anyhow::Result<String> {
        Ok(self.vm()?.console().text())
    }

    /// Waits until the VM has ended by itself.
    pub async fn ended(&self) -> anyhow::Result<()> {
        let mut ended = self.vm()?.ended();
        tokio::time::timeout(AFTERMATH, ended.wait_for(|ended| *ended))
            .await
            .context("the VM does not end")??;
        Ok(())
    }

    /// Ends a plain agent by SIGTERM, with all its containers.
    async fn end(mut self) -> anyhow::Result<()> {
        let pid = self.pid()?;
        let Place::Plain { process, .. } = &mut self.place else { return Ok(()) };
        if process.0.try_wait()?.is_none() {
            nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(i32::try_from(pid)?),
                nix::sys::signal::SIGTERM,
            )?;
        }
        let status = process.0.wait()?;
        ensure!(status.success(), "the agent did not end well: {status}");
        Ok(())
    }
}

/// A directory with a busybox root file system in it.
fn share(scratch: &Scratch) -> anyhow::Result<PathBuf> {
    let share = scratch.path().join("share");
    if !share.exists() {
        busybox_rootfs(&share.join("rootfs"))?;
    }
    Ok(share)
}
