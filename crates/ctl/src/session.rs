//! The life of one `bulkhead run`.
//!
//! ```text
//! boot ∥ unpack ──► create ──► start ──► converse ──► drained ──► stop: VM, mounts, files gone
//!      └──────────────┴── a signal or a failure ──────────────────►┘
//! ```
//!
//! Until the container runs, a signal ends the run; afterwards it goes to the container.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow};
use bulkhead_hypervisor::{Accel, AccelPolicy};
use bulkhead_sandbox::{
    Config, Container, ContainerSpec, Hypervisor, Rootfs, Sandbox, SandboxSpec, Stdio, StdioTarget,
};
use tokio::{sync::watch, task::JoinHandle};

use crate::{
    acceleration,
    archive::{Execution, Image},
    conversation::{self, End},
    failure,
    inroot::Root,
    lookup,
    rundir::RunDir,
    running,
    signals::Signals,
    spec::{self, Overrides},
    streams::{self, Health, Sink},
    timing::Timing,
    user,
    volume::Volume,
};

/// The guest's own figures are a courtesy; a guest that does not answer must not hold up the end. On hardware
/// virtualization.
const FIGURES_BOUND: Duration = Duration::from_secs(5);

/// Everything known before the boot.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) config: Config,
    pub(crate) id: String,
    pub(crate) name: String,
    /// What the user called the image or root file system.
    pub(crate) origin: String,
    /// The image to unpack into the root file system, when it is not a directory of the user.
    pub(crate) image: Option<Arc<Image>>,
    pub(crate) execution: Execution,
    pub(crate) overrides: Overrides,
    pub(crate) user: Option<String>,
    pub(crate) volumes: Vec<Volume>,
    pub(crate) memory: Option<crate::limits::Memory>,
    pub(crate) cpus: Option<crate::limits::Cpus>,
    pub(crate) interactive: bool,
    pub(crate) dir: RunDir,
    pub(crate) bundle: PathBuf,
    pub(crate) rootfs: PathBuf,
}

impl Plan {
    /// Fails when the command is certainly not in the root file system, which is there.
    pub(crate) fn find_command(&self) -> Result<()> {
        let command = spec::command(&self.execution, &self.overrides.command)?;
        // Nobody knows what a volume brings.
        let ([name, ..], true) = (command.as_slice(), self.volumes.is_empty()) else { return Ok(()) };
        let search = spec::search_path(&self.execution, &self.overrides);
        let cwd = spec::working_dir(&self.execution, &self.overrides);
        let found = lookup::check(&self.root()?, name, &search, cwd);
        found.with_context(|| format!("run container {}", self.name))
    }

    fn root(&self) -> Result<Root> {
        Root::open(&self.rootfs).with_context(|| format!("root file system {}", self.rootfs.display()))
    }
}

/// Runs the plan; returns the exit code.
pub(crate) async fn run(
    plan: &Plan,
    signals: &mut Signals,
    timing: &mut Timing,
    figures: bool,
) -> Result<u8> {
    let sandbox = match prepare(plan, signals).await? {
        Ok(sandbox) => sandbox,
        Err(signal) => return Ok(failure::signalled(signal)),
    };
    timing.sandbox = Some(sandbox.timings());
    announce(plan, sandbox.accel());
    let end = contain(plan, &sandbox, signals, timing).await;
    if figures && plan.config.hypervisor == Hypervisor::Qemu {
        let bound = sandbox.accel().scale(FIGURES_BOUND);
        timing.guest = tokio::time::timeout(bound, sandbox.guest_timings()).await.ok().and_then(Result::ok);
    }
    let stopping = Instant::now();
    let stopped = sandbox.stop().await;
    let removed = plan.dir.remove();
    timing.teardown = Some(stopping.elapsed());
    // What the container did is what the user asked about; leftovers are told of beside it.
    for error in [stopped.context("stop the sandbox").err(), removed.err()].into_iter().flatten() {
        streams::say(&failure::line(&error));
    }
    end
}

