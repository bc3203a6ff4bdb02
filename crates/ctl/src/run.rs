//! `bulkhead run`: a container in a VM of its own, in the foreground.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};
use bulkhead_sandbox::{Config, enter_private_mount_namespace};
use clap::{ArgGroup, Args};

use crate::{
    archive::{self, Execution},
    failure,
    limits::{Cpus, Memory},
    name,
    rundir::{self, RunDir},
    running,
    session::{self, Plan},
    signals::Signals,
    spec::{self, Overrides},
    streams,
    timing::Timing,
    tty, user,
    volume::Volume,
};

/// Runs a container in a VM of its own.
///
/// The exit code is the container's: 128 + n when signal n ended it. 125 means that bulkhead itself failed, 126 that the
/// command cannot be executed, 127 that it was not found.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("source").required(true)))]
pub(crate) struct Run {
    /// Accepted for the habit: nothing of a run is kept after its end anyway
    #[arg(long)]
    rm: bool,
    /// Pass the standard input on; without it the container reads end-of-file
    #[arg(short, long)]
    interactive: bool,
    /// Give the container a terminal
    #[arg(short, long)]
    tty: bool,
    /// Name of the container; a random id otherwise
    #[arg(long, value_parser = name::check)]
    name: Option<String>,
    /// Set an environment variable, or pass one of ours on
    #[arg(short, long, value_name = "NAME[=VALUE]", value_parser = spec::check_setting)]
    env: Vec<String>,
    /// Working directory in the container
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// User in the container; names are looked up in its /etc/passwd and /etc/group
    #[arg(short, long, value_name = "UID[:GID]|NAME", value_parser = user::check)]
    user: Option<String>,
    /// Show a directory or file of the host in the container
    #[arg(short, long, value_name = "HOST:GUEST[:ro]")]
    volume: Vec<Volume>,
    /// Memory the container may use, as 512m or 1g; the VM gets that and what its kernel needs
    #[arg(short, long, value_name = "SIZE")]
    memory: Option<Memory>,
    /// CPUs the container may use, as 2 or 0.5; the VM gets the next whole number
    #[arg(long, value_name = "NUMBER")]
    cpus: Option<Cpus>,
    /// Print one line at the end that says where the time went, as JSON
    #[arg(long)]
    timing: bool,
    /// Run from this directory; the container can write to it, and what it writes stays
    #[arg(long, value_name = "DIR", group = "source")]
    rootfs: Option<PathBuf>,
    /// Run from an image archive: what `docker save` or `skopeo copy ... oci-archive:` write, also gzip or zstd compressed
    #[arg(value_name = "IMAGE.tar", group = "source")]
    image: Option<PathBuf>,
    /// The command; replaces the image's Cmd
    #[arg(last = true, value_name = "CMD")]
    command: Vec<String>,
}

/// Runs the container; returns its exit code.
pub(crate) fn run(args: Run, started: Instant) -> Result<u8> {
    let figures = args.timing;
    let mut timing = Timing::new(started);
    let code = own(args, &mut timing);
    if figures {
        streams::say(&timing.line());
    }
    code
}

fn own(args: Run, timing: &mut Timing) -> Result<u8> {
    ensure_root()?;
    // While this process has one thread: its mounts die with it, however it dies.
    enter_private_mount_namespace()?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let (code, plan) = runtime.block_on(interruptible(args, timing));
    // A boot that was given up goes before the claim to the name does. Threads that wait for the user's input, or for
    // whoever reads our output, end with the process.
    runtime.shutdown_background();
    drop(plan);
    code
}

/// Plans and runs; a signal ends either. The plan comes back so that its directory outlives everything else.
async fn interruptible(args: Run, timing: &mut Timing) -> (Result<u8>, Option<Plan>) {
    let mut signals = match Signals::install().context("signal handlers") {
        Ok(signals) => signals,
        Err(error) => return (Err(error), None),
    };
    let figures = args.timing;
    let stop = Arc::new(AtomicBool::new(false));
    let mut planning = tokio::task::spawn_blocking({
        let stop = Arc::clone(&stop);
        move || plan(args, &stop)
    });
    let planned = tokio::select! {
        planned = &mut planning => planned.context("plan the run").flatten(),
        signal = signals.end() => {
            stop.store(true, Ordering::Relaxed);
            // With what it made so far.
            drop(planning.await);
            return (Ok(failure::signalled(signal)), None);
        }
    };
    match planned {
        Ok(plan) => (session::run(&plan, &mut signals, timing, figures).await, Some(plan)),
        Err(error) => (Err(error), None),
    }
}

/// Everything that can be found wrong before a VM is started.
fn plan(args: Run, stop: &AtomicBool) -> Result<Plan> {
    tty::check(args.interactive, args.tty)?;
    args.volume.iter().try_for_each(Volume::check)?;
    let config = Config::load()?;
    let id = name::fresh_id()?;
    let name = args.name.unwrap_or_else(|| id.clone());
    rundir::sweep(&config.cache_dir);
    let dir = RunDir::claim(&config.cache_dir, &config.state_root, &name)?;
    forget_the_dead(&config, &name)?;
    let bundle = dir.make("bundle", 0o700)?;
    let overrides = Overrides {
        env: spec::settings(&args.env, |name| std::env::var(name).ok()),
        cwd: args.workdir,
        command: args.command,
        terminal: args.tty,
        size: if args.tty { tty::size() } else { None },
    };
    let (image, rootfs, execution, origin) = match (args.rootfs, args.image) {
        (Some(path), _) => {
            let path = directory(&path)?;
            let origin = path.display().to_string();
            (None, path, Execution::default(), origin)
        }
        (None, Some(path)) => {
            let image = archive::open(&path, dir.path(), stop)?;
            let execution = image.execution.clone();
            (Some(Arc::new(image)), dir.make("rootfs", 0o755)?, execution, path.display().to_string())
        }
        (None, None) => bail!("give an image archive or --rootfs"),
    };
    spec::command(&execution, &overrides.command)?;
    let plan = Plan {
        config,
        id,
        name,
        origin,
        image,
        execution,
        overrides,
        user: args.user,
        volumes: args.volume,
        memory: args.memory,
        cpus: args.cpus,
        interactive: args.interactive,
        dir,
        bundle,
        rootfs,
    };
    // An image is looked into as soon as it is unpacked.
    if plan.image.is_none() {
        plan.find_command()?;
    }
    Ok(plan)
}

/// Everything here needs root: VMs with shared directories, mounts, other processes' state.
pub(crate) fn ensure_root() -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "root is needed; run it with sudo");
    Ok(())
}

/// What a dead run of this name left. The claim to the name is ours, so none of that name is alive.
fn forget_the_dead(config: &Config, name: &str) -> Result<()> {
    for dead in running::all(config)? {
        if dead.is_ours() && dead.name() == name && !dead.is_alive() {
            bulkhead_sandbox::cleanup(&config.state_root, &dead.state.id)
                .with_context(|| format!("remove what a dead run left of {name}"))?;
        }
    }
    Ok(())
}

fn directory(path: &Path) -> Result<PathBuf> {
    let what = || format!("root file system {}", path.display());
    let full = path.canonicalize().with_context(what)?;
    ensure!(
        full.is_dir(),
        "root file system {}: it is not a directory; give an image archive without --rootfs",
        path.display()
    );
    ensure!(
        full != Path::new("/"),
        "root file system /: the host's own root cannot be shared; give another directory"
    );
    Ok(full)
}
