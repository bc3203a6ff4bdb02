//! Hooks: those of the caller are waited for, those of the container are run here.
//!
//! The child has one thread and no children of its own but these, so it waits for them itself.

use std::{
    fs::File,
    io::{self, Read, Seek, Write},
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{ExitStatus, Stdio},
};

use rustix::{
    fs::MemfdFlags,
    process::{Pid, PidfdFlags, Signal},
};

use super::{
    Child,
    fault::{Fault, Outcome},
};
use crate::{
    channel::{FromChild, ToChild},
    container::wait_for_end,
    hooks::Hook,
    sys,
};

/// So much of what a hook says is told after its failure.
const WORDS: u64 = 1024;

/// Lets the caller run its own, in a container that has its namespaces and mounts.
pub(super) fn of_caller(child: &mut Child) -> Outcome {
    if !child.plan.setup.hooks.wait {
        return Ok(());
    }
    child.channel.send(&FromChild::Mounted, &[])?;
    match child.channel.receive()? {
        Some((ToChild::Continue, _)) => Ok(()),
        Some(_) => Err(Fault::new(libc::EPROTO, "unexpected message")),
        // A hook failed, or the maker is gone: there is nobody left to tell.
        None => sys::exit(1),
    }
}

/// In the container's namespaces, before its root is changed to: the programs are the caller's.
pub(super) fn create_container(child: &mut Child) -> Outcome {
    let hooks = &child.plan.setup.hooks;
    let state = hooks.state.text("creating", Some(std::process::id()));
    hooks.create_container.iter().try_for_each(|hook| run("createContainer", hook, &state))
}

/// As the container's user, right before its command: the programs are the container's.
pub(super) fn start_container(child: &mut Child) -> Outcome {
    let hooks = &child.plan.setup.hooks;
    let state = hooks.state.text("created", Some(std::process::id()));
    hooks.start_container.iter().try_for_each(|hook| run("startContainer", hook, &state))
}

fn run(kind: &str, hook: &Hook, state: &[u8]) -> Outcome {
    attempt(hook, state).map_err(|why| {
        let errno = why.raw_os_error().unwrap_or(libc::EIO);
        Fault::new(errno, format!("{kind} hook {}: {why}", hook.path()))
    })
}

/// Input and output are files in memory, so that no pipe can fill up.
fn attempt(hook: &Hook, state: &[u8]) -> io::Result<()> {
    let memory = |name| rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).map(File::from);
    let (mut stdin, mut output) = (memory("state")?, memory("output")?);
    stdin.write_all(state)?;
    stdin.rewind()?;
    let mut process = hook
        .command()
        .stdin(stdin)
        .stdout(Stdio::from(output.try_clone()?))
        .stderr(Stdio::from(output.try_clone()?))
        .process_group(0)
        .spawn()?;
    let pid = Pid::from_child(&process);
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    if !wait_for_end(&pidfd, hook.timeout())? {
        // The only failure is that it is gone already.
        let _ = rustix::process::kill_process_group(pid, Signal::KILL);
        process.wait()?;
        let seconds = hook.timeout().as_secs();
        return Err(io::Error::other(format!("it did not end within {seconds} s and was killed")));
    }
    let status = process.wait()?;
    if status.success() {
        return Ok(());
    }
    output.rewind()?;
    let mut words = Vec::new();
    output.take(WORDS).read_to_end(&mut words)?;
    Err(io::Error::other(describe(status, &words)))
}

fn describe(status: ExitStatus, words: &[u8]) -> String {
    let how = match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, signal) => format!("killed by signal {}", signal.unwrap_or_default()),
    };
    let words = String::from_utf8_lossy(words).split_whitespace().collect::<Vec<_>>().join(" ");
    if words.is_empty() { how } else { format!("{how}: {words}") }
}