/// Boots and unpacks side by side; an image without the command ends the boot. The inner error is the signal that came in between.
async fn prepare(plan: &Plan, signals: &mut Signals) -> Result<Result<Arc<Sandbox>, i32>> {
    acceleration::announce_probe(&plan.config);
    let stop = Arc::new(AtomicBool::new(false));
    let mut unpacking = unpack(plan, &stop);
    let mut unpacked = false;
    let outcome = {
        let boot =
            async { Sandbox::start(&plan.config, sandbox_spec(plan)).await.context("start the sandbox") };
        let fill = async {
            let done = (&mut unpacking).await;
            unpacked = true;
            done.context("unpack the image")??;
            plan.find_command()
        };
        tokio::select! {
            both = async { tokio::try_join!(boot, fill) } => both.map(|(sandbox, ())| Ok(sandbox)),
            signal = signals.end() => Ok(Err(signal)),
        }
    };
    // Whatever ended first: the thread must not write into a directory that is about to go.
    stop.store(true, Ordering::Relaxed);
    if !unpacked {
        let _ = unpacking.await;
    }
    outcome
}

fn unpack(plan: &Plan, stop: &Arc<AtomicBool>) -> JoinHandle<Result<()>> {
    let (image, target, stop) = (plan.image.clone(), plan.rootfs.clone(), Arc::clone(stop));
    tokio::task::spawn_blocking(move || image.map_or(Ok(()), |image| image.unpack(&target, &stop)))
}

fn sandbox_spec(plan: &Plan) -> SandboxSpec {
    let command = spec::command(&plan.execution, &plan.overrides.command).unwrap_or_default().join(" ");
    let path = |path: &Path| path.display().to_string();
    let labels = [
        (running::NAME, plan.name.clone()),
        (running::IMAGE, plan.origin.clone()),
        (running::COMMAND, command),
        (running::DIR, path(plan.dir.path())),
        (running::ROOTFS, path(&plan.rootfs)),
    ];
    SandboxSpec {
        id: plan.id.clone(),
        hostname: plan.id.clone(),
        vcpus: plan.cpus.map(|cpus| cpus.vcpus()),
        memory_mib: plan.memory.map(|memory| memory.vm_mib()),
        labels: labels.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
        ..SandboxSpec::default()
    }
}

/// Says once what makes everything slower, and writes it down for `ps`.
fn announce(plan: &Plan, accel: Accel) {
    let name = match (&plan.config.hypervisor, accel) {
        (Hypervisor::Local { .. }, _) => "none",
        (Hypervisor::Qemu, Accel::Kvm) => "kvm",
        (Hypervisor::Qemu, Accel::Tcg) => {
            streams::say(match plan.config.accel {
                AccelPolicy::Tcg => "bulkhead: running under TCG (slower), as the configuration says",
                _ => "bulkhead: no usable KVM here, running under TCG (slower); see 'bulkhead check'",
            });
            "tcg"
        }
    };
    if let Err(error) = std::fs::write(plan.dir.path().join(running::ACCEL), name) {
        tracing::warn!("write down the accelerator: {error}");
    }
}

/// Makes the container, runs it to its end, and has all of its output out.
async fn contain(plan: &Plan, sandbox: &Sandbox, signals: &mut Signals, timing: &mut Timing) -> Result<u8> {
    let health = Arc::new(Health::default());
    let (end_of_output, ended) = watch::channel(false);
    let (stdio, copies) = stdio(plan, &health, &ended).context("standard streams")?;
    let creating = Instant::now();
    let container = tokio::select! {
        created = create(plan, sandbox, stdio) => created?,
        signal = signals.end() => return Ok(failure::signalled(signal)),
    };
    timing.created = Some(creating.elapsed());
    let what = || format!("run container {}", plan.name);
    let end = converse(plan, &container, signals, &health).await.with_context(what);
    timing.exited = Some(Instant::now());
    end_of_output.send_replace(true);
    if matches!(end, Ok(End::Exited(_))) {
        tokio::select! {
            () = finish(copies) => {}
            // Whoever reads our output has stalled, and the user does not want to wait for them.
            _ = signals.end() => {}
        }
    }
    timing.first_output = health.first_output();
    explain(sandbox, &end?, &health).await
}

