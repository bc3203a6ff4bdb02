//! `bulkhead rm`: removes what a dead run left, and with `-f` ends a live one.

use std::{os::fd::OwnedFd, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use bulkhead_sandbox::{Config, cleanup};
use clap::Args;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

use crate::{
    kill, name, run, rundir,
    running::{self, Running},
};

/// An owner whose container was killed takes the VM down; under TCG that is slow.
const PATIENCE: Duration = Duration::from_secs(30);

/// Removes a run: what a dead one left, or with -f a live one.
#[derive(Debug, Args)]
pub(crate) struct Rm {
    /// End it first when it is alive
    #[arg(short, long)]
    force: bool,
    /// The container
    #[arg(value_parser = name::check)]
    name: String,
}

/// Removes the run.
pub(crate) fn run(args: &Rm) -> Result<u8> {
    run::ensure_root()?;
    let config = Config::load()?;
    let Some(running) = running::find(&config, &args.name)? else {
        if args.force {
            return Ok(0);
        }
        bail!("no run is named {}; `bulkhead ps` lists them", args.name);
    };
    if running.is_alive() {
        ensure!(args.force, "{} is running; end it with `bulkhead rm -f {}`", args.name, args.name);
        end(&running).with_context(|| format!("end {}", args.name))?;
    }
    cleanup(&config.state_root, &running.state.id)
        .with_context(|| format!("remove what is left of {}", args.name))?;
    rundir::sweep(&config.cache_dir);
    Ok(0)
}

/// Kills the container and waits for its owner to clean up; an owner that does not is killed, and everything of it dies
/// with it.
fn end(running: &Running) -> Result<()> {
    let Some(pid) = i32::try_from(running.state.owner.pid).ok().and_then(Pid::from_raw) else {
        bail!("the state file names process {}", running.state.owner.pid);
    };
    let Ok(owner) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(()) };
    // Only now is the pid pinned: it is the owner's if it was the owner's after that.
    if !running.is_alive() {
        return Ok(());
    }
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let killed = runtime.block_on(async {
        tokio::time::timeout(PATIENCE, kill::send(running, libc::SIGKILL.unsigned_abs()))
            .await
            .context("no answer")?
    });
    match killed {
        Ok(()) if ended(&owner, Some(PATIENCE))? => return Ok(()),
        Ok(()) => tracing::info!("the owner did not end within {PATIENCE:?}"),
        Err(error) => tracing::info!("{error:#}"),
    }
    match pidfd_send_signal(&owner, Signal::KILL) {
        Ok(()) | Err(Errno::SRCH) => {}
        Err(error) => return Err(error).context("kill the owner"),
    }
    ended(&owner, None).map(drop)
}

/// Waits for a process; `false` when it did not end in time.
fn ended(process: &OwnedFd, bound: Option<Duration>) -> Result<bool> {
    let bound = bound.map(Timespec::try_from).transpose()?;
    loop {
        match poll(&mut [PollFd::new(process, PollFlags::IN)], bound.as_ref()) {
            Ok(ready) => return Ok(ready > 0),
            // The bound begins anew, which only a debugger will notice.
            Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("wait for the owner"),
        }
    }
}