/// The container's streams, and the tasks that copy its outputs.
fn stdio(
    plan: &Plan,
    health: &Arc<Health>,
    ended: &watch::Receiver<bool>,
) -> std::io::Result<(Stdio, Vec<JoinHandle<()>>)> {
    let terminal = plan.overrides.terminal;
    let stdin = if plan.interactive { StdioTarget::Fd(streams::input()?) } else { StdioTarget::Null };
    let (stdout, copy) = streams::output(Sink::stdout(health)?, ended.clone())?;
    let mut copies = vec![copy];
    let mut stderr = StdioTarget::Null;
    if !terminal {
        let (pipe, copy) = streams::output(Sink::stderr(health)?, ended.clone())?;
        copies.push(copy);
        stderr = StdioTarget::Fd(pipe);
    }
    Ok((Stdio { stdin, stdout: StdioTarget::Fd(stdout), stderr, terminal }, copies))
}

async fn create(plan: &Plan, sandbox: &Sandbox, stdio: Stdio) -> Result<Arc<Container>> {
    let user = user::resolve(&plan.root()?, plan.user.as_deref().unwrap_or(&plan.execution.user))?;
    let spec = spec::container(&spec::Container {
        hostname: &plan.id,
        rootfs: &plan.rootfs,
        execution: &plan.execution,
        overrides: &plan.overrides,
        user: &user,
        volumes: &plan.volumes,
        memory: plan.memory,
        cpus: plan.cpus,
    })?;
    // For `bulkhead exec`, which starts from the container's own process.
    let file = plan.bundle.join("config.json");
    spec.save(&file).with_context(|| format!("write {}", file.display()))?;
    let request = ContainerSpec {
        id: plan.id.clone(),
        bundle: plan.bundle.clone(),
        spec,
        rootfs: Rootfs::Directory(plan.rootfs.clone()),
        stdio,
    };
    sandbox.create_container(request).await.with_context(|| format!("create container {}", plan.name))
}

async fn converse(
    plan: &Plan,
    container: &Arc<Container>,
    signals: &mut Signals,
    health: &Health,
) -> Result<End> {
    let terminal = plan.overrides.terminal;
    let raw = if terminal && plan.interactive { Some(crate::tty::Raw::enter()?) } else { None };
    if let Some((rows, columns)) = plan.overrides.size {
        container.resize("", rows.into(), columns.into()).await?;
    }
    container.start("").await?;
    let end = conversation::hold(&conversation::Init(Arc::clone(container)), terminal, signals, health).await;
    drop(raw);
    end
}

async fn finish(copies: Vec<JoinHandle<()>>) {
    for copy in copies {
        // A copy that panicked has said so.
        let _ = copy.await;
    }
}

/// The exit code, and a word where the code alone would puzzle.
async fn explain(sandbox: &Sandbox, end: &End, health: &Health) -> Result<u8> {
    if let Some(failure) = conversation::output_failure(health) {
        return Err(failure);
    }
    let code = conversation::code(end, health);
    if let End::Exited(_) = end {
        // Nothing of ours has stopped the VM yet: when it is gone, that is why the container is.
        let lost = tokio::select! {
            biased;
            exit = sandbox.wait() => Some(exit),
            () = std::future::ready(()) => None,
        };
        if let Some(exit) = lost {
            let words = exit
                .last_words
                .lines()
                .map(str::trim)
                .rfind(|line| !line.is_empty())
                .unwrap_or("none")
                .to_owned();
            let error = anyhow!(
                "the VM ended with code {} while the container ran; its last words: {words}",
                exit.code
            );
            streams::say(&failure::line(&error));
        }
    }
    Ok(code)
}
